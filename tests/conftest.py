"""Settings for every test."""

import os

# Two threads that share two cores with another process spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles in the process itself: a pool of compilers would take longer to start than the tests' graphs take.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

import megalodon_plugin.titan  # noqa: F401  chooses the device, which must come before any import of torchtitan

torch.set_num_threads(1)
