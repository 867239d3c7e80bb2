"""Activation checkpointing by the host: what is kept of a layer for its backward pass."""

from typing import Any

import torch
from torch import nn
from torchtitan.distributed.activation_checkpoint import apply_ac

import megalodon_plugin.ops  # noqa: F401  registers torch.ops.megalodon

from .stage import MegalodonStage

# Results that selective activation checkpointing keeps. The host's own list lacks `addmm`, which every Linear with a
# bias is, and attention. CEMA and TimestepNorm are recomputed: together 0.6% of a step at the width of 7B, for the
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


def checkpoint_activations(stage: MegalodonStage, job_config: Any, compile_model: bool) -> None:
    """By the host. With selection by op, attention and feed-forward network are wrapped one by one: what is kept
    between them is one tensor, their sum with the residual, and not the products that it is the sum of.
    """
    options = job_config.activation_checkpoint

    def wrap(children: nn.ModuleDict, saved: set) -> None:
        holder = nn.Module()  # the host wraps the children of `.layers`
        holder.layers = children
        compiled, folder = compile_model, job_config.job.dump_folder
        apply_ac(holder, options, model_compile_enabled=compiled, op_sac_save_list=saved, base_folder=folder)

    if options.mode != "selective" or options.selective_ac_option != "op":
        wrap(stage.layers, SAVED_OPS)
        return
    # Of the products of a SwiGLU the host recomputes one; without it there is but one, which is recomputed.
    saved_of_network = SAVED_OPS if stage.cfg.swiglu else SAVED_OPS - {torch.ops.aten.mm.default}
    for name, saved in (("attention", SAVED_OPS), ("feed_forward", saved_of_network)):
        parts = nn.ModuleDict({key: getattr(layer, name) for key, layer in stage.layers.items()})
        wrap(parts, saved)
        for key, layer in stage.layers.items():
            layer.register_module(name, parts[key])
