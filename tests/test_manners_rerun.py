"""timm's manners where a span is evaluated by running the model's forward again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import twnn_plugin as tw


class Block(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Between(nn.Module):
    """Computes something between its modules, so that they cannot be replayed one after another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Block(3, 4), Block(4, 4), Block(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(1.5 * self.b(self.a(x))).mean((2, 3)))


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def attached() -> nn.Module:
    torch.manual_seed(0)
    model = tw.attach(
        Between().double(),
        wormholes="c->b",
        stages=["a", "b", "c"],
        example=images(2),
        policy="always",
        tol=1e-9,
        max_iter=80,
    )
    assert model.wormholes[0].mode == "rerun"
    return model


def test_checkpointing_changes_nothing():
    results = []
    for enable in (False, True):
        model = attached().train()
        model.set_grad_checkpointing(enable)
        out = model(images())
        out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(
            (out, grads, dict(model.named_buffers()), sum("forward" in vars(m) for m in model.modules()))
        )
    (out, grads, buffers, none), (out2, grads2, buffers2, blocks) = results
    assert torch.equal(out, out2) and grads.keys() == grads2.keys() and blocks == none + 3
    assert all(torch.allclose(grads[name], grads2[name], rtol=1e-9) for name in grads)
    assert all(torch.equal(buffers[name], buffers2[name]) for name in buffers)


def test_unrolled_but_not_exported():
    model, x = attached().eval(), images()
    with torch.no_grad():
        solved = model(x)
        assert float((tw.unrolled(model, 30)(x) - solved).norm()) < 1e-6
        assert float((tw.unrolled(model, 1)(x) - solved).norm()) > 1e-5
    with pytest.raises(tw.AttachError, match=r"torch\.export cannot follow"):
        tw.export(model, x)


def test_compiled_around_it():
    torch._dynamo.reset()
    model, x = attached().eval(), images()
    fast = torch.compile(copy.deepcopy(model), backend="eager")
    with torch.no_grad():
        for value in (x, x + 1):
            assert torch.allclose(fast(value), model(value), rtol=1e-7)
    torch._dynamo.reset()
