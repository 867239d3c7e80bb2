"""Applies the host's techniques to the model: activation checkpointing, torch.compile, FSDP2."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import apply_compile
from torchtitan.tools.logging import logger

import megalodon_plugin.ops  # noqa: F401  registers torch.ops.megalodon

# Results that selective activation checkpointing keeps. The host's own list lacks `addmm`, which every Linear with a
# bias is, and our ops; recomputing those would repeat most of a layer.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.megalodon.cema.default,
    torch.ops.megalodon.timestep_norm.default,
    torch.ops.megalodon.chunk_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    # Keeps the scale that a low-precision conversion is computed from.
    torch.ops.aten.max.default,
    torch._higher_order_ops.inductor_compiled_code,
}

# Modules of a layer whose parameters stay float32 under mixed precision, by their name in the layer.
FLOAT32_MODULES = (
    "attention.timestep_norm",
    "attention.cema",
    "attention.rms_norm",
    "attention.qk",
    "feed_forward.norm",
)


def parallelize_megalodon(model: nn.Module, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """The model with activation checkpointing, then compiled layer by layer, then sharded, each as the job asks.

    Raises:
        ValueError: torch.compile of the layers, or dropout, together with FSDP, which the plugin does not combine yet.
    """
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if parallel_dims.fsdp_enabled and compile_model:
        raise ValueError(
            '`compile.components` must not hold "model" with `parallelism.data_parallel_shard_degree` = '
            f"{parallel_dims.dp_shard}: the layers' float32 parameter groups cannot be compiled into one graph yet"
        )
    dropouts = [name for name in ("dropout", "hidden_dropout", "attention_dropout") if getattr(model.cfg, name) > 0]
    if parallel_dims.fsdp_enabled and dropouts:
        raise ValueError(
            f"`megalodon.{dropouts[0]}` must be 0 with `parallelism.data_parallel_shard_degree` = "
            f"{parallel_dims.dp_shard}: the host seeds all data ranks alike, so they would drop the same places"
        )
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compile_model,
            op_sac_save_list=SAVED_OPS,
            base_folder=job_config.job.dump_folder,
        )
    if compile_model:
        apply_compile(model, job_config.compile)
    if parallel_dims.fsdp_enabled:
        shard_model(model, parallel_dims, job_config)
    return model


def shard_model(model: nn.Module, parallel_dims: ParallelDims, job_config: Any) -> None:
    """FSDP2: one group for each layer's matrices in the low dtype, one for its small parameters in float32."""
    training = job_config.training
    reduce_dtype = TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    low = MixedPrecisionPolicy(param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param], reduce_dtype=reduce_dtype)
    # param_dtype=None and not float32, which would cast the group's inputs too.
    full = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    reshard = {"always": True, "never": False, "default": not parallel_dims.pp_enabled}[
        job_config.parallelism.fsdp_reshard_after_forward
    ]
    mesh = parallel_dims.get_mesh("fsdp")
    common: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if training.enable_cpu_offload:
        common["offload_policy"] = CPUOffloadPolicy()
    for layer in model.layers.values():  # type: ignore[operator, union-attr]
        small = [layer.get_submodule(name) for name in FLOAT32_MODULES]
        # Modules without parameters (norm_affine = false) make no group.
        fully_shard([m for m in small if any(True for _ in m.parameters())], mp_policy=full, **common)
        fully_shard(layer, mp_policy=low, **common)
    if model.norm is not None:
        fully_shard(model.norm, mp_policy=full, **common)  # type: ignore[arg-type]
    # A shared weight belongs to one group: the root's. Otherwise embedding and output have one each.
    for module in (model.tok_embeddings, model.output):
        if module is not None and not model.cfg.tie_embedding:  # type: ignore[union-attr]
            fully_shard(module, mp_policy=low, **common)  # type: ignore[arg-type]
    # The root keeps the default: its parameters stay gathered until the backward pass.
    fully_shard(model, mp_policy=low, **{k: v for k, v in common.items() if k != "reshard_after_forward"})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The Trainer divides by the global token count itself.
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    logger.info("Applied FSDP to the model; CEMA, norms and attention gamma/beta stay float32")
