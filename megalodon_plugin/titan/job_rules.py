"""What a job may ask for, checked before anything is built, and what the adapter changes in its configuration."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from torchtitan.tools.logging import logger

from megalodon_plugin.model import MegalodonConfig
from megalodon_plugin.parallel.layout import DIMENSIONS, OWN_ENTRY, Job, Layout, check_layout

FLOAT8 = "quantize.linear.float8"


def use_own_trainer(job_config: Any) -> None:
    """Note in the job's configuration that the plugin's Trainer trains it. The host hands this object, and nothing that
    names the Trainer, to all that it builds.
    """
    job_config.own_trainer = True


def has_own_trainer(job_config: Any) -> bool:
    """Whether the plugin's Trainer trains the job, not the host's."""
    return getattr(job_config, "own_trainer", False)


def check(job_config: Any, config: MegalodonConfig, own_trainer: bool) -> None:
    """Raise ValueError, naming option, rule and value, for what the model or, without the plugin's Trainer, the stock
    entry cannot train. Changes nothing.
    """
    job = dataclasses.replace(facts_of(job_config), own_trainer=own_trainer)
    check_layout(layout_of(job_config), config, job)
    parallelism = job_config.parallelism
    if parallelism.expert_parallel_degree > 1:
        raise ValueError(
            f"`parallelism.expert_parallel_degree` must be 1, but is {parallelism.expert_parallel_degree}: the model "
            "has no experts"
        )
    if parallelism.enable_async_tensor_parallel:
        raise ValueError(
            "`parallelism.enable_async_tensor_parallel` must be false, but is true: torchtitan's "
            "version covers gathers along the sequence, and this model gathers features"
        )
    balancer = parallelism.context_parallel_load_balancer
    if balancer not in (None, "headtail"):
        raise ValueError(
            f"`parallelism.context_parallel_load_balancer` must be left at its default, but is {balancer!r}: CEMA "
            "reads tokens in order, so every rank takes a contiguous slice, and all have the same work"
        )
    _check_carried_state(job, config)


def amend(job_config: Any) -> None:
    """Change two of the host's options that have no right default for this model; the log says which.

    The load balancer of context parallelism permutes tokens, which a recurrent model cannot take, and TOML has no way
    to say None. And the host converts the output layer to float8 too, where logits lose quality for little speed.
    """
    parallelism = job_config.parallelism
    if parallelism.context_parallel_load_balancer is not None and parallelism.context_parallel_degree > 1:
        logger.info("Context parallel load balancer off: every rank takes a contiguous slice of whole chunks")
    parallelism.context_parallel_load_balancer = None
    if FLOAT8 not in job_config.model.converters:
        return
    float8 = job_config.quantize.linear.float8
    if "output" not in float8.filter_fqns:
        logger.info("float8 leaves the output layer out")
        float8.filter_fqns = [*float8.filter_fqns, "output"]
    if float8.enable_fsdp_float8_all_gather and parallelism.data_parallel_shard_degree == 1:
        logger.warning(
            "`quantize.linear.float8.enable_fsdp_float8_all_gather` does nothing with "
            "`parallelism.data_parallel_shard_degree` = 1: weights are gathered in the low dtype"
        )


def layout_of(job_config: Any) -> Layout:
    """The layout that the job asks for. A sharding degree of -1 takes the ranks that the other degrees leave."""
    degrees = {of.field: getattr(job_config.parallelism, of.key) for of in DIMENSIONS.values()}
    if degrees["dp_shard"] == -1:
        others = Layout(**degrees | {"dp_shard": 1}).gpus
        degrees["dp_shard"] = max(1, int(os.environ.get("WORLD_SIZE", 1)) // others)
    return Layout(**degrees)


def facts_of(job_config: Any) -> Job:
    """What the rules of layouts need of the job."""
    training, parallelism = job_config.training, job_config.parallelism
    parts = parallelism.module_fqns_per_model_part
    lengths = {"training.seq_len": training.seq_len}
    if job_config.validation.enable:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    return Job(
        lengths=lengths,
        local_rows=training.local_batch_size,
        rows=training.global_batch_size if training.global_batch_size > 0 else None,
        microbatch_rows=parallelism.pipeline_parallel_microbatch_size,
        schedule=parallelism.pipeline_parallel_schedule,
        schedule_csv=parallelism.pipeline_parallel_schedule_csv,
        layers_per_stage=parallelism.pipeline_parallel_layers_per_stage,
        less_layers=(
            parallelism.pipeline_parallel_first_stage_less_layers,
            parallelism.pipeline_parallel_last_stage_less_layers,
        ),
        parts=None if parts is None else len(parts),
        carry_state=carries_state(job_config),
        float8=FLOAT8 in job_config.model.converters,
    )


# A carried state. Layouts that cannot carry one are refused above, checkpoints that lack one in checkpoint_checks.


def carries_state(job_config: Any) -> bool:
    """`megalodon.carry_state`: whether rows of consecutive steps continue one document. False for a job without the
    plugin's section.

    Raises:
        ValueError: it is not true or false.
    """
    carry = getattr(getattr(job_config, "megalodon", None), "carry_state", False)
    if not isinstance(carry, bool):
        raise ValueError(f"`megalodon.carry_state` must be true or false, but is {carry!r}")
    return carry


def _check_carried_state(job: Job, config: MegalodonConfig) -> None:
    if job.carry_state and not job.own_trainer:
        raise ValueError(
            "`megalodon.carry_state` must be false when torchtitan's own command starts the job, whose Trainer carries "
            f"no state from step to step, but is true. Start the job with `{OWN_ENTRY}` or `megalodon train`"
        )
    if job.carry_state and config.attention_dropout > 0:
        raise ValueError(
            "`megalodon.attention_dropout` must be 0 with `megalodon.carry_state`, but is "
            f"{config.attention_dropout}: attention to carried keys and values cannot drop any"
        )


def check_other_model(job_config: Any) -> None:
    """Raise ValueError if a model of the host's is to carry a state."""
    if carries_state(job_config):
        raise ValueError(
            "`megalodon.carry_state` must be false for other models than megalodon, but is true with `model.name` "
            f'= "{job_config.model.name}"'
        )


def check_other_dataset(job_config: Any, own_datasets: Iterable[str]) -> None:
    """Raise ValueError if rows of a data set of the host's are to carry a state."""
    if carries_state(job_config):
        raise ValueError(
            f"`training.dataset` must be one of {', '.join(own_datasets)} with `megalodon.carry_state`, whose rows "
            f'follow documents, but is "{job_config.training.dataset}"'
        )


def check_loading_of_carried_state(job_config: Any) -> None:
    """Raise ValueError if a job that carries a state is to load the rows' positions without it."""
    excluded = job_config.checkpoint.exclude_from_loading
    if carries_state(job_config) and "train_state" in excluded and "dataloader" not in excluded:
        raise ValueError(
            "`checkpoint.exclude_from_loading` must not name train_state without dataloader with "
            "`megalodon.carry_state`: rows would continue inside documents without the state of what came before"
        )
