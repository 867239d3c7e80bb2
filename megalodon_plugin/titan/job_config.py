"""Sections that the plugin adds to torchtitan's TOML: `[megalodon]` and `[data]`.

Named in the TOML as `[job] custom_config_module = "megalodon_plugin.titan.job_config"`; the host merges the JobConfig
below into its own. (No `from __future__ import annotations` here: the merge needs real types.)
"""

import dataclasses
from dataclasses import dataclass, field

from megalodon_plugin.model import MegalodonConfig

WEIGHT_DECAY_ON = ("all", "matrices")


@dataclass
class TrainingOptions:
    """Options of `[megalodon]` that are not the model's."""

    weight_decay_on: str = "all"
    """Where weight decay falls: "all" parameters, as in the authors' recipe, or "matrices" only, which leaves out
    norms, biases and CEMA."""
    kernels: str | None = None
    """CUDA kernels: "auto" (PyTorch code with one warning where they cannot run), "require" (an error there) or "off".
    None: what the environment variable MEGALODON_KERNELS says, else "auto"."""
    loss_chunk_tokens: int = 4096
    """Positions whose logits exist at a time in training; 0: all at once. Pipeline and tensor parallelism always make
    all of them."""
    carry_state: bool = False
    """Rows of consecutive steps continue one document, with the model's state carried from each to the next: truncated
    backpropagation through time. See docs/long-context.md."""


# Every option of the model by its name, None where the flavor decides.
Megalodon = dataclasses.make_dataclass(
    "Megalodon",
    [(f.name, f.type | None, None) for f in dataclasses.fields(MegalodonConfig)],  # type: ignore[operator]
    bases=(TrainingOptions,),
    namespace={"__module__": __name__},
)
Megalodon.__doc__ = "`[megalodon]`: overrides of the flavor's model options by name, and `TrainingOptions`."


@dataclass
class Data:
    """`[data]`: the plugin's own data sets, `local_text` and `python_stdlib`."""

    seed: int = 0
    """Decides the order of the text and which part of it is held out."""
    validation_fraction: float = 0.0
    """Share of the text held out for validation when that reads the training data, as it does unless set otherwise."""
    broken_lines: str = "error"
    """What a broken line of a .jsonl file does: "error" or "skip" (counted and reported)."""
    text_field: str = "text"
    """Field of a .jsonl line that holds the text."""


@dataclass
class Validation:
    """`[validation]`: the host's options; here is only the default that the plugin gives one of them."""

    dataset: str | None = None
    """Data set of validation. None: training's, like its path, of which `data.validation_fraction` is held out."""


@dataclass
class JobConfig:
    """The plugin's part of the job's configuration."""

    megalodon: Megalodon = field(default_factory=Megalodon)  # type: ignore[valid-type]
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
