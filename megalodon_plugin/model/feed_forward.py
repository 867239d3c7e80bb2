"""The feed-forward network with the two-hop residual (arXiv 2404.08801, section 3.4)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MegalodonConfig
from .init import init_linear
from .norm import LayerNorm
from .rank_hooks import LocalView, identity


class FeedForward(nn.Module):
    """(y, x) -> x + [alpha] fc2(silu(fc1 u) [fc3 u]), u = LayerNorm(y), (B, L, D).

    y is the attention block's output, x that block's *input*: the residual makes two hops. fc3 only with swiglu, alpha
    (a learned scale a channel) only with rescale_ffn.
    """

    def __init__(self, cfg: MegalodonConfig, layer_id: int = 0):
        super().__init__()
        self.cfg, self.layer_id = cfg, layer_id
        self.local_view: LocalView = identity
        self.norm = LayerNorm(cfg.dim, cfg.norm_eps, cfg.norm_affine)
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.fc3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False) if cfg.swiglu else None
        self.fc2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.alpha = nn.Parameter(torch.ones(cfg.dim)) if cfg.rescale_ffn else None

    def init_weights(self) -> None:
        self.norm.init_weights()
        for linear in (self.fc1, self.fc2, self.fc3):
            if linear is not None:
                init_linear(linear, self.cfg.init_mode)
        if self.alpha is not None:
            nn.init.constant_(self.alpha, 0.1 * 0.5**self.layer_id)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        u = self.norm(y)
        hidden = F.silu(self.fc1(u))  # (B, L, F)
        if self.fc3 is not None:
            hidden = hidden * self.fc3(u)
        hidden = F.dropout(hidden, self.cfg.hidden_dropout, self.training)
        out = F.dropout(self.fc2(hidden), self.cfg.dropout, self.training)
        if self.alpha is not None:
            out = out * self.local_view(self.alpha).to(out.dtype)
        return residual + out
