"""Sequence tasks with labels checked apart, and models of sequences and of images read as sequences."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import timm
import torch

import twnn_plugin as tw
from zoo.data import load_data
from zoo.data.sequences import BLANK, GO, adding, as_sequences, copy_memory, stream
from zoo.errors import ConfigError
from zoo.models import SEQUENCES, SequenceModel

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")


@pytest.mark.parametrize("length", [2, 7, 100])
def test_adding_is_solved_by_adding(length):
    x, y = adding(200, length, stream("adding", "train", 0))
    assert x.shape == (200, length, 2)
    for row, wanted in zip(x.tolist(), y.tolist(), strict=True):
        marked = [(t, number) for t, (number, mark) in enumerate(row) if mark == 1.0]
        assert len(marked) == 2 and marked[0][0] < length // 2 <= marked[1][0]
        assert all(0 <= number < 1 for number, _ in row)
        assert abs(sum(number for _, number in marked) - wanted) < 1e-6
    assert abs(float((y - 1).square().mean()) - 1 / 6) < 0.05


@pytest.mark.parametrize("delay", [1, 30])
def test_copy_memory_is_solved_by_a_tape(delay):
    tokens, wanted = copy_memory(100, delay, stream("copy", "train", 0))
    assert tokens.shape == wanted.shape == (100, delay + 20)
    for row, answer in zip(tokens.tolist(), wanted.tolist(), strict=True):
        tape, out, asked = [], [], False
        for token in row:
            if token not in (BLANK, GO):
                tape.append(token)
            out.append(tape.pop(0) if asked else BLANK)
            asked = asked or token == GO
        assert out == answer and row.count(GO) == 1
    assert tokens.unique().tolist() == list(range(GO + 1))


def test_parts_are_disjoint_and_one_seed_is_one_set():
    parts = {part: adding(300, 20, stream("adding", part, 0))[0] for part in ("train", "val", "test")}
    rows = {part: {tuple(row.flatten().tolist()) for row in x} for part, x in parts.items()}
    assert (
        not rows["train"] & rows["val"]
        and not rows["train"] & rows["test"]
        and not rows["val"] & rows["test"]
    )
    assert torch.equal(parts["val"], adding(300, 20, stream("adding", "val", 0))[0])
    assert not torch.equal(parts["val"], adding(300, 20, stream("adding", "val", 1))[0])


def test_images_are_read_from_the_top_left():
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    pixels, rows = as_sequences(images), as_sequences(images, "rows")
    assert pixels.shape == (2, 20, 3) and rows.shape == (2, 4, 15)
    assert pixels[1, 7].tolist() == images[1, :, 1, 2].tolist()
    assert rows[1, 2].tolist() == images[1, :, 2].T.flatten().tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda: stream("adding", "training", 0),
        lambda: stream("adding", "train", -1),
        lambda: adding(0, 10, stream("a", "train", 0)),
        lambda: adding(3, 1, stream("a", "train", 0)),
        lambda: copy_memory(3, 0, stream("a", "train", 0)),
        lambda: as_sequences(torch.zeros(2, 3)),
        lambda: as_sequences(torch.zeros(2, 1, 3, 3), "row"),
        lambda: SequenceModel(3, 2, readout="lest"),
        lambda: SequenceModel(3, 2)(torch.zeros(2, 5, 4)),
        lambda: SequenceModel(3, 2, tokens=True)(torch.zeros(2, 5)),
        lambda: SequenceModel(3, 2, tokens=True)(torch.full((2, 5), 3)),
    ],
)
def test_bad_input_is_told(call):
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("readout", ["last", "mean", "all"])
def test_a_models_answer_does_not_depend_on_padding(readout):
    torch.manual_seed(0)
    model = SequenceModel(3, 2, 8, 2, readout=readout, wormholes="auto", gate="always", tol=1e-6).eval()
    x = torch.randn(3, 9, 3)
    with torch.no_grad():
        every = model(x, lengths=torch.tensor([9, 5, 2]))
        assert torch.equal(model(x, lengths=[9, 5, 2]), every)  # a list will do, as for a stack
        together = every[1]
        alone = model(x[1:2, :5])[0]
    if readout == "all":
        together = together[:5]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_language_model_is_causal_and_can_be_carried_on():
    torch.manual_seed(0)
    model = SequenceModel(
        11,
        11,
        8,
        3,
        readout="all",
        tokens=True,
        causal=True,
        wormholes="layer2->layer0",
        tol=1e-6,
        max_iter=80,
    ).eval()
    tw.configure(model, policy="always")
    tokens = torch.randint(0, 11, (2, 10), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 3) % 11
    with torch.no_grad():
        logits = model(tokens)
        torch.testing.assert_close(logits[:, :6], model(other)[:, :6], atol=1e-4, rtol=0)
        first, state = model.carry(tokens[:, :4])
        second, _ = model.carry(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SEQUENCES)
def test_timm_manners(name):
    size = 8 if name.endswith("pixels") else 28
    model = timm.create_model(name, num_classes=7, in_chans=1, hidden=8, drop_rate=0.1).eval()
    x = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(x)
    assert features.shape == (2, size * size if name.endswith("pixels") else size, model.num_features)
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.pretrained_cfg["architecture"] == name
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    if name.startswith("twnn_"):
        assert [record.span for record in tw.report(model)] == ["layer1->layer0"]
    else:
        with pytest.raises(tw.AttachError):
            tw.report(model)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match="img_size=20"):
        timm.create_model("gru_rows", in_chans=1)(torch.zeros(1, 1, 28, 20))


def test_a_wormhole_through_time_remembers_what_its_lag_tells():
    """Copy memory in miniature: with the lag of the task a few updates do; without, none of this size did."""
    found = {}
    for wormhole in ((), "layer0[t-14]->layer0"):
        torch.manual_seed(0)
        options = {
            "wormholes": wormhole,
            "gate": "always",
            "gate_over": "state",
            "window": 14 if wormhole else None,
        }
        model = SequenceModel(10, 9, 24, 1, readout="all", tokens=True, **options)
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        data = stream("copy", "train", 0)
        for _ in range(120):
            tokens, wanted = copy_memory(16, 11, data, width=3)
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tokens, wanted = copy_memory(200, 11, stream("copy", "test", 0), width=3)
        with torch.no_grad():
            found[bool(wormhole)] = float(
                (model.eval()(tokens)[:, -3:].argmax(-1) == wanted[:, -3:]).float().mean()
            )
    assert found[True] > 0.9 > 0.5 > found[False]


def test_digits_make_sequences():
    split = load_data("digits").test
    x = as_sequences(split.images.float())
    assert x.shape == (len(split), 64, 1) and math.isclose(float(x.max()), 255)


SEQUENCES = (Path(__file__).resolve().parents[1] / "docs" / "sequences.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", SEQUENCES, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_of_the_page_run(code):
    torch.manual_seed(0)
    exec(compile(code, "sequences.md", "exec"), {})
    assert len(SNIPPETS) >= 5
