"""The job that is planned: a host's configuration with its model's parameters, and what a rank of it does in a step."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalodon_plugin.parallel.layout import DIMENSIONS, Layout, is_schedule, reshards_after_forward

from .memory import Memory, Parameter, Stage, Work, parameters_of, rank_memory
from .traffic import Exchange, exchanges_of_step

if TYPE_CHECKING:
    from megalodon_plugin.titan.model_args import MegalodonModelArgs


@dataclass(frozen=True)
class PlannedJob:
    """A job of the host with all degrees 1, and what each layout makes of it."""

    args: "MegalodonModelArgs"
    parameters: list[Parameter]
    forward_flops: float
    """Of one token."""
    options: Any
    """The host's configuration."""

    @property
    def tokens_per_row(self) -> int:
        return self.options.training.seq_len

    def rows(self, layout: Layout) -> int:
        """Of a step, over all ranks."""
        training = self.options.training
        return training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * layout.data

    def work(self, layout: Layout) -> Work:
        """What a rank does in a step."""
        options = self.options
        training, checkpointing = options.training, options.activation_checkpoint
        mode = checkpointing.mode
        if mode == "selective":
            mode = "full" if checkpointing.selective_ac_option == "0" else checkpointing.selective_ac_option
        microbatch = training.local_batch_size
        if layout.pp > 1:
            microbatch = options.parallelism.pipeline_parallel_microbatch_size
        return Work(
            rows=microbatch,
            length=training.seq_len,
            microbatches=training.local_batch_size // microbatch,
            accumulation=self.rows(layout) // (training.local_batch_size * layout.data),
            low_bytes=2 if training.mixed_precision_param == "bfloat16" else 4,
            checkpointing=mode,
            loss_parallel=not options.parallelism.disable_loss_parallel,
            compiled_loss=options.compile.enable and "loss" in options.compile.components,
            compiled=options.compile.enable and "model" in options.compile.components,
            loss_rows=options.megalodon.loss_chunk_tokens,
        )

    def stages(self, degree: int) -> list[Stage]:
        """What each of `degree` ranks of a pipeline holds, as the host cuts the model. The layout must be allowed."""
        if degree == 1:
            return [Stage(self.args.n_layers)]
        options = self.options.parallelism
        names = options.module_fqns_per_model_part
        if names is None:
            from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part

            less = options.pipeline_parallel_first_stage_less_layers, options.pipeline_parallel_last_stage_less_layers
            names = generate_llm_fqn_per_model_part(degree, self.args.n_layers, *less)
        microbatches = self.options.training.local_batch_size // options.pipeline_parallel_microbatch_size
        waiting = [microbatches] * degree
        if is_schedule(options.pipeline_parallel_schedule, "1F1B"):
            waiting = [min(n, degree - rank) for rank, n in enumerate(waiting)]
        layers = [sum(name.startswith("layers.") for name in part) for part in names]
        return [Stage(n, rank == 0, rank == degree - 1, waiting[rank]) for rank, n in enumerate(layers)]

    def reshards(self, layout: Layout) -> bool:
        """Whether FSDP frees a layer's weights after its forward pass."""
        return reshards_after_forward(self.options.parallelism.fsdp_reshard_after_forward, layout.pp > 1)

    def exchanges(self, layout: Layout, stage: Stage) -> list[Exchange]:
        """Of a step, of a rank that holds `stage`."""
        work, reshard = self.work(layout), self.reshards(layout)
        return exchanges_of_step(self.args.config, self.parameters, work, layout, stage, reshard)

    def memory(self, layout: Layout, stage: Stage) -> Memory:
        """Of a rank that holds `stage`."""
        return rank_memory(self.args.config, self.parameters, self.work(layout), layout, stage, self.reshards(layout))

    def with_checkpointing(self, mode: str) -> "PlannedJob":
        """The same job under another mode of activation checkpointing."""
        options = copy.deepcopy(self.options)
        options.activation_checkpoint.mode = mode
        return dataclasses.replace(self, options=options)


def load_job(config: Path, seq_len: int | None, overrides: list[str]) -> PlannedJob:
    """The job of a TOML file with the host's overrides, its model on the meta device.

    Raises:
        ValueError: the job trains another model, or asks for something that cannot be estimated.
    """
    from megalodon_plugin.titan.command_line import read_job

    degrees = [option for option in overrides if option.startswith("--parallelism.") and "degree" in option]
    if degrees:
        raise ValueError(f"`{degrees[0].split('=')[0]}` must be left out, because the plan chooses the degrees")
    options = read_job(["--job.config_file", str(config), *overrides])
    if options.model.name != "megalodon":
        raise ValueError(f"`model.name` must be megalodon, but is {options.model.name!r}")
    if seq_len is not None:
        options.training.seq_len = options.validation.seq_len = seq_len
    if options.activation_checkpoint.mode not in ("none", "full", "selective"):
        mode = options.activation_checkpoint.mode
        raise ValueError(f"`activation_checkpoint.mode` must be none, full or selective for a plan, but is {mode!r}")
    if options.training.enable_cpu_offload:
        raise ValueError("`training.enable_cpu_offload` must be false for a plan: it counts all state on the GPU")
    return planned_job(options)


def planned_job(options: Any) -> PlannedJob:
    """The job of a host's configuration with all degrees 1, its model on the meta device."""
    from megalodon_plugin.model import Megalodon
    from megalodon_plugin.titan.job_rules import use_own_trainer
    from megalodon_plugin.titan.model_args import Flavors

    options = copy.deepcopy(options)
    for dimension in DIMENSIONS.values():
        setattr(options.parallelism, dimension.key, 1)
    use_own_trainer(options)  # what `megalodon train` can do is what is planned
    args = Flavors()[options.model.flavor]
    args.update_from_config(options)
    with torch.device("meta"):
        model = Megalodon(args.config)
    _, flops = args.get_nparams_and_flops(model, options.training.seq_len)
    return PlannedJob(args, parameters_of(model), flops / 3, options)
