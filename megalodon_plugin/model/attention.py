"""Megalodon's attention block: CEMA, normalised attention inside chunks, gates (arXiv 2404.08801, section 3)."""

import math
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_plugin.ops import chunk_attention
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition

from .cema import CEMA
from .chunk_cache import attend_after
from .config import MegalodonConfig
from .init import init_linear
from .norm import RMSNorm, TimestepNorm, at_least_float32
from .rank_hooks import LocalView, identity
from .rotary import Rotary
from .state import LayerPast, LayerState


class QueryKey(nn.Module):
    """Queries and keys from the shared representation z, (B, L, Z) -> two of (B, L, H, Z/H).

    Each head of z is normalised (RMSNorm without a weight), then q, k = z (gamma + 1)/sqrt(Z/H) + beta with row 0 of
    gamma and beta (2, Z) for q and row 1 for k, then RoPE with the position inside the chunk.
    """

    def __init__(self, cfg: MegalodonConfig):
        super().__init__()
        self.head_dim, self.eps = cfg.qk_head_dim, cfg.norm_eps
        self.local_view: LocalView = identity
        self.gamma = nn.Parameter(torch.zeros(2, cfg.z_dim))
        self.beta = nn.Parameter(torch.zeros(2, cfg.z_dim))
        self.rotary = Rotary(cfg.qk_head_dim, cfg.chunk_size, cfg.rope_theta)

    def init_weights(self) -> None:
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, z: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        heads = at_least_float32(z).unflatten(2, (-1, self.head_dim))  # all heads, or those of this rank
        heads = F.rms_norm(heads, (self.head_dim,), None, self.eps)
        gain = ((self.local_view(self.gamma) + 1) / math.sqrt(self.head_dim)).unflatten(1, (-1, self.head_dim))
        shift = self.local_view(self.beta).unflatten(1, (-1, self.head_dim))
        q, k = (self.rotary(heads * gain[row] + shift[row], positions).to(z.dtype) for row in (0, 1))
        return q, k


class MegalodonAttention(nn.Module):
    """x -> x + the attention block's output, (B, L, D).

    t = TimestepNorm(x); m = RMSNorm(CEMA(t)); q, k from wz(m); v = silu(wv(t)); r = silu(wr(m));
    out = x + wh1(m) + wh2(attention(q, k, v) * r), with the dropouts of the paper's recipe in between.
    """

    def __init__(self, cfg: MegalodonConfig, layer_id: int = 0):
        super().__init__()
        self.cfg = cfg
        self.timestep_norm = TimestepNorm(cfg.dim, cfg.norm_groups, cfg.norm_eps)
        self.cema = CEMA(cfg.dim, cfg.cema_ndim, cfg.cema_input, layer_id)
        self.rms_norm = RMSNorm(cfg.dim, cfg.norm_eps, cfg.norm_affine)
        self.wz = nn.Linear(cfg.dim, cfg.z_dim)
        self.qk = QueryKey(cfg)
        self.wv = nn.Linear(cfg.dim, cfg.value_dim)
        self.wr = nn.Linear(cfg.dim, cfg.value_dim)
        self.wh1 = nn.Linear(cfg.dim, cfg.dim)
        self.wh2 = nn.Linear(cfg.value_dim, cfg.dim, bias=False)

    def init_weights(self) -> None:
        for part in (self.timestep_norm, self.cema, self.rms_norm, self.qk):
            part.init_weights()
        for linear in (self.wz, self.wv, self.wr, self.wh1, self.wh2):
            init_linear(linear, self.cfg.init_mode)

    @overload
    def forward(self, x: Tensor, past: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, past: LayerPast) -> tuple[Tensor, LayerState]: ...

    def forward(self, x: Tensor, past: LayerPast | None = None) -> Tensor | tuple[Tensor, LayerState]:
        """The output (B, L, D) for rows from their start; for a piece after `past` the output and the state after it.

        One method for both, for activation checkpointing wraps the module's call.
        """
        return self._rows(x) if past is None else self._piece(x, past)

    def _rows(self, x: Tensor) -> Tensor:
        t, _ = self.timestep_norm(x)
        pending = self.cema.start(t)
        v = self._values(t)  # needs nothing of CEMA, so that the exchange is hidden
        e, _ = self.cema(t, pending=pending)
        m = self._hidden_dropout(self.rms_norm(e))
        q, k, r = self._queries_keys_gates(m, torch.arange(x.shape[1], device=x.device))
        return self._output(x, m, self._attend(q, k, v), r)

    def _piece(self, x: Tensor, past: LayerPast) -> tuple[Tensor, LayerState]:
        assert self.cema.prefix is None, "a state belongs to whole rows, not to slices of ranks"
        state = past.state
        t, norm_state = self.timestep_norm(x, None if state is None else state.norm)
        v = self._values(t)
        e, h = self.cema(t, None if state is None else state.h)
        m = self._hidden_dropout(self.rms_norm(e))
        steps = torch.arange(x.shape[1], device=x.device)
        q, k, r = self._queries_keys_gates(m, steps if state is None else past.position.unsqueeze(1) + steps)
        attended, new_k, new_v = attend_after(past, q, k, v, self.cfg.chunk_size, self._attend)
        return self._output(x, m, attended, r), LayerState(norm_state, h, new_k, new_v)

    def _values(self, t: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, H, V/H)"""
        return F.silu(self.wv(t)).unflatten(2, (-1, self.cfg.value_head_dim))

    def _queries_keys_gates(self, m: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D), positions in the text (L,) or (B, L) -> two of (B, L, H, Z/H), and (B, L, V)"""
        q, k = self.qk(self.wz(m), positions % self.cfg.chunk_size)
        return q, k, F.silu(self.wr(m))

    def _output(self, x: Tensor, m: Tensor, attended: Tensor, r: Tensor) -> Tensor:
        gated = self._hidden_dropout(attended.flatten(2) * r)
        return x + F.dropout(self.wh1(m) + self.wh2(gated), self.cfg.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Chunk attention of rows whose first timestep begins a chunk."""
        if self.training and self.cfg.attention_dropout > 0:
            return chunk_attention_definition(q, k, v, self.cfg.chunk_size, self.cfg.attention_dropout)
        return chunk_attention(q, k, v, self.cfg.chunk_size)

    def _hidden_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.cfg.hidden_dropout, self.training)
