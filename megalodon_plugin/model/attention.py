"""Megalodon's attention block: CEMA, normalised attention inside chunks, gates (arXiv 2404.08801, section 3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_plugin.ops import chunk_attention
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition

from .cema import CEMA
from .chunk_cache import attend_after_cache, attend_in_place, first_cache
from .config import MegalodonConfig
from .init import init_linear
from .norm import RMSNorm, TimestepNorm, at_least_float32
from .rank_hooks import LocalView, identity
from .rotary import Rotary
from .state import LayerState


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

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        position: Tensor | None = None,
        return_state: bool = False,
        in_place: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """The block on a piece (B, L, D) after `state`; `position` (B,) timesteps come before it (None: none do).

        With `in_place`, for one timestep, the state's caches of keys and values are written and not copied.
        """
        cfg = self.cfg
        t, norm_state = self.timestep_norm(x, None if state is None else state.norm)
        started = self.cema.start(t)
        v = F.silu(self.wv(t)).unflatten(2, (-1, cfg.value_head_dim))  # (B, L, H, V/H)
        e, h = self.cema(t, None if state is None else state.h, return_state, started)
        m = self._hidden_dropout(self.rms_norm(e))
        steps = torch.arange(x.shape[1], device=x.device)
        positions = (steps if position is None else position.unsqueeze(1) + steps) % cfg.chunk_size
        q, k = self.qk(self.wz(m), positions)  # (B, L, H, Z/H)
        r = F.silu(self.wr(m))  # (B, L, V)
        if state is None:
            attended = self._attend(q, k, v)
            cache = (first_cache(k, cfg.chunk_size), first_cache(v, cfg.chunk_size)) if return_state else None
        elif state.k.shape[1] == 0:  # whole chunks after whole chunks
            attended, cache = self._attend(q, k, v), (state.k, state.v)
        elif in_place:
            assert position is not None
            attended, cache = attend_in_place(q, k, v, state.k, state.v, position), (state.k, state.v)
        else:
            assert position is not None
            attended, new_k, new_v = attend_after_cache(q, k, v, state.k, state.v, position)
            cache = (new_k, new_v)
        gated = self._hidden_dropout(attended.flatten(2) * r)
        out = x + F.dropout(self.wh1(m) + self.wh2(gated), cfg.dropout, self.training)
        if not return_state:
            return out
        assert h is not None and cache is not None
        return out, LayerState(norm_state, h, *cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training and self.cfg.attention_dropout > 0:
            return chunk_attention_definition(q, k, v, self.cfg.chunk_size, self.cfg.attention_dropout)
        return chunk_attention(q, k, v, self.cfg.chunk_size)

    def _hidden_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.cfg.hidden_dropout, self.training)
