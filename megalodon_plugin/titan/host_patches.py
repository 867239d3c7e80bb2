"""Where torchtitan 0.2.2 has no hook: every place that replaces or reaches into a part of it, each with the reason.

`cpu.py` is another one, apart from these because it must run before torchtitan is imported.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.distributed import ParallelDims

from megalodon_plugin.checkpoint.tokenizer_files import BYTE_TOKENIZER


def around_load(checkpointer: CheckpointManager, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Load inside `context()`.

    The host asks a checkpoint for all that its Trainer's `state_dict` names, and one missing name fails the loading. It
    calls `load` inside `train`, between two other things, so no method of a Trainer that could be overridden stands
    around the loading alone.
    """
    load = checkpointer.load

    def load_inside(step: int = -1) -> bool:
        with context():
            return load(step)

    checkpointer.load = load_inside  # type: ignore[method-assign]


@contextmanager
def no_warning_of_tokenizer_names() -> Iterator[None]:
    """Keep the host from warning inside that `model.hf_assets_path` does not exist when it names a tokenizer.

    Its configuration takes every value for a path, and logs on the root logger, where only a filter tells this message
    from others.
    """

    def keep(record: logging.LogRecord) -> bool:
        return record.getMessage() != f"HF assets path {BYTE_TOKENIZER} does not exist!"

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def dense_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    """The mesh (pp, dp_replicate, fsdp, tp), dimensions of one rank included.

    `get_mesh` refuses to give out a dimension of one rank, over which there is nothing to share. But replication with
    FSDP's hooks needs ("dp_replicate", "fsdp") with an fsdp of one rank: the host's own replication divides the
    gradients once more (torchtitan #2318). And FSDP over one rank computes in the low dtype, for which the host's
    autocast is off under tensor and pipeline parallelism.
    """
    parallel_dims.world_mesh  # noqa: B018  builds the meshes
    return parallel_dims._global_meshes["dense"]
