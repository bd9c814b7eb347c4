"""``dynalay_`` models: plain where nothing is iterated, at a fixed point where something is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twnn_plugin as tw
from tests.families import FAMILIES, Family
from twnn_plugin.errors import AttachError, OptionError, UnknownNameError
from twnn_plugin.selection import LayerSelection, Reward, closed_loss, policy_loss, selection_of

SMALL: dict[str, Any] = {"in_chans": 1, "num_classes": 5, "widths": (4, 6, 8)}


def _cnn3(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dynalay_cnn3", **{**SMALL, **options})


def _images(batch: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def _selection(model: nn.Module) -> LayerSelection:
    found = selection_of(model)
    assert found is not None
    return found


class TestCNN3:
    def test_nop_is_cnn3_and_its_checkpoints_load(self) -> None:
        torch.manual_seed(1)
        plain = timm.create_model("cnn3", **SMALL).eval()
        for net in (_cnn3(policy="never"), _cnn3(fpi_layers=())):
            net.load_state_dict(plain.state_dict(), strict=True)
            assert torch.equal(net.eval()(_images()), plain(_images()))
        with pytest.raises(RuntimeError, match="Missing"):
            _cnn3().load_state_dict({"fc.bias": torch.zeros(5)})

    @pytest.mark.parametrize("layers", ["layer1", ("layer1", "layer2"), None, ()])
    def test_any_subset_of_the_layers(self, layers: Any) -> None:
        net = _cnn3(fpi_layers=layers).eval()
        assert net(_images()).shape == (5, 5)
        found = selection_of(net)
        wanted = {"layer1": ("layer1",), None: ("layer1", "layer2", "layer3")}.get(layers, layers)
        assert (() if found is None else found.iterated) == tuple(wanted)

    @pytest.mark.parametrize(("message", "scale"), [("linear", 0.3), ("mixer", 0.1)])
    def test_an_iterated_layer_is_at_its_fixed_point(self, message: str, scale: float) -> None:
        net: Any = _cnn3(
            fpi_layers="layer2", policy="always", message=message, scale=scale, tol=1e-10, max_iter=200
        )
        net.double().eval()
        x = _images().double()
        with torch.no_grad():
            logits = net(x)
            h = net.pool1(net.layer1(x))
            z = net.layer2(h)
            first = z
            for _ in range(300):
                z = net.layer2(h + net.selection.feedbacks[0].message(z, h.shape))
            wanted = net.forward_head(net.pool3(net.layer3(net.pool2(z))))
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        assert float((z - first).abs().max()) > 1e-3  # the test can fail

    def test_state_dict_copy_and_pickle(self) -> None:
        net, other = _cnn3(policy="always", open_head=True), _cnn3(policy="always", open_head=True, scale=0.3)
        other.load_state_dict(net.state_dict())
        x = _images()
        wanted = net.eval()(x)
        for twin in (other.eval(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), wanted)

    def test_a_new_classifier_answers_for_both_paths(self) -> None:
        net: Any = _cnn3(policy="always", open_head=True).eval()
        net(_images())
        net.reset_classifier(3)
        assert net(_images()).shape == (5, 3)
        tw.configure(net, policy="never")
        assert net(_images()).shape == (5, 3)

    def test_the_open_head_answers_for_samples_that_iterated_alone(self) -> None:
        net: Any = _cnn3(policy=tw.policy("entropy", threshold=0.0), open_head=True).eval()
        x = _images()
        before = net(x)
        with torch.no_grad():
            net.selection.open_head.fc.bias.add_(1.0)
        assert torch.allclose(net(x), before + 1.0, atol=1e-5)
        tw.configure(net, policy="never")
        assert torch.equal(net(x), net.forward_head(net.forward_features(x)))

    def test_a_solve_that_fails_keeps_the_open_loop_value_and_the_closed_head(self) -> None:
        net: Any = _cnn3(policy="always", open_head=True, scale=3.0, tol=1e-12, max_iter=1).eval()
        with torch.no_grad():
            net.selection.open_head.fc.bias.add_(100.0)
        x = _images()
        torch.testing.assert_close(net(x), net.forward_head(net.forward_features(x)))
        report = tw.report(net)
        assert all(bool(record.fallback.all()) for record in report)
        assert "kept an open-loop value" in str(report)

    def test_every_parameter_learns_something(self) -> None:
        for policy in ("never", "always", "dynalay", "halting"):
            net = _cnn3(policy=policy, open_head=True, message="mixer", hidden=3).train()
            x, targets = _images(), torch.arange(5)
            logits = net(x)
            record = _selection(net).last
            assert record is not None
            loss = F.cross_entropy(logits, targets) + closed_loss(record, targets)
            (loss + policy_loss(record, logits, targets, Reward())).backward()
            assert [n for n, p in net.named_parameters() if p.grad is None] == [], policy

    def test_no_parameter_is_left_without_a_gradient(self) -> None:
        # DistributedDataParallel waits for each of them, whatever the losses are.
        for policy in ("never", "always"):
            net = _cnn3(policy=policy, open_head=True).train()
            net(_images()).sum().backward()
            assert [n for n, p in net.named_parameters() if p.grad is None] == [], policy

    def test_the_closed_loss_reaches_the_closed_path_alone(self) -> None:
        net: Any = _cnn3(policy="always", open_head=True).train()
        net(_images())
        closed_loss(net.selection.last, torch.arange(5)).backward()
        grads = {n for n, p in net.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        assert "fc.weight" in grads and "layer1.conv.weight" in grads
        assert not any(name.startswith("selection.") for name in grads)

    def test_equation_six_is_an_option(self) -> None:
        net: Any = _cnn3(fpi_layers="layer3", policy="always", orthogonal=True, max_iter=60)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        net.train()(_images()).square().sum().backward()
        optimizer.step()
        weight = net.selection.feedbacks[0].message.project.weight.detach()  # 6 outputs of 8
        torch.testing.assert_close(weight @ weight.T, torch.eye(6), rtol=1e-4, atol=1e-4)

    def test_the_jacobian_penalty_can_be_added(self) -> None:
        net: Any = _cnn3(fpi_layers="layer2", policy="always", jacobian=0.5).train()
        net(_images())
        loss = net.selection.auxiliary_loss()
        assert loss is not None and float(loss.detach()) > 0
        tw.configure(net, policy="never")
        net(_images())
        assert net.selection.auxiliary_loss() is None


class TestTimm:
    @pytest.mark.parametrize("family", [f for n, f in FAMILIES.items()], ids=list(FAMILIES))
    def test_a_family(self, family: Family) -> None:
        torch.manual_seed(0)
        plain = family.plain().eval()
        torch.manual_seed(0)
        options = {"num_classes": 5, **family.options}
        all_of_it: Any = timm.create_model(f"dynalay_{family.name}", **options)
        last = all_of_it.stages[-1]
        net: Any = timm.create_model(
            f"dynalay_{family.name}",
            **options,
            fpi_layers=last,
            policy="never",
            scale=family.scale,
            max_iter=60,
        ).eval()
        net.load_state_dict(plain.state_dict(), strict=True)
        x = family.images(2)
        with torch.no_grad():
            assert torch.equal(net(x), plain(x))
            tw.configure(net, policy="always")
            opened = net(x)
        record = _selection(net).last
        assert record is not None
        assert bool((record.counts == 1).all()) and not bool(record.fallback.any())
        assert not torch.equal(opened, plain(x))
        assert torch.equal(copy.deepcopy(net)(x), opened)

    def test_manners(self) -> None:
        family = FAMILIES["vit"]
        net: Any = timm.create_model(f"dynalay_{family.name}", num_classes=5, **family.options)
        assert net.pretrained_cfg["architecture"] == f"dynalay_{family.name}"
        assert "backbone.pos_embed" in net.no_weight_decay()
        names = [name for name, _ in net.named_parameters()]
        matcher = net.group_matcher()
        assert all(not str(rule).startswith("^blocks") for rule in matcher.values())
        assert any(name.startswith("backbone.blocks") for name in names)
        net.reset_classifier(3)
        assert net.eval()(family.images(2)).shape == (2, 3)
        with pytest.raises(OptionError, match="checkpointing"):
            net.set_grad_checkpointing()

    def test_it_trains(self) -> None:
        family = FAMILIES["vit"]
        torch.manual_seed(0)
        net: Any = timm.create_model(
            f"dynalay_{family.name}", num_classes=5, policy="dynalay", open_head=True, **family.options
        ).train()
        logits = net(family.images(3))
        record = _selection(net).last
        assert record is not None
        targets = torch.arange(3)
        loss = F.cross_entropy(logits, targets) + policy_loss(record, logits, targets, Reward())
        (loss + closed_loss(record, targets)).backward()
        assert [n for n, p in net.named_parameters() if p.grad is None] == []

    def test_a_model_whose_stages_do_not_follow_each_other_is_refused(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.pretrained_cfg = {"input_size": (3, 8, 8)}
                self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
                self.feature_info = [
                    {"module": "a", "num_chs": 4, "reduction": 1},
                    {"module": "b", "num_chs": 4, "reduction": 1},
                ]

            def forward_features(self, x: Tensor) -> Tensor:
                return self.b(self.a(x) * 2)

            def forward_head(self, x: Tensor) -> Tensor:
                return x.mean(dim=(2, 3))

            def forward(self, x: Tensor) -> Tensor:
                return self.forward_head(self.forward_features(x))

        from zoo.models import DynaLayNet

        with pytest.raises(AttachError, match="no module"):
            DynaLayNet(Odd())


class TestBadInput:
    def test_names_and_options(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean 'layer2'"):
            _cnn3(fpi_layers="layre2")
        with pytest.raises(OptionError, match="Did you mean 'max_iter'"):
            _cnn3(max_itr=3)
        with pytest.raises(OptionError, match="fpi_layers is empty"):
            _cnn3(fpi_layers=(), policy="always")
        with pytest.raises(OptionError, match="Did you mean 'mixer'"):
            _cnn3(message="mixr")
        with pytest.raises(OptionError, match="hidden"):
            _cnn3(hidden=4)
        with pytest.raises(OptionError, match="choose one"):
            _cnn3(orthogonal=True, contraction=0.5)
        with pytest.raises(UnknownNameError, match="Did you mean 'dynalay'"):
            _cnn3(policy="dynaly")

    @pytest.mark.parametrize("name", ["dynalay_cnn3", "dynalay_resnet8_cifar", "dynalay_lstm3"])
    def test_flags_are_true_or_false(self, name: str) -> None:
        for given in ("x", 1, ""):
            with pytest.raises(OptionError, match="open_head is True or False; got"):
                timm.create_model(name, num_classes=5, open_head=given)
            if name != "dynalay_lstm3":  # which has no such option
                with pytest.raises(OptionError, match="orthogonal is True or False; got"):
                    timm.create_model(name, num_classes=5, orthogonal=given)

    def test_configure_and_attach(self) -> None:
        net = _cnn3(policy="never")
        with pytest.raises(OptionError, match="Did you mean 'policy'"):
            tw.configure(net, polcy="never")
        with pytest.raises(OptionError, match="dynalay_"):
            tw.attach(timm.create_model("resnet8_cifar"), policy="dynalay")
        tw.configure(net, max_iter=7, tol=0.5, max_choices=2)
        assert _selection(net).feedbacks[0].settings.max_iter == 7
        assert _selection(net).max_choices == 2
