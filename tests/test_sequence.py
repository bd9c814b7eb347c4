"""Recurrent stacks with wormholes: the plain stack, the equation, padding, states, gates and gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.gates import LearnedGate
from twnn_plugin.policies import Policy
from twnn_plugin.sequence import LayerOutputs, RecurrentStack, TemporalSpec
from twnn_plugin.sequence.spec import END, parse

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")

WORMHOLES = ("layer1->layer0", "layer1[t-1]->layer0", "layer1[end]->layer0", "layer0[t-3]->layer0")
TIGHT = {"gate": "always", "tol": 1e-6, "max_iter": 60, "scale": 0.4}


def sequences(batch=4, length=12, features=3, seed=0):
    return torch.randn(batch, length, features, generator=torch.Generator().manual_seed(seed))


def stack(wormholes="layer1->layer0", cell="gru", layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return RecurrentStack(cell, 3, 8, layers, wormholes=wormholes, **options)


# The plain stack


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_closed_it_is_torchs_bit_for_bit(kind, both, mode):
    torch.manual_seed(0)
    plain = kind(3, 8, 2, batch_first=True, bidirectional=both)
    ours = RecurrentStack.from_torch(plain, wormholes=["layer1->layer0"])
    getattr(ours, mode)()
    out, state = ours(sequences())
    expected, after = plain(sequences())
    assert torch.equal(out, expected)
    for mine, theirs in zip(_tensors(state.torch()), _tensors(after), strict=True):
        assert torch.equal(mine, theirs)
    assert ours.records()[0].evaluations == (
        4 if mode == "train" else 0
    )  # one differentiated evaluation a row


def _tensors(state):
    return state if isinstance(state, tuple) else (state,)


def test_torchs_states_are_taken_and_given_back():
    torch.manual_seed(0)
    plain = nn.LSTM(3, 8, 2, batch_first=True)
    ours = RecurrentStack.from_torch(plain)
    given = (torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    out, state = ours(sequences(), given)
    expected, after = plain(sequences(), given)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(state.torch(), after, strict=True))
    assert all(part.is_contiguous() for part in state.torch())  # cuDNN refuses others


def test_plain_checkpoints_load_strictly():
    plain = stack(())
    ours = stack("auto", seed=1)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(ours.eval()(sequences())[0], plain.eval()(sequences())[0])


# The equation


@pytest.mark.parametrize("wormhole", WORMHOLES)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_output_solves_the_equation_as_it_is_written(wormhole, cell):
    model = stack(wormhole, cell, **TIGHT).eval()
    x = sequences()
    with torch.no_grad():
        out, state = model(x)
        assert model.records()[0].status.tolist() == [0] * 4
        (span,) = model.spans
        hidden = [layer.rnn for layer in model.layers]
        z = out if span.spec.source == 1 else None
        inner, _ = hidden[0](x)
        # The source's output, found by a plain iteration of the equation written out by hand.
        z = torch.zeros_like(out) if z is None else z
        for _ in range(60):
            back = _time(z, span.spec.delay)
            first, after0 = hidden[0](x + span.message(back))
            z = first if span.spec.source == 0 else hidden[1](first)[0]
        second, after1 = hidden[1](first)
    torch.testing.assert_close(out, second, atol=2e-5, rtol=0)
    ends = [after[0] if cell == "lstm" else after for after in (after0, after1)]
    torch.testing.assert_close(_tensors(state.torch())[0], torch.cat(ends), atol=2e-5, rtol=0)
    assert not torch.allclose(out, hidden[1](inner)[0], atol=1e-3)


def _time(z, delay):
    if delay == END:
        return z[:, -1:].expand_as(z)
    return torch.cat([torch.zeros_like(z[:, :delay]), z], dim=1)[:, : z.shape[1]]


def test_plain_iteration_solves_a_delay_in_as_many_steps_as_it_has_windows():
    model = stack("layer0[t-3]->layer0", solver="picard", **TIGHT).eval()
    with torch.no_grad():
        whole, _ = model(sequences(length=12))
    assert int(model.records()[0].steps.max()) <= 4  # 12 / 3: nothing before the first window, then exact
    model.window = 3
    with torch.no_grad():
        windows, _ = model(sequences(length=12))
    torch.testing.assert_close(whole, windows, atol=1e-6, rtol=0)
    assert model.records()[0].steps.tolist() == [4] * 4 and model.records()[0].evaluations == 16


@pytest.mark.parametrize("wormhole", ["layer1->layer0", "layer1[t-1]->layer0", "layer0[t-3]->layer0"])
@pytest.mark.parametrize("window", [1, 5])
def test_solving_step_by_step_gives_what_solving_all_at_once_gives(wormhole, window):
    model = stack(wormhole, **TIGHT)
    x = sequences()
    out, state = model(x)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    model.window = window
    steps, after = model(x)
    torch.testing.assert_close(steps, out, atol=2e-5, rtol=0)
    torch.testing.assert_close(after.torch(), state.torch(), atol=2e-5, rtol=0)
    again = torch.autograd.grad(steps.square().sum(), list(model.parameters()))
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_wormholes_that_share_layers_are_one_equation():
    model = stack(["layer1->layer0", "layer2[t-1]->layer1"], layers=3, **TIGHT).eval()
    x = sequences()
    with torch.no_grad():
        out, _ = model(x)
        one, two = model.spans
        rnns = [layer.rnn for layer in model.layers]
        a = b = torch.zeros(4, 12, 8)
        for _ in range(60):
            first = rnns[0](x + one.message(a))[0]
            a, b = (lambda z: (z, rnns[2](z)[0]))(rnns[1](first + two.message(_time(b, 1)))[0])
    torch.testing.assert_close(out, b, atol=2e-5, rtol=0)
    records = model.records()
    assert [r.evaluations > 0 for r in records] == [True, False]  # counted once
    assert torch.equal(records[0].steps, records[1].steps)


def test_wormholes_apart_are_solved_one_after_the_other():
    model = stack(["layer0->layer0", "layer2->layer1"], layers=3, **TIGHT).eval()
    with torch.no_grad():
        model(sequences())
    assert [r.evaluations > 0 for r in model.records()] == [True, True]


@pytest.mark.parametrize("adjoint", ["ad_fixed_point", "unrolled", "implicit"])
@pytest.mark.parametrize("wormhole", WORMHOLES)
def test_gradients_are_those_of_finite_differences(adjoint, wormhole):
    model = stack(wormhole, adjoint=adjoint, gate="always", tol=1e-11, max_iter=200, scale=0.4).double()
    x = sequences(2, 6).double().requires_grad_()
    weight = model.spans[0].message.project.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).double()

    def value(x):
        out, state = model(x)
        return out.square().sum() + state.torch().sum()

    found = torch.autograd.grad(value(x), [x, weight])
    with torch.no_grad():
        step = 1e-6
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
        model.eval()
        inputs = (value(x + step * along) - value(x - step * along)) / (2 * step)
        weight.add_(step * direction)
        up = value(x)
        weight.sub_(2 * step * direction)
        weights = (up - value(x)) / (2 * step)
    assert abs(float((found[0] * along).sum() - inputs)) < 1e-6 * (1 + abs(float(inputs)))
    assert abs(float((found[1] * direction).sum() - weights)) < 1e-6 * (1 + abs(float(weights)))


# Padding and states


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("wormhole", WORMHOLES)
def test_a_sequence_does_not_feel_how_far_its_mates_reach(wormhole, cell, both, norm):
    if both and "t-" in wormhole:
        wormhole = "layer1->layer0"
    model = stack(wormhole, cell, bidirectional=both, norm=norm, **TIGHT).eval()
    x = sequences()
    x[1, 7:] = 1e6  # must not be looked at
    with torch.no_grad():
        out, state = model(x, lengths=[12, 7, 1, 0])
        steps = model.records()[0].steps
        alone, end = model(x[1:2, :7])
    torch.testing.assert_close(out[1:2, :7], alone, atol=2e-6, rtol=0)
    assert int(steps[1]) == int(model.records()[0].steps[0])
    assert not out[1, 7:].any() and not out[3].any()
    for mine, theirs in zip(_tensors(state.torch()), _tensors(end.torch()), strict=True):
        torch.testing.assert_close(mine[:, 1:2], theirs, atol=2e-6, rtol=0)
        assert not mine[:, 3].any()  # of an empty sequence: the state it began with


def test_residuals_do_not_feel_padding():
    model = stack(gate="always", norm="max", solver="picard", tol=1e-9, max_iter=2, scale=0.4).eval()
    with torch.no_grad():
        model(sequences(length=100), lengths=[100, 7, 1, 0])
        together = model.records()[0].residual
        model(sequences(length=100)[1:2, :7])
    torch.testing.assert_close(model.records()[0].residual[0], together[1], rtol=1e-4, atol=0)


class Watching(Policy):
    """Keeps what it was shown."""

    def forward(self, view):
        self.features = view.features
        return view.open


@pytest.mark.parametrize("over", ["step", "state", "sequence"])
def test_gates_and_policies_do_not_feel_padding(over):
    policy = Watching()
    model = stack(gate_over=over, policy=policy).eval()
    with torch.no_grad():
        model(sequences(), lengths=[12, 7, 1, 0])
        together, features = model.records()[0].probability, policy.features
        model(sequences()[1:2, :7])
    torch.testing.assert_close(model.records()[0].probability[0], together[1])
    mine = {"step": slice(12, 19), "state": slice(1, 2), "sequence": slice(1, 2)}[over]
    torch.testing.assert_close(policy.features, features[mine])


@pytest.mark.parametrize("wormhole", ["layer1->layer0", "layer1[t-1]->layer0", "layer0[t-3]->layer0"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_sequence_may_be_given_in_pieces(wormhole, cell):
    model = stack(wormhole, cell, **TIGHT).eval()
    x = sequences()
    lengths = torch.tensor([12, 9, 4, 0])
    with torch.no_grad():
        whole, end = model(x, lengths=lengths)
        first, state = model(x[:, :5], lengths=lengths.clamp(max=5))
        second, after = model(x[:, 5:], state, lengths=(lengths - 5).clamp(min=0))
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=2e-5, rtol=0)
    for mine, theirs in zip(_tensors(after.torch()), _tensors(end.torch()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    for mine, theirs in zip(after.tails, end.tails, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_detached_states_cut_the_graph():
    model = stack("layer1[t-1]->layer0", **TIGHT)
    x = sequences().requires_grad_()
    _, state = model(x)
    assert state.torch().requires_grad
    out, _ = model(sequences(seed=1), state.detach())
    out.sum().backward()
    assert x.grad is None


# Causality


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("wormhole", ["layer1->layer0", "layer1[t-1]->layer0", "layer0[t-3]->layer0"])
@pytest.mark.parametrize("over", ["step", "state"])
def test_causal_outputs_do_not_see_later_inputs(cell, wormhole, over):
    model = stack(wormhole, cell, causal=True, gate_over=over, tol=1e-10, max_iter=99, scale=0.4).eval()
    for span in model.spans:
        nn.init.normal_(span.gate.score.weight, std=2.0)  # some steps open, some not
        nn.init.zeros_(span.gate.score.bias)
    model.double()
    x = sequences(length=16).double()
    other = x.clone()
    other[:, 9:] = sequences(length=16, seed=9)[:, 9:] * 5
    state = model(sequences(seed=5).double())[1]
    model(x, state)
    tw.configure(model, threshold=float(model.records()[0].probability.logit().median()))
    with torch.no_grad():
        before, after = model(x, state)[0], model(other, state)[0]
        opened = model.records()[0].gate
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-8, rtol=0)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)
    assert 0 < float(opened.mean()) < 1


def test_a_solve_that_fails_later_does_not_change_what_came_before():
    model = stack("auto", causal=True, gate="always", solver="picard", tol=1e-9, max_iter=3, scale=2.0).eval()
    x = sequences()
    other = x.clone()
    other[:, 9:] += 5
    with torch.no_grad():
        before, after = model(x)[0], model(other)[0]
    record = model.records()[0]
    assert (record.status != 0).all() and not record.fallback.any()
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)


def test_what_is_not_causal_shows_in_the_same_test():
    model = stack("layer1[end]->layer0", **TIGHT).eval()
    x = sequences()
    other = x.clone()
    other[:, 9:] += 5
    with torch.no_grad():
        assert not torch.allclose(model(x)[0][:, :9], model(other)[0][:, :9], atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"wormholes": "layer1[end]->layer0"},
        {"wormholes": "auto", "bidirectional": True},
        {"wormholes": "auto", "gate_over": "sequence"},
    ],
)
def test_causal_refuses_what_is_not(options):
    if options["wormholes"] != "auto" or "bidirectional" in options:
        with pytest.raises(ValueError, match="a window exclude"):
            stack(window=4, **options)
    with pytest.raises(ValueError, match="causal"):
        stack(causal=True, **options)


# Gates, policies and the rest of the interface


class Some(Policy):
    """Opens the rows it was given."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.seen = rows, None

    def forward(self, view):
        self.seen = view
        return torch.tensor(self.rows)


