"""The rows of an active batch as the compiled kernels keep them: places, blocks, and what is written down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from twnn_plugin import kernels
from twnn_plugin.solvers.base import Control
from twnn_plugin.solvers.book_rows import CODES, rule_of

from .streams import Mixed, mixed_batches

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")


def guests(width: int = 3, capacity: int = 4, **control) -> kernels.Guests:
    rule = rule_of(Control(**{"tol": 1e-3, "max_iter": 50, **control}), torch.float64)
    return kernels.Guests(torch.empty(0, width, dtype=torch.float64), rule, CODES, capacity)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_blocks_do_not_overlap_and_are_used_again(data):
    held, here = guests(width=2), {}
    most = 0
    for _ in range(data.draw(st.integers(1, 30))):
        if here and data.draw(st.booleans()):
            begin = data.draw(st.sampled_from(sorted(here)))
            count, mark = here.pop(begin)
            value, *_ = held.collect(begin)
            assert value.shape == (count, 2) and bool(
                (value == mark).all()
            )  # growth and others left it alone
        else:
            count = data.draw(st.integers(1, 9))
            begin = held.reserve(count)
            taken = {place for b, (n, _) in here.items() for place in range(b, b + n)}
            assert not taken & set(range(begin, begin + count))
            mark = float(len(taken) + 100 * begin)
            held.values[begin : begin + count] = mark
            here[begin] = count, mark
        most = max(most, sum(n for n, _ in here.values()))
    # At worst every other block is free and too small; doubling adds as much again.
    assert held.values.shape[0] <= max(4, 4 * most + 18)
    assert held.values.shape[0] == held.status.shape[0] == held.steps.shape[0] == held.residual.shape[0]


@pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")  # one runs out of evaluations
def test_rows_that_come_later_are_written_down_as_if_they_had_been_alone():
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.6, 0.1], dtype=torch.float64)[:, None]
    start = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    expected = [
        tw.fix(lambda z, c: c * z, start[i : i + 1], rates[i : i + 1], solver="picard", tol=1e-3)
        for i in range(7)
    ]
    held, first = guests(), 4
    begin = held.reserve(7)
    held.enter(range(first), range(begin, begin + first))
    z, rate, seats, coming = start[:first].clone(), rates[:first].clone(), list(range(first)), first
    while any(seat is not None for seat in seats):
        fz = rate * z
        ended, _ = held.look(z, fz, torch.empty_like(z))
        left = held.leave(z, fz)
        assert len(left) == ended
        for place in left:
            seats[place] = None
        z = fz
        for place in left:
            if coming < 7:
                held.enter([place], [begin + coming])
                z[place], rate[place], seats[place] = start[coming], rates[coming], coming
                coming += 1
        if coming == 7 and None in seats:
            keep = torch.tensor([place for place, seat in enumerate(seats) if seat is not None])
            if len(keep):
                held.keep(keep)
                z, rate, seats = z[keep], rate[keep], [seat for seat in seats if seat is not None]
    value, status, steps, residual = held.collect(begin)
    assert torch.equal(status, torch.cat([s.status for s in expected]))
    assert torch.equal(steps, torch.cat([s.steps for s in expected]))
    assert torch.allclose(residual, torch.cat([s.residual for s in expected]))
    assert torch.allclose(value, torch.cat([s.value for s in expected]))


def test_no_row_is_written_where_there_is_no_room():
    held = guests(capacity=2)
    begin = held.reserve(2)
    for rows, places in (([2], [begin]), ([0], [begin + 2]), ([0, 2], [begin, begin + 1])):
        with pytest.raises(ValueError, match="no room"):
            held.enter(rows, places)
    with pytest.raises(TypeError, match="arguments wanted"):
        held.enter([0, 1], [begin])


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_streams_with_and_without_kernels_agree(solver, in_flight):
    model, batches = Mixed(solver=solver).double().eval(), [x.double() for x in mixed_batches(90, 7)]
    with kernels.disabled():
        expected = list(tw.stream(model, batches, 5, in_flight=in_flight))
    others, model.solutions = model.solutions, []
    torch.testing.assert_close(list(tw.stream(model, batches, 5, in_flight=in_flight)), expected)
    assert [s.steps.tolist() for s in model.solutions] == [s.steps.tolist() for s in others]
    assert [s.status.tolist() for s in model.solutions] == [s.status.tolist() for s in others]
