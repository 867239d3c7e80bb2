"""Which layouts of ranks a job may ask for, checked before anything is built."""

from typing import Any

from torchtitan.tools.logging import logger

OWN_ENTRY = "python -m torch.distributed.run -m megalodon_plugin.cli.train"

_own_entry = False


def mark_own_entry() -> None:
    """Called by the plugin's Trainer: what the stock Trainer would train wrongly is right from here on."""
    global _own_entry
    _own_entry = True


def is_own_entry() -> bool:
    """Whether the plugin's Trainer runs this process."""
    return _own_entry


def check_job(job_config: Any, args: Any) -> None:
    """Raise ValueError for a layout that the stock entry would train wrongly or that the plugin does not have.

    Also turns off the host's load balancer for context parallelism: it permutes tokens, which a recurrent model cannot
    take, and TOML has no way to say None.
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
    for key in ("context_parallel_degree", "tensor_parallel_degree", "data_parallel_replicate_degree"):
        degree = getattr(parallelism, key)
        if degree > 1:
            raise ValueError(
                f"`parallelism.{key}` must be 1: this version of the plugin trains on one device, data parallel with "
                f"FSDP2 or in pipeline stages; but it is {degree}"
            )
    if parallelism.pipeline_parallel_degree > 1 and args.tie_embedding:
        raise ValueError(
            "`megalodon.tie_embedding` must be false with `parallelism.pipeline_parallel_degree` = "
            f"{parallelism.pipeline_parallel_degree}: the embedding and the output layer lie on different ranks"
        )
    if parallelism.context_parallel_load_balancer is not None:
        logger.debug("Context parallel load balancer off: it permutes tokens, and CEMA reads them in order")
        parallelism.context_parallel_load_balancer = None
