"""Sizes of a model that is small, shared by the tests of the model and its state dicts."""

SIZES = {
    "vocab_size": 31,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 2,
    "z_dim": 8,
    "value_dim": 20,
    "ffn_dim": 14,
    "cema_ndim": 3,
    "chunk_size": 8,
    "norm_groups": 3,
}
