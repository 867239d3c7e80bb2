"""The memory of one rank, estimated from the configuration and the degrees alone: no GPU, no process group.

What autograd keeps is counted op by op as the model's code has it run eagerly, in the letters B, L, D, V, Z, H, N, F, G
of the configuration; `tests/planning/test_memory.py` holds the counts against what torch keeps. torch.compile keeps
at most as much, for it recomputes what is cheap.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.model.feed_forward import FeedForward
from megalodon_plugin.ops.cema import kept_states
from megalodon_plugin.ops.checks import ACTIVATION_DTYPES
from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.parallel.tensor_plan import LAYER_PLAN, ROOT_PLAN, TIED_ROOT_PLAN

FLOAT32 = 4
PARAMETER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes of a parameter, its gradient and AdamW's two moments, all float32."""


@dataclass(frozen=True)
class Work:
    """What a job does, whatever the layout."""

    rows: int
    """B of one forward pass of a rank: the local batch, or a pipeline's microbatch."""
    length: int
    """L of whole rows."""
    microbatches: int = 1
    """Of one backward pass of a pipeline; 1 without a pipeline."""
    accumulation: int = 1
    """Backward passes in a step."""
    low_bytes: int = 2
    """Bytes of `training.mixed_precision_param`."""
    checkpointing: str = "none"
    """"none", "full", "op" (selective by op), or a number n: every n-th layer in full."""
    loss_parallel: bool = True
    compiled_loss: bool = True
    compiled: bool = False
    """Layers are compiled: of what selection by op keeps, only what the backward pass reads stays."""
    loss_rows: int = 0
    """Tokens whose logits exist at a time; 0: all. All under tensor and pipeline parallelism."""
    gpu: bool = True
    """CEMA's kernels and torch's fused RMSNorm, which a CPU lacks."""


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline holds; without a pipeline, everything."""

    layers: int
    first: bool = True
    last: bool = True
    in_flight: int = 1
    """Microbatches whose forward pass is done and whose backward pass is not, at most."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, and what tensor parallelism and mixed precision make of it."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    """The dimension that tensor parallelism cuts; None: every rank has all of it."""
    is_small: bool
    """Belongs to the float32 group at FSDP's root: all but the linear maps, the embedding and alpha of rescale_ffn."""

    def numel(self, tp: int = 1, shards: int = 1) -> int:
        """Numbers on the first rank, which has the largest part."""
        sizes = list(self.shape)
        if self.tp_dim is not None:
            sizes[self.tp_dim] = -(-sizes[self.tp_dim] // tp)
        sizes[0] = -(-sizes[0] // shards)
        return math.prod(sizes)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its worst moment."""

    parameters: int
    gradients: int
    moments: int
    gathered: int
    """Unsharded weights and gradients of the layers being computed, in the low dtype."""
    saved: int
    """What forward passes keep for backward passes."""
    at_work: int
    """The larger of: logits, their gradient and the loss; one layer's backward pass."""

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def parameters_of(model: Megalodon) -> list[Parameter]:
    """Every parameter of a Megalodon, a shared one once; the model may be on the meta device."""
    modules = dict(model.named_modules())
    root_plan = TIED_ROOT_PLAN if model.cfg.tie_embedding else ROOT_PLAN
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        in_layer = owner.split(".", 2)[2] if owner.startswith("layers.") else None
        style = root_plan[owner] if in_layer is None else LAYER_PLAN[in_layer]
        is_small = not isinstance(modules[owner], nn.Linear | nn.Embedding | FeedForward)
        found.append(Parameter(name, tuple(parameter.shape), style.shard, is_small))
    return found


def parameters_on(parameters: Iterable[Parameter], stage: Stage) -> list[Parameter]:
    """Those that a pipeline's rank holds. Layers are alike, so which ones does not matter."""
    kept = []
    for parameter in parameters:
        part = parameter.name.split(".")
        if part[0] == "layers":
            keep = int(part[1]) < stage.layers
        else:
            keep = stage.first if part[0] == "tok_embeddings" else stage.last
        if keep:
            kept.append(parameter)
    return kept


def saved_by_layer(cfg: MegalodonConfig, work: Work, layout: Layout, checkpointing: str) -> int:
    """Bytes that autograd keeps of one layer's forward pass on one rank.

    `checkpointing`: "none": all that the layer's ops save. "full": its input. "op": its input and the results of the
    ops that selective checkpointing keeps (of matrix products without a bias the host keeps every second only).
    """
    a, tp, tokens = work.low_bytes, layout.tp, work.rows * work.length // layout.cp
    d, v, z, f = (size // tp for size in (cfg.dim, cfg.value_dim, cfg.z_dim, cfg.ffn_dim))
    heads, statistics = cfg.n_heads // tp, 2 * FLOAT32 * cfg.norm_groups // tp
    state = work.rows * d * cfg.cema_ndim * 2 * FLOAT32  # CEMA's, of every row
    kept = _kept_states(cfg, work, layout, a) * state
    if checkpointing == "full":
        return a * d * tokens
    if checkpointing == "op":
        number = 2 * a * d  # the inputs of attention and of the feed-forward network
        number += 2 * a * v + a * z  # wv, wr, wz
        number += a * v + FLOAT32 * heads  # chunk_attention
        number += a * f if cfg.swiglu else 0  # fc1
        if not work.compiled:  # these are in the list, but nothing reads them
            number += a * d + a * cfg.dim  # wh1; wh2: partial sums of all features
            number += a * cfg.dim if cfg.swiglu else 0  # fc2
        number += 2 * a * d if tp > 1 else 0  # what the reduce-scatters give
        # With slices of time what was gathered, folded and summarised.
        return number * tokens + (0 if layout.cp == 1 else state * (layout.cp + 2))
    number = a * d + statistics  # timestep_norm: its input and each step's statistics
    number += a * d + (a * cfg.dim if tp > 1 else 0)  # cema: its input; wv: the same features, gathered
    number += 2 * a * v  # silu's input and output
    number += FLOAT32 * cfg.dim + FLOAT32  # rms_norm: its input in float32, 1/rms
    number += 0 if work.gpu or not cfg.norm_affine else FLOAT32 * cfg.dim
    number += a * cfg.dim  # wz, wr, wh1: their input
    number += 2 * FLOAT32 * z + FLOAT32 * heads  # qk: z in float32, its norm, the norm's result
    number += 2 * a * z  # q, k
    number += 2 * a * v  # wr's output, r
    number += a * v + FLOAT32 * heads  # attention's output, log-sums
    number += a * v  # wh2's input
    number += FLOAT32 * cfg.dim + 2 * FLOAT32 + a * cfg.dim  # feed_forward.norm: its input, statistics; its output
    number += (4 if cfg.swiglu else 2) * a * f  # fc1, silu; fc3 and the product
    number += a * d if cfg.rescale_ffn else 0
    turns = 2 * FLOAT32 * cfg.qk_head_dim * (work.length // layout.cp)  # cosines and sines, for q and for k
    return number * tokens + turns + kept


def _kept_states(cfg: MegalodonConfig, work: Work, layout: Layout, activation: int) -> int:
    """States that CEMA's kernels keep at the edges of groups of steps."""
    length = work.length // layout.cp
    dtype = next(dtype for dtype in ACTIVATION_DTYPES if dtype.itemsize == activation)
    return kept_states(length, cfg.cema_ndim, dtype) if work.gpu else 0


def saved_by_layers(cfg: MegalodonConfig, work: Work, layout: Layout, layers: int) -> int:
    """Bytes kept of one forward pass of `layers` layers."""
    if work.checkpointing.isdigit():
        full = layers // int(work.checkpointing)
        of_full, of_none = (saved_by_layer(cfg, work, layout, mode) for mode in ("full", "none"))
        return full * of_full + (layers - full) * of_none
    return layers * saved_by_layer(cfg, work, layout, work.checkpointing)


def loss_bytes(cfg: MegalodonConfig, work: Work, layout: Layout) -> int:
    """Bytes of logits, loss and their gradients at the worst moment.

    A compiled loss reads the logits and writes their gradient. An eager one holds three float32 copies: the logarithms
    of the softmax, their gradient, and that of the logits in float32.
    """
    tokens = work.rows * work.length // layout.cp
    own = -(-cfg.n_outputs // layout.tp)
    number = own if work.loss_parallel else cfg.n_outputs
    copies = 2 * work.low_bytes if work.compiled_loss else 3 * FLOAT32
    if work.loss_rows and layout.tp == layout.pp == 1:
        # The gradients of features and weight are there at once, the weight's as a float32 sum.
        gradients = tokens * cfg.dim * work.low_bytes + FLOAT32 * own * cfg.dim
        return min(tokens, work.loss_rows) * own * copies + gradients
    gathered_from = own * work.low_bytes if number != own else 0
    return tokens * (number * copies + gathered_from)


def layer_backward_bytes(cfg: MegalodonConfig, work: Work, layout: Layout) -> int:
    """Bytes of one layer's backward pass: what is recomputed, and the gradients at its widest place.

    Those are taken to be three of the widest activation's size and one of the residual stream's. A compiled layer
    recomputes what selection by op would keep, and for a while TimestepNorm, CEMA and the values.
    """
    a, tokens = work.low_bytes, work.rows * work.length // layout.cp
    mode = "full" if work.checkpointing.isdigit() else work.checkpointing
    if work.compiled and mode != "none":
        again = a * tokens * (2 * cfg.dim + cfg.value_dim) // layout.tp
        again += saved_by_layer(cfg, work, layout, "op") if mode == "full" else 0
        return again + a * tokens * (cfg.dim + 3 * max(cfg.value_dim, cfg.ffn_dim) // layout.tp)
    everything = saved_by_layer(cfg, work, layout, "none")
    again = 0 if mode == "none" else max(0, everything - saved_by_layer(cfg, work, layout, mode))
    widest = 3 * max(cfg.value_dim, cfg.ffn_dim) // layout.tp
    return again + a * tokens * (cfg.dim + widest)


def gathered_bytes(parameters: list[Parameter], work: Work, layout: Layout, reshard: bool) -> int:
    """Bytes of unsharded weights and gradients on a rank that holds these parameters.

    With `reshard` two layers' weights (one in use, one being gathered) and one layer's gradients, in the low dtype and
    as the float32 numbers that are reduced. Without it all layers' weights, and the gradients of all layers if several
    microbatches add up before they are reduced. The output layer's weight and the float32 group stay in any case.
    """
    tp, low = layout.tp, work.low_bytes
    matrices = sum(p.numel(tp) for p in parameters if not p.is_small)
    if layout.gpus == 1:
        return matrices * low if low < FLOAT32 else 0  # autocast's copies
    if not layout.has_fsdp and low == FLOAT32:
        return 0
    small = sum(p.numel(tp) for p in parameters if p.is_small)
    layer = sum(p.numel(tp) for p in parameters if not p.is_small and p.name.startswith("layers.0."))
    ends = [p.numel(tp) for p in parameters if not p.is_small and not p.name.startswith("layers.")]
    weights = 2 * layer + max(ends, default=0) if reshard else matrices
    gradients = matrices if work.microbatches > 1 else layer
    return weights * low + layer * low + gradients * FLOAT32 + 2 * small * FLOAT32


def rank_memory(
    cfg: MegalodonConfig, parameters: list[Parameter], work: Work, layout: Layout, stage: Stage, reshard: bool
) -> Memory:
    """The memory of a rank that holds `stage`; `parameters` are those of the whole model."""
    own = parameters_on(parameters, stage)
    numel = sum(p.numel(layout.tp, layout.shards) for p in own)
    saved = stage.in_flight * saved_by_layers(cfg, work, layout, stage.layers)
    at_work = layer_backward_bytes(cfg, work, layout)
    if stage.last:
        a, tokens = work.low_bytes, work.rows * work.length // layout.cp
        # The final norm's input and its output, which the output layer reads: in one piece.
        saved += tokens * (a * (cfg.dim // layout.tp + cfg.dim) + 2 * FLOAT32 * cfg.norm_groups // layout.tp)
        at_work = max(at_work, loss_bytes(cfg, work, layout))
    gathered = gathered_bytes(own, work, layout, reshard)
    return Memory(numel * PARAMETER, numel * GRADIENT, numel * MOMENTS, gathered, saved, at_work)
