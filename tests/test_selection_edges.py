"""Selections, policies and zoo models at their edges: modes of heads, whole costs, and clear refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw
from twnn_plugin.errors import MapError, OptionError
from twnn_plugin.policies import Policy
from twnn_plugin.policies.base import SpanPolicy
from twnn_plugin.selection import LayerSelection, Reward, closed_loss, foreseen
from zoo.build import create
from zoo.cli import main
from zoo.config import TrainConfig
from zoo.errors import CheckpointError, ConfigError
from zoo.tasks import prefix_sums
from zoo.tasks.run import load_model

SMALL: dict[str, Any] = {"widths": (4, 6, 8), "num_classes": 5}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _net(name: str = "dynalay_cnn3", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL if name.endswith("cnn3") else {"num_classes": 5}), **options)


class TestHeads:
    """A head is as the model that it belongs to: in its mode, and without a second model beside it."""

    @pytest.mark.parametrize(
        ("name", "policy", "open_head"),
        [
            ("dynalay_cnn3", "never", False),
            ("dynalay_cnn3", "never", True),
            ("dynalay_cnn3", "always", False),
            ("dynalay_resnet8_cifar", "always", True),
        ],
    )
    def test_dropout_is_off_in_eval_mode_and_on_in_training(
        self, name: str, policy: str, open_head: bool
    ) -> None:
        net = _net(name, drop_rate=0.5, policy=policy, open_head=open_head, max_iter=2).eval()
        assert torch.equal(net(X), net(X))
        net.reset_classifier(4)
        assert torch.equal(net.eval()(X), net(X))
        net.train()
        assert not torch.equal(net(X), net(X))

    def test_where_nothing_is_iterated_it_is_cnn3_with_dropout_too(self) -> None:
        net, plain = _net(drop_rate=0.5, policy="never"), _net("cnn3", drop_rate=0.5)
        net.load_state_dict(plain.state_dict())
        assert torch.equal(net.eval()(X), plain.eval()(X))
        torch.manual_seed(1)
        expected = plain.train()(X)
        torch.manual_seed(1)
        assert torch.equal(net.train()(X), expected)

    def test_an_open_head_copies_its_own_weights_alone(self) -> None:
        net = _net("dynalay_resnet8_cifar", drop_rate=0.5, policy="always", open_head=True, max_iter=2)
        answers = net.selection.open_head.owner[0]
        registered = {id(p) for p in net.parameters()}
        assert {id(p) for p in answers.parameters()} <= registered
        assert id(answers.get_classifier().weight) != id(net.get_classifier().weight)
        closed = net.get_classifier().weight.clone()
        net.train()(X).sum().backward()
        assert answers.get_classifier().weight.grad.abs().sum() > 0
        assert torch.equal(net.get_classifier().weight, closed)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    @pytest.mark.parametrize("name", ["dynalay_cnn3", "dynalay_resnet8_cifar"])
    def test_copies_and_pickles_of_whole_models(self, name: str, how: Any) -> None:
        net = _net(name, drop_rate=0.5, policy="always", open_head=True, max_iter=2)
        twin = how(net)
        assert torch.equal(twin.eval()(X), net.eval()(X))
        net.train()
        assert not torch.equal(net(X), net(X)) and torch.equal(twin(X), twin(X))
        tail = getattr(twin.selection.open_head, "owner", (twin,))[0]
        assert {id(p) for p in tail.parameters()} <= {id(p) for p in twin.parameters()}


class TestCosts:
    """The network's multiply-adds are all that one sample takes, its stem included."""

    @pytest.mark.parametrize("name", ["resnet8_cifar", "mobilenetv3_small_050", "resnet18"])
    @pytest.mark.parametrize("size", [32, 64])
    def test_the_stem_is_counted_where_there_is_one(self, name: str, size: int) -> None:
        net = _net(f"dynalay_{name}", policy="never").eval()
        x = torch.zeros(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            net.backbone(x)
        net(x)
        assert net.selection.last.open_loop == counter.get_total_flops() // 2

        bare = _net(policy="never").eval()  # no stem: its layers and its classifier, as ever
        bare(X)
        layers = 32 * 32 * 27 * 4 + 16 * 16 * 36 * 6 + 8 * 8 * 54 * 8
        assert bare.selection.last.open_loop == layers + 8 * 5


class _Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class _Spans(SpanPolicy):
    def forward(self, view: Any) -> Tensor:
        return view.open


class TestRefusals:
    """What cannot work is refused when it is asked for, in words."""

    def test_a_layer_of_whole_numbers(self) -> None:
        always: Policy = tw.policy("always")
        with pytest.raises(MapError, match=r"'a' must return floating point.*int64"):
            LayerSelection({"a": _Rounded()}, nn.Identity(), torch.zeros(2, 12), always)
        words = {"a": nn.Embedding(4, 8), "b": nn.Linear(8, 8)}
        tokens = torch.zeros(2, 12, dtype=torch.long)
        with pytest.raises(MapError, match=r"'a' cannot be iterated.*int64"):
            LayerSelection(words, nn.Flatten(), tokens, always)
        LayerSelection(words, nn.Flatten(), tokens, always, ["b"]).eval()(tokens)

    @pytest.mark.parametrize("policy", ["gate", _Spans()])
    def test_a_policy_for_spans(self, policy: Any) -> None:
        net = _net(policy="never").eval()
        before = net.selection.policy
        with pytest.raises(OptionError, match="single spans"):
            tw.configure(net, policy=policy, max_choices=1)
        assert net.selection.policy is before and net.selection.max_choices == 3
        net(X)
        with pytest.raises(OptionError, match="single spans"):
            _net(policy=policy)

    @pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(4), torch.zeros(3, 2), torch.tensor(1)])
    def test_labels_that_are_not_one_a_sample(self, labels: Tensor) -> None:
        net = _net(policy="oracle").eval()
        with pytest.raises(OptionError, match="one label for each"), foreseen(net, X, labels.long()):
            pass
        with foreseen(net, X, torch.zeros(3, dtype=torch.long)):
            net(X)

    @pytest.mark.parametrize("name", ["twnn_prefix", "twnn_maze", "ff_maze", "lstm3", "gru_rows"])
    def test_features_of_models_that_have_none(self, name: str) -> None:
        with pytest.raises(OptionError, match=f"{name} has no feature maps"):
            timm.create_model(name, features_only=True)


