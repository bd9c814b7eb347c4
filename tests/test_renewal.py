"""Rows that start anew among others: each does what it would do in a batch that began with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from twnn_plugin.solvers import Problem, StepSolver
from twnn_plugin.streaming.methods import Cohorts, Renewing
from twnn_plugin.trees import take

from .streams import Mixed, assert_same, mixed_batches

ROWS, WIDTH, STEPS = 6, 9, 24
METHODS = [
    ("picard", {}, ()),
    ("picard", {"damping": 0.7}, ()),
    ("ad_fixed_point", {}, ()),
    *(("anderson", {"start": start}, ()) for start in (0, 1, 2, 3, 6)),
    *(("anderson", {"memory": memory}, ()) for memory in (1, 2, 4, 8)),
    ("anderson", {"damping": 0.6, "memory": 2}, ()),
    ("anderson", {"start": 0, "damping": 0.6}, (4, 5)),
    ("anderson", {"start": 1}, (4, 5)),
    ("anderson", {}, (2, 7)),
]


def method(name: str, options: dict, parts: tuple[int, ...]) -> StepSolver:
    solver = tw.solver(name, **options)
    assert isinstance(solver, StepSolver)
    return solver.in_parts(parts) if parts else solver


class Map:
    """``tanh(W z) + x``, its entries of different sizes, for rows that come and go."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.scale = torch.logspace(-2, 2, WIDTH, dtype=torch.float64)
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.weight = 0.95 * weight / torch.linalg.matrix_norm(weight, 2)
        self.x = torch.randn(100, WIDTH, generator=generator, dtype=torch.float64)

    def __call__(self, z: Tensor, which: list[int]) -> Tensor:
        return self.scale * (torch.tanh((z / self.scale) @ self.weight) + self.x[which])


def by_itself(solver: StepSolver, f: Map, which: int, steps: int) -> list[Tensor]:
    """The iterates of one row."""
    z = torch.zeros(1, WIDTH, dtype=torch.float64)
    state, iterates = solver.init(z), [z]
    for _ in range(steps):
        fz = f(z, [which])
        z, state = solver.step(None, z, fz, fz - z, state)
        iterates.append(z)
    return iterates


def _no_further_evaluations(z: Tensor, begin: int) -> Tensor:
    raise AssertionError("these methods evaluate f only once in a step")


class Batch:
    """Rows of different ages, stepped together.

    Args:
        kind: of the class under test.
        solver: the method.
    """

    def __init__(self, kind, solver: StepSolver):
        self.solver, self.f, self.steps = solver, Map(), kind(solver, _no_further_evaluations)
        self.z = torch.zeros(0, WIDTH, dtype=torch.float64)
        self.which: list[int] = []  # the number of each row
        self.made: list[int] = []  # the steps that it has made
        self._numbers = iter(range(100))
        self.join(ROWS)

    def join(self, count: int) -> None:
        new = torch.zeros(count, WIDTH, dtype=torch.float64)
        self.z = torch.cat([self.z, new])
        self.which += [next(self._numbers) for _ in range(count)]
        self.made += [0] * count
        self.steps.extend(new, self.z)

    def leave(self, places: list[int]) -> None:
        keep = [place for place in range(len(self.which)) if place not in places]
        self.z = self.z[keep]
        self.which, self.made = [self.which[i] for i in keep], [self.made[i] for i in keep]
        self.steps.keep(keep, torch.tensor)

    def replace(self, places: list[int]) -> None:
        self.z = self.z.index_fill(0, torch.tensor(places), 0)
        for place in places:
            self.which[place], self.made[place] = next(self._numbers), 0
        self.steps.replace(torch.tensor(places), self.z)

    def step(self, spoilt: list[int]) -> None:
        """Evaluate and step; rows in some places are infinite, and are not looked at."""
        fz = self.f(self.z, self.which).index_fill(0, torch.tensor(spoilt, dtype=torch.long), math.inf)
        self.z = self.steps.following(self.z, fz, fz - self.z)
        self.made = [age + 1 for age in self.made]
        for place, (row, age) in enumerate(zip(self.which, self.made, strict=True)):
            if place not in spoilt:
                expected = by_itself(self.solver, self.f, row, age)[-1][0]
                torch.testing.assert_close(self.z[place], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("name", "options", "parts"), METHODS)
