"""Settings for every test."""

import os

import torch

import megalodon_plugin.titan  # noqa: F401  chooses the device, which must come before any import of torchtitan

# Two threads that share two cores with another process spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
