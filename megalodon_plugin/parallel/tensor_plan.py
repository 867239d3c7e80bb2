"""Tensor parallelism: every rank holds D/P features of the residual stream, and its part of every large parameter.

Megalodon's recurrences act on single channels (CEMA) or groups of them (TimestepNorm), so sharding features, and not
time, between the blocks lets each rank run them complete and without an exchange. Only the maps that mix features need
one. The tables below are the whole plan. A block of (B, L, D) exchanges, in the activations' dtype except the last:

| | forward | backward |
|---|---|---|
| all-gather, B L D | wv's input, rms_norm's, feed_forward.norm's | wh2's and fc2's outputs |
| reduce-scatter, B L D | wh2's and fc2's outputs | wv's input, rms_norm's, feed_forward.norm's |
| all-reduce, D | | rms_norm's weight, feed_forward.norm's weight and bias |

So one gathered tensor serves all linear maps that read it, and no map reads features that it does not need.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import Ranks
from .layout import tensor_parallel_refusal
from .model_part import ModelPart
from .tensor_styles import Style, register_logits_hook, shard_module

LAYER_PLAN = {
    # Groups and channels do not see each other: each rank has G/P whole groups, D/P channels.
    "attention.timestep_norm": Style(shard=0),
    "attention.cema": Style(shard=0),
    # Whole heads of values, from all features of the normalised input.
    "attention.wv": Style(shard=0, gather_input=True),
    # Averages squares over all features. Its output, the same on every rank, serves wz, wr and wh1 as it is.
    "attention.rms_norm": Style(shard=None, gather_input=True),
    # Whole heads of queries and keys, of gates; wh1's rows are the residual's features. Biases go with the rows.
    "attention.wz": Style(shard=0),
    "attention.wr": Style(shard=0),
    "attention.wh1": Style(shard=0),
    # Rows are queries and keys, columns the features of all heads.
    "attention.qk": Style(shard=1),
    # Reads the values of this rank's heads, and so gives partial sums.
    "attention.wh2": Style(shard=1, scatter_output=True),
    # Averages over all features. Its output serves fc1 and fc3 as it is.
    "feed_forward.norm": Style(shard=None, gather_input=True),
    "feed_forward.fc1": Style(shard=0),
    "feed_forward.fc3": Style(shard=0),
    "feed_forward.fc2": Style(shard=1, scatter_output=True),
    # alpha scales features that are sharded already.
    "feed_forward": Style(shard=0),
}

ROOT_PLAN = {
    # Every rank looks up its own features.
    "tok_embeddings": Style(shard=1),
    # As in the layers.
    "norm": Style(shard=0),
    # By rows of the vocabulary, so that the loss can be computed on parts of the logits.
    "output": Style(shard=0, gather_input=True),
}

# The output layer needs the shared weight by rows: a rank finds only some of the tokens, with all their features.
TIED_ROOT_PLAN = ROOT_PLAN | {"tok_embeddings": Style(shard=0, scatter_output=True)}


def apply_tensor_parallel(model: ModelPart, tp_mesh: DeviceMesh, loss_parallel: bool) -> None:
    """Shard a Megalodon, or a pipeline stage of one, over the ranks of `tp_mesh`; it may be on the meta device.

    Call it before activation checkpointing, torch.compile and FSDP. With `loss_parallel` the logits are a DTensor,
    Shard(-1), as `torch.distributed.tensor.parallel.loss_parallel` takes it; else every rank has all of them.
    """
    reason = tensor_parallel_refusal(model.cfg, tp_mesh.size())
    if reason is not None:
        raise ValueError(reason)
    ranks = Ranks.of(tp_mesh.get_group())
    embedding, output = model.tok_embeddings, model.output
    tied = embedding is not None and output is not None and model.cfg.tie_embedding
    _shard_parts(model, TIED_ROOT_PLAN if tied else ROOT_PLAN, tp_mesh, ranks)
    if embedding is not None and output is not None and tied:
        output.weight = embedding.weight
    if output is not None:
        register_logits_hook(output, tp_mesh, ranks, loss_parallel)
    for layer in model.layers.values():
        _shard_parts(layer, LAYER_PLAN, tp_mesh, ranks)


def _shard_parts(parent: nn.Module, plan: dict[str, Style], mesh: DeviceMesh, ranks: Ranks) -> None:
    parts = dict(parent.named_modules())
    for name, style in plan.items():
        if name in parts:  # options and pipeline stages leave some out
            shard_module(parts[name], style, mesh, ranks)
