"""What one rank exchanges in a training step, from the configuration and the degrees alone, and the time links take.

Every exchange is counted by its part: the bytes that a rank itself contributes to an all-gather, or keeps of a
reduce-scatter. Over P ranks (P - 1) parts cross a rank's link, and twice as many for an all-reduce.
"""

from dataclasses import dataclass

from megalodon_plugin.model import MegalodonConfig
from megalodon_plugin.parallel.layout import Layout

from .memory import FLOAT32, Parameter, Stage, Work, parameters_on


@dataclass(frozen=True)
class Exchange:
    """One collective as it recurs in a step, of one rank of the busiest stage."""

    dimension: str
    """"fsdp", "replicate", "tp", "cp" or "pp"."""
    what: str
    kind: str
    """"all-gather", "reduce-scatter", "all-reduce" or "send"."""
    ranks: int
    stride: int
    """Distance between neighbours of the group, in the order in which the host numbers the GPUs."""
    part: int
    """Bytes; of an all-reduce the P-th part of the tensor."""
    forward: int
    """Messages of one layer (or of what is no layer) in one forward pass, without what is recomputed."""
    backward: int
    """The same in one backward pass."""
    layers: int
    """Layers on the rank; 1 for what is no layer."""
    messages: float
    """In a step, over all layers and passes, with those that activation checkpointing repeats."""

    @property
    def sent(self) -> int:
        """Bytes that one message moves over a rank's link."""
        parts = {"all-reduce": 2 * (self.ranks - 1), "send": 1}.get(self.kind, self.ranks - 1)
        return parts * self.part


def exchanges_of_step(
    cfg: MegalodonConfig, parameters: list[Parameter], work: Work, layout: Layout, stage: Stage, reshard: bool
) -> list[Exchange]:
    """All exchanges of a rank that holds `stage`, except sums of single numbers (losses, norms, counts)."""
    found: list[Exchange] = []
    if layout.has_fsdp:
        found += _fsdp(parameters_on(parameters, stage), work, layout, stage, reshard)
    if layout.tp > 1:
        found += _tensor(cfg, work, layout, stage)
    if layout.cp > 1:
        found += _chunk(cfg, work, layout, stage)
    if layout.pp > 1:
        found.append(_pipeline(cfg, work, layout, stage))
    return found


def _again(work: Work) -> float:
    """Share of layers whose forward pass is recomputed in the backward pass."""
    if work.checkpointing.isdigit():
        return 1 / int(work.checkpointing)
    return 1.0 if work.checkpointing == "full" else 0.0


