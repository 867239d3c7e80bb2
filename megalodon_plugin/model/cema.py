"""CEMA as a module: its parameters, in the authors' shapes, and their initialisation."""

import torch
from torch import Tensor, nn

from megalodon_plugin.ops import cema
from megalodon_plugin.ops.cema import CemaParameters

from .init import init_random, init_theta
from .rank_hooks import CemaPrefix, LocalView, identity


class CEMA(nn.Module):
    """Complex exponential moving average over time, per channel; see `ops.cema`.

    alpha, delta (D, N, 1), theta (D, 1, 1), gamma (D, N, 2), omega (D, 1).
    """

    def __init__(self, dim: int, order: int, cema_input: str, layer_id: int):
        super().__init__()
        self.cema_input, self.layer_id = cema_input, layer_id
        self.local_view: LocalView = identity
        self.prefix: CemaPrefix | None = None
        self.alpha = nn.Parameter(torch.zeros(dim, order, 1))
        self.delta = nn.Parameter(torch.zeros(dim, order, 1))
        self.theta = nn.Parameter(torch.zeros(dim, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(dim, order, 2))
        self.omega = nn.Parameter(torch.zeros(dim, 1))

    def init_weights(self) -> None:
        init_random(self.alpha, nn.init.normal_, std=0.2)
        init_random(self.delta, nn.init.normal_, std=0.2)
        init_theta(self.theta, self.layer_id)
        init_random(self.gamma, nn.init.normal_)
        self.gamma[..., 1].zero_()
        init_random(self.omega, nn.init.trunc_normal_, std=0.25, a=-1.0, b=1.0)

    def start(self, x: Tensor) -> Tensor | None:
        """Start the exchange that `forward` needs, if any; work that does not need CEMA can run before `forward`."""
        return None if self.prefix is None else self.prefix.start(x, self._parameters_here())

    def forward(self, x: Tensor, h0: Tensor | None = None, pending: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`ops.cema` of x (B, L, D) after the hidden state h0 (None: zero): y, and the hidden state after x.

        `pending` is what `start` returned for the same x; h0 then comes from the ranks before this one.
        """
        parameters = self._parameters_here()
        if self.prefix is not None and pending is not None:
            assert h0 is None
            h0 = self.prefix.before(pending, parameters, x.shape[1])
        y, h = cema(x, *parameters[:5], h0=h0, return_state=True, cema_input=self.cema_input)
        assert h is not None
        if self.prefix is not None and pending is not None:
            y = self.prefix.after(y, h, parameters)
        return y, h

    def _parameters_here(self) -> CemaParameters:
        own = (self.alpha, self.delta, self.theta, self.gamma, self.omega)
        alpha, delta, theta, gamma, omega = (self.local_view(parameter) for parameter in own)
        return CemaParameters(alpha, delta, theta, gamma, omega, self.cema_input == "paper")
