"""Gates beside half weights, in inference mode, compiled, with options that cannot be; messages compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch._dynamo
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import twnn_plugin as tw
from twnn_plugin.blocks import message
from twnn_plugin.sequence import RecurrentStack

Wormhole = tw.blocks.get("wormhole")
HALF = (torch.float16, torch.bfloat16)
NUMBERS = (
    "threshold",
    "dual",
    "integral",
    "excess",
    "effort",
    "price",
    "running_mean",
    "running_var",
    "spread",
)


def features(rows=64, channels=16, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def made(name="straight_through", **options):
    torch.manual_seed(0)
    return tw.gate(name, channels=16, **options)


def kept(gate):
    """The buffers' values, at full precision."""
    return {name: buffer.tolist() for name, buffer in gate.named_buffers()}


def block_of(width=8, **options):
    torch.manual_seed(0)
    return Wormhole(
        nn.Linear(width, width), torch.randn(4, width), **{"tol": 1e-2, "max_iter": 20, **options}
    )


# ------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("name", ["straight_through", "sigmoid", "hard_concrete"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_gate_with_half_weights_keeps_its_budget(dtype, name):
    gate, x = made(name, budget=0.3).to(dtype).train(), features(200).to(dtype)
    with torch.no_grad():
        for _ in range(300):
            gate(x)
        out = gate.eval()(x)
    # One of 200 samples: scores that round to the same number would open or close together.
    assert float(out.open.float().mean()) == pytest.approx(0.3, abs=0.011)
    assert out.probability.dtype == torch.float32 and gate.hidden.weight.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_the_dual_variable_rises_to_its_bound_beside_half_weights(dtype):
    gate, x = made(budget=0.3, control="dual", bias=5.0).to(dtype).train(), features().to(dtype)
    with torch.no_grad():
        for _ in range(400):  # 10 * 0.005 * 0.7 a step, of which half precision loses some near the bound
            gate(x)
    assert float(gate.integral) == float(gate.dual) == gate.dual_bound
    assert float(gate.excess) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_the_effort_comes_all_the_way_beside_half_weights(dtype):
    gate = made(budget="2 rows").to(dtype)
    for _ in range(300):
        gate.observe(torch.tensor([9, 10]))
    assert float(gate.effort) == pytest.approx(9.5, abs=1e-3)


