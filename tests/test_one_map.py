"""While a span is iterated it is one map: statistics and draws stand still, and are counted once."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import twnn_plugin as tw
from twnn_plugin.adjoints.equation import Equation

Wormhole = tw.blocks.get("wormhole")


class FunctionalNorm(nn.Module):
    """Batch normalisation without a layer, with running statistics of its own or without."""

    def __init__(self, running: bool):
        super().__init__()
        if running:
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))
        self.running = running

    def forward(self, x):
        kept = (self.mean, self.var) if self.running else (None, None)
        return F.batch_norm(x, *kept, training=self.training or not self.running)


class Twice(nn.Module):
    """One layer that runs twice in a pass."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(torch.tanh(self.norm(x)) * 2 + 1)


class Tokens(nn.Module):
    """(B, C, H, W) through attention over positions, with dropout inside it."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
        kv = tokens[:, :1] if self.options.get("enable_gqa") else tokens
        out = F.scaled_dot_product_attention(tokens, kv, kv, dropout_p=0.3 * self.training, **self.options)
        return out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape)


class Multihead(nn.Module):
    """torch's own attention layer, whose dropout no module makes; masked in every way that it takes."""

    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        later = torch.ones(16, 16, dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[0], 16, dtype=torch.bool)
        padding[:, 13:] = True
        out, weights = self.attention(
            tokens, tokens, tokens, padding, need_weights=self.need_weights, attn_mask=later
        )
        assert (weights is not None) == self.need_weights
        return out.transpose(1, 2).reshape(x.shape)


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * (1 + 0.3 * self.draw(x)) if self.training else x


def rand(x):
    return torch.rand(x.shape[0], 1, 1, 1)


def rand_size(x):
    return torch.rand(size=(x.shape[0], x.shape[1], 1, 1))


NORMS = {
    "plain": lambda: nn.BatchNorm2d(6),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "not tracked": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "nothing": lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False),
    "synchronised": lambda: nn.SyncBatchNorm(6),
    "timm, with activation": lambda: timm.layers.BatchNormAct2d(6),
    "twice": lambda: Twice(nn.BatchNorm2d(6)),
    "functional": lambda: FunctionalNorm(True),
    "functional, not tracked": lambda: FunctionalNorm(False),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
}
DRAWS = {
    "dropout": lambda: nn.Dropout(0.2),
    "dropout2d": lambda: nn.Dropout2d(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.2),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.2),
    "drop path": lambda: timm.layers.DropPath(0.3),
    "rrelu": lambda: nn.RReLU(),
    "attention": Tokens,
    "causal attention": lambda: Tokens(is_causal=True),
    "grouped attention": lambda: Tokens(enable_gqa=True),
    "multihead": Multihead,
    "multihead with weights": lambda: Multihead(True, bias=False),
    "multihead with separate weights": lambda: Multihead(kdim=6, vdim=6),
    "randn_like": lambda: Draws(torch.randn_like),
    "rand": lambda: Draws(rand),
    "rand with size": lambda: Draws(rand_size),
    "bernoulli": lambda: Draws(lambda x: torch.bernoulli(torch.full_like(x, 0.5))),
    "uniform_": lambda: Draws(lambda x: torch.empty_like(x).uniform_()),
}


