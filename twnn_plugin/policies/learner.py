"""What policies that learn to pick layers share: what they perceive, and how they explore."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .base import Policy, SelectionPolicy
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["LearningPolicy", "perceive"]

_METRICS = (
    6  # entropy, highest probability, margin, cost, step and repeats; and each layer's count and residual
)


def perceive(view: SelectionView) -> Tensor:
    """(b, F) what an agent looks at.

    The layer-normalised pooled activations of every layer; of the present prediction the entropy, the highest
    probability and its margin to the next; cost and number of steps so far, how often in a row the last
    choice was made; how often each layer was iterated and how far it is from rest.
    """
    parts = [nn.functional.layer_norm(f, f.shape[1:]) for f in view.features]
    logits = view.logits.float()
    probability = logits.flatten(2).mean(dim=2).softmax(dim=1) if logits.dim() > 2 else logits.softmax(dim=1)
    best = probability.topk(min(2, probability.shape[1]), dim=1).values
    entropy = view.entropy
    metrics = torch.stack(
        [
            entropy,
            best[:, 0],
            best[:, 0] - best[:, -1],
            view.spent,
            torch.full_like(entropy, view.step),
            view.repeats.to(entropy.dtype),
        ],
        dim=1,
    )
    rest = view.residual.clamp_min(1e-8).log10() / 8 + 1  # 0 at 1e-8 and below, 1 at 1
    inputs = torch.cat([*parts, metrics, view.counts, rest], dim=1)
    # A broken sample must not reach the weights: zero times NaN is NaN.
    return torch.where(torch.isfinite(inputs).all(dim=1, keepdim=True), inputs, 0.0)


class LearningPolicy(SelectionPolicy):
    """A policy that learns: it belongs to one network, and makes a share of its choices at random in
    training.

    A subclass builds its networks in :meth:`build` and picks in :meth:`decide`.

    Args:
        name: as it is registered, for messages.
        hidden: width of the hidden layer.
        epsilon: share of random choices in training, in [0, 1]; see ``anneal``.
        final_epsilon: what it falls to; None: it stays.
        anneal: training steps over which it falls, linearly.

    Raises:
        OptionError: an impossible value.
    """

    def __init__(self, name: str, hidden: int, epsilon: float, final_epsilon: float | None, anneal: int):
        super().__init__()
        for option, value in (("hidden", hidden), ("anneal", anneal)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(
                    f"Option {option} of policy {name!r} must be a whole number >= 1; got {value!r}."
                )
        for option, share in (("epsilon", epsilon), ("final_epsilon", final_epsilon)):
            if share is not None:
                check_number(name, option, share, "in [0, 1]", lambda value: 0 <= value <= 1)
        self.hidden, self.anneal = hidden, anneal
        self.epsilon, self.final_epsilon = epsilon, epsilon if final_epsilon is None else final_epsilon
        self.override: float | None = None
        self.guide: tuple[Policy, ...] = ()  # in a tuple, so that it does not become a child
        self.layers: tuple[str, ...] = ()
        self.widths: tuple[int, ...] = ()
        self.trained: Tensor
        self.register_buffer("trained", torch.zeros((), dtype=torch.long))

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        if self.layers and (self.layers, self.widths) != (tuple(layers), tuple(widths)):
            raise OptionError(
                f"This agent was made for another network: it knows the layers {', '.join(self.layers)} of "
                f"widths {self.widths}; it was given {', '.join(layers)} of widths {tuple(widths)}. Make one "
                "for each network."
            )
        if self.layers:
            return
        self.layers, self.widths = tuple(layers), tuple(widths)
        self.build(sum(widths) + _METRICS + 2 * len(layers), len(layers))

    def select(self, view: SelectionView) -> Selection:
        return self.guide[0].select(view) if self.guide and self.training else self.decide(view)

    @abstractmethod
    def decide(self, view: SelectionView) -> Selection:
        """The agent's own choice: which layer each of the (b,) samples iterates next; none: it is done."""

    @abstractmethod
    def build(self, inputs: int, layers: int) -> None:
        """Make the networks: of (b, inputs) features, as :func:`perceive` gives them."""

    def choose_among(self, inputs: int, outputs: int, rest: float) -> None:
        """Make the usual networks: scores of the outputs, nearly alike at first, and the expected reward.

        Args:
            inputs: features.
            outputs: moves; the first is to iterate nothing.
            rest: initial logit of that one.
        """
        self.body = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU())
        self.score = nn.Linear(self.hidden, outputs)
        # The reward is estimated apart, so that fitting it does not move the choices.
        self.value = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)
        with torch.no_grad():
            self.score.bias[0] = rest

    def perceived(self, view: SelectionView) -> Tensor:
        """(b, F) in the dtype of the agent's weights."""
        weight = next(self.parameters(), None)
        if weight is None:
            raise OptionError("This agent belongs to no network yet: call bind(layers, widths) first.")
        return perceive(view).to(weight.dtype)

    def exploring(self) -> float:
        """The present share of random choices in training."""
        if self.override is not None:
            return self.override
        done = min(1.0, float(self.trained) / self.anneal)
        return self.epsilon + done * (self.final_epsilon - self.epsilon)

    def explore(self, share: float | None) -> None:
        """Make this share of choices at random in training, 1 all; None: what the schedule says."""
        if share is not None and not 0 <= share <= 1:
            raise OptionError(f"A share of random choices is in [0, 1]; got {share!r}.")
        self.override = share

    def follow(self, guide: Policy | None) -> None:
        """Leave the choices in training to another policy, from which nothing is learnt; None: no longer.

        For the warm-up of the network that the agent belongs to. The agent stays part of that network.

        Raises:
            OptionError: the guide was made for another network.
        """
        if guide is not None:
            guide.bind(self.layers, self.widths)
        self.guide = () if guide is None else (guide,)

    def stepped(self) -> None:
        """Called once for each training step: the share of random choices falls."""
        self.trained += 1

    def drawn(self, view: SelectionView, logits: Tensor, baseline: Tensor) -> Selection:
        """A choice drawn in training, with all that REINFORCE needs.

        Args:
            view: what it answers.
            logits: (b, N + 1) of NOP and each layer; -inf for what cannot be chosen.
            baseline: (b,) the reward that is expected.
        """
        count = len(view.layers)
        action, mixed, entropy = self.draw(logits)
        price = torch.cat([view.prices.new_zeros(1), view.prices]).to(mixed.dtype)
        return Selection(
            Selection.of_actions(action, count),
            log_prob=mixed.gather(1, action[:, None]).squeeze(1).clamp_min(1e-12).log(),
            entropy=entropy,
            expected_price=mixed @ price,
            baseline=baseline,
            preferred=Selection.of_actions(logits.detach().argmax(dim=1), count),
            distribution=mixed,
        )

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An action for each sample, the present share of them at random.

        Args:
            logits: (b, A); -inf for what cannot be chosen.

        Returns:
            (b,) actions; (b, A) the distribution that they were really drawn from, with its graph, or the
            gradient would be biased; (b,) the entropy of the policy's own.
        """
        share = self.exploring()
        log_p = logits.log_softmax(dim=1)
        probability = log_p.exp()
        possible = torch.isfinite(logits).to(probability.dtype)
        mixed = (1 - share) * probability + share * possible / possible.sum(dim=1, keepdim=True)
        if not logits.shape[0]:
            return torch.zeros(0, dtype=torch.long, device=logits.device), mixed, mixed.sum(dim=1)
        entropy = -(probability * log_p.masked_fill(possible == 0, 0.0)).sum(dim=1)
        return torch.multinomial(mixed.detach(), 1).squeeze(1), mixed, entropy
