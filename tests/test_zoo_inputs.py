"""What the zoo's nets say to batches of none, and to inputs of another dtype than their parameters."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw

PREFIXES = ("twnn_prefix", "rnn_prefix", "deq_prefix", "ff_prefix")
MAZES = ("twnn_maze", "rnn_maze", "deq_maze", "ff_maze")


def small(name: str) -> nn.Module:
    return timm.create_model(name, width=4)


def given(name: str, batch: int = 2, **options) -> Tensor:
    return torch.ones(batch, 1, 6, **options) if name in PREFIXES else torch.zeros(batch, 3, 9, 9, **options)


def answers(name: str, batch: int = 2) -> tuple[int, ...]:
    return (batch, 2, 6) if name in PREFIXES else (batch, 2, 9, 9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*PREFIXES, *MAZES])
def test_a_batch_of_none_has_no_answers(name, training):
    model = small(name).train(training)
    assert model(given(name, batch=0)).shape == answers(name, batch=0)
    if hasattr(model, "solved"):
        assert [tuple(found.shape) for found in model.solved()] == [(0,), (0,)]
    assert model(given(name)).shape == answers(name)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_none_in_torchdeqs_classifier(training):
    model = timm.create_model("deq_tiny", width=8, inner=8).train(training)
    out = model(torch.zeros(0, 3, 8, 8))
    assert out.shape == (0, 10)
    assert {key: tuple(value.shape) for key, value in model.last_info.items()} == {
        "nstep": (0,),
        "abs_lowest": (0,),
        "rel_lowest": (0,),
    }
    out.sum().backward()


@pytest.mark.parametrize("name", [*PREFIXES, *MAZES])
def test_another_dtype_is_refused_with_both_named(name):
    model = small(name).eval()
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.long):
        with pytest.raises(tw.MapError, match=f"torch.float32, .* of {dtype}") as info:
            model(given(name, dtype=dtype))
        assert "{0, 1}" not in str(info.value) and "[0, 1]" not in str(info.value)  # values are not looked at
    with pytest.raises(tw.MapError, match=r"torch.float64, .* of torch.float32"):
        model.double()(given(name))
    assert model(given(name, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["twnn_prefix", "ff_prefix", "twnn_maze", "rnn_maze", "ff_maze"])
def test_autocast_takes_what_it_converts(name):
    model = small(name).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert model(given(name, dtype=dtype)).shape == answers(name)
        with pytest.raises(tw.MapError, match="float64"):
            model(given(name, dtype=torch.float64))
        with pytest.raises(tw.MapError, match="int64"):
            model(given(name, dtype=torch.long))


def test_devices_without_autocast_are_told_the_same():
    model = small("ff_prefix").to("meta")
    assert model(given("ff_prefix", device="meta")).shape == answers("ff_prefix")
    with pytest.raises(tw.MapError, match="float64"):
        model(given("ff_prefix", device="meta", dtype=torch.float64))


def test_feed_forward_nets_say_how_many_channels_they_read():
    with pytest.raises(tw.MapError, match=r"bits of shape \(B, 2, n\)"):
        timm.create_model("ff_prefix", in_chans=2, depth=1)(torch.ones(1, 1, 4))
    with pytest.raises(tw.MapError, match=r"images of shape \(B, 1, H, W\)"):
        timm.create_model("ff_maze", in_chans=1, depth=1)(torch.ones(1, 3, 9, 9))
