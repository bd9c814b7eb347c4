"""A policy that needs no training."""

import torch

from twnn_plugin.policies import Policy


class EvenRows(Policy):
    """Iterates every other sample, from the first."""

    def forward(self, view):
        return torch.arange(view.open.numel(), device=view.open.device) % 2 == 0
