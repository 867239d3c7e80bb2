"""The model's configuration, its rules, and the presets of the released code and of the paper."""

import dataclasses
import types
from dataclasses import dataclass
from typing import Any

from megalodon_plugin.ops.cema import CEMA_INPUTS

INIT_MODES = ("he", "bert", "xavier")


@dataclass(kw_only=True)
class MegalodonConfig:
    """Sizes and options of a Megalodon model.

    Letters as in the docs: D = dim, H = n_heads, Z = z_dim, V = value_dim, F = ffn_dim, N = cema_ndim, C = chunk_size,
    G = norm_groups.

    Raises:
        ValueError: naming the option, the rule and the value, where a rule is broken.
    """

    vocab_size: int
    dim: int
    """D, width of the residual stream."""
    n_layers: int
    n_heads: int
    """H, heads of the chunk attention."""
    z_dim: int
    """Z, width of the shared query/key representation; a head has Z/H, which RoPE needs to be even."""
    value_dim: int
    """V, width of the attention's values and gates; a head has V/H."""
    ffn_dim: int
    """F, hidden width of the feed-forward network."""
    cema_ndim: int = 16
    """N, order of CEMA: complex states a channel."""
    chunk_size: int
    """C, positions a chunk; attention does not cross chunks."""
    norm_groups: int
    """G, feature groups of TimestepNorm."""
    norm_eps: float = 1e-5
    norm_affine: bool = True
    """Weights in RMSNorm and LayerNorm; TimestepNorm always has them."""
    rope_theta: float = 10000.0
    swiglu: bool = False
    rescale_ffn: bool = False
    """A learned scale a channel on the feed-forward network's output."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(D)."""
    tie_embedding: bool = False
    """The output layer shares the embedding's weight."""
    output_size: int | None = None
    """Rows of the output layer; None is vocab_size."""
    init_mode: str = "he"
    cema_input: str = "released"
    """"released" as in the authors' code, or "paper": CEMA's input coefficient is rotated too."""
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError where an option has the wrong type or breaks a rule."""
        check_types(self, MegalodonConfig)
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "z_dim", "value_dim", "ffn_dim", "chunk_size"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        _require(1 <= self.cema_ndim <= 32, "cema_ndim", "must lie between 1 and 32", self.cema_ndim)
        for name in ("z_dim", "value_dim"):
            size = getattr(self, name)
            _require(size % self.n_heads == 0, name, f"must be divisible by `n_heads` = {self.n_heads}", size)
        head = self.z_dim // self.n_heads
        _require(
            head % 2 == 0, "z_dim", f"must give heads of an even size (RoPE turns pairs; a head has {head})", self.z_dim
        )
        _require(self.norm_groups >= 1, "norm_groups", "must be at least 1", self.norm_groups)
        _require(
            self.dim % self.norm_groups == 0,
            "dim",
            f"must be divisible by `norm_groups` = {self.norm_groups}",
            self.dim,
        )
        _require(self.norm_eps > 0, "norm_eps", "must be positive", self.norm_eps)
        _require(self.rope_theta > 1, "rope_theta", "must be above 1", self.rope_theta)
        _require(self.init_mode in INIT_MODES, "init_mode", f"must be one of {INIT_MODES}", self.init_mode)
        _require(self.cema_input in CEMA_INPUTS, "cema_input", f"must be one of {CEMA_INPUTS}", self.cema_input)
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)", getattr(self, name))
        if self.output_size is not None:
            _require(self.output_size >= 1, "output_size", "must be at least 1", self.output_size)
            _require(
                not self.tie_embedding or self.output_size == self.vocab_size,
                "output_size",
                f"must equal `vocab_size` = {self.vocab_size} when `tie_embedding` is set",
                self.output_size,
            )

    @property
    def n_outputs(self) -> int:
        """Rows of the output layer."""
        return self.vocab_size if self.output_size is None else self.output_size

    @property
    def qk_head_dim(self) -> int:
        return self.z_dim // self.n_heads

    @property
    def value_head_dim(self) -> int:
        return self.value_dim // self.n_heads


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"`{name}` {rule}, but is {value!r}")


def check_types(options: Any, options_class: type) -> None:
    """Raise ValueError for a field of the dataclass whose value has another type than declared.

    TOML values reach us unchecked, and a string in place of a number would fail far from its cause. An int is
    accepted (and converted) where a float is declared.
    """
    for field in dataclasses.fields(options_class):
        value = getattr(options, field.name)
        allowed = field.type.__args__ if isinstance(field.type, types.UnionType) else (field.type,)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            setattr(options, field.name, float(value))
            continue
        if not any(type(value) is t for t in allowed):
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ValueError(f"`{field.name}` must be of type {names}, but is {value!r}")


def _released(**options: Any) -> MegalodonConfig:
    return MegalodonConfig(vocab_size=32000, **options)


_SIZE_1_3B = {"dim": 2048, "n_layers": 24, "n_heads": 2, "z_dim": 512, "value_dim": 4096, "norm_groups": 64}
_SIZE_7B = {"dim": 4096, "n_layers": 32, "n_heads": 4, "z_dim": 1024, "value_dim": 8192, "norm_groups": 64}

PRESETS: dict[str, MegalodonConfig] = {
    "debug": MegalodonConfig(
        vocab_size=32000,
        dim=128,
        n_layers=4,
        n_heads=2,  # so that two tensor parallel ranks can share it
        z_dim=64,
        value_dim=256,
        ffn_dim=384,
        chunk_size=256,
        norm_groups=8,
    ),
    "released_200M": _released(
        dim=1024, n_layers=12, n_heads=1, z_dim=256, value_dim=2048, ffn_dim=2560, norm_groups=32, chunk_size=2048
    ),
    "released_1.3B": _released(**_SIZE_1_3B, ffn_dim=4864, chunk_size=2048),
    "released_1.3B_pg19": _released(
        **_SIZE_1_3B, ffn_dim=3584, chunk_size=2048, swiglu=True, scale_embedding=True, tie_embedding=True
    ),
    "released_7.1B": _released(**_SIZE_7B, ffn_dim=11264, chunk_size=2048),
    "released_7.3B": _released(**_SIZE_7B, ffn_dim=8192, chunk_size=2048, swiglu=True),
    "paper_7B": _released(
        **_SIZE_7B, ffn_dim=8192, chunk_size=4096, swiglu=True, rope_theta=100000.0, cema_input="paper"
    ),
}
"""Ready configurations by name. Copy one before you change it: `dataclasses.replace(PRESETS["debug"], n_layers=2)`."""