def test_a_policy_picks_layers_and_only_the_picked_rows_run():
    policy = Some([True, False, False, True])
    model = stack(["layer0->layer0", "layer1->layer1"], policy=policy, tol=1e-6, scale=0.4).eval()
    tw.configure(model, spans="layer1->layer1", policy="never")
    rows = []
    hook = model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with torch.no_grad():
        out, _ = model(sequences())
        hook.remove()
        plain = copy.deepcopy(model)
        tw.configure(plain, policy="never")
        closed, _ = plain(sequences())
    picked, other = tw.report(model)
    assert picked.open.tolist() == policy.rows and not other.open.any()
    assert torch.equal(out[1:3], closed[1:3]) and not torch.allclose(out[0], closed[0], atol=1e-3)
    assert policy.seen.features.shape == (4, 8) and policy.seen.span == "layer0->layer0"
    # The open-loop pass, the iterations of two rows, and the pass that the states come from.
    assert rows[0] == rows[-1] == 4 and set(rows[1:-1]) <= {1, 2}
    assert sum(rows[1:-1]) == picked.evaluations > 4


def test_multiply_adds_are_those_that_ran():
    model = stack("layer1->layer0", **TIGHT).eval()
    with torch.no_grad():
        model(sequences(), keep_state=False)
    record = model.records()[0]
    each = 12 * (3 * 8 * (3 + 8) + 3 * 8 * (8 + 8) + 8 * 3)
    assert record.multiply_adds == record.evaluations * each
    assert "layer1->layer0" in str(tw.report(model))


