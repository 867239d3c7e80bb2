"""Megalodon (arXiv 2404.08801) for torchtitan: model, ops and host adapter. See README.md."""

__version__ = "0.1.0"