def test_features_of_dynalay_cnn3():
    net, plain = _net(features_only=True).eval(), _net("cnn3", features_only=True).eval()
    with torch.no_grad():
        assert [f.shape for f in net(X)] == [f.shape for f in plain(X)]
    assert net.feature_info.channels() == [4, 6, 8]


@pytest.mark.parametrize(
    ("policy", "options", "found"),
    [
        ("random", {"p": "a"}, "Option p"),
        ("random", {"weights": [float("inf"), 1, 1]}, "finite"),
        ("entropy", {"weights": [float("nan"), 1]}, "finite"),
        ("dynalay", {"temperature": "x"}, "Option temperature"),
        ("dynalay", {"temperature": float("inf")}, "Option temperature"),
        ("dynalay", {"cost_weight": "x"}, "Option cost_weight"),
        ("dynalay", {"cost_weight": float("nan")}, "Option cost_weight"),
        ("dynalay", {"nop_bias": "x"}, "Option nop_bias"),
        ("dynalay", {"epsilon": "x"}, "Option epsilon"),
        ("twnn_controller", {"forward_bias": "x"}, "Option forward_bias"),
        ("twnn_controller", {"cost_weight": float("inf")}, "Option cost_weight"),
        ("halting", {"prior": "x"}, "Option prior"),
        ("halting", {"cost_weight": float("nan")}, "Option cost_weight"),
        ("halting", {"order": 3}, "Option order"),
    ],
)
def test_options_of_policies(policy: str, options: dict[str, Any], found: str):
    with pytest.raises(OptionError, match=found):
        tw.policy(policy, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, float("inf")) for name in ("alpha", "beta", "repeat", "critic", "entropy", "weight")),
        ("floor", float("-inf")),
        ("floor", "x"),
        ("weight", "x"),
    ],
)
def test_weights_of_the_reward(name: str, value: Any):
    with pytest.raises(OptionError, match=f"Option {name} of the reward"):
        Reward(**{name: value})


def test_weights_of_losses_are_finite():
    with pytest.raises(OptionError, match="finite weight"):
        closed_loss(None, torch.zeros(1), weight=float("inf"))  # type: ignore[arg-type]
    for name in ("reward_alpha", "reward_beta", "closed_weight"):
        given: dict[str, Any] = {name: float("inf")}
        with pytest.raises(ConfigError, match=f"{name}=inf".replace("_", "-")):
            TrainConfig(**given)


@pytest.mark.parametrize("widths", [(4, 4), (4, 4, 4, 4), (4, 4, 0), (4, 4, 1.5), 4, "444"])
@pytest.mark.parametrize("name", ["cnn3", "dynalay_cnn3"])
def test_widths_of_cnn3(name: str, widths: Any):
    with pytest.raises(ConfigError, match="channels of the 3 layers"):
        timm.create_model(name, widths=widths)


def test_what_cannot_be_built_is_named_without_its_structure():
    with pytest.raises(ConfigError, match=r"cannot be built.*'AlwaysPolicy'"):
        create("dynalay_cnn3", options={"policy": tw.policy("always"), "drop_rate": "x"})
    with pytest.raises(ConfigError, match="published weights"):
        create("cnn3", pretrained=True)
    with pytest.raises(CheckpointError, match=r"ship with the package do not fit.*'width': 3"):
        load_model("twnn_prefix", model_kwargs={"width": 3})


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("train --policy random --policy-kwargs p=a", "Option p"),
        ("train --policy dynalay --policy-kwargs temperature=x", "Option temperature"),
        ("train --policy dynalay --policy-kwargs nop_bias=x", "Option nop_bias"),
        ("train --policy dynalay --reward-beta inf", "--reward-beta=inf"),
        ("train --policy dynalay --model-kwargs widths=4,4", "channels of the 3 layers"),
        ("train --model resnet8_cifar --pretrained", "No pretrained weights"),
        ("train --model twnn_prefix --updates 1 --model-kwargs width=x", "cannot be built"),
        ("eval --model twnn_prefix --bits 32 --model-kwargs width=3", "do not fit"),
        ("eval --model twnn_prefix --bits 32 --model-kwargs width=0", "cannot be built"),
    ],
)
def test_the_command_says_it_in_one_line(arguments: str, found: str, tmp_path: Path):
    words = arguments.split()
    if words[0] == "train":
        words += ["--output", str(tmp_path / "run")]
        words += [] if "twnn_prefix" in words else ["--dataset", "digits", "--epochs", "1"]
    result = CliRunner().invoke(main, words)
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(said) == 1 and found in said[0] and len(said[0]) < 400


def test_the_command_finds_the_benchmarks_own_strings(tmp_path: Path):
    strings = prefix_sums(32, 6)
    folder = tmp_path / "prefix_sums_data"
    folder.mkdir()
    torch.save(strings.inputs[:, 0], folder / "32_data.pth")
    torch.save(strings.targets.float(), folder / "32_targets.pth")
    words = ["eval", "--model", "twnn_prefix", "--bits", "32", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and "entirely right" in result.stdout