def _fsdp(own: list[Parameter], work: Work, layout: Layout, stage: Stage, reshard: bool) -> list[Exchange]:
    tp, shards, low = layout.tp, layout.shards, work.low_bytes
    matrices = [p for p in own if not p.is_small]
    layer = sum(p.numel(tp, shards) for p in matrices if p.name.startswith("layers.0."))
    # An untied embedding is its own group; the output layer's weights, and tied ones, are gathered once.
    tied = not any(p.name.startswith("output.") for p in matrices)
    embedding = sum(p.numel(tp, shards) for p in matrices if p.name.startswith("tok_embeddings."))
    output = sum(p.numel(tp, shards) for p in matrices if p.name.startswith("output."))
    small = sum(p.numel(tp, shards) for p in own if p.is_small)
    backward_passes = work.accumulation  # a pipeline's microbatches reduce their gradients together
    gathering_passes = work.accumulation * (work.microbatches if reshard else 1)
    again = 1 if reshard else 0
    groups = [("layer weights", layer, low, again, stage.layers)]
    groups += [("embedding weights", embedding, low, 0 if tied and stage.last else again, 1)]
    groups += [("output weights", output, low, 0, 1), ("float32 parameters", small, FLOAT32, 0, 1)]
    found = []
    for what, numel, item, backward, layers in groups:
        if not numel:
            continue
        if shards > 1:
            gathers = (1 + backward) * layers * gathering_passes
            shape = ("fsdp", what, "all-gather", shards, tp)
            found.append(Exchange(*shape, numel * item, 1, backward, layers, gathers))
            shape = ("fsdp", f"gradients of {what}", "reduce-scatter", shards, tp)
            found.append(Exchange(*shape, numel * FLOAT32, 0, 1, layers, layers * backward_passes))
        if layout.dp_replicate > 1:
            part = -(-numel * FLOAT32 // layout.dp_replicate)
            shape = ("replicate", f"gradients of {what}", "all-reduce", layout.dp_replicate, tp * shards)
            found.append(Exchange(*shape, part, 0, 1, layers, layers * backward_passes))
    return found


def _tensor(cfg: MegalodonConfig, work: Work, layout: Layout, stage: Stage) -> list[Exchange]:
    tp, a = layout.tp, work.low_bytes
    tokens = work.rows * work.length // layout.cp
    passes, part = work.microbatches * work.accumulation, a * tokens * cfg.dim // tp
    again = _again(work)
    gathers_again = 1.0 if work.checkpointing == "op" else again  # selective checkpointing keeps what is reduced

    def exchange(what: str, kind: str, part: int, forward: int, backward: int, layers: int, again: float) -> Exchange:
        messages = (forward * (1 + again) + backward) * layers * passes
        return Exchange("tp", what, kind, tp, 1, part, forward, backward, layers, messages)

    layers = stage.layers
    found = [
        exchange("features of a layer", "all-gather", part, 3, 0, layers, gathers_again),
        exchange("partial sums of a layer", "reduce-scatter", part, 2, 0, layers, again),
        exchange("gradients of what was reduced", "all-gather", part, 0, 2, layers, 0),
        exchange("gradients of gathered features", "reduce-scatter", part, 0, 3, layers, 0),
    ]
    if cfg.norm_affine:
        small = -(-cfg.dim * FLOAT32 // tp)
        found.append(exchange("gradients of whole norms", "all-reduce", small, 0, 3, layers, 0))
    if stage.first and cfg.tie_embedding:
        found.append(exchange("partial embeddings", "reduce-scatter", part, 1, 0, 1, 0))
        found.append(exchange("gradients of embeddings", "all-gather", part, 0, 1, 1, 0))
    if stage.last:
        found.append(exchange("the output layer's input", "all-gather", part, 1, 0, 1, 0))
        found.append(exchange("gradients of the output layer's input", "reduce-scatter", part, 0, 1, 1, 0))
        if not work.loss_parallel:
            logits = a * tokens * -(-cfg.n_outputs // tp)
            found.append(exchange("logits", "all-gather", logits, 1, 0, 1, 0))
    return found


def _chunk(cfg: MegalodonConfig, work: Work, layout: Layout, stage: Stage) -> list[Exchange]:
    norm = work.rows * cfg.norm_groups // layout.tp * 2 * FLOAT32
    state = work.rows * cfg.dim // layout.tp * cfg.cema_ndim * 2 * FLOAT32
    passes = work.microbatches * work.accumulation
    found = []
    for what, part in (("TimestepNorm's mean and variance", norm), ("CEMA's hidden state", state)):
        messages = (2 + _again(work)) * stage.layers * passes  # selective checkpointing keeps the gathered summaries
        group = ("cp", what, "all-gather", layout.cp, layout.tp)
        found.append(Exchange(*group, part, 1, 1, stage.layers, messages))
    if stage.last:
        group = ("cp", "the final norm's mean and variance", "all-gather", layout.cp, layout.tp)
        found.append(Exchange(*group, norm, 1, 1, 1, 2 * passes))
    return found


def _pipeline(cfg: MegalodonConfig, work: Work, layout: Layout, stage: Stage) -> Exchange:
    tokens = work.rows * work.length // layout.cp
    part = work.low_bytes * tokens * cfg.dim // layout.tp
    # A rank in the middle sends what it computed on, and its gradient back; the ends do one of both.
    forward, backward = int(not stage.last), int(not stage.first)
    messages = (forward + backward) * work.microbatches * work.accumulation
    stride = layout.gpus // layout.pp
    return Exchange("pp", "the residual stream", "send", layout.pp, stride, part, forward, backward, 1, messages)
