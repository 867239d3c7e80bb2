"""Which layouts of ranks a job may ask for, checked before anything is built."""

from typing import Any

from torchtitan.tools.logging import logger

from megalodon_plugin.parallel.chunk import check_chunk_parallel
from megalodon_plugin.parallel.tensor_plan import check_tensor_parallel

OWN_ENTRY = "python -m torch.distributed.run -m megalodon_plugin.cli.train"

FLOAT8 = "quantize.linear.float8"

_own_entry = False


def mark_own_entry() -> None:
    """Called by the plugin's Trainer: what the stock Trainer would train wrongly is right from here on."""
    global _own_entry
    _own_entry = True


def is_own_entry() -> bool:
    """Whether the plugin's Trainer runs this process."""
    return _own_entry


def check_job(job_config: Any, args: Any) -> None:
    """Raise ValueError for a layout that the stock entry would train wrongly or that the model cannot take.

    Also sets two of the host's options that have no right default for this model: see the functions below.
    """
    parallelism = job_config.parallelism
    needs_own_trainer = {
        "pipeline_parallel_degree": "its loss is divided by the token count only after the backward pass "
        "(torchtitan #2972), so that clipping would always fire",
        "context_parallel_degree": "its metrics count every token once a rank (torchtitan #2983, #3111)",
    }
    for key, reason in needs_own_trainer.items():
        degree = getattr(parallelism, key)
        if degree > 1 and not _own_entry:
            raise ValueError(
                f"`parallelism.{key}` must be 1 under the stock entry, but is {degree}: {reason}. "
                f"Start the job with `{OWN_ENTRY}` or `megalodon train`"
            )
    check_tensor_parallel(args, parallelism.tensor_parallel_degree)
    names = ("megalodon.chunk_size", "parallelism.context_parallel_degree")
    lengths = {"training.seq_len": job_config.training.seq_len}
    if job_config.validation.enable:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    for name, length in lengths.items():
        check_chunk_parallel(length, args.chunk_size, parallelism.context_parallel_degree, (name, *names))
    if parallelism.expert_parallel_degree > 1:
        raise ValueError(
            f"`parallelism.expert_parallel_degree` must be 1, but is {parallelism.expert_parallel_degree}: the model "
            "has no experts"
        )
    if parallelism.enable_async_tensor_parallel:
        raise ValueError(
            "`parallelism.enable_async_tensor_parallel` must be false, but is true: it knows gathers over time only, "
            "and the plugin's are over features"
        )
    if parallelism.pipeline_parallel_degree > 1 and args.tie_embedding:
        raise ValueError(
            "`megalodon.tie_embedding` must be false with `parallelism.pipeline_parallel_degree` = "
            f"{parallelism.pipeline_parallel_degree}: the embedding and the output layer lie on different ranks"
        )
    _check_carried_state(job_config, args)
    _turn_off_load_balancer(parallelism)
    if FLOAT8 in job_config.model.converters:
        _check_float8(args, parallelism.tensor_parallel_degree)
        _leave_output_out_of_float8(job_config)


def _check_carried_state(job_config: Any, args: Any) -> None:
    """A carried state is whole on one rank, which the rows that it belongs to must be too."""
    carry = getattr(getattr(job_config, "megalodon", None), "carry_state", False)
    if not isinstance(carry, bool):
        raise ValueError(f"`megalodon.carry_state` must be true or false, but is {carry!r}")
    if not carry:
        return
    if not _own_entry:
        raise ValueError(
            "`megalodon.carry_state` must be false under the stock entry, whose Trainer carries nothing from step to "
            f"step, but is true. Start the job with `{OWN_ENTRY}` or `megalodon train`"
        )
    for key, reason in {
        "context_parallel_degree": "it shares one row over ranks; use it without a carried state, or a carried state "
        "with shorter rows",
        "tensor_parallel_degree": "its ranks hold the features and heads of one state",
        "pipeline_parallel_degree": "its stages exchange activations alone",
    }.items():
        degree = getattr(job_config.parallelism, key)
        if degree > 1:
            raise ValueError(f"`parallelism.{key}` must be 1 with `megalodon.carry_state`, but is {degree}: {reason}")
    if args.attention_dropout > 0:
        raise ValueError(
            "`megalodon.attention_dropout` must be 0 with `megalodon.carry_state`, but is "
            f"{args.attention_dropout}: attention to carried keys and values has none"
        )


def _turn_off_load_balancer(parallelism: Any) -> None:
    """The host's default permutes tokens, which a recurrent model cannot take, and TOML has no way to say None."""
    asked = parallelism.context_parallel_load_balancer
    if asked not in (None, "headtail"):
        raise ValueError(
            f"`parallelism.context_parallel_load_balancer` must be left at its default, but is {asked!r}: CEMA reads "
            "tokens in order, so every rank takes a contiguous slice, and all have the same work"
        )
    if asked is not None and parallelism.context_parallel_degree > 1:
        logger.info("Context parallel load balancer off: every rank takes a contiguous slice of whole chunks")
    parallelism.context_parallel_load_balancer = None


def _check_float8(args: Any, degree: int) -> None:
    """The float8 product takes multiples of 16, of which the host checks whole matrices and not a rank's part."""
    for name in ("dim", "z_dim", "value_dim", "ffn_dim"):
        size = getattr(args, name)
        if size % 16 == 0 and size % (16 * degree):
            raise ValueError(
                f"`megalodon.{name}` must be a multiple of {16 * degree} for float8 on "
                f"`parallelism.tensor_parallel_degree` = {degree} ranks, whose parts are multiples of 16, but is {size}"
            )


def _leave_output_out_of_float8(job_config: Any) -> None:
    """Logits from float8 weights cost quality for little speed, and the host filters nothing by default."""
    options = job_config.quantize.linear.float8
    if "output" not in options.filter_fqns:
        logger.info("float8 leaves the output layer out")
        options.filter_fqns = [*options.filter_fqns, "output"]
    if options.enable_fsdp_float8_all_gather and job_config.parallelism.data_parallel_shard_degree == 1:
        logger.warning(
            "`quantize.linear.float8.enable_fsdp_float8_all_gather` does nothing with "
            "`parallelism.data_parallel_shard_degree` = 1: weights are gathered in the low dtype"
        )
