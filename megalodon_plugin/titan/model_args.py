"""The model's arguments as torchtitan wants them: flavors, overrides from the job, and the checks of both."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger

from megalodon_plugin.model import PRESETS, MegalodonConfig
from megalodon_plugin.ops.cema import cema_flops
from megalodon_plugin.ops.chunk_attention import chunk_attention_flops
from megalodon_plugin.ops.dispatch import set_kernels

from . import job_rules
from .job_config import WEIGHT_DECAY_ON
from .tokenizer import vocab_size_of

MODEL_OPTIONS = tuple(f.name for f in dataclasses.fields(MegalodonConfig))


@dataclass(kw_only=True)
class MegalodonModelArgs(MegalodonConfig, BaseModelArgs):
    """`MegalodonConfig` that can take its overrides from a job's configuration."""

    @property
    def config(self) -> MegalodonConfig:
        """The model's part alone."""
        return MegalodonConfig(**{name: getattr(self, name) for name in MODEL_OPTIONS})

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Apply `[megalodon]`, size the vocabulary for the tokenizer, and check what the model needs of the job.

        `megalodon.kernels` is set for the whole process.

        Raises:
            ValueError: naming the key, the rule and the value.
        """
        _check_dtypes(job_config)
        overrides = getattr(job_config, "megalodon", None)
        if overrides is not None:
            for name in MODEL_OPTIONS:
                if getattr(overrides, name) is not None:
                    setattr(self, name, getattr(overrides, name))
            if overrides.weight_decay_on not in WEIGHT_DECAY_ON:
                raise ValueError(
                    f"`megalodon.weight_decay_on` must be one of {WEIGHT_DECAY_ON}, but is "
                    f"{overrides.weight_decay_on!r}"
                )
            if overrides.loss_chunk_tokens < 0:
                raise ValueError(
                    f"`megalodon.loss_chunk_tokens` must be at least 0, but is {overrides.loss_chunk_tokens}"
                )
            if overrides.kernels is not None:
                _set_kernels_of_process(overrides.kernels)
        tokens = vocab_size_of(job_config.model.hf_assets_path)
        if overrides is None or overrides.vocab_size is None:
            if self.vocab_size != tokens:
                logger.info(f"The tokenizer decides the vocabulary: {tokens} tokens instead of {self.vocab_size}")
            self.vocab_size = tokens
        try:
            self.validate()
        except ValueError as error:
            raise ValueError(f"[megalodon] {error}") from error
        if tokens > self.vocab_size:
            raise ValueError(
                f"`megalodon.vocab_size` must be at least the tokenizer's {tokens} tokens, but is {self.vocab_size}"
            )
        if tokens > self.n_outputs:
            raise ValueError(
                f"`megalodon.output_size` must be at least the tokenizer's {tokens} tokens, but is {self.n_outputs}"
            )
        job_rules.check(job_config, self, job_rules.has_own_trainer(job_config))
        job_rules.amend(job_config)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters (a shared one once) and floating-point operations a trained token.

        Forward and backward count three times the forward pass: matrix products 2 a weight, attention the pairs i >= j
        inside chunks only, CEMA its recurrence. The embedding is a look-up; element-wise work is not counted.
        """
        n_params = sum(p.numel() for p in model.parameters())
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        attention = chunk_attention_flops(
            1, seq_len, self.n_heads, self.qk_head_dim, self.value_head_dim, self.chunk_size
        )
        cema = cema_flops(seq_len, self.dim, self.cema_ndim)
        forward = 2 * matrices + self.n_layers * (attention + cema) / seq_len
        return n_params, round(3 * forward)


class Flavors(Mapping[str, MegalodonModelArgs]):
    """`model.flavor` -> fresh arguments: the host changes what it gets, and a preset must not change."""

    def __getitem__(self, flavor: str) -> MegalodonModelArgs:
        if flavor not in PRESETS:
            raise ValueError(f"`model.flavor` must be one of {', '.join(PRESETS)}, but is {flavor!r}")
        return MegalodonModelArgs(**dataclasses.asdict(PRESETS[flavor]))

    def __contains__(self, flavor: object) -> bool:
        return flavor in PRESETS

    def __iter__(self) -> Iterator[str]:
        return iter(PRESETS)

    def __len__(self) -> int:
        return len(PRESETS)


def _set_kernels_of_process(mode: str) -> None:
    """For all models of the process: the ops are functions, to which a model passes no options."""
    set_kernels(mode, "megalodon.kernels")
    logger.info(f"CUDA kernels of this process: {mode} (`megalodon.kernels`)")


def _check_dtypes(job_config: Any) -> None:
    training = job_config.training
    if training.dtype != "float32":
        raise ValueError(
            f"`training.dtype` must be float32, but is {training.dtype!r}: a lower one would round CEMA's parameters "
            'and the optimizer\'s state; set `training.mixed_precision_param = "bfloat16"` for fast matrix products'
        )
    if training.mixed_precision_param not in ("bfloat16", "float32"):
        raise ValueError(
            "`training.mixed_precision_param` must be bfloat16 or float32 (float16 has too little range for running "
            f"statistics and slowly decaying states), but is {training.mixed_precision_param!r}"
        )