def test_windows_that_do_not_fill_are_counted_as_they_are():
    model = stack("layer0[t-5]->layer0", layers=1, window=5, **TIGHT).eval()
    with torch.no_grad():
        model(sequences(), keep_state=False)
    assert model.records()[0].evaluations == 4 * 3
    assert model.records()[0].multiply_adds == 4 * 12 * (3 * 8 * (3 + 8) + 8 * 3)


@pytest.mark.parametrize("solver", tw.solvers.names())
def test_solvers_agree(solver):
    model = stack("auto", **{**TIGHT, "tol": 1e-4}).eval()
    with torch.no_grad():
        expected, _ = model(sequences())
        tw.configure(model, solver=solver)
        out, _ = model(sequences())
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("over", ["sequence", "step", "state"])
@pytest.mark.parametrize("gate", ["straight_through", "sigmoid"])
@pytest.mark.parametrize("wormhole", ["layer1->layer0", "layer0[t-3]->layer0"])
def test_closed_gates_and_messages_learn(over, gate, wormhole):
    model = stack(
        wormhole, gate=(gate, {"bias": -0.03}), gate_over=over, window=3 if "t-" in wormhole else None
    )
    out, _ = model(sequences())
    plain = copy.deepcopy(model)
    tw.configure(plain, policy="never")
    assert (model.records()[0].gate == 0).any()
    if not model.records()[0].gate.any():
        torch.testing.assert_close(out, plain(sequences())[0])
    out.square().sum().backward()
    (span,) = model.spans
    assert span.gate.score.weight.grad.abs().sum() > 0
    assert span.message.project.weight.grad.abs().sum() > 0


