"""Applies the host's techniques to the model, in this order: tensor parallelism, chunk parallelism, activation
checkpointing, torch.compile, FSDP2 (sharding, replication, or both).
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import apply_compile
from torchtitan.tools.logging import logger

import megalodon_plugin.ops  # noqa: F401  registers torch.ops.megalodon
from megalodon_plugin.model.output import OutputLayer
from megalodon_plugin.model.precision import float32_parameters
from megalodon_plugin.parallel.chunk import apply_chunk_parallel
from megalodon_plugin.parallel.collectives import Ranks
from megalodon_plugin.parallel.layout import reshards_after_forward
from megalodon_plugin.parallel.tensor_plan import apply_tensor_parallel

from .host_patches import dense_mesh
from .job_config import TrainingOptions

# Results that selective activation checkpointing keeps. The host's own list lacks `addmm`, which every Linear with a
# bias is, and attention. CEMA and TimestepNorm are computed again: together 0.6% of a step at the width of 7B, for the
# memory of two of the eleven tensors of the width that a layer would keep.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.megalodon.chunk_attention.default,
    # Chunk parallelism's summaries and what is folded from them: small, and each stands for an exchange.
    torch.ops.megalodon.norm_summary.default,
    torch.ops.megalodon.norm_fold.default,
    torch.ops.megalodon.cema_summary.default,
    torch.ops.megalodon.cema_fold.default,
    torch.ops.megalodon.gather_summaries.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    # Keeps the scale that a low-precision conversion is computed from.
    torch.ops.aten.max.default,
    torch._higher_order_ops.inductor_compiled_code,
}


def parallelize_megalodon(model: nn.Module, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """The model, or a pipeline stage of it, with what the job asks for. Call it on the meta device.

    That the layout can train the model has been checked with the job (see `job_rules`).
    """
    if parallel_dims.tp_enabled:
        loss_parallel = not job_config.parallelism.disable_loss_parallel
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"), loss_parallel)
        logger.info("Applied Tensor Parallelism to the model: features between blocks, heads inside attention")
    if parallel_dims.cp_enabled:
        apply_chunk_parallel(model, Ranks.of(parallel_dims.get_mesh("cp").get_group()))
        logger.info("Applied Chunk Parallelism to the model on the context parallel mesh")
    _set_loss(model, parallel_dims, job_config)
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        checkpoint_activations(model, job_config, compile_model)
    if compile_model:
        apply_compile(model, job_config.compile)
        if parallel_dims.cp_enabled and model.norm is not None:
            # Its summary's backward pass would else be several passes over the features.
            model.norm.compile(backend=job_config.compile.backend, fullgraph=True)  # type: ignore[operator, union-attr]
    mesh = data_mesh(parallel_dims, job_config.training.mixed_precision_param != "float32")
    if mesh is not None:
        shard_model(model, mesh, parallel_dims, job_config)
    return model


def checkpoint_activations(model: nn.Module, job_config: Any, compile_model: bool) -> None:
    """By the host. With selection by op, attention and feed-forward network are wrapped one by one: what is kept
    between them is one tensor, their sum with the residual, and not the products that it is the sum of.
    """
    options = job_config.activation_checkpoint
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]

    def wrap(children: nn.ModuleDict, saved: set) -> None:
        holder = nn.Module()  # the host wraps the children of `.layers`
        holder.layers = children
        compiled, folder = compile_model, job_config.job.dump_folder
        apply_ac(holder, options, model_compile_enabled=compiled, op_sac_save_list=saved, base_folder=folder)

    if options.mode != "selective" or options.selective_ac_option != "op":
        wrap(layers, SAVED_OPS)
        return
    # Of the products of a SwiGLU the host computes one again; so is the only one without it.
    saved_of_network = SAVED_OPS if model.cfg.swiglu else SAVED_OPS - {torch.ops.aten.mm.default}  # type: ignore[union-attr]
    for name, saved in (("attention", SAVED_OPS), ("feed_forward", saved_of_network)):
        parts = nn.ModuleDict({key: getattr(layer, name) for key, layer in layers.items()})
        wrap(parts, saved)
        for key, layer in layers.items():
            layer.register_module(name, parts[key])


def _set_loss(model: nn.Module, parallel_dims: ParallelDims, job_config: Any) -> None:
    """End in the loss, part by part, where this rank has all of the output layer and the loss follows the model."""
    options = getattr(job_config, "megalodon", None)
    rows = TrainingOptions.loss_chunk_tokens if options is None else options.loss_chunk_tokens
    output = model.output
    if rows == 0 or parallel_dims.tp_enabled or parallel_dims.pp_enabled or not isinstance(output, OutputLayer):
        return
    model.logits_in_loss = True  # type: ignore[assignment]
    output.rows_at_once = rows
    output.compile_loss = job_config.compile.enable and "loss" in job_config.compile.components


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


def shard_model(model: nn.Module, mesh: DeviceMesh, parallel_dims: ParallelDims, job_config: Any) -> None:
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
    matrices = set(model.parameters()) - float32_parameters(model)
    fully_shard(model, mp_policy=full, ignored_params=matrices, **common)
    common |= {"mp_policy": low, "ignored_params": float32_parameters(model)}  # other objects than before: sharded
    reshard = reshards_after_forward(policy, parallel_dims.pp_enabled)
    for layer in model.layers.values():  # type: ignore[operator, union-attr]
        fully_shard(layer, reshard_after_forward=reshard, **common)
    ends = [module for module in (model.tok_embeddings, model.output) if module is not None]
    if model.cfg.tie_embedding and ends:  # type: ignore[union-attr]
        fully_shard(ends, reshard_after_forward=policy == "always", **common)  # type: ignore[arg-type]
    else:
        for module in ends:
            # The backward pass starts with the output layer, so gathering it again would be in vain.
            again = policy == "always" if module is model.output else reshard
            fully_shard(module, reshard_after_forward=again, **common)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The Trainer divides by the global token count itself.
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    kind = "HSDP" if mesh.ndim > 1 and mesh.size(1) > 1 else "replication" if mesh.ndim > 1 else "FSDP"
    kind = "mixed precision" if mesh.size() == 1 else kind
    logger.info(f"Applied {kind} to the model; CEMA, norms and attention gamma/beta stay float32")
