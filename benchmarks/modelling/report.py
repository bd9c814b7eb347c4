"""Tables and claims of ``models``, from the cells' data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from ..harness import Claim, Table
from ..training.report import compared, paired, shown
from .arms import ARMS
from .papers import paper_claims, verdicts

__all__ = ["Found", "claims", "datasets", "found_on", "tables", "time_to"]

Found = dict[str, dict[int, dict[str, Any]]]
"""Data of the finished cells by arm and seed."""

AHEAD = 3.0
RIVALS = ("deq", "deq_phantom")
CONTROLS = {"plain": "the plain backbone", "longer": "the same trained longer", "wider": "a wider one"}


def datasets(cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(data set, precision) of the finished cells, in order."""
    done = (cell["options"] for cell in cells if cell["status"] == "ok" and "arm" in cell["options"])
    return list(dict.fromkeys((options["dataset"], options["precision"]) for options in done))


def found_on(cells: list[dict[str, Any]], dataset: str, precision: str = "float32") -> Found:
    """The finished cells of one data set."""
    found: Found = {}
    for cell in cells:
        options = cell["options"]
        if cell["status"] == "ok" and (options.get("dataset"), options.get("precision")) == (
            dataset,
            precision,
        ):
            found.setdefault(options["arm"], {})[options["seed"]] = cell["data"]
    return found


def pick(found: Found, arm: str, get: Callable[[dict[str, Any]], Any]) -> dict[int, Any]:
    """One figure of every seed of an arm."""
    return {seed: get(data) for seed, data in found.get(arm, {}).items()}


def accuracy(data: dict[str, Any]) -> float:
    """Test accuracy in per cent."""
    return data["test"]["accuracy"]


def seconds(data: dict[str, Any]) -> float:
    """Of the training, the search for a rate left out."""
    return sum(data["training"]["seconds"].values())


