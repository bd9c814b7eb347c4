"""torch.compile around models with wormholes: the same results, and no compilation again and again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import twnn_plugin as tw

from .families import FAMILIES


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=counter), counter


def train_once(net, x):
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    return out


@pytest.mark.parametrize("key", ["resnet", "vit"])
def test_the_same_in_eval_and_nothing_compiled_twice(key):
    family = FAMILIES[key]
    model = family.twnn(tol=1e-6, max_iter=80).double().eval()
    fast, counter = compiled(model)
    frames = []
    with torch.no_grad():
        for policy in ("always", "gate", tw.policy("random", p=0.5)):
            tw.configure(model, policy=policy)
            for seed in range(3):
                x = family.images(3, seed=seed).double()
                torch.manual_seed(seed)
                expected = model(x)
                torch.manual_seed(seed)
                assert torch.allclose(fast(x), expected, rtol=1e-5, atol=1e-7)
                frames.append(counter.frame_count)
    # Other data, other rows open, other numbers of steps, other policies: the same graphs.
    assert 0 < frames[0] <= 6 and frames[-1] == frames[0]


@pytest.mark.parametrize("key", ["resnet", "vit"])
def test_the_same_in_training(key):
    family = FAMILIES[key]
    model = family.twnn(policy="always", tol=1e-8, max_iter=80).double().train()
    twin = copy.deepcopy(model)
    fast, counter = compiled(twin)
    frames = []
    for seed, policy in enumerate(("always", "always", "gate")):
        for net in (model, twin):
            tw.configure(net, policy=policy)
        x = family.images(4, seed=seed).double()
        assert torch.allclose(train_once(model, x), train_once(fast, x), rtol=1e-5, atol=1e-7)
        frames.append(counter.frame_count)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(b.double(), c.double(), rtol=1e-9), name
    assert 0 < frames[0] <= 8 and frames[-1] == frames[0]


def test_checkpointing_and_ahead_of_time_autograd():
    model = FAMILIES["vit"].twnn(policy="always", tol=1e-5).eval()
    x = FAMILIES["vit"].images()
    expected = model(x)
    model.set_grad_checkpointing(True)
    fast = torch.compile(model, backend="aot_eager")
    out = fast(x)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()


@pytest.mark.parametrize("key", ["convnext", "vit"])
def test_the_unrolled_form_compiles_to_one_graph(key):
    model = FAMILIES[key].twnn(policy="always").eval()
    module = tw.unrolled(model, 3)
    fast = torch.compile(module, backend="eager", fullgraph=True)
    x = FAMILIES[key].images()
    with torch.no_grad():
        assert torch.allclose(fast(x), module(x), rtol=1e-5, atol=1e-6)