@pytest.mark.parametrize("kind", [Renewing, Cohorts])
def test_rows_that_come_and_go(kind, name, options, parts):
    batch = Batch(kind, method(name, options, parts))
    events = {4: batch.join, 5: batch.leave, 12: batch.join, 13: batch.leave}
    with torch.no_grad():
        for k in range(STEPS):
            if k in events:
                events[k](2 if k in (4, 12) else [0, 3])
            batch.step([])


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize(("name", "options", "parts"), METHODS)
def test_rows_in_the_places_of_others(name, options, parts, spoilt):
    batch = Batch(Renewing, method(name, options, parts))
    events = {1: [3], 2: [1], 3: [0, 4], 4: [0], 9: [5], 15: [0, 1, 2, 3, 4, 5], 16: [2]}
    with torch.no_grad():
        for k in range(STEPS):
            if k in events:
                batch.replace(events[k])
            batch.step(events.get(k + 1, []) if spoilt else [])
            if k == 11:
                batch.join(1)  # while nobody is young
            if k == 16:
                batch.leave([1])  # while somebody is


def test_a_history_of_one_age_is_stepped_the_ordinary_way_again():
    batch = Batch(Renewing, tw.solver("anderson", start=2))
    with torch.no_grad():
        for k in range(12):
            if k == 6:
                batch.replace([1, 2])
            batch.step([])
            assert (batch.steps._state.ages is None) == (not 6 <= k < 8)


def test_f_may_return_what_is_somebody_elses():
    constant = torch.randn(4, WIDTH)
    before = constant.clone()
    steps = Renewing(tw.solver("anderson", start=1), _no_further_evaluations)
    z = torch.zeros(4, WIDTH)
    with torch.no_grad():
        steps.extend(z, z)
        for k in range(6):
            if k in (1, 3):
                steps.replace(torch.tensor([2]), z)
            z = steps.following(z, constant, constant - z)
    assert torch.equal(constant, before)


# Which methods have it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrapped(tw.solvers.get("anderson")):  # type: ignore[misc]
    """Its steps are not those that its ``renew`` was made for."""

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state):
        following, state = super().step(problem, z, fz, r, state)
        return following, state


@dataclass(frozen=True)
class Begun(tw.solvers.get("picard")):  # type: ignore[misc]
    """Its state is where each row began."""

    def init(self, z: Tensor):
        return z

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Tensor):
        assert state.shape == z.shape
        return fz, state


@dataclass(frozen=True)
class Renewed(Begun):
    def renew(self, state, rows: Tensor, z: Tensor):
        return state.index_copy(0, rows, z[rows])


def test_a_renew_that_was_made_for_another_step_does_not_count():
    assert [tw.solver(name).renews for name in ("picard", "ad_fixed_point", "anderson", "broyden")] == [
        *(True, True, True),
        False,
    ]
    assert tw.solver("anderson").in_parts((2, 3)).renews
    assert not Wrapped().renews and not Begun().renews and Renewed().renews
    with pytest.raises(NotImplementedError, match="Broyden has no renew"):
        tw.solver("broyden").renew(None, torch.tensor([0]), torch.zeros(2, 2))


@pytest.mark.parametrize("check_every", [None, 3])
@pytest.mark.parametrize(
    "solver",
    [
        *(tw.solver("anderson", start=start) for start in (0, 1, 5)),
        tw.solver("anderson", memory=6, damping=0.8),
        *(Wrapped(), Begun(), Renewed()),
    ],
    ids=str,
)
def test_streams_of_them(solver, check_every):
    model, batches = Mixed(solver=solver, check_every=check_every).eval(), mixed_batches(60, 5)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    alone = sorted(step for s in model.solutions for step in s.steps.tolist())
    model.solutions = []
    assert_same(list(tw.stream(model, batches, 7)), expected)
    assert sorted(step for s in model.solutions for step in s.steps.tolist()) == alone


def test_take_reaches_the_ages():
    solver, z = tw.solver("anderson", start=2), torch.zeros(4, WIDTH)
    state = solver.renew(solver.init(z), torch.tensor([1]), z)
    assert take(state, torch.tensor([3, 1])).ages.steps.tolist() == [0, 0]
    state = solver.step(None, z, z + 1, z + 1, state)[1]
    state = solver.renew(state, torch.tensor([1, 2]), z)
    assert take(state, torch.tensor([3, 1])).ages.steps.tolist() == [1, 0]
