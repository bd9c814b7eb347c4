"""Networks whose layers a policy picks from: only what was chosen runs, and each learns its own part."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.blocks import SolveSettings
from twnn_plugin.errors import MapError, OptionError, UnknownNameError
from twnn_plugin.policies import Policy
from twnn_plugin.policies.base import SelectionPolicy
from twnn_plugin.policies.dynalay import DynaLayPolicy
from twnn_plugin.policies.entropy import EntropyPolicy
from twnn_plugin.policies.selection import Selection, SelectionView
from twnn_plugin.selection import Connection, LayerSelection, Reward, policy_loss
from twnn_plugin.selection.learning import reward

LAYERS = ("layer1", "layer2", "layer3")


class Fixed(SelectionPolicy):
    """Answers with a given table: one row of choices (B,) for each step; 0 is NOP."""

    def __init__(self, *steps: list[int]):
        super().__init__()
        self.steps = [torch.tensor(step) for step in steps]

    def select(self, view: SelectionView) -> Selection:
        if view.step >= len(self.steps):
            return Selection(torch.zeros(view.rows, len(view.layers), dtype=torch.bool))
        return Selection(Selection.of_actions(self.steps[view.step][view.index], len(view.layers)))


class Net(nn.Module):
    """Three convolutional layers, a head and a selection."""

    def __init__(self, policy: Policy, drop: float = 0.0, **options: object):
        super().__init__()
        torch.manual_seed(3)
        self.layer1, self.layer2, self.layer3 = _layer(1, 4, drop), _layer(4, 6, drop), _layer(6, 8, drop)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        layers = {name: self.get_submodule(name) for name in LAYERS}
        self.selection = LayerSelection(layers, self.head, torch.zeros(2, 1, 12, 12), policy, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.selection(x)

    def plain(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(x))))


def _layer(channels: int, width: int, drop: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.Tanh(),
        nn.Dropout(drop),
    )


def _images(batch: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def _count_rows(net: Net) -> list[int]:
    rows = [0, 0, 0, 0]
    for place, module in enumerate((net.layer1, net.layer2, net.layer3, net.head)):
        module.register_forward_hook(
            lambda m, args, out, place=place: rows.__setitem__(place, rows[place] + args[0].shape[0])
        )
    return rows


class TestForward:
    def test_nop_is_the_plain_network_bit_for_bit(self) -> None:
        net = Net(tw.policy("never")).eval()
        x = _images()
        assert torch.equal(net(x), net.plain(x))
        assert net.selection.last is not None
        assert net.selection.last.multiply_adds == 0

    def test_a_chosen_layer_is_at_its_fixed_point_and_the_rest_follows(self) -> None:
        settings = SolveSettings(tol=1e-6, max_iter=200)
        net = Net(Fixed([2, 0, 2, 1, 3, 0]), connection=Connection(scale=0.5), settings=settings).eval()
        x = _images()
        with torch.no_grad():
            logits = net(x)
            h = net.layer1(x)
            z = net.layer2(h)
            for _ in range(200):
                z = net.layer2(h + net.selection.feedbacks[1].message(z, h.shape))
            wanted = net.head(net.layer3(z))
            torch.testing.assert_close(logits[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits[[1, 5]], net.plain(x)[[1, 5]], rtol=0, atol=0)
            assert (logits[[0, 2, 3, 4]] - net.plain(x)[[0, 2, 3, 4]]).abs().amax(dim=1).min() > 1e-4

    def test_only_what_was_chosen_runs(self) -> None:
        net = Net(Fixed([2, 0, 2, 1, 3, 0], [0, 0, 3, 0, 0, 0])).eval()
        x = _images()
        net.selection.costs(x)
        rows = _count_rows(net)
        with torch.no_grad():  # with gradients each solve ends with one evaluation more
            net(x)
        record = net.selection.last
        assert record is not None
        assert tuple(r - 6 for r in rows) == record.rows
        assert record.counts.tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
        # Layer 1 and what is before a choice never run again for it: sample 3 alone chose layer 1.
        assert record.rows[0] == int(record.steps[3, 0])
        assert record.rows[3] == 5  # the head: four samples, one of them twice

    def test_multiply_adds_are_those_that_a_counter_sees(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        net = Net(Fixed([2, 0, 2, 1, 3, 0])).eval()
        x = _images()
        net.selection.costs(x)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        record = net.selection.last
        assert record is not None
        assert record.open_loop * 6 + record.multiply_adds == counter.get_total_flops() // 2
        assert float(record.spent[1]) == 0
        assert math.isclose(float(record.spent.sum()) * record.open_loop, record.multiply_adds, rel_tol=1e-5)

    def test_several_layers_in_one_sweep(self) -> None:
        net = Net(tw.policy("always")).eval()
        net(_images())
        record = net.selection.last
        assert record is not None
        assert bool((record.counts == 1).all())
        assert len(record.decisions) == 2  # all, then none

    def test_a_result_does_not_depend_on_batch_mates(self) -> None:
        net = Net(Fixed([2, 0, 2, 1, 3, 0]), settings=SolveSettings(tol=1e-5, max_iter=100)).eval()
        x = _images()
        together = net(x)
        for row, action in enumerate((2, 0, 2, 1, 3, 0)):
            net.selection.policy = Fixed([action])
            torch.testing.assert_close(net(x[row : row + 1]), together[row : row + 1], rtol=1e-4, atol=1e-5)

    def test_choices_are_cut_off(self) -> None:
        net = Net(Fixed(*[[1] * 6] * 9), max_choices=4).eval()
        net(_images())
        record = net.selection.last
        assert record is not None
        assert bool((record.counts[:, 0] == 4).all())

    def test_an_empty_batch(self) -> None:
        net = Net(tw.policy("dynalay")).eval()
        assert net(_images(0)).shape == (0, 5)

    @pytest.mark.parametrize("policy", ["dynalay", "random", "always", "never", "entropy"])
    def test_policies_by_name(self, policy: str) -> None:
        net = Net(tw.policy(policy)).eval()
        torch.manual_seed(0)
        assert net(_images()).shape == (6, 5)
        assert abs(sum(net.selection.last.shares().values()) - 1) < 1e-5 or policy == "always"  # type: ignore[union-attr]

    def test_a_record_prints_as_a_table(self) -> None:
        net = Net(Fixed([2, 0, 2, 1, 3, 0])).eval()
        net(_images())
        text = str(net.selection.last)
        assert "nop" in text and "layer3" in text and "times the open-loop pass" in text

    def test_a_copy_chooses_alike(self) -> None:
        net = Net(tw.policy("dynalay", nop_bias=0.0)).eval()
        twin = copy.deepcopy(net)
        assert torch.equal(net(_images()), twin(_images()))
        with torch.no_grad():
            twin.layer1[0].weight.add_(1.0)  # type: ignore[index, operator, union-attr]
        assert not torch.equal(net(_images()), twin(_images()))


class TestTraining:
    def test_statistics_are_counted_once(self) -> None:
        net, plain = Net(Fixed([2, 0, 2, 1, 3, 0])), Net(tw.policy("never"))
        for model in (net, plain):
            model.train()
            model(_images())
        for mine, other in zip(net.layer2.buffers(), plain.layer2.buffers(), strict=True):
            assert torch.equal(mine, other)

    def test_dropout_holds_one_mask_in_a_pass(self) -> None:
        net = Net(Fixed([2] * 6), drop=0.5, settings=SolveSettings(tol=1e-5, max_iter=200)).train()
        torch.manual_seed(0)
        net(_images())
        record = net.selection.last
        assert record is not None
        assert bool((record.status == 0).all())

    def test_only_chosen_layers_get_the_fixed_points_gradient(self) -> None:
        # Equation 4: with sample 1 in the loss alone, only the connection that it chose learns.
        net = Net(Fixed([1, 2, 3, 0, 0, 0])).eval()
        x = _images()
        for sample, which in ((0, 0), (1, 1), (2, 2), (3, None)):
            net.zero_grad()
            net(x)[sample].sum().backward()
            for place, feedback in enumerate(net.selection.feedbacks):
                grads = [p.grad for p in feedback.parameters()]
                touched = any(g is not None and bool(g.abs().max() > 0) for g in grads)
                assert touched == (place == which)

    def test_the_gradient_is_that_of_the_equation(self) -> None:
        net = Net(Fixed([2, 0, 2, 1, 3, 0]), settings=SolveSettings(tol=1e-12, max_iter=300)).double().eval()
        x = _images().double().requires_grad_()
        # Along random directions: a difference quotient for each of the pixels would take most of a minute.
        assert torch.autograd.gradcheck(
            lambda x: net(x).sum(dim=0), (x,), atol=1e-6, rtol=1e-4, nondet_tol=1e-8, fast_mode=True
        )

    def test_a_layer_chosen_twice_keeps_its_unrolled_gradient_in_eval_mode(self) -> None:
        # The second solve begins at its solution and takes one step: the rest comes through its start.
        x, grads = _images(2).double().requires_grad_(), []
        for adjoint in ("unrolled", "implicit"):
            settings = SolveSettings(tol=1e-10, max_iter=200, adjoint=adjoint, solver="picard")
            net = Net(Fixed([2, 2], [2, 2]), connection=Connection(scale=0.5), settings=settings)
            net.double().eval()(x).square().sum().backward()
            assert x.grad is not None
            grads.append(x.grad)
            x.grad = None
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)

    def test_every_parameter_gets_a_gradient_whatever_is_chosen(self) -> None:
        for policy in (Fixed([0] * 6), Fixed([1] * 6), tw.policy("dynalay")):
            net = Net(policy).train()
            logits = net(_images())
            record = net.selection.last
            assert record is not None
            targets = torch.arange(6) % 5
            (F.cross_entropy(logits, targets) + policy_loss(record, logits, targets, Reward())).backward()
            assert [n for n, p in net.named_parameters() if p.grad is None] == []

    @pytest.mark.parametrize("estimator", ["reinforce", "gumbel"])
    def test_the_agent_and_the_network_learn_apart(self, estimator: str) -> None:
        torch.manual_seed(1)
        net = Net(tw.policy("dynalay", nop_bias=-2.0, estimator=estimator)).train()
        logits = net(_images())
        record = net.selection.last
        assert record is not None
        targets = torch.arange(6) % 5
        policy_loss(record, logits, targets, Reward()).backward()
        for name, parameter in net.named_parameters():
            mine = name.startswith("selection.policy")
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            assert reached <= mine, name
        assert net.selection.policy.score.weight.grad.abs().max() > 0  # type: ignore[union-attr]

    def test_straight_through_choices_are_taught_by_the_loss(self) -> None:
        torch.manual_seed(1)
        net = Net(tw.policy("dynalay", nop_bias=-2.0, estimator="gumbel")).train()
        logits = net(_images())
        F.cross_entropy(logits, torch.arange(6) % 5).backward()
        agent = net.selection.policy
        assert agent.score.weight.grad.abs().max() > 0  # type: ignore[union-attr]


class TestReward:
    def _record(self) -> tuple[Net, Tensor]:
        net = Net(Fixed([2, 0, 2, 1, 3, 0], [2, 0, 3, 0, 0, 0])).eval()
        return net, net(_images())

    def test_it_is_equation_two(self) -> None:
        net, logits = self._record()
        record = net.selection.last
        assert record is not None
        targets = logits.argmax(dim=1)
        settings = Reward(alpha=0.5, beta=0.3, repeat=0.1)
        value = reward(record, logits, targets, settings)
        wanted = 0.5 - 0.3 * record.spent
        wanted[0] -= 0.1  # chose layer 2 twice in a row
        torch.testing.assert_close(value, wanted)

    def test_quality_by_hand(self) -> None:
        logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.999, 0.001]]).log()
        targets = torch.tensor([0, 0, 1])
        for measure, wanted in (
            ("accuracy", [1.0, 0.0, 0.0]),
            ("probability", [0.9, 0.2, 0.001]),
            ("likelihood", [math.log(0.9), math.log(0.2), -4.0]),
        ):
            torch.testing.assert_close(Reward(measure=measure).quality(logits, targets), torch.tensor(wanted))

    def test_quality_is_a_mean_over_positions(self) -> None:
        logits = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]]).log()
        quality = Reward(measure="probability").quality(logits, torch.tensor([[0, 0]]))
        torch.testing.assert_close(quality, torch.tensor([0.55]))

    def test_reinforce_is_the_gradient_of_the_expected_reward(self) -> None:
        # One decision, two actions that matter: the average over draws against the exact derivative.
        net = Net(tw.policy("dynalay", epsilon=0.2, nop_bias=0.3), iterated=["layer2"], max_choices=1)
        net.train()
        for module in (net.layer1, net.layer2, net.layer3):
            module.eval()
        x, targets = _images(400, seed=5), torch.arange(400) % 5
        settings = Reward(alpha=1.0, beta=0.2, weight=1.0, critic=0.0, entropy=0.0, measure="likelihood")
        agent = net.selection.policy
        assert isinstance(agent, DynaLayPolicy)
        outcomes = []
        for action in (0, 1):
            net.selection.policy = Fixed([action] * 400)
            with torch.no_grad():
                logits = net(x)
            record = net.selection.last
            assert record is not None
            outcomes.append(settings.quality(logits, targets) - 0.2 * record.spent)
        net.selection.policy = agent
        estimates = []
        for draw in range(40):
            torch.manual_seed(draw)
            agent.zero_grad()
            logits = net(x)
            record = net.selection.last
            assert record is not None
            policy_loss(record, logits, targets, settings).backward()
            estimates.append(agent.score.bias.grad.clone())  # type: ignore[union-attr]
        agent.zero_grad()
        agent.eval()
        first = record.decisions[0]
        view = _view_of(net, x)
        probability = agent.scores(view).logits.softmax(dim=1) * 0.8 + 0.1
        expected = (probability * torch.stack(outcomes, dim=1)).sum(dim=1).mean()
        (-expected).backward()
        estimate, exact = torch.stack(estimates), agent.score.bias.grad
        assert exact is not None and first.index.numel() == 400
        spread = estimate.std(dim=0) / 40**0.5
        assert bool(((estimate.mean(dim=0) - exact).abs() < 4 * spread + 1e-4).all())
        assert float(exact.abs().max()) > 5 * float(spread.max())  # the test can fail

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": -1}, "alpha"),
            ({"alpha": 0, "beta": 0}, "says nothing"),
            ({"weight": 0}, "weight"),
            ({"measure": "acuracy"}, "measure"),
            ({"floor": 1.0}, "floor"),
        ],
    )
    def test_bad_weights(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            Reward(**options)  # type: ignore[arg-type]


def _view_of(net: Net, x: Tensor) -> SelectionView:
    """What the agent sees first."""
    seen: list[SelectionView] = []

    class Look(SelectionPolicy):
        def select(self, view: SelectionView) -> Selection:
            seen.append(view)
            return Selection(torch.zeros(view.rows, len(view.layers), dtype=torch.bool))

    before, net.selection.policy = net.selection.policy, Look()
    net(x)
    net.selection.policy = before
    return seen[0]


class TestAgent:
    def test_a_higher_cost_turns_choices_into_nop_and_never_back(self) -> None:
        torch.manual_seed(0)
        net = Net(tw.policy("dynalay", nop_bias=-0.2)).eval()
        agent = net.selection.policy
        assert isinstance(agent, DynaLayPolicy)
        nn.init.normal_(agent.score.weight)
        view = _view_of(net, _images(200))
        before = torch.zeros(200, dtype=torch.bool)
        shares = []
        for cost in (-40.0, -1.0, -0.3, 0.0, 0.3, 1.0, 40.0):
            agent.cost_weight = cost
            nop = ~agent.select(view).layers.any(dim=1)
            assert bool((before <= nop).all())
            before = nop
            shares.append(float(nop.float().mean()))
        assert shares[0] < 0.5 < shares[-1]

    def test_exploration_falls(self) -> None:
        agent = DynaLayPolicy(epsilon=0.4, final_epsilon=0.1, anneal=3)
        seen = []
        for _ in range(5):
            seen.append(round(agent.exploring(), 6))
            agent.stepped()
        assert seen == [0.4, 0.3, 0.2, 0.1, 0.1]

    def test_a_broken_sample_leaves_the_agent_alone(self) -> None:
        torch.manual_seed(0)
        net = Net(tw.policy("dynalay", nop_bias=-1.0)).train()
        for name in LAYERS:
            net.get_submodule(name).eval()
        x = _images()
        x[2] = float("nan")
        logits = net(x)
        record = net.selection.last
        assert record is not None
        good = torch.tensor([0, 1, 3, 4, 5])
        assert bool(torch.isfinite(logits[good]).all())
        policy_loss(record, logits, torch.zeros(6, dtype=torch.long), Reward(measure="accuracy")).backward()
        assert all(
            bool(torch.isfinite(p.grad).all())
            for p in net.selection.policy.parameters()
            if p.grad is not None
        )

    def test_one_agent_for_one_network(self) -> None:
        agent = tw.policy("dynalay")
        Net(agent)
        with pytest.raises(OptionError, match="another network"):
            Net(agent, iterated=["layer1"])

    def test_its_state_is_saved(self) -> None:
        net, other = Net(tw.policy("dynalay", nop_bias=0.0)), Net(tw.policy("dynalay", nop_bias=0.0))
        net.selection.policy.stepped()  # type: ignore[operator, union-attr]
        other.load_state_dict(net.state_dict())
        assert int(other.selection.policy.trained) == 1  # type: ignore[arg-type]


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            {"hidden": 0},
            {"epsilon": 2.0},
            {"final_epsilon": -0.1},
            {"temperature": 0.0},
            {"estimator": "reinforced"},
            {"anneal": 0},
        ],
    )
    def test_agent_options(self, options: dict[str, object]) -> None:
        with pytest.raises(OptionError, match=next(iter(options))):
            tw.policy("dynalay", **options)

    def test_layers(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean 'layer2'"):
            Net(tw.policy("never"), iterated=["layre2"])
        with pytest.raises(OptionError, match="max_choices"):
            Net(tw.policy("never"), max_choices=0)
        with pytest.raises(OptionError, match="layer"):
            Net(EntropyPolicy(layer="layer9"))
        with pytest.raises(OptionError, match="weights"):
            Net(tw.policy("random", weights=(1.0,)))

    def test_a_layer_that_cannot_be_iterated(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        with pytest.raises(MapError, match="'a' must return one tensor"):
            LayerSelection({"a": Two()}, nn.Identity(), torch.zeros(2, 3), tw.policy("never"))

    def test_a_policy_for_spans_and_one_for_layers(self) -> None:
        with pytest.raises(OptionError, match="single spans"):
            Net(tw.policy("gate"))
        block = tw.blocks.get("wormhole")(nn.Linear(4, 4), torch.zeros(2, 4), policy=tw.policy("dynalay"))
        with pytest.raises(OptionError, match="dynalay_"):
            block(torch.zeros(2, 4))

    def test_a_policy_that_answers_something_else(self) -> None:
        class Wrong(SelectionPolicy):
            def select(self, view: SelectionView) -> Selection:
                return Selection(torch.zeros(view.rows))

        with pytest.raises(OptionError, match="booleans"):
            Net(Wrong()).eval()(_images())
