"""DynaLay on text: layers iterated by choice, nothing that looks ahead, padding that says nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw
from twnn_plugin.errors import OptionError, UnknownNameError
from twnn_plugin.policies.base import SelectionPolicy
from twnn_plugin.policies.selection import Selection, SelectionView
from twnn_plugin.selection import Reward, policy_loss, selection_of
from zoo.errors import ConfigError
from zoo.models import TEXT
from zoo.models.dynalay_lstm import RecurrentPart

WORDS = 30


class Fixed(SelectionPolicy):
    """Answers with one row of choices (B,), once; 0 is NOP."""

    def __init__(self, choices: list[int]):
        super().__init__()
        self.choices = torch.tensor(choices)

    def select(self, view: SelectionView) -> Selection:
        chosen = self.choices[view.index] if view.step == 0 else torch.zeros_like(view.index)
        return Selection(Selection.of_actions(chosen, len(view.layers)))


def made(name: str = "dynalay_lstm3", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": WORDS, "hidden": 12, **options})  # type: ignore[arg-type]


def classifier(**options: object) -> nn.Module:
    return made(**{"task": "classification", "num_classes": 4, "vocab_size": WORDS, **options})


def texts(rows: int = 4, steps: int = 9) -> Tensor:
    return torch.randint(1, WORDS, (rows, steps), generator=torch.Generator().manual_seed(1))


EXACT = {"tol": 1e-11, "max_iter": 200, "scale": 0.5}


class TestModels:
    @pytest.mark.parametrize("name", TEXT)
    def test_they_are_registered(self, name):
        assert name in timm.list_models("*3")
        model = made(name).eval()
        assert model(texts()).shape == (4, WORDS, 9)
        assert (selection_of(model) is None) == (not name.startswith("dynalay_"))
        assert isinstance(model.layer1.rnn, nn.GRU if "gru" in name else nn.LSTM)

    def test_nop_is_the_plain_twin_bit_for_bit_and_its_checkpoint_loads(self):
        model, plain = made(policy="never").eval(), made("lstm3").eval()
        nn.init.normal_(plain.head.fc.weight)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(texts()), plain(texts()))
        assert torch.equal(model.forward_head(model.forward_features(texts())), plain(texts()))

    @pytest.mark.parametrize("layers", [("layer1",), ("layer1", "layer2"), None, "layer3"])
    def test_models_0_to_3(self, layers):
        model = made(fpi_layers=layers, policy="always").eval()
        wanted = (
            ("layer1", "layer2", "layer3") if layers is None else (layers,) if layers == "layer3" else layers
        )
        assert model.selection.iterated == wanted
        model(texts())
        record = model.selection.last
        assert (record.counts == 1).all() and (record.status == 0).all()

    def test_a_chosen_layer_is_at_its_fixed_point_and_the_rest_follows(self):
        model = made(policy=Fixed([2, 0, 3, 1]), **EXACT).double().eval()
        out = model(texts())
        entry = model.layer1(model.embed(texts()[:1]))
        feedback = model.selection.feedbacks[1]
        z = model.layer2(entry)
        for _ in range(100):
            z = model.layer2(entry + feedback.message(z, entry.shape))
        torch.testing.assert_close(out[:1], model.head(model.layer3(z)), rtol=1e-8, atol=1e-8)
        plain = model.head(model.layer3(model.layer2(model.layer1(model.embed(texts())))))
        torch.testing.assert_close(out[1], plain[1])
        assert (out[0] - plain[0]).abs().max() > 1e-4

    def test_copies_and_pickles_choose_alike(self):
        model = made(policy=tw.policy("dynalay", nop_bias=0.0)).eval()
        out = model(texts())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(texts()), out)
            with torch.no_grad():
                twin.layer3.rnn.weight_ih_l0.zero_()
            assert not torch.equal(twin(texts()), out)
        other = made(policy=tw.policy("dynalay", nop_bias=0.0)).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(texts()), out)

    def test_another_classifier(self):
        model = made(policy="always").eval()
        model(texts())
        before = model.selection.last.open_loop
        model.reset_classifier(7)
        assert model(texts()).shape == (4, 7, 9)
        assert before - model.selection.last.open_loop == 9 * 12 * (WORDS - 7)
        assert model.get_classifier().out_features == 7

    def test_a_head_of_its_own(self):
        model = made(open_head=True, policy=Fixed([1, 0, 0, 0])).eval()
        before = model(texts())
        with torch.no_grad():
            model.selection.open_head.fc.bias.add_(1.0)
        moved = (model(texts()) - before).flatten(1).abs().amax(dim=1)
        assert moved[0] > 0.9 and (moved[1:] == 0).all()


class TestSequences:
    @pytest.mark.parametrize("message", ["linear", "mixer"])
    def test_no_prediction_looks_ahead(self, message):
        model = made(policy="always", message=message, **EXACT).double().eval()
        x = texts()
        y = x.clone()
        y[:, 6:] = (y[:, 6:] + 7) % WORDS
        before, after = model(x), model(y)
        assert (model.selection.last.status == 0).all()
        torch.testing.assert_close(before[..., :6], after[..., :6], rtol=1e-7, atol=1e-8)
        assert (before[..., 6:] - after[..., 6:]).abs().max() > 1e-3

    def test_padding_says_nothing(self):
        model = classifier(policy="always", **EXACT).double().eval()
        x = texts()
        padded = F.pad(x, (0, 5))
        torch.testing.assert_close(model(padded), model(x), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(model(padded)[:1], model(padded[:1]), rtol=1e-8, atol=1e-9)

    def test_a_text_of_padding_alone(self):
        model = classifier(policy="always").eval()
        assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.int64))).all()

    def test_multiply_adds_are_those_that_are_executed(self):
        model = made(policy=Fixed([2, 0, 3, 1])).eval()
        x = texts()
        model(x)
        work = [0]
        for name in model.names:
            part = model.get_submodule(name)
            assert isinstance(part, RecurrentPart)
            each = 9 * 4 * 12 * (12 + 12)  # steps, gates, width, inputs and state
            part.register_forward_hook(
                lambda m, args, out, each=each: work.__setitem__(0, work[0] + args[0].shape[0] * each)
            )
        recurrent = {torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        record = model.selection.last
        counts = counter.get_flop_counts()["Global"]
        others = sum(flops for operation, flops in counts.items() if operation not in recurrent)
        assert others > 0  # the head's and the messages'
        assert record.open_loop * 4 + record.multiply_adds == others // 2 + work[0]

    def test_windows_of_any_length(self):
        model = made(policy="always").eval()
        for steps in (1, 3, 20):
            assert model(texts(2, steps)).shape == (2, WORDS, steps)


class TestLearning:
    @pytest.mark.parametrize("build", [made, classifier])
    def test_every_parameter_gets_a_gradient_and_the_agent_its_own(self, build):
        model = build(policy=tw.policy("dynalay", nop_bias=-2.0), drop_rate=0.1).train()
        x = texts()
        logits = model(x)
        targets = texts(4, 9) if logits.dim() == 3 else torch.arange(4)
        policy_loss(model.selection.last, logits, targets, Reward()).backward()
        reached = {
            n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)
        }
        assert reached and all(name.startswith("selection.policy") for name in reached)
        F.cross_entropy(model(x), targets).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    def test_only_the_chosen_layer_gets_the_fixed_points_gradient(self):
        model = made(policy=Fixed([1, 2, 3, 0])).eval()
        for sample, which in enumerate((0, 1, 2, None)):
            model.zero_grad()
            model(texts())[sample].sum().backward()
            for place, feedback in enumerate(model.selection.feedbacks):
                grads = [p.grad for p in feedback.parameters()]
                assert any(g is not None and bool(g.abs().max() > 0) for g in grads) == (place == which)

    def test_the_gradient_is_that_of_the_equation(self):
        model = made(policy=Fixed([2, 3, 1, 0]), hidden=4, **{**EXACT, "tol": 1e-13}).double().eval()
        weight = model.embed.weight

        def loss(given: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"embed.weight": given}, (texts(4, 3),)).square().mean()

        assert torch.autograd.gradcheck(loss, (weight.detach().requires_grad_(),), atol=1e-7, rtol=1e-4)


class TestBadInput:
    def test_tokens(self):
        model = made().eval()
        with pytest.raises(ConfigError, match="outside the vocabulary of 30: they go from 30 to 30"):
            model(torch.full((1, 3), 30))
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            model(torch.full((1, 3), -1))
        for x in (torch.rand(2, 3), torch.ones(3, dtype=torch.int64), torch.ones(2, 0, dtype=torch.int64)):
            with pytest.raises(ConfigError, match="whole numbers"):
                model(x)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"task": "langage"}, ConfigError, "Did you mean 'language'"),
            ({"cell": "rnn"}, ConfigError, "Possible: lstm, gru"),
            ({"hidden": 0}, ConfigError, "hidden"),
            ({"fpi_layers": ("layer4",)}, UnknownNameError, "Did you mean 'layer"),
            ({"policy": "dynalai"}, UnknownNameError, "Did you mean 'dynalay'"),
            ({"fpi_layers": (), "policy": "dynalay"}, ConfigError, "would do nothing"),
            ({"max_iters": 3}, OptionError, "Did you mean 'max_iter'"),
            ({"max_choices": 0}, OptionError, "max_choices"),
            ({"message": "conv"}, OptionError, "message"),
        ],
    )
    def test_options(self, options, error, said):
        with pytest.raises(error, match=said):
            made(**options)
