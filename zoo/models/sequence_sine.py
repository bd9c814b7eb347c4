"""The network of task B of Habiba & Pearlmutter (2021): algorithms 3 and 4, a wave out of a fixed point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WaveNet"]


class WaveNet(nn.Module):
    """``y_t = sigmoid(w2 h + b2)`` with ``h = tanh(w1 x_t + b1)``, iterated to a fixed point.

    Algorithm 3 writes ``net(f, alpha, x_t)`` with w1, b1, w2, b2 and no state; algorithm 4 calls
    ``fix(net, alpha, inputs)``, and equation 3 with figure 2 say what is iterated: g is given the hidden
    units and the output of the step before, ``H_{t-1}, O_{t-1}``, nothing at first. So::

        h' = tanh(w1 [x_t, h, y] + b1)
        y' = sigmoid(w2 h' + b2)
        (h, y) = fix((h, y) -> (h', y')),   from zero

    ``fix`` takes a contraction, and so do its transforms: without one the adjoint's iteration grows without
    bound. The paper assumes it; here the part of w1 that multiplies (h, y) is kept within ``rate`` by
    :func:`twnn_plugin.contractive`.

    Args:
        hidden: units; the paper does not say.
        gain: norm of the recurrent part of w1 at the start.
        rate: its greatest norm, below 1.
        reach: range of the first layer's input weights, so that its units bend at different times.
        solver: of :func:`twnn_plugin.fix`; the paper iterates plainly.
        adjoint: likewise; ``"ad_fixed_point"`` is equation 8.
        tol: the paper's tolerance.
        max_iter: the paper's greatest number of iterations.

    Attributes:
        last: the solution of the newest solve.
    """

    def __init__(
        self,
        hidden: int = 32,
        gain: float = 0.5,
        rate: float = 0.8,
        reach: float = 6.0,
        solver: str = "ad_fixed_point",
        adjoint: str = "ad_fixed_point",
        tol: float = 1e-3,
        max_iter: int = 300,
    ):
        super().__init__()
        # Here rather than above: importing twnn_plugin imports the zoo's models.
        import twnn_plugin as tw

        self.hidden = hidden
        self.w1 = nn.Linear(1, hidden)
        self.back = nn.Linear(hidden + 1, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 1)
        self.options: dict[str, Any] = {
            "solver": solver,
            "adjoint": adjoint,
            "tol": tol,
            "max_iter": max_iter,
        }
        self.last: Any = None
        with torch.no_grad():
            nn.init.uniform_(self.w1.weight, -reach, reach)
            nn.init.uniform_(self.w1.bias, -reach, reach)
            nn.init.orthogonal_(self.back.weight[:, :hidden], gain)
            self.back.weight[:, hidden:].zero_()
        tw.contractive(self.back, rate)

    def net(
        self, state: tuple[Tensor, Tensor], x: Tensor, back: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 3: hidden units (N, hidden) and output (N, 1) of the next iteration, for x (N, 1).

        ``back``: the weight of that name, where it has been worked out already.
        """
        back = self.back.weight if back is None else back
        hidden = torch.tanh(self.w1(x) + F.linear(torch.cat(state, dim=1), back))
        return hidden, torch.sigmoid(self.w2(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Algorithm 4, line 3: inputs (N, 1) to predictions (N, 1), each at its own fixed point."""
        import twnn_plugin as tw

        back = self.back.weight  # once a solve: a constrained weight is worked out at each access
        nothing = (x.new_zeros(len(x), self.hidden), x.new_zeros(len(x), 1))
        self.last = tw.fix(lambda z, x: self.net(z, x, back), nothing, x, **self.options)
        return self.last.value[1]
