"""What `megalodon bench parallel` is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalodon_plugin.planning.links import Links

from ..train.trainer import check_steps


@dataclass(frozen=True)
class ParallelOptions:
    """What is run, and how."""

    out: Path
    """Folder of the results."""
    gpus: int | None = None
    """At most so many; None: all, or 2 processes without a GPU."""
    layouts: Sequence[str] | None = None
    """As `Layout.parse` reads them; None: `default_layouts`."""
    sizes: Sequence[str] = ("7B-width",)
    """Of `sizes.SIZES`."""
    against: str | None = None
    """"llama": also the host's Llama of about as many parameters."""
    scaling: Sequence[str] = ("weak", "strong")
    """Of these and "none"."""
    tokens_per_gpu: Sequence[int] = (32768,)
    """Weak scaling: of a step."""
    lengths: Sequence[int] = (32768, 131072, 1048576)
    """Strong scaling: tokens of a row."""
    tokens_per_step: int = 262144
    """Strong scaling; longer rows come one a step."""
    no_checks: bool = False
    steps: int = 15
    """At most; the first three are not counted."""
    seconds: float = 20.0
    """Of counted steps; no more are made after so long."""
    checkpointing: str = "selective"
    """"selective", "full" or "none"."""
    eager: bool = False
    """Without torch.compile."""
    longest_step: float = 60.0
    """Seconds; slower steps are left out."""
    timeout: float = 600.0
    """Seconds; a task that takes longer is ended."""
    simulate: Sequence[int] | None = None
    """Numbers of GPUs."""
    node_gb_s: float = Links.node_gb_s
    network_gb_s: float = Links.network_gb_s
    latency_us: float = Links.latency_us
    commit: str | None = None
    """In place of what git says."""

    def check(self) -> None:
        """Raise ValueError for what is out of range."""
        smallest = {
            "gpus": self.gpus,
            "tokens-per-gpu": min(self.tokens_per_gpu),
            "tokens-per-step": self.tokens_per_step,
            "lengths": min(self.lengths),
            "seconds": self.seconds,
            "longest-step": self.longest_step,
            "timeout": self.timeout,
            "node-gb-s": self.node_gb_s,
            "network-gb-s": self.network_gb_s,
        }
        for name, value in smallest.items():
            if value is not None and value <= 0:
                raise ValueError(f"`--{name}` must be positive, but is {value}")
        check_steps(self.steps)
