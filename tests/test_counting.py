"""Multiply-adds of recurrent layers, whose fused kernels torch's registry has no formulas for.

What is expected is counted where torch writes the layers out: oneDNN off, on the CPU. At the end, the stream
that CUDA graphs are captured on.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import twnn_plugin as tw
from benchmarks.harness import Executed
from twnn_plugin.sequence import LayerOutputs, RecurrentLayer
from zoo.models.dynalay_split import stem_multiply_adds

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
aten = torch.ops.aten

STEPS, ROWS, WIDTH, HIDDEN = 7, 3, 5, 4
KINDS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"bias": False}),
    (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 2}),
    (nn.LSTM, {"bidirectional": True, "proj_size": 3, "bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"bias": False}),
    (nn.RNN, {"num_layers": 2}),
    (nn.RNN, {"bidirectional": True, "nonlinearity": "relu"}),
]
FUSED = [(kind, options) for kind, options in KINDS if kind is nn.LSTM and "proj_size" not in options]


def states(layer: nn.RNNBase, device: str = "cpu", rows: int = ROWS) -> tuple[Tensor, ...]:
    """Initial states, from which a gradient is wanted."""
    copies = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 2 if layer.mode == "LSTM" else 1]
    return tuple(torch.zeros(copies, rows, width, device=device, requires_grad=True) for width in widths)


def call(layer: nn.RNNBase, x: Any, given: tuple[Tensor, ...]) -> Tensor:
    out = layer(x, given if len(given) > 1 else given[0])[0]
    return out if isinstance(out, Tensor) else out.data


def counted(layer: nn.RNNBase, x: Any, written_out: bool = True) -> tuple[int, int]:
    """Operations forward and backward; the gradients of input and states are wanted, too."""
    given = states(layer)
    with torch.backends.mkldnn.flags(enabled=False) if written_out else nullcontext():
        with FlopCounterMode(display=False) as forward:
            out = call(layer, x, given)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    fused = aten.mkldnn_rnn_layer in forward.get_flop_counts()["Global"]
    assert fused != written_out
    return forward.get_total_flops(), backward.get_total_flops()


@needs_onednn
@pytest.mark.parametrize("kind, options", FUSED)
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_dnn_counts_as_if_written_out(kind, options, batch_first):
    layer = kind(WIDTH, HIDDEN, batch_first=batch_first, **options)
    axes = (ROWS, STEPS) if batch_first else (STEPS, ROWS)
    x = torch.randn(*axes, WIDTH, requires_grad=True)
    forward, backward = counted(layer, x, written_out=False)
    assert (forward, backward) == counted(layer, x)
    assert forward == 2 * STEPS * ROWS * sum(p.numel() for p in layer.parameters() if p.dim() == 2)


class Answers(TorchDispatchMode):
    """Says what cuDNN's backward pass would have said, but for the values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is not aten._cudnn_rnn_backward:
            return func(*args, **(kwargs or {}))
        x, weights, _, _, hx, cx = args[:6]
        return (x, hx, hx if cx is None else cx, list(weights))


