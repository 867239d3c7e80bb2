"""FSDP2: which parameters are sharded and replicated over which ranks, and in which dtype they are gathered."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from megalodon_plugin.model.precision import float32_parameters
from megalodon_plugin.parallel.layout import reshards_after_forward

from .host_patches import dense_mesh
from .stage import MegalodonStage


def data_mesh(parallel_dims: ParallelDims, mixed_precision: bool) -> DeviceMesh | None:
    """The mesh that parameters are sharded and replicated over, chunk parallel ranks included; None without one.

    A mesh of one rank shares nothing, but FSDP over it computes in the low dtype, see `host_patches.dense_mesh`.
    """
    replicated, sharded = parallel_dims.dp_replicate_enabled, parallel_dims.fsdp_enabled
    if sharded:
        return parallel_dims.get_mesh(["dp_replicate", "fsdp"] if replicated else "fsdp")
    if replicated:
        return dense_mesh(parallel_dims)["dp_replicate", "fsdp"]
    if mixed_precision and (parallel_dims.tp_enabled or parallel_dims.pp_enabled):
        return dense_mesh(parallel_dims)["fsdp"]
    return None


def shard_model(stage: MegalodonStage, mesh: DeviceMesh, parallel_dims: ParallelDims, job_config: Any) -> None:
    """FSDP2: a group for each layer's matrices in the low dtype, and one for all float32 parameters at the root.

    The float32 group belongs to the root because its hooks must not stand inside a layer that is compiled into one
    graph. It is gathered once a step and stays: 0.1% of the model (38 MB of 7B).
    """
    training, policy = job_config.training, job_config.parallelism.fsdp_reshard_after_forward
    reduce_dtype = TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    param_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    # Activations have the low dtype already; casting a layer's inputs would round its state, which is float32.
    low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # param_dtype=None and not float32, which would cast the group's inputs too.
    full = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    common: dict[str, Any] = {"mesh": mesh}
    if training.enable_cpu_offload:
        common["offload_policy"] = CPUOffloadPolicy()
    # The root first: it passes over modules that have a group already, with all of their parameters.
    matrices = set(stage.parameters()) - float32_parameters(stage)
    fully_shard(stage, mp_policy=full, ignored_params=matrices, **common)
    common |= {"mp_policy": low, "ignored_params": float32_parameters(stage)}  # other objects than before: sharded
    reshard = reshards_after_forward(policy, parallel_dims.pp_enabled)
    for layer in stage.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **common)
    ends: list[nn.Module] = [module for module in (stage.tok_embeddings, stage.output) if module is not None]
    if stage.cfg.tie_embedding and ends:
        fully_shard(ends, reshard_after_forward=policy == "always", **common)
    else:
        for module in ends:
            # The backward pass starts with the output layer, so gathering it again would be in vain.
            again = policy == "always" if module is stage.output else reshard
            fully_shard(module, reshard_after_forward=again, **common)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # The Trainer divides by the global token count itself.
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    kind = "HSDP" if mesh.ndim > 1 and mesh.size(1) > 1 else "replication" if mesh.ndim > 1 else "FSDP"
    kind = "mixed precision" if mesh.size() == 1 else kind
    logger.info(f"Applied {kind} to the model; CEMA, norms and attention gamma/beta stay float32")
