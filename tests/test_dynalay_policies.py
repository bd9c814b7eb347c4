"""Policies that pick among layers: oracle, halting, studies of a frozen network, the watch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from tests.families import FAMILIES
from twnn_plugin.errors import OptionError, SelectionWarning
from twnn_plugin.policies.base import SelectionPolicy
from twnn_plugin.policies.selection import Selection, SelectionView
from twnn_plugin.selection import (
    LayerSelection,
    Monitor,
    Reward,
    foreseen,
    informed_loss,
    outcomes,
    policy_loss,
    selection_of,
    study,
)


def _net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"in_chans": 1, "num_classes": 5, "widths": (4, 6, 8), "scale": 1.0, "message": "mixer"}
    return timm.create_model("dynalay_cnn3", **{**small, **options}).eval()


def _selection(model: nn.Module) -> LayerSelection:
    found = selection_of(model)
    assert found is not None
    return found


def _data(batch: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 16, 16, generator=generator), torch.randint(5, (batch,), generator=generator)


class TestOracle:
    def test_it_makes_the_cheapest_right_choice(self) -> None:
        net, (x, y) = _net(policy="oracle"), _data()
        with foreseen(net, x, y) as tried, torch.no_grad():
            logits = net(x)
        record = _selection(net).last
        assert record is not None
        right = tried.right(y)
        assert torch.equal(logits.argmax(dim=1) == y, right.any(dim=1))
        chosen = torch.where(record.counts.any(dim=1), record.counts.argmax(dim=1) + 1, 0)
        assert bool((chosen[right[:, 0]] == 0).all()) and bool((chosen[~right.any(dim=1)] == 0).all())
        assert bool((chosen > 0).any())  # the test can fail
        for row in torch.nonzero(chosen).flatten().tolist():
            dearer = tried.cost[row][right[row]]
            assert float(tried.cost[row, chosen[row]]) == float(dearer.min())

    def test_without_labels_it_says_what_to_do(self) -> None:
        net, (x, y) = _net(policy="oracle"), _data(4)
        with pytest.raises(OptionError, match="foreseen"):
            net(x)
        with foreseen(net, x, y), pytest.raises(OptionError, match="more"):
            net(torch.cat([x, x]))
        with pytest.raises(OptionError, match="oracle"), foreseen(_net(policy="never"), x, y):
            pass

    def test_outcomes_are_those_of_each_choice(self) -> None:
        net, (x, _) = _net(policy="never"), _data(8)
        found = outcomes(net, x)
        assert torch.equal(found.logits[:, 0], net(x))
        assert float(found.cost[:, 0].max()) == 0 and float(found.cost[:, 1:].min()) > 0
        tw.configure(net, policy=tw.policy("entropy", threshold=0.0, layer="layer2"))
        torch.testing.assert_close(net(x), found.logits[:, 2])


class TestEntropy:
    def test_a_share_is_the_least_certain_of_the_batch(self) -> None:
        net, (x, _) = _net(policy=tw.policy("entropy", share=0.3, layer="layer2")), _data(40)
        entropy = study(net, x).view.entropy
        net(x)
        record = _selection(net).last
        assert record is not None
        opened = record.iterated
        assert int(opened.sum()) == 12 and record.counts.sum(dim=0).tolist() == [0, 12, 0]
        assert float(entropy[opened].min()) >= float(entropy[~opened].max())

    @pytest.mark.parametrize(("share", "opened"), [(0.0, 0), (0.01, 0), (0.5, 4), (1.0, 8)])
    def test_it_is_rounded_to_whole_samples(self, share: float, opened: int) -> None:
        net = _net(policy=tw.policy("entropy", share=share))
        net(_data(8)[0])
        assert int(_selection(net).last.iterated.sum()) == opened  # type: ignore[union-attr]

    def test_a_broken_sample_takes_no_others_place(self) -> None:
        net, x = _net(policy=tw.policy("entropy", share=0.5)), _data(8)[0].clone()
        x[3] = torch.nan
        net(x)
        opened = _selection(net).last.iterated  # type: ignore[union-attr]
        assert int(opened.sum()) == 4 and not bool(opened[3])

    def test_an_empty_batch(self) -> None:
        net = _net(policy=tw.policy("entropy", share=0.5, weights=(1, 1, 1)))
        assert net(torch.zeros(0, 1, 16, 16)).shape == (0, 5)

    def test_layers_are_drawn_by_weights(self) -> None:
        net = _net(policy=tw.policy("entropy", share=1.0, weights=(1, 0, 3)))
        torch.manual_seed(0)
        net(_data(400)[0])
        counts = _selection(net).last.counts.sum(dim=0).tolist()  # type: ignore[union-attr]
        assert counts[1] == 0 and sum(counts) == 400 and 60 < counts[0] < 140

    def test_the_threshold_is_half_a_nat_unless_a_share_is_given(self) -> None:
        assert tw.policy("entropy").threshold == 0.5  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 0.1, "share": 0.5}, "threshold and share .* exclude"),
            ({"layer": "layer1", "weights": (1, 1, 1)}, "layer and weights .* exclude"),
            ({"share": 1.5}, "share .* in .0, 1."),
            ({"threshold": -1.0}, "threshold"),
            ({"weights": (0, 0, 0)}, "sum to more than 0"),
            ({"weights": (1, -1, 1)}, "numbers >= 0"),
            ({"weights": 1}, "numbers >= 0"),
            ({"weights": ("a", "b", "c")}, "numbers >= 0"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            tw.policy("entropy", **options)

    def test_weights_of_another_network(self) -> None:
        with pytest.raises(OptionError, match="one number for each of the 3 layers"):
            _net(policy=tw.policy("entropy", share=0.5, weights=(1, 1)))


class TestGuide:
    @pytest.mark.parametrize("name", ["dynalay", "halting", "twnn_controller"])
    def test_another_policy_chooses_in_training_alone(self, name: str) -> None:
        net, (x, _) = _net(policy=name), _data(20)
        selection = _selection(net)
        agent: Any = selection.policy
        names = list(net.state_dict())
        agent.follow(tw.policy("entropy", share=0.5, layer="layer1"))
        assert list(net.state_dict()) == names
        net.train()(x)
        assert selection.last is not None and selection.last.counts.sum(dim=0).tolist() == [10, 0, 0]
        loss = policy_loss(selection.last, net(x), torch.zeros(20, dtype=torch.long), Reward())
        assert float(loss) == 0  # nothing is learnt from another's choices
        own = net.eval()(x)
        agent.follow(None)
        torch.testing.assert_close(net(x), own)

    def test_one_made_for_another_network(self) -> None:
        agent: Any = _selection(_net(policy="dynalay")).policy
        with pytest.raises(OptionError, match="one number for each"):
            agent.follow(tw.policy("entropy", share=0.5, weights=(1, 2)))
        assert agent.guide == ()


class TestHalting:
    def test_it_goes_through_its_order_until_it_halts(self) -> None:
        net: Any = _net(policy=tw.policy("halting", order=("layer3", "layer1")), max_choices=5)
        policy = net.selection.policy
        with torch.no_grad():
            policy.halt[2].bias.fill_(-100.0)
            net(_data(6)[0])
        assert net.selection.last.counts.tolist() == [[1, 0, 1]] * 6
        with torch.no_grad():
            policy.halt[2].bias.fill_(100.0)
            net(_data(6)[0])
        assert int(net.selection.last.counts.sum()) == 0

    def test_the_prior_holds_it(self) -> None:
        net: Any = _net(policy=tw.policy("halting", prior=0.3, epsilon=0.0))
        policy = net.selection.policy.train()
        found = study(net, _data(20)[0])
        at_prior = policy.select(found.view).entropy
        torch.testing.assert_close(at_prior, torch.zeros(20), atol=1e-3, rtol=0)
        with torch.no_grad():
            policy.halt[2].bias.add_(3.0)
        assert float(policy.select(found.view).entropy.detach().max()) < -0.1

    def test_bad_options(self) -> None:
        for options in ({"prior": 1.0}, {"hidden": 0}, {"epsilon": 2.0}):
            with pytest.raises(OptionError, match=next(iter(options))):
                tw.policy("halting", **options)
        with pytest.raises(OptionError, match="layer2"):
            _net(policy=tw.policy("halting", order=("layre2",)))
        with pytest.raises(OptionError, match="each once"):
            _net(policy=tw.policy("halting", order=("layer2", "layer2")))


class TestController:
    def _vit(self) -> Any:
        torch.manual_seed(0)
        family = FAMILIES["vit"]
        options = {**family.options, "scale": 0.05, "max_choices": 1}
        return timm.create_model("dynalay_vit_tiny_patch16_224", policy="twnn_controller", **options).eval()

    def _move(self, net: Any, action: int) -> None:
        with torch.no_grad():
            net.selection.policy.score.bias.zero_()
            net.selection.policy.score.bias[action] = 100.0

    def test_back_forward_and_skipping(self) -> None:
        net, x = self._vit(), FAMILIES["vit"].images(2)
        blocks = [net.backbone.blocks[i] for i in range(4)]
        with torch.no_grad():
            self._move(net, 0)
            assert torch.equal(net(x), net.backbone(x))
            self._move(net, 2)  # back to the second block, and on
            back, last = net(x), net.selection.last
            assert last.counts.tolist() == [[0, 1, 0, 0]] * 2 and last.rows[2:] == (2, 2, 2)
            self._move(net, 4 + 2)  # the same, but for the third
            rows = [0]
            blocks[2].register_forward_hook(lambda m, a, o: rows.__setitem__(0, rows[0] + a[0].shape[0]))
            skipped, last = net(x), net.selection.last
        assert rows[0] == 2  # the first pass alone
        assert last.counts.tolist() == [[0, 1, 0, 0]] * 2 and last.rows[2:] == (0, 2, 2)
        assert not torch.equal(back, skipped)

    def test_it_skips_nothing_that_changes_the_shape(self) -> None:
        net: Any = _net(policy=tw.policy("twnn_controller", epsilon=1.0), scale=0.1, max_choices=4)
        net.selection.policy.train()
        torch.manual_seed(0)
        net(_data(40)[0])
        record = net.selection.last
        assert all(not bool(d.selection.skip.any()) for d in record.decisions)
        assert bool(record.counts.any(dim=0).all())

        class Wrong(SelectionPolicy):
            def select(self, view: SelectionView) -> Selection:
                some = torch.ones_like(view.counts, dtype=torch.bool)
                return Selection(some, skip=some)

        tw.configure(net, policy=Wrong())
        with pytest.raises(OptionError, match="another shape"):
            net(_data(4)[0])

    def test_it_learns_by_reinforce(self) -> None:
        net = self._vit().train()
        logits = net(FAMILIES["vit"].images(3))
        policy_loss(net.selection.last, logits, torch.arange(3), Reward()).backward()
        assert float(net.selection.policy.score.weight.grad.abs().max()) > 0


class TestStudy:
    def test_an_agent_learns_what_it_is_shown(self) -> None:
        net: Any = _net(open_head=True, scale=0.1)
        x, _ = _data(80)
        net.selection.open_head.fc.reset_parameters()  # so that iterating answers otherwise
        found = study(net, x, batch=32)
        # Every sample is right after one choice at least, which needs not be NOP.
        answers = found.outcomes.logits.argmax(dim=2)
        y = answers.gather(1, (torch.arange(80) % 4)[:, None]).squeeze(1)
        policy: Any = _selection(net).policy
        policy.train()
        settings = Reward(alpha=1.0, beta=0.0, weight=1.0, entropy=0.0)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for _ in range(150):
            loss = informed_loss(policy, found, y, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        policy.eval()
        right, cost = found.judged(found.choices(policy), y)
        never, free = found.judged(torch.zeros(80, dtype=torch.long), y)
        oracle = found.outcomes.right(y).any(dim=1).float()
        assert float(oracle.mean()) > float(never.mean()) + 0.05
        assert float(right.mean()) > float(never.mean()) + 0.5 * float((oracle - never).mean())
        assert float(cost.mean()) > 0 == float(free.max())
        with torch.no_grad():  # what a study says is what the network does
            assert torch.equal(net(x).argmax(dim=1) == y, right > 0)

    def test_what_it_refuses(self) -> None:
        net, (x, y) = _net(policy="always"), _data(4)
        found = study(net, x)
        with pytest.raises(OptionError, match="several layers"):
            found.choices(_selection(net).policy)
        with pytest.raises(OptionError, match="distribution"):
            informed_loss(tw.policy("never"), found, y, Reward())
        with pytest.raises(OptionError, match="at least one sample"):
            study(net, x[:0])

    def test_the_network_is_left_as_it_was(self) -> None:
        net, (x, _) = _net(), _data(4)
        before = _selection(net).policy
        net.train()
        study(net, x)
        assert _selection(net).policy is before and net.training and before.training


class TestMonitor:
    def _steps(self, monitor: Monitor, bias: float, steps: int) -> list[str]:
        net: Any = _net(policy=tw.policy("dynalay", epsilon=0.5), max_choices=1)
        policy = net.selection.policy.train()
        with torch.no_grad():
            policy.score.bias[0] = bias
        told = []
        for step in range(steps):
            torch.manual_seed(step)
            net(_data(8)[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SelectionWarning)
                text = monitor.update(net.selection.last)
            told += [text] if text else []
        return told

    def test_a_collapse_is_told_once_though_exploration_goes_on(self) -> None:
        told = self._steps(Monitor(limit=0.95, steps=5), 50.0, 12)
        assert len(told) == 1 and "'nop'" in told[0] and "beta" in told[0]

    def test_other_layers_name_other_settings(self) -> None:
        net: Any = _net(policy=tw.policy("entropy", threshold=0.0, layer="layer1"))
        net(_data(8)[0])
        monitor = Monitor(limit=0.9, steps=1)
        with pytest.warns(SelectionWarning, match="layer1"):
            monitor.update(net.selection.last)

    def test_no_collapse_no_word(self) -> None:
        net = _net(policy="random")
        monitor = Monitor(limit=0.9, steps=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                net(_data(40)[0])
                assert monitor.update(_selection(net).last) is None  # type: ignore[arg-type]

    def test_bad_options(self) -> None:
        for options in ({"limit": 0.0}, {"steps": 0}):
            with pytest.raises(OptionError, match=next(iter(options))):
                Monitor(**options)  # type: ignore[arg-type]