def level_of(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The validation accuracy that both reach: the lower of the two bests."""
    return min(max(point[-1] for point in data["training"]["curve"]) for data in (ours, theirs))


def time_to(data: dict[str, Any], level: float) -> tuple[float, float] | None:
    """Seconds and multiply-adds of training until validation accuracy first reaches ``level``."""
    for point in data["training"]["curve"]:
        if point[-1] >= level:
            return sum(point[1:4]), point[4]
    return None


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """For each data set: accuracy, training, curves; then the settings."""
    made: list[Table] = []
    for dataset, precision in datasets(cells):
        found = found_on(cells, dataset, precision)
        title = f"{_data(found)}, {precision}"
        made += [
            _accuracy_table(found, title),
            _training_table(found, title),
            verdicts(found, title),
            _dial_table(found, title),
        ]
    return [*made, _settings_table(cells)]


def _data(found: Found) -> str:
    return next(data["data"] for by_seed in found.values() for data in by_seed.values())


def _there(found: Found) -> Iterable[tuple[str, str, list[dict[str, Any]]]]:
    for arm in ARMS:
        if arm.name in found:
            data = list(found[arm.name].values())
            short = "" if data[0]["share"] >= 1 else " *"
            yield arm.name, arm.title + short, data


SHORT = (
    "* trained for less than the others, for time: its accuracy says what so many updates give, no more. "
    "Mean over seeds (range)."
)


def _accuracy_table(found: Found, title: str) -> Table:
    base = found.get("plain", {})
    cost = median(d["test"]["multiply_adds"] for d in base.values()) if base else None
    rows = []
    for _, name, data in _there(found):
        work = [d["test"]["multiply_adds"] for d in data]
        steps = [d["test"]["steps"] for d in data if d["test"].get("share")]
        rows.append(
            (
                name,
                str(data[0]["parameters"]),
                str(data[0]["training"]["updates"]),
                ", ".join(f"{d['training']['rate']:g}" for d in data),
                shown([accuracy(d) for d in data]),
                shown([d["test"]["ece"] for d in data]),
                shown([d["test"]["nll"] for d in data], 3),
                shown([w / 1e6 for w in work]),
                f"{median(work) / cost:.2f}x" if cost else "-",
                shown([100 * d["test"]["share"] for d in data], 0) if "share" in data[0]["test"] else "-",
                shown(steps, 1) if steps else "-",
            )
        )
    columns = (
        "network",
        "parameters",
        "updates",
        "rates chosen",
        "test accuracy, %",
        "calibration error, %",
        "likelihood, nats",
        "million multiply-adds an image",
        "of plain",
        "iterated, %",
        "iterations",
    )
    note = "Multiply-adds are those executed on the test images, counted as they run. "
    return Table(f"Accuracy and work: {title}", columns, rows, (note + SHORT,))


def _training_table(found: Found, title: str) -> Table:
    rows = []
    for _, name, data in _there(found):
        work = [d["work"] for d in data]
        rows.append(
            (
                name,
                *(_timed([w[p] for w in work], [w[f"{p}_ratio"] for w in work]) for p in _PHASES),
                shown([d["training"]["seconds"]["forward"] for d in data], 1),
                shown([d["training"]["seconds"]["backward"] for d in data], 1),
                shown([d["training"]["multiply_adds"] / 1e12 for d in data], 2),
                shown([w["peak_bytes"] / 1e6 for w in work], 1),
                *(
                    _timed([d["latency"][b] for d in data], [d["latency"][b]["ratio"] for d in data])
                    for b in ("1", "256")
                ),
            )
        )
    columns = (
        "network",
        "forward, ms",
        "backward, ms",
        "training forward, s",
        "training backward, s",
        "training multiply-adds, 10^12",
        "peak memory, MB",
        "latency batch 1, ms",
        "latency batch 256, ms",
    )
    note = (
        "Forward and backward: one update's, and latency, each with its ratio to the plain backbone's in the "
        "same interleaved rounds. Peak memory: of forward and backward of one update. Training times leave "
        "out the search for a rate. "
    )
    return Table(f"Training and latency: {title}", columns, rows, (note + SHORT,))


_PHASES = ("forward", "backward")


def _timed(spreads: list[dict[str, float]], ratios: list[dict[str, float]]) -> str:
    """Median over seeds in milliseconds, and times the plain backbone's."""
    middle, ratio = (median(s["median"] for s in values) for values in (spreads, ratios))
    return f"{1e3 * middle:.3g} ({ratio:.2f}x)"


def _dial_table(found: Found, title: str) -> Table:
    rows = []
    for _, name, data in _there(found):
        for place, point in enumerate(data[0]["curve"]):
            points = [d["curve"][place] for d in data if len(d["curve"]) > place]
            rows.append(
                (
                    name,
                    point["at"],
                    shown([p["accuracy"] for p in points]),
                    shown([p["multiply_adds"] / 1e6 for p in points]),
                    shown([100 * p["share"] for p in points], 0) if "share" in point else "-",
                )
            )
    columns = ("network", "set to", "test accuracy, %", "million multiply-adds an image", "iterated, %")
    return Table(f"Accuracy against cost: {title}", columns, rows, long=True)


def _settings_table(cells: list[dict[str, Any]]) -> Table:
    named = {cell["options"].get("arm") for cell in cells}
    rows = [
        (arm.title, ", ".join(f"{rate:g}" for rate in arm.rates), arm.source)
        for arm in ARMS
        if arm.name in named
    ]
    note = (
        "All: AdamW, weight decay 0.02, gradients clipped at norm 1, one cycle of the learning rate, half of "
        "the images mirrored. Each rate is tried for 15 % of the training; the best on validation data goes "
        "on."
    )
    return Table(
        "Settings, and where they come from", ("network", "rates", "source"), rows, (note,), long=True
    )


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """TWNN against its controls and the equilibrium models, then the papers' claims."""
    made: list[Claim] = []
    for dataset, precision in datasets(cells):
        found = found_on(cells, dataset, precision)
        where = _data(found) + ("" if precision == "float32" else f", {precision}")
        if "twnn" in found:
            made += [_against(found, name, words, where) for name, words in CONTROLS.items() if name in found]
            made += [_ahead(found, rival, where) for rival in RIVALS if rival in found]
        made += paper_claims(found, where)
    return made


def _against(found: Found, control: str, words: str, where: str) -> Claim:
    ours, theirs = pick(found, "twnn", accuracy), pick(found, control, accuracy)
    gaps = paired(ours, theirs)
    works = [pick(found, arm, lambda d: d["test"]["multiply_adds"] / 1e6) for arm in ("twnn", control)]
    met = "yes" if gaps and min(gaps) > 0 else ("no" if not gaps or max(gaps) <= 0 else "in part")
    return Claim(
        f"{where}: TWNN's test accuracy against {words}",
        f"{shown(list(theirs.values()))} % at {median(works[1].values()):.2f} million multiply-adds",
        f"{shown(list(ours.values()))} % at {median(works[0].values()):.2f} million",
        f"{compared(gaps)} points" if gaps else "-",
        "ahead, every seed",
        met if gaps else "not measured",
    )


def _ahead(found: Found, rival: str, where: str) -> Claim:
    title = next(arm.title for arm in ARMS if arm.name == rival)
    times: list[float] = []
    works: list[float] = []
    levels, mine, other = [], [], []
    for seed, ours in found["twnn"].items():
        theirs = found[rival].get(seed)
        if theirs is None:
            continue
        level = level_of(ours, theirs)
        a, b = time_to(ours, level), time_to(theirs, level)
        assert a is not None and b is not None  # both reach it, by its definition
        times.append(b[0] / a[0])
        works.append(b[1] / a[1])
        levels.append(100 * level)
        mine.append(a[0])
        other.append(b[0])
    if not times:
        return Claim(f"{where}: training time of TWNN against {title}", "-", "-", "-", "3x", "not measured")
    met = "yes" if min(times) >= AHEAD else ("no" if max(times) < AHEAD else "in part")
    return Claim(
        f"{where}: training time to equal validation accuracy ({shown(levels, 1)} %), TWNN against {title}",
        f"{shown(other, 1)} s",
        f"{shown(mine, 1)} s",
        f"{shown(times, 1)} times faster; {shown(works, 1)} times fewer multiply-adds",
        f"at least {AHEAD:g}x, every seed",
        met,
    )
