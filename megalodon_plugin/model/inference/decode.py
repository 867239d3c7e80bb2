"""One token after another from a carried state, under a CUDA graph where there is a GPU."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..model import Megalodon
from ..state import MegalodonState


class Decoder:
    """Owns the state of a batch and reads one token of each row a step, always in the same memory.

    On a GPU the step is captured once in a CUDA graph and replayed: a step is hundreds of small kernels, and launching
    them one by one takes far longer than running them.

    Args:
        model: in eval mode.
        state: taken over and changed; clone it to keep it.
        graph: whether to capture the step, by default on a GPU.
        compile: compile the layers' step: a few seconds of waiting, then half the kernels. Rounding differs.
    """

    @torch.no_grad()
    def __init__(self, model: Megalodon, state: MegalodonState, graph: bool | None = None, compile: bool = False):
        self._model = _with_compiled_layers(model) if compile else model
        # Of its own memory, contiguous: what was read may be views of larger tensors.
        self._state = state.map(lambda t: t.contiguous())
        self._tokens = torch.zeros_like(state.position)
        self._graph: torch.cuda.CUDAGraph | None = None
        if state.position.is_cuda if graph is None else graph:
            self._capture()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, vocabulary) after one more token of each row, (B,) int64. The next step overwrites them."""
        if self._graph is None:
            return self._model.step_(tokens, self._state)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits

    @property
    def state(self) -> MegalodonState:
        """A copy of the state after the steps so far."""
        return self._state.with_unused_zeroed().map(torch.clone)

    def _capture(self) -> None:
        # The first runs compile kernels and choose algorithms, which a graph cannot hold. They write nothing but what
        # is put back here and the caches' next entry, which the first real step writes again.
        small = [self._state.position, *self._state.norm]
        small += [t for layer in self._state.layers for t in (*layer.norm, layer.h)]
        saved = [t.clone() for t in small]

        def put_back() -> None:
            for t, old in zip(small, saved, strict=True):
                t.copy_(old)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._model.step_(self._tokens, self._state)
                put_back()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._model.step_(self._tokens, self._state)
        self._graph = graph


def _with_compiled_layers(model: Megalodon) -> Megalodon:
    """A model of the same parameters. The one given stays as it is: reading would compile for every length."""
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    layers = {
        name: cast(nn.Module, torch.compile(layer, fullgraph=True, dynamic=False))  # typed as a function
        for name, layer in model.layers.items()
    }
    compiled.layers = nn.ModuleDict(layers)
    return compiled