def test_closed_steps_have_no_part_in_the_gradient_of_the_input():
    model = stack("layer1->layer0", gate_over="step", tol=1e-11, max_iter=200, scale=0.4).double()
    nn.init.normal_(model.spans[0].gate.score.weight, std=2.0)
    x = sequences(2, 6).double().requires_grad_()
    model(x)
    tw.configure(model, threshold=float(model.records()[0].probability.logit().median()))
    (found,) = torch.autograd.grad(model(x)[0].square().sum(), x)
    assert 0 < float(model.records()[0].gate.mean()) < 1
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        ends = [model.eval()(x + step * along)[0].square().sum() for step in (1e-6, -1e-6)]
    expected = float(ends[0] - ends[1]) / 2e-6
    assert abs(float((found * along).sum()) - expected) < 1e-6 * (1 + abs(expected))


def test_a_budget_opens_that_share_of_the_steps():
    model = stack("auto", budget=0.25, gate_over="step", tol=1e-2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for seed in range(40):
        out, _ = model(sequences(8, seed=seed))
        optimizer.zero_grad()
        (out - 1).square().mean().backward()
        optimizer.step()
    gates = []
    for seed in range(50, 60):
        with torch.no_grad():
            model.eval()(sequences(8, seed=seed))
        gates.append(model.records()[0].gate.mean())
    assert 0.1 < float(torch.stack(gates).mean()) < 0.45


def test_a_budget_in_multiply_adds_knows_the_price_and_the_steps():
    model = stack("auto", budget="2.0x", policy="always", tol=1e-3)
    gate = model.spans[0].gate
    layers = 3 * 8 * (3 + 8) + 3 * 8 * (8 + 8)
    assert abs(float(gate.price) - (layers + 8 * 3) / layers) < 1e-6
    assumed = float(gate.effort)
    for _ in range(80):
        model(sequences())
    taken = float(model.records()[0].steps.float().mean())
    assert abs(float(gate.effort) - taken) < 0.5 < abs(assumed - taken)
    assert abs(gate.wanted() - 1 / (float(gate.effort) * float(gate.price))) < 1e-3


def test_a_layer_is_a_module_for_blocks_that_iterate_one():
    layer = stack().layers[0]
    block = tw.blocks.get("fpi")(LayerOutputs(layer), sequences(), tol=1e-6)
    block.eval()
    with torch.no_grad():
        assert block(sequences()).shape == (4, 12, 8)
    assert tw.report(block)[0].open.all()


def test_dropout_is_drawn_once_a_solve():
    model = stack("auto", dropout=0.5, **TIGHT)
    x = sequences()
    torch.manual_seed(0)
    out, state = model(x)
    assert model.records()[0].status.tolist() == [0] * 4  # a map that changed would not settle
    torch.manual_seed(0)
    again, _ = model(x)
    assert torch.equal(out, again)
    torch.manual_seed(1)
    assert not torch.allclose(model(x)[0], out, atol=1e-3)
    assert state is not None


def test_a_row_that_fails_keeps_its_open_loop_values():
    model = stack("layer1->layer0", gate="always", tol=1e-9, max_iter=1, scale=3.0).eval()
    with torch.no_grad():
        out, state = model(sequences())
        assert tw.report(model)[0].fallback.all()
        tw.configure(model, policy="never")
        closed, end = model(sequences())
    assert torch.equal(out, closed) and torch.equal(state.torch(), end.torch())


def test_a_broken_sequence_leaves_its_mates_alone():
    model = stack("auto", **TIGHT).eval()
    x = sequences()
    with torch.no_grad():
        whole, _ = model(x)
        x[2, 5] = float("nan")
        out, _ = model(x)
    torch.testing.assert_close(out[[0, 1, 3]], whole[[0, 1, 3]], atol=1e-6, rtol=0)
    assert out[2, 5:].isnan().all()


def test_copies_and_checkpoints_keep_everything():
    model = stack("layer1[t-1]->layer0", budget=0.3)
    model(sequences())[0].sum().backward()
    twin = copy.deepcopy(model.eval())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    fresh = stack("layer1[t-1]->layer0", budget=0.3, seed=7).eval()
    fresh.load_state_dict(model.state_dict())
    x = sequences(seed=3)
    expected, _ = model(x)
    for other in (twin, loaded, fresh):
        assert torch.equal(other(x)[0], expected)
    # A copy is settled with its own weights.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_forward_mode_on_the_cpu(cell):
    method = {"solver": "ad_fixed_point", "adjoint": "ad_fixed_point"}
    model = stack("auto", cell, **TIGHT, **method).double()
    x = sequences(2, 5).double()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def f(x):
        return model(x, keep_state=False)[0]

    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's LSTM has no forward mode
        _, found = torch.func.jvp(f, (x,), (along,))
        step = 1e-5
        expected = (f(x + step * along) - f(x - step * along)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_second_derivatives_on_the_cpu(cell):
    model = stack("layer1[t-1]->layer0", cell, gate="always", tol=1e-10, max_iter=100, scale=0.4).double()
    x = sequences(2, 5).double().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    (found,) = torch.autograd.grad((grad * along).sum(), x)

    def first(x):
        (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x)
        return grad

    step = 1e-6
    expected = (first(x + step * along) - first(x - step * along)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Bad input


@pytest.mark.parametrize(
    "text, spec",
    [
        ("layer2->layer0", TemporalSpec(2, 0, 0)),
        (" layer2 [t] -> layer0 ", TemporalSpec(2, 0, 0)),
        ("-1[t - 12]->0", TemporalSpec(2, 0, 12)),
        ("2[end]->1", TemporalSpec(2, 1, END)),
        ("auto", TemporalSpec(2, 0, 0)),
    ],
)
def test_specs_are_read(text, spec):
    assert parse(text, 3) == (spec,)


@pytest.mark.parametrize(
    "text, message",
    [
        ("layer0->layer2", "did you mean 'layer2->layer0'"),
        ("layer3->layer0", "Did you mean 'layer0'|Did you mean 'layer2'|Did you mean 'layer1'"),
        ("layer2", "is written"),
        ("layer2[t+1]->layer0", r"\[t\], \[t-1\]"),
        (["layer1->layer0", "1->0"], "named twice"),
        ([3], "takes strings"),
    ],
)
def test_bad_specs_are_refused(text, message):
    with pytest.raises((ValueError, KeyError), match=message):
        parse(text, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cell": "gruu"}, "Did you mean 'gru'"),
        ({"layers": 0}, "num_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": 1, "wormholes": "auto", "dropout": 0.1}, "one layer only"),
        ({"window": 0}, "window"),
        ({"gate_over": "steps"}, "Did you mean 'step'"),
        ({"max_iters": 3}, "Did you mean 'max_iter'"),
        ({"solver": "andersen"}, "Did you mean 'anderson'"),
        ({"policy": "allways"}, "Did you mean 'always'"),
        ({"gate": "sigmoyd"}, "Did you mean 'sigmoid'"),
        ({"budget": 1.5}, "budget"),
        ({"budget": "1.5x", "gate_over": "step"}, "share of steps"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        stack(**options)


def test_bad_inputs_are_refused_and_lose_nothing():
    model = stack("layer1[t-1]->layer0", **TIGHT).eval()
    x = sequences()
    with torch.no_grad():
        expected, state = model(x)
        for call in (
            lambda: model(x[0]),
            lambda: model(x[..., :2]),
            lambda: model(x[:, :0]),
            lambda: model(x, lengths=[12, 12, 12]),
            lambda: model(x, lengths=[12, 12, 12, 13]),
            lambda: model(x, lengths=torch.ones(4)),
            lambda: model(x, torch.zeros(1, 4, 8)),
            lambda: model(x, state.mapped(lambda part: part[:2])),
            lambda: model(x, stack((), layers=3)(x)[1]),
        ):
            with pytest.raises(tw.MapError):
                call()
        assert torch.equal(model(x)[0], expected)
    with pytest.raises(tw.MapError, match="proj_size"):
        RecurrentStack.from_torch(nn.LSTM(3, 8, proj_size=4))
    with pytest.raises(tw.UnknownNameError, match="layer1"):
        tw.configure(model, spans="layer1->layer0", tol=1e-3)


def test_a_policy_that_answers_nonsense_is_told():
    with pytest.raises(tw.OptionError, match="Some"):
        stack("auto", policy=Some([True]))(sequences())


def test_learned_gates_can_be_configured():
    model = stack("auto")
    tw.configure(model, threshold=-100.0, tol=1e-2)
    (span,) = model.spans
    assert isinstance(span.gate, LearnedGate) and span.settings.tol == 1e-2
    model.eval()(sequences())
    assert tw.report(model)[0].open.all()
