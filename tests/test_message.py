"""The message: shapes, scales, and the bound on its Lipschitz constant."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.blocks.message import BallNorm, Message

# (layout and shape of the state, of the target): down, up, non-divisible, to and from vectors, tokens
WAYS = [
    ("NCHW", (6, 4, 4), "NCHW", (5, 8, 8)),
    ("NCHW", (6, 7, 5), "NCHW", (5, 4, 3)),
    ("NCHW", (6, 3, 4), "NCHW", (5, 10, 7)),
    ("NCHW", (6, 4, 9), "NCHW", (5, 8, 5)),  # longer one way, shorter the other: pooled
    ("NHWC", (4, 4, 6), "NHWC", (6, 6, 5)),
    ("NLC", (7, 6), "NLC", (7, 5)),
    ("NLC", (7, 6), "NLC", (16, 5)),
    ("NLC", (16, 6), "NLC", (7, 5)),
    ("NC", (6,), "NC", (5,)),
    ("NC", (6,), "NCHW", (5, 3, 4)),
    ("NCHW", (6, 3, 4), "NC", (5,)),
    ("NC", (6,), "NLC", (9, 5)),
]


def lipschitz(message: Message, state: torch.Tensor, size: torch.Size, steps: int = 60) -> float:
    """The largest singular value of the Jacobian at a state, by power iteration."""
    v = torch.randn_like(state)
    length = 0.0
    for _ in range(steps):
        v = v / v.norm()
        _, u = torch.func.jvp(lambda z: message(z, size), (state,), (v,))
        length = float(u.detach().norm())
        (v,) = torch.func.vjp(lambda z: message(z, size), state)[1](u)
    return length


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w[0]}{w[1]}-{w[2]}{w[3]}")
def test_no_state_and_no_weight_exceeds_the_contraction(way):
    source, shape, target, aim = way
    torch.manual_seed(0)
    channels = {"NCHW": 0, "NC": 0}
    inside, outside = shape[channels.get(source, -1)], aim[channels.get(target, -1)]
    message = Message(source, target, inside, outside, scale=0.1, contraction=0.9).double()
    with torch.no_grad():  # as large as an optimiser may make them
        message.project.parametrizations.weight.original.mul_(50)
        message.scale.mul_(torch.randn(outside) * 100)
    size = torch.Size((1, *aim))
    found = 0.0
    for scale in (1e-6, 0.1, 1.0, 30.0):  # zero variance, inside the ball, at its edge, far outside
        found = max(found, lipschitz(message, scale * torch.randn(1, *shape).double(), size))
    constant = torch.full((1, *shape), 1e-3).double()
    found = max(found, lipschitz(message, constant, size))
    assert found <= 0.9
    # Far apart, too, and the bound is not empty: the message is not just made small.
    a, b = torch.randn(2, 200, *shape).double() * 2
    size = torch.Size((200, *aim))
    moved = (message(a, size) - message(b, size)).flatten(1).norm(dim=1)
    assert bool((moved <= 0.9 * (a - b).flatten(1).norm(dim=1)).all())
    assert found > 0.15


def test_group_normalisation_has_no_such_bound():
    torch.manual_seed(0)
    message = Message("NCHW", "NCHW", 6, 5, scale=0.1).double()
    flat = torch.ones(1, 6, 4, 4).double() + 1e-3 * torch.randn(1, 6, 4, 4).double()
    assert lipschitz(message, flat, torch.Size((1, 5, 4, 4))) > 3


def test_the_ball():
    state = torch.randn(4, 6, 3, 3) * torch.tensor([1e-3, 0.3, 5.0, 100.0])[:, None, None, None]
    out = BallNorm()(state)
    rms = out.square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.equal(out[:2], state[:2]) and torch.allclose(rms[2:], torch.ones(2))
    zero = torch.zeros(2, 6, requires_grad=True)
    BallNorm()(zero).sum().backward()
    assert torch.equal(zero.grad, torch.ones(2, 6))


def test_a_contracting_message_around_a_nonexpansive_body_settles_by_itself():
    torch.manual_seed(0)
    body = nn.Sequential(tw.contractive(nn.Linear(8, 8), 1.0), nn.Tanh())
    x = torch.randn(16, 8)
    block = tw.blocks.get("wormhole")(
        body, x, gate="always", contraction=0.8, solver="picard", tol=1e-6, max_iter=100
    )
    with torch.no_grad():
        block.feedback.message.scale.fill_(1e4)
        block.feedback.message.project.parametrizations.weight.original.mul_(1e4)
    block.train()
    block(x).square().sum().backward()
    assert bool((block.last.status == int(tw.Status.converged)).all())
    original = block.feedback.message.project.parametrizations.weight.original
    assert bool(original.grad.any()) and bool(block.feedback.message.scale.grad.any())
    again = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    again.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), block.eval()(x))
    with pytest.raises(tw.OptionError, match="contraction"):
        tw.blocks.get("wormhole")(body, x, contraction=-1.0)
