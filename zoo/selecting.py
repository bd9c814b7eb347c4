"""Training models whose layers a policy picks: phases, rewards, shares, and a watch over collapse."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twnn_plugin.errors import SelectionWarning
from twnn_plugin.policies.entropy import EntropyPolicy
from twnn_plugin.selection import LayerSelection, Reward, SelectionRecord, selection_of
from twnn_plugin.selection.learning import reward as reward_of
from twnn_plugin.selection.protocols import Follower, Learner

from .config import TrainConfig
from .errors import ConfigError

__all__ = ["PHASES", "Selecting", "SelectionSums", "collapse", "make_selecting", "reward_from", "rewards_of"]

PHASES = ("main", "agent", "both")
"""Who learns: the main model, with choices at random or by a rule; the agent, while the main model rests;
both."""

COLLAPSED = 0.98
_LEARNING = (
    *("policy_lr", "main_epochs", "main_share", "agent_epochs", "reward_alpha", "reward_beta"),
    *("reward_lambda", "reward_repeat", "reward_entropy", "reward_measure"),
)


class SelectionSums:
    """What was chosen, what it cost and what it earned, added up over samples.

    Args:
        layers: names of the N layers that can be iterated.
        device: of the sums.

    Attributes:
        sums: (4 + 2 (N + 1),) float64: samples, rewards, costs, decisions; decisions of each choice, NOP
            first; first decisions of each choice. Adding the sums of two processes gives the sums of both.
    """

    def __init__(self, layers: Sequence[str], device: torch.device | str = "cpu"):
        self.names = ("nop", *layers)
        self.sums = torch.zeros(4 + 2 * len(self.names), dtype=torch.float64, device=device)

    def update(self, record: SelectionRecord, rewards: Tensor | None = None) -> Tensor:
        """Add a pass, with the (B,) rewards of its samples if there are any; returns what was added."""
        new = torch.zeros_like(self.sums)
        count, device = len(self.names), new.device
        new[0] = record.spent.shape[0]
        if rewards is not None:
            new[1] = rewards.sum().to(device)
        new[2] = record.spent.sum().to(device)
        for place, decision in enumerate(record.decisions):
            chosen = decision.selection.layers
            picked = torch.cat([(~chosen.any(dim=1)).sum()[None], chosen.sum(dim=0)]).to(device, new.dtype)
            new[3] += decision.index.numel()
            new[4 : 4 + count] += picked
            if place == 0:
                new[4 + count :] += picked
        self.sums += new
        return new

    def figures(self, sums: Tensor | None = None) -> dict[str, float]:
        """Means a sample and shares of the decisions, from these sums or from others of the same kind.

        ``cost`` is what was computed after the open-loop pass, as a share of the network's multiply-adds.
        """
        values = (self.sums if sums is None else sums).tolist()
        samples, decisions = max(values[0], 1.0), max(values[3], 1.0)
        shares = zip(self.names, values[4 : 4 + len(self.names)], strict=True)
        return {
            "reward": values[1] / samples,
            "cost": values[2] / samples,
            **{f"share_{name}": picked / decisions for name, picked in shares},
        }

    def first_shares(self) -> dict[str, float]:
        """Shares of the first decision of each sample."""
        first = self.sums[4 + len(self.names) :].tolist()
        samples = max(float(self.sums[0]), 1.0)
        return {name: picked / samples for name, picked in zip(self.names, first, strict=True)}


class Selecting:
    """What a run does for a model with a selection: phases, rewards, and a watch over the choices.

    Args:
        config: the settings.
        selection: of the model.

    Attributes:
        learner: the policy, if it learns.
        reward: what it learns from.
        sums: of the training epoch that is running.
    """

    def __init__(self, config: TrainConfig, selection: LayerSelection, device: torch.device):
        self.config, self.selection = config, selection
        self.learner = selection.policy if isinstance(selection.policy, Learner) else None
        self.reward = reward_from(config)
        self.sums = SelectionSums(selection.iterated, device)
        self.frozen: list[nn.Parameter] = []
        self.told: str | None = None
        if self.learner is None:
            self.main_epochs, self.agent_epochs = 0, 0
            return
        if config.mixup or config.cutmix:
            raise ConfigError("The agent's reward needs one label a sample: leave mixup and cutmix at 0.")
        main, agent = config.main_epochs, config.agent_epochs
        self.main_epochs = config.epochs // 5 if main is None else main
        self.agent_epochs = config.epochs // 10 if agent is None else agent
        if self.main_epochs + self.agent_epochs > config.epochs:
            raise ConfigError(
                f"main_epochs={self.main_epochs} and agent_epochs={self.agent_epochs} are more than "
                f"epochs={config.epochs} together; take fewer."
            )
        if config.main_share is not None and not self.main_epochs:
            raise ConfigError(
                f"main_share={config.main_share} would do nothing: main_epochs is 0 (by default a fifth of "
                f"epochs={config.epochs}). Set main_epochs to 1 or more, or leave main_share out."
            )
        if config.main_share is not None and not isinstance(self.learner, Follower):
            raise ConfigError(
                f"main_share={config.main_share} needs an agent that lets a rule choose meanwhile, as "
                f"'dynalay' does; policy {config.policy!r} has no method 'follow'. Leave it out."
            )

    @property
    def agent(self) -> list[nn.Parameter]:
        """The parameters of a policy that learns."""
        return [] if self.learner is None else list(self.selection.policy.parameters())

    def phase(self, epoch: int) -> str:
        """One of :data:`PHASES`; policies that do not learn have the last alone."""
        if epoch < self.main_epochs:
            return "main"
        return "agent" if epoch < self.main_epochs + self.agent_epochs else "both"

    def counts(self, epoch: int) -> bool:
        """Whether the epoch may be the best one: not before the agent has learnt anything."""
        return self.phase(epoch) != "main" or self.main_epochs >= self.config.epochs

    def begin(self, epoch: int, model: nn.Module) -> None:
        """Set modes, exploration and who rests; ``model`` is in training mode."""
        phase = self.phase(epoch)
        if self.learner is None:
            return
        self.learner.explore(1.0 if phase == "main" else None)
        self._guide(phase == "main")
        mine = {id(parameter) for parameter in self.agent}
        everyone = list(model.parameters())
        rests = {"main": True, "agent": False}
        self.frozen = [] if phase == "both" else [p for p in everyone if (id(p) in mine) == rests[phase]]
        if phase == "agent":
            # The agent learns about the network as it is used: running statistics, no dropout.
            model.eval()
            self.selection.training = True
            self.selection.policy.train()

    def end(self) -> None:
        """Give the policy its choices and its own schedule of exploration back."""
        if self.learner is not None:
            self.learner.explore(None)
            self._guide(False)

    def _guide(self, wanted: bool) -> None:
        share = self.config.main_share
        if share is None or not isinstance(self.learner, Follower):
            return
        alike = [1.0] * len(self.selection.iterated)
        self.learner.follow(EntropyPolicy(share=share, weights=alike) if wanted else None)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what rests as it is: without a gradient there is no update and no weight decay either."""

        def drop(*_: Any) -> None:
            for parameter in self.frozen:
                parameter.grad = None

        optimizer.register_step_pre_hook(drop)

    def teaches(self, epoch: int) -> bool:
        """Whether the agent's loss counts."""
        return self.learner is not None and self.phase(epoch) != "main"

    def update(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """After an update of the weights: sums of this batch, see :class:`SelectionSums`."""
        record = self.selection.last
        assert record is not None
        added = self.sums.update(record, rewards_of(record, logits, targets, self.reward))
        if self.learner is not None and self.teaches(epoch):
            self.learner.stepped()
        return added

    def check(self, sums: SelectionSums, epoch: int) -> str | None:
        """Warn where the choices on validation data have collapsed; the text, or None.

        On validation data, since exploration hides it in training. The same takeover is told once.
        """
        if self.learner is None or self.phase(epoch) == "main":
            return None
        action = collapse(sums)
        if action is None or action == self.told:
            self.told = action
            return None
        self.told = action
        text = _advice(action, sums.first_shares()[action], self.config)
        warnings.warn(text, SelectionWarning, stacklevel=2)
        return text

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside the sums: the policy's state is with the model's."""
        return {"told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self.told = state["told"]


def make_selecting(config: TrainConfig, model: nn.Module, device: torch.device) -> Selecting | None:
    """For a model with a selection; None for others.

    Raises:
        ConfigError: settings of an agent, and there is none.
    """
    selection = selection_of(model)
    made = None if selection is None else Selecting(config, selection, device)
    plain = TrainConfig()
    names = _LEARNING if made is None or made.learner is None else ()
    if made is None:
        names = (*names, "closed_weight")
    for name in names:
        if getattr(config, name) != getattr(plain, name):
            reason = (
                "has no layers that a policy picks" if made is None else "has a policy that does not learn"
            )
            raise ConfigError(
                f"{name}={getattr(config, name)!r} would do nothing: the model {config.model!r} {reason}. "
                "Take a dynalay_ model with policy dynalay, or leave it out."
            )
    return made


def reward_from(config: TrainConfig) -> Reward:
    """The reward that the settings of a run describe."""
    return Reward(
        alpha=config.reward_alpha,
        beta=config.reward_beta,
        repeat=config.reward_repeat,
        weight=config.reward_lambda,
        measure=config.reward_measure,
        entropy=config.reward_entropy,
    )


@torch.no_grad()
def rewards_of(record: SelectionRecord, logits: Tensor, targets: Tensor, reward: Reward) -> Tensor:
    """(B,) rewards of the last pass (equation 2 of Mathur & Plis 2023)."""
    return reward_of(record, logits.float(), targets, reward)


def collapse(sums: SelectionSums) -> str | None:
    """The choice that nearly every sample makes first, or None."""
    shares = sums.first_shares()
    action = max(shares, key=lambda name: shares[name])
    return action if shares[action] >= COLLAPSED else None


def _advice(action: str, share: float, config: TrainConfig) -> str:
    found = f"it chose {action!r} first for {100 * share:.1f} % of the validation samples"
    head = f"The agent has collapsed: {found}. "
    entropy = f"raise reward_entropy={config.reward_entropy:g} or the policy's epsilon"
    if action == "nop":
        return head + (
            f"To have it iterate, lower reward_beta={config.reward_beta:g} (the price of multiply-adds), "
            f"{entropy}, or warm the main model up for longer (main_epochs)."
        )
    return head + f"To have it spare easy samples, raise reward_beta={config.reward_beta:g}, or {entropy}."
