"""Carries the model's state from each row to the one that continues it in the next step (`[megalodon] carry_state`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torchtitan.components.loss import IGNORE_INDEX

from megalodon_plugin.model import Megalodon
from megalodon_plugin.model.state import MegalodonState


class CarriedStates:
    """The states of this rank's rows of a step, a batch for each of its micro steps, detached from their past.

    A row's state is carried to the same row of the next step, whose text continues its own, and is empty where a
    document begins: see `dataloader.DocumentLoader`. Every step passes tensors of the same shapes, the first one too,
    so a compiled model has one graph.

    Args:
        lanes: names of the rank's rows in the whole job, micro step by micro step.
        dtype: of the activations, and so of keys and values.
        whole_chunks: rows are of whole chunks: none is unfinished at a row's end, and no keys and values are held.
    """

    def __init__(
        self,
        model: Megalodon,
        lanes: Sequence[int],
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        whole_chunks: bool,
    ) -> None:
        empty = model.empty_state(batch_size, dtype)
        if whole_chunks:
            empty = empty.without_caches()
        self._empty = empty.to(device)
        self._lanes = lanes
        self._batch_size = batch_size
        self._states = [self._empty] * (len(lanes) // batch_size)
        self.begin_step()

    def begin_step(self) -> None:
        """The next micro step is the step's first."""
        self._micro_step = 0
        self._contexts: list[Tensor] = []
        self._filled: list[Tensor] = []

    def before(self, begins: Tensor, labels: Tensor) -> MegalodonState:
        """State before the rows of the next micro step, of which `begins` (batch,) are the first of a document."""

        def restarted(empty: Tensor, carried: Tensor) -> Tensor:
            return torch.where(begins.view(-1, *[1] * (carried.ndim - 1)), empty, carried).contiguous()

        state: MegalodonState = pytree.tree_map(restarted, self._empty, self._states[self._micro_step])
        self._contexts.append(state.position)
        self._filled.append((labels != IGNORE_INDEX).double().mean())
        return state

    def after(self, state: MegalodonState) -> None:
        """Keep what the model returned for them; gradients stop there."""
        self._states[self._micro_step] = state.detach()
        self._micro_step += 1

    def numbers_of_step(self) -> dict[str, float]:
        """Tokens that the step's rows had read before, in the mean and of the row with most, and the share of their
        places that holds text. Every rank of the job must call it.
        """
        context = torch.cat(self._contexts).double()
        own = torch.stack([context.mean(), context.max(), torch.stack(self._filled).mean()])
        of_ranks = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(of_ranks, own)
        means, longest, filled = of_ranks.view(-1, len(own)).cpu().unbind(1)
        return {
            "carried_context/mean(tokens)": float(means.mean()),
            "carried_context/longest(tokens)": float(longest.max()),
            "carried_context/filled(%)": 100 * float(filled.mean()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """New tensors, one a row and dtype, named by the row's place in the whole job and not by a rank."""
        named = {}
        for lane, row in self._rows():
            leaves = pytree.tree_leaves(row)
            for dtype in _dtypes(leaves):
                own = [leaf.flatten() for leaf in leaves if leaf.dtype == dtype]
                named[_name(lane, dtype)] = torch.cat(own)
        return named

    def load_state_dict(self, named: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on any number of ranks with as many rows in all."""
        rows = []
        for lane, row in self._rows():
            leaves, structure = pytree.tree_flatten(row)
            for dtype in _dtypes(leaves):
                places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
                parts = named[_name(lane, dtype)].split([leaves[i].numel() for i in places])
                for i, part in zip(places, parts, strict=True):
                    leaves[i] = part.to(leaves[i]).view_as(leaves[i])
            rows.append(pytree.tree_unflatten(leaves, structure))
        starts = range(0, len(rows), self._batch_size)
        self._states = [MegalodonState.joined(rows[start : start + self._batch_size]) for start in starts]

    def _rows(self) -> Iterator[tuple[int, MegalodonState]]:
        """(lane, state of that row alone)"""
        for i, lane in enumerate(self._lanes):
            yield lane, self._states[i // self._batch_size].select([i % self._batch_size])


class StateKeepingLoss:
    """A loss of logits that come with the state behind their rows, which it gives to `states` to keep."""

    def __init__(self, loss_fn: Any, states: CarriedStates) -> None:
        self._loss_fn, self._states = loss_fn, states

    def __call__(self, pred: tuple[Tensor, MegalodonState], labels: Tensor) -> Tensor:
        logits, state = pred
        self._states.after(state)
        return self._loss_fn(logits, labels)


def _dtypes(leaves: Sequence[Tensor]) -> list[torch.dtype]:
    return list(dict.fromkeys(leaf.dtype for leaf in leaves))


def _name(lane: int, dtype: torch.dtype) -> str:
    return f"carried_{str(dtype).removeprefix('torch.')}_{lane}"
