"""Settings for every test."""

import os

import torch

# Two threads that share two cores with another process spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