def on_cudnn(layer: nn.RNNBase, x: Tensor, sizes: list[int]) -> tuple[int, int]:
    """What is counted of cuDNN's operations, called as torch calls them, with tensors without values."""
    given = states(layer, "meta", sizes[0] if sizes else ROWS)
    mode = ["RNN_RELU", "RNN_TANH", "LSTM", "GRU"].index(layer.mode)
    flat = [weight for group in layer.all_weights for weight in group]
    with FlopCounterMode(display=False) as forward:
        out = aten._cudnn_rnn(
            *(x, flat, len(layer.all_weights[0]), torch.empty(9, device="meta")),
            *(given[0], given[1] if len(given) > 1 else None, mode, layer.hidden_size, layer.proj_size),
            *(layer.num_layers, layer.batch_first, 0.0, True, layer.bidirectional, sizes, None),
        )[0]
    gradient = torch.ones_like(out)
    with Answers(), FlopCounterMode(display=False) as backward:
        wanted = [t for t in (x, *given, *flat) if t.requires_grad]
        torch.autograd.grad(out, wanted, gradient, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("kind, options", KINDS)
@pytest.mark.parametrize("how", ["padded", "batch_first", "packed", "frozen"])
def test_cu_dnn_counts_as_if_written_out(kind, options, how):
    layer = kind(WIDTH, HIDDEN, batch_first=how == "batch_first", **options)
    layer.requires_grad_(how != "frozen")
    axes = (ROWS, STEPS) if how == "batch_first" else (STEPS, ROWS)
    x, sizes = torch.randn(*axes, WIDTH, requires_grad=True), []
    given: Any = x
    if how == "packed":
        packed = pack_padded_sequence(x.detach(), torch.tensor([STEPS, 4, 2]))
        x, sizes = packed.data.requires_grad_(), packed.batch_sizes.tolist()
        given = packed._replace(data=x)
    expected = counted(layer, given)
    layer.to("meta")
    assert on_cudnn(layer, x.detach().to("meta").requires_grad_(), sizes) == expected


@pytest.mark.parametrize("backend", ["cudnn", "miopen"])
def test_the_operations_take_what_the_formulas_read(backend):
    name = f"{'_' if backend == 'cudnn' else ''}{backend}_rnn"
    for operation in (getattr(aten, name), getattr(aten, f"{name}_backward")):
        taken = [argument.name for argument in operation.default._schema.arguments]
        assert taken[:2] == ["input", "weight"] and operation in flop_registry
    assert taken[-1] == "output_mask"


@needs_onednn
def test_what_is_executed_is_counted_forward_and_backward():
    layer = nn.LSTM(WIDTH, HIDDEN, num_layers=2)
    x = torch.randn(STEPS, ROWS, WIDTH, requires_grad=True)
    with Executed() as executed:
        call(layer, x, states(layer)).sum().backward()
    assert executed.operations["mkldnn_rnn_layer"] == 2
    assert executed.multiply_adds == sum(counted(layer, x)) // 2


# Who counts by them --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Two recurrent layers and a classifier."""

    def __init__(self, cell: str):
        super().__init__()
        self.a = LayerOutputs(RecurrentLayer(cell, 16, 16))
        self.b = LayerOutputs(RecurrentLayer(cell, 16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean(1))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_wormhole_over_recurrent_layers_has_their_multiply_adds_and_their_price(cell):
    torch.manual_seed(0)
    x = torch.randn(4, 10, 16)
    model = tw.attach(
        Recurrent(cell), "b->a", stages=["a", "b"], example=x, policy="always", budget="1.5x"
    ).eval()
    with torch.no_grad():
        model(x)
    (record,) = tw.report(model)
    layers, message = 2 * RecurrentLayer(cell, 16, 16).multiply_adds(10), 10 * 16 * 16
    assert record.multiply_adds == record.evaluations * (layers + message)
    (price,) = (buffer for name, buffer in model.named_buffers() if name.endswith("price"))
    assert float(price) == pytest.approx((layers + message) / (layers + 16 * 3))


@pytest.mark.parametrize("name, gates", [("dynalay_lstm3", 4), ("dynalay_gru3", 3)])
def test_layers_that_an_agent_picks_among_cost_what_they_take(name, gates):
    model = timm.create_model(name, num_classes=30, hidden=12, policy="always").eval()
    steps = 9
    model(torch.ones(2, steps, dtype=torch.int64))
    layer = steps * gates * 12 * (12 + 12)
    assert model.selection.last.open_loop == 3 * layer + steps * 12 * 30


class Stemmed(nn.Module):
    """Rows of an image go through an LSTM before the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LSTM(8, HIDDEN, batch_first=True)
        self.first = nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        return self.first(self.stem(images.flatten(1, 2))[0])


def test_a_stem_may_be_recurrent():
    model = Stemmed()
    assert stem_multiply_adds(model, model.first, torch.zeros(5, 3, 8, 8)) == 3 * 8 * 4 * HIDDEN * (
        8 + HIDDEN
    )