def body(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
    return nn.Sequential(first, middle, nn.Tanh(), last, nn.Tanh()).double()


def images(batch=6):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()


def block(middle: nn.Module, **options) -> nn.Module:
    options = {"policy": tw.policy("always"), "tol": 1e-11, "max_iter": 200, "scale": 0.2, **options}
    torch.manual_seed(1)
    return Wormhole(body(middle), images(), **options).double()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("policy", ["always", "never"])
def test_running_statistics_are_those_of_the_plain_network(name, policy):
    plain, x = body(NORMS[name]()).train(), images()
    wormhole = block(NORMS[name](), policy=tw.policy(policy)).train()
    for _ in range(2):
        plain(x)
        out = wormhole(x)
    out.sum().backward()
    assert bool((wormhole.last.status == int(tw.Status.converged)).all())
    buffers = dict(wormhole.body.named_buffers())
    for key, value in plain.named_buffers():
        assert torch.allclose(value.double(), buffers[key].double(), rtol=1e-9), key
    assert all(m.training for m in wormhole.body.modules())


@pytest.mark.parametrize("name", [n for n in NORMS if n not in ("synchronised", "cumulative")])
def test_total_gradients_through_the_statistics_by_finite_differences(name):
    wormhole = block(NORMS[name]()).train()
    x = images(4)
    direction = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    weights = {"body.0.weight": wormhole.body[0].weight, "body.3.weight": wormhole.body[3].weight}

    def value(x, *given):
        replaced = dict(zip(weights, given, strict=True))
        return (torch.func.functional_call(wormhole, replaced, (x,)) * direction).sum()

    given = [x.requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights.values())]
    gradients = torch.autograd.grad(value(*given), given)
    for i, gradient in enumerate(gradients):
        torch.manual_seed(3)
        step = torch.randn_like(given[i])
        step = step / step.norm()
        with torch.no_grad():
            ahead = [g + 1e-5 * step if i == j else g for j, g in enumerate(given)]
            behind = [g - 1e-5 * step if i == j else g for j, g in enumerate(given)]
            expected = (value(*ahead) - value(*behind)) / 2e-5
        assert float((gradient * step).sum()) == pytest.approx(float(expected), rel=1e-5, abs=1e-8), i


@pytest.mark.parametrize("name", DRAWS)
def test_draws_stand_still_and_are_those_of_the_plain_network(name):
    plain, x = body(DRAWS[name]()).train(), images()
    torch.manual_seed(5)
    expected = plain(x)
    closed = block(DRAWS[name](), policy=tw.policy("never")).train()
    torch.manual_seed(5)
    assert torch.allclose(closed(x), expected, atol=1e-12) or name == "rrelu"
    opened = block(DRAWS[name]()).train()
    torch.manual_seed(5)
    z = opened(x)
    assert bool((opened.last.status == int(tw.Status.converged)).all())
    torch.manual_seed(5)
    again = plain(x + opened.feedback.message(z, x.shape))  # the same draws as the pass had
    assert torch.allclose(again, z, atol=1e-8) or name == "rrelu"
    assert not torch.allclose(z, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "functional", "dropout", "attention", "rand", "drop path"])
def test_rows_that_leave_change_nothing(name, monkeypatch):
    made = {**NORMS, **DRAWS}[name]
    x = images() * torch.logspace(-2, 1, 6).double()[:, None, None, None]  # they settle at different times

    def run():
        wormhole = block(made(), solver="picard", scale=0.6).train()
        torch.manual_seed(5)
        out = wormhole(x)
        gradient = torch.autograd.grad(out.square().sum(), wormhole.body[0].weight)[0]
        return out, gradient, wormhole.last

    out, gradient, record = run()
    monkeypatch.setattr(Equation, "leave_share", 0.0)  # nobody leaves
    stayed, reference, all_in = run()
    assert len(set(record.steps.tolist())) > 1 and record.evaluations < all_in.evaluations
    assert torch.allclose(out, stayed, atol=1e-12) and torch.allclose(gradient, reference, atol=1e-9)


def test_batches_count_in_eval_mode_too_where_nothing_was_tracked():
    x = images()
    wormhole = block(nn.BatchNorm2d(6, track_running_stats=False), solver="picard", scale=0.6).eval()
    with torch.no_grad():
        z = wormhole(x * torch.logspace(-2, 1, 6).double()[:, None, None, None])
    assert bool((wormhole.last.status == int(tw.Status.converged)).all())
    assert torch.isfinite(z).all()
    # A part in training mode inside a model in eval mode (Monte Carlo dropout) is held, too.
    wormhole = block(nn.Dropout(0.3)).eval()
    wormhole.body[1].train()
    with torch.no_grad():
        wormhole(x)
    assert bool((wormhole.last.status == int(tw.Status.converged)).all())


def test_statistics_that_were_taken_away_without_a_word_are_an_error():
    wormhole = block(nn.BatchNorm2d(6)).eval()
    norm = wormhole.body[1]
    with torch.no_grad():
        wormhole(images())
        norm.running_mean = norm.running_var = None
        with pytest.raises(tw.AttachError, match=r"BatchNorm2d .*Set track_running_stats=False, too"):
            wormhole(images())
        norm.track_running_stats = False
        wormhole(images())
    assert bool((wormhole.last.status == int(tw.Status.converged)).all())