@pytest.mark.parametrize("name", ["straight_through", "sigmoid", "hard_concrete"])
@pytest.mark.parametrize("per", ["sample", "channel"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@torch.no_grad()
def test_a_glance_sees_what_a_look_would(dtype, per, name):
    gate, x = made(name, per=per).to(dtype).eval(), features()
    gate(x.to(dtype))
    highest = float(gate.scores.max())
    opened = []
    for above in (-0.1, -1e-5, 0.0, 1e-5, 0.1):
        gate.put("threshold", highest + above)
        probability, out = gate.glance(x), gate(x.to(dtype))
        opened.append(bool(out.open.any()))
        assert opened[-1] == (probability is None)
        assert probability is None or torch.equal(probability(), out.probability)
    assert opened == [True, True, False, False, False]


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "to a device, too": lambda m: m.to("cpu", torch.bfloat16),
    "twice": lambda m: m.half().bfloat16(),
    "there and back": lambda m: m.bfloat16().float().half(),
    "then copied": lambda m: copy.deepcopy(m.half()),
    "then pickled": lambda m: pickle.loads(pickle.dumps(m.bfloat16())),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_what_keeps_the_budget_is_not_rounded_when_a_model_is_cast(cast):
    block = block_of(gate=("sigmoid", {"budget": 0.3}))
    for place, name in enumerate(NUMBERS):
        block.feedback.gate.put(name, 1 / 3 + place)
    before = kept(block.feedback.gate)
    gate = cast(block).feedback.gate
    assert kept(gate) == before and set(before) == set(NUMBERS)
    assert {buffer.dtype for buffer in gate.buffers()} == {torch.float32}
    assert {p.dtype for p in gate.parameters()} == {gate.dtype} and gate.dtype in HALF


def test_the_other_dtypes_are_those_of_the_weights():
    gate = made()
    assert {b.dtype for b in gate.double().buffers()} == {gate.dtype} == {torch.float64}
    assert {b.dtype for b in gate.float().buffers()} == {gate.dtype} == {torch.float32}
    gate.double().half()
    assert {b.dtype for b in gate.buffers()} == {torch.float32} and gate.dtype == torch.float16
    assert {b.device.type for b in gate.to("meta").buffers()} == {"meta"}
    torch.set_default_dtype(torch.float16)
    try:
        gate = made(bias=0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in gate.buffers()} == {torch.float32} and gate.dtype == torch.float16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_a_checkpoint_in_half_precision_is_loaded(dtype, assign):
    gate = made(budget=0.3)
    gate.put("threshold", -1.75)
    old = {name: value.to(dtype) for name, value in gate.state_dict().items()}
    for twin in (made(budget=0.3), made(budget=0.3).to(dtype)):
        twin.load_state_dict(old, assign=assign)
        assert {b.dtype for b in twin.buffers()} == {torch.float32} and float(twin.threshold) == -1.75
        twin.train()(features().to(twin.dtype))
        assert float(twin.threshold) != -1.75


def test_averages_of_a_model_with_half_weights():
    model = block_of(gate=("sigmoid", {"budget": 0.3})).bfloat16().train()
    averages = [ModelEmaV3(model, decay=0.5), AveragedModel(model, use_buffers=True)]
    for value in (-1.0, -2.0):
        model.feedback.gate.put("threshold", value)
        averages[0].update(model)
        averages[1].update_parameters(model)
    for average, expected in zip(averages, (-1.25, -1.5), strict=True):
        gate = next(m for m in average.modules() if isinstance(m, tw.gates.LearnedGate))
        assert gate.threshold.dtype == torch.float32 and float(gate.threshold) == expected


@pytest.mark.parametrize("control", ["threshold", "dual"])
@pytest.mark.parametrize("name", ["straight_through", "sigmoid", "hard_concrete"])
def test_a_wormhole_with_half_weights_is_trained(name, control):
    gate = (name, {"budget": 0.5, "control": control, "bias": 0.0, "per": "channel"})
    block = block_of(gate=gate).bfloat16().train()
    x = torch.randn(16, 8).bfloat16()
    out = block(x)
    assert out.dtype == torch.bfloat16
    (out.float().square().mean() + block.auxiliary_loss()).backward()
    assert bool(block.feedback.gate.score.weight.grad.any())
    with torch.no_grad():
        assert block.eval()(x).dtype == torch.bfloat16


def test_a_stack_with_half_weights_is_trained():
    torch.manual_seed(0)
    stack = RecurrentStack("gru", 6, 8, 2, wormholes="layer1->layer0", gate="sigmoid", budget=0.5).bfloat16()
    out, _ = stack.train()(torch.randn(4, 5, 6).bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert stack.spans[0].gate.threshold.dtype == torch.float32


def test_a_gate_whose_layers_keep_no_weights_as_tensors_computes_in_the_dtype_of_its_threshold():
    class Packed(nn.Module):
        """As a dynamically quantised layer has it."""

        def __init__(self, layer):
            super().__init__()
            self.packed = [layer]

        def weight(self):
            return self.packed[0].weight

        def forward(self, x):
            return self.packed[0](x)

    gate = made("sigmoid").eval()
    with torch.no_grad():
        expected = gate(features()).probability
        gate.hidden, gate.score = Packed(gate.hidden), Packed(gate.score)
        assert gate.dtype == torch.float32 and torch.equal(gate(features()).probability, expected)
        assert torch.equal(gate.glance(features())(), expected)


# ------------------------------------------------------------------------------------------ inference mode


def _calibrate(model):
    tw.calibrate(model, [features(64, 8)], budget="2 rows")


def _train(model):
    model.train()(features(64, 8))


AT_WORK = {
    "calibrate": ({}, _calibrate),
    "configure": ({}, lambda model: tw.configure(model, threshold=-3.0, budget="1.5x")),
    "threshold": ({"budget": "2 rows"}, _train),
    "dual": ({"budget": "2 rows", "control": "dual"}, _train),
}


@pytest.mark.parametrize("options, act", AT_WORK.values(), ids=AT_WORK.keys())
def test_what_happens_in_inference_mode_leaves_a_model_that_can_be_used(options, act):
    gate = ("straight_through", {**options, "bias": 0.5})
    model, twin = (block_of(gate=gate, opening=3) for _ in range(2))
    best = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        act(model)
    with torch.no_grad():
        act(twin)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, best[name])]
    assert moved and not [name for name, buffer in model.named_buffers() if buffer.is_inference()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    model.train()(features(64, 8)).square().sum().backward()
    model.load_state_dict(best)
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_an_error_in_inference_mode_leaves_everything_as_it_was():
    model = block_of(gate=("sigmoid", {"budget": 0.3}))
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield features(64, 8)
        raise RuntimeError("the disk is gone")

    class Loader:
        def __init__(self):
            self.rounds = 0

        def __iter__(self):
            self.rounds += 1
            return batches() if self.rounds > 1 else iter([features(64, 8)])

    with torch.inference_mode(), pytest.raises(RuntimeError, match="the disk"):
        tw.calibrate(model, Loader(), budget="2 rows")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.feedback.gate.budget == 0.3 and not any(b.is_inference() for b in model.buffers())


# ------------------------------------------------------------------------------------------------- options


def test_a_gate_is_not_told_its_channels():
    gate = ("sigmoid", {"channels": 5})
    with pytest.raises(tw.OptionError, match="leave channels out of gate 'sigmoid'; got channels=5"):
        block_of(gate=gate)
    with pytest.raises(tw.OptionError, match="leave channels out"):
        timm.create_model("twnn_resnet10t", num_classes=5, wormholes="layer4->layer4", gate=gate)


@pytest.mark.parametrize("spans", [5, [], (), [5], [None], b"body->body", object()])
def test_spans_that_are_no_names_are_refused(spans):
    block = block_of()
    settings = block.feedback.settings
    with pytest.raises(tw.OptionError, match="spans is the name of a span, such as 'body->body'"):
        tw.configure(block, spans=spans, tol=0.5)
    assert block.feedback.settings == settings
    for named in ("body->body", ["body->body"], ("body->body",), {"body->body"}, iter(["body->body"])):
        tw.configure(block, spans=named, tol=0.5)
    assert block.feedback.settings.control.tol == 0.5


@pytest.mark.parametrize("options", [{"records": "no"}, {"batched": "no"}, {"records": 1}, {"batched": None}])
def test_a_stream_is_told_yes_or_no(options):
    (name,) = options
    with pytest.raises(tw.OptionError, match=f"{name} is True or False; got"):
        tw.stream(block_of().eval(), [features(4, 8)], 4, **options)


# ------------------------------------------------------------------------------------------------- traced


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def contracting():
    torch.manual_seed(0)
    options = {"policy": "always", "contraction": 0.5, "num_classes": 5}
    return timm.create_model("twnn_resnet8_cifar", wormholes="layer3->layer2", **options).eval()


def quantiles_compile() -> bool:
    """Whether this torch takes a quantile into a graph, which the threshold follows; 2.11 does not."""
    try:
        torch.compile(lambda x: torch.quantile(x, 0.5), backend="eager", fullgraph=True)(torch.ones(3))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("control", ["threshold", "dual"])
def test_a_gate_that_keeps_a_budget_compiles_to_one_graph(control, fresh_compiler):
    if control == "threshold" and not quantiles_compile():
        pytest.skip(f"torch {torch.__version__} breaks the graph at a quantile")
    gate, twin = (made(budget=0.3, control=control).train() for _ in range(2))
    moving = ("running_mean", "running_var", "threshold" if control == "threshold" else "dual")
    fast = torch.compile(twin, backend="eager", fullgraph=True)
    for seed in range(3):
        gate(features(seed=seed)), fast(features(seed=seed))
    torch.testing.assert_close(dict(gate.named_buffers()), dict(twin.named_buffers()))
    assert all(value != kept(made())[name] for name, value in kept(gate).items() if name in moving)


@torch.no_grad()
def test_a_contracting_message_compiles_to_one_graph(fresh_compiler):
    module = tw.unrolled(contracting(), 2)
    fast = torch.compile(module, backend="eager", fullgraph=True)
    for rows, side in ((2, 16), (3, 16), (3, 24)):  # at the last, sizes are symbols
        x = torch.randn(rows, 3, side, side)
        assert torch.equal(fast(x), module(x))


@torch.no_grad()
def test_a_contracting_message_is_exported_before_it_has_run():
    model, many = contracting(), torch.randn(5, 3, 20, 20)  # a size that no other test has: no norm is known
    program = tw.export(model, many[:2], steps=2).module()
    assert torch.allclose(program(many), tw.unrolled(model, 2)(many), atol=1e-6)


def test_the_norm_of_a_resizing_is_the_largest_singular_value_of_its_matrix():
    for here in range(1, 17):
        eye = torch.eye(here, dtype=torch.float64)[:, None]
        for there in range(1, 17):
            pooled, between = F.adaptive_avg_pool1d(eye, there), F.interpolate(eye, size=there, mode="linear")
            for rows, found in (
                (pooled, message._resize_norm(here, there, True)),
                (between, message._resize_norm(here, there, False)),
            ):
                true = float(torch.linalg.matrix_norm(rows[:, 0], 2))
                assert true * (1 - 1e-12) <= found <= true * (1 + 2e-6), (here, there)
    with torch.device("meta"):
        assert message._resize_norm(31, 97, False) > 1


def test_two_budgets_are_refused_and_a_weight_of_no_closed_head():
    model = timm.create_model("resnet10t", num_classes=5)
    with pytest.raises(tw.OptionError, match=r"two budgets, budget=0.5 and the gate's option budget=0.3"):
        tw.attach(model, gate=("sigmoid", {"budget": 0.3}), budget=0.5)
    with pytest.raises(tw.OptionError, match="two budgets"):
        RecurrentStack("gru", 4, 4, wormholes="auto", gate=("sigmoid", {"budget": 0.3}), budget=0.5)
    with pytest.raises(tw.OptionError, match=r"closed_weight=0.3 is the weight of a closed head's loss"):
        tw.attach(model, closed_weight=0.3)
    assert not hasattr(model, "wormholes")