def test_spectral_normalisation_does_not_go_on_while_iterating():
    x = images()
    layer = spectral_norm(nn.Conv2d(6, 6, 1))
    wormhole, plain = block(copy.deepcopy(layer)).train(), body(layer).train()
    wormhole(x).sum().backward()
    assert bool((wormhole.last.status == int(tw.Status.converged)).all())
    plain(x)
    vectors = wormhole.body[1].parametrizations.weight[0]
    assert torch.allclose(vectors._u, plain[1].parametrizations.weight[0]._u)


class Shuffles(nn.Module):
    def forward(self, x):
        return x + 0.1 * x[:, torch.randperm(x.shape[1])]


class OwnStatistics(nn.BatchNorm2d):
    """Normalises by the batch without F.batch_norm."""

    def forward(self, input):
        if not self.training:
            return super().forward(input)
        return (input - input.mean((0, 2, 3), keepdim=True)) / input.abs().amax((0, 2, 3), keepdim=True)


class MoreDraws(nn.Module):
    """Draws for a number of rows that has nothing to do with the samples'."""

    def forward(self, x):
        return x * torch.rand(x.shape[0] + 1, 1, 1, 1)[1:]


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (Shuffles, "draws random numbers in a way"),
        (OwnStatistics, "in a way that cannot be held fixed"),
        (MoreDraws, "cannot be split by samples"),
        (lambda *n: timm.layers.EvoNorm2dB0(6), "changes a buffer of its own"),
    ],
)
def test_what_cannot_be_held_is_refused(middle, message):
    made = middle(6) if middle is OwnStatistics else middle()
    wormhole = block(made, solver="picard", scale=0.6).train()
    x = images() * torch.logspace(-2, 1, 6).double()[:, None, None, None]
    with pytest.raises(tw.AttachError, match=message):
        wormhole(x)


def test_a_copy_watches_its_own_layers():
    wormhole = block(nn.BatchNorm2d(6)).train()
    wormhole(images()).sum().backward()
    twin = copy.deepcopy(wormhole)
    before = wormhole.body[1].num_batches_tracked.clone()
    twin(images()).sum().backward()
    assert int(twin.body[1].num_batches_tracked) == int(before) + 1
    assert torch.equal(wormhole.body[1].num_batches_tracked, before)


class Held(nn.Module):
    """A normalisation, and nothing else."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


class Normed(nn.Module):
    """Its stages are a stem, a normalisation and a convolution."""

    def __init__(self, wrap, between):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 1, 1), wrap(nn.BatchNorm2d(6))
        self.end, self.head, self.between = nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 5), between

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(torch.tanh(self.end(torch.tanh(x) if self.between else x)).mean((2, 3)))


@pytest.mark.parametrize("between", [False, True], ids=["replay", "rerun"])
def test_a_span_may_begin_with_a_normalisation(between):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for wrap in (lambda norm: norm, Held):
        torch.manual_seed(0)
        model = Normed(wrap, between).double().train()
        with torch.no_grad():
            norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
            given = model.stem(images)
            # Running statistics that are nearly the batch's: what goes by them is not far away.
            norm.running_mean.copy_(given.mean((0, 2, 3)))
            norm.running_var.copy_(given.var((0, 2, 3), unbiased=False) * 1.001)
        options = {"policy": "always", "gate": "always", "tol": 1e-10, "max_iter": 100, "scale": 0.05}
        tw.attach(model, wormholes="end->norm", stages=["stem", "norm", "end"], example=images, **options)
        assert tw.spans(model)[0].mode == ("rerun" if between else "replay")
        passes = []
        for training in (True, True, False, True):  # listening to the norms ends with a pass in eval mode
            model.train(training).zero_grad()
            model(images).square().sum().backward()
            passes.append([p.grad for p in model.parameters() if p.grad is not None])
            assert bool((tw.report(model)[0].status == 0).all())
        assert int(norm.num_batches_tracked) == 3
        found.append(passes)
    for mine, expected in zip(*found, strict=True):
        assert len(mine) == len(expected)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-10) for a, b in zip(mine, expected, strict=True))
