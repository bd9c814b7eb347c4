"""From the cells of ``propagation`` to its tables and claims."""

from __future__ import annotations

import statistics
from typing import Any

from ..harness import Claim, Table
from .nets import KINDS

__all__ = ["STABLE", "claims", "data_of", "learned", "mean_of", "tables"]

Cell = dict[str, Any]
STABLE = ("hamiltonian", "antisymmetric")
KEPT = 2.0  # the factor within which distances are to stay
DRIFT = 0.05
POINT = 0.01
DEEP, SHALLOW = 1000, 50
WORDS = {
    "b": "features diverge from the origin and one another",
    "c": "features accumulate in the centre",
    "d": "well separated, distances preserved",
    "e": "stable behaviour",
    "f": "stable behaviour",
    "-": "(not drawn)",
}


def data_of(cells: list[Cell], kind: str) -> list[Cell]:
    """The finished cells of a kind."""
    return [c for c in cells if c["status"] == "ok" and c["options"]["kind"] == kind]


def learned(cells: list[Cell]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Data of the networks by set, kind and depth."""
    return {
        (c["options"]["set"], c["options"]["net"], c["options"]["depth"]): c["data"]
        for c in data_of(cells, "learn")
    }


def mean_of(data: dict[str, Any]) -> float:
    """Mean test accuracy over seeds."""
    return statistics.fmean(run["test"] for run in data["runs"])


def _percent(data: dict[str, Any] | None) -> str:
    """Mean and range of the test accuracy."""
    if data is None:
        return "-"
    tests = [100 * run["test"] for run in data["runs"]]
    skipped = sum(run["skipped"] for run in data["runs"])
    lost = f"; {skipped} steps skipped" if skipped else ""
    return f"{statistics.fmean(tests):.1f} ({min(tests):.1f} to {max(tests):.1f}{lost})"


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _power(value: float | None) -> str:
    """A factor from its decimal logarithm."""
    return "not finite" if value is None else f"{10**value:.3g}"


def tables(cells: list[Cell]) -> list[Table]:
    """All tables; those without cells are left out."""
    made = [
        _figure2(cells),
        _figure3(cells),
        _accuracy(cells),
        _signals(cells),
        _smooth(cells),
        _tuning(cells),
    ]
    return [table for table in made if table.rows]


def _figure2(cells: list[Cell]) -> Table:
    rows = []
    for cell in data_of(cells, "figure2"):
        for r in cell["data"]["panels"]:
            ends = ", ".join(f"{d:.3g}" for d in r["distance_end"][-1])
            kept = f"{r['distance_least'][-1]:.3g} to {r['distance_most'][-1]:.3g}"
            rows.append(
                (
                    r["panel"],
                    r["operator"],
                    r["convention"],
                    WORDS[r["panel"]],
                    ends,
                    kept,
                    _figure(r["radius"]),
                )
            )
    columns = (
        "panel",
        "operator",
        "features times K",
        "the poster's words",
        "distances 1-2, 1-3, 2-3 after 21 layers",
        "over all layers",
        "spectral radius",
    )
    notes = (
        "Distances are divided by those of the start. The poster prints no numbers. It writes features as "
        "rows ('Y K'); 'K y' is the other reading. Both antisymmetric forms have its factor 1/2 and gamma = "
        "0, which the text leaves open: both then give K0.",
        "'As printed' is the poster's K + K^T: it grows or collapses, so the plus sign is a misprint.",
    )
    return Table("Figure 2: 21 equal layers, h = 0.1, tanh", columns, rows, notes)


def _figure3(cells: list[Cell]) -> Table:
    rows = []
    for cell in data_of(cells, "figure3"):
        for r in cell["data"]["readings"]:
            for k, n in enumerate(r["numbers"]):
                rows.append(
                    (
                        r["reading"],
                        str(n),
                        f"{r['size'][k]:.4f}",
                        f"{r['distance_least'][k]:.3g} to {r['distance_most'][k]:.3g}",
                        f"{100 * r['drift'][k]:.2f} %",
                        f"{r['undone']:.1e}" if n == r["numbers"][-1] else "",
                    )
                )
    columns = ("start", "N", "largest size / start", "distances / start", "energy drift", "error undone")
    notes = (
        "The poster says: 'the features do not explode or vanish asymptotically'. Its text does not say "
        "where the two features go in a state of three and two, nor which plane is drawn: both readings "
        "are here.",
        "Drift: largest over layers and features. Undone: largest error of the start worked out backwards.",
    )
    return Table("Figure 3: Verlet, equal layers, k1, k2, h = 0.1, tanh", columns, rows, notes)


def _accuracy(cells: list[Cell]) -> Table:
    found = learned(cells)
    depths = sorted({depth for _, _, depth in found})
    rows = [
        (name, kind, *(_percent(found.get((name, kind, depth))) for depth in depths))
        for name in dict.fromkeys(name for name, _, _ in found)
        for kind in KINDS
        if any((name, kind, depth) in found for depth in depths)
    ]
    notes = (
        "Mean (range) over seeds, 4000 test points. The setting was chosen on 1000 validation points, with "
        "the first seed, among four of each kind.",
    )
    return Table(
        "Test accuracy in % by depth", ("set", "network", *(f"{d} layers" for d in depths)), rows, notes
    )


def _signals(cells: list[Cell]) -> Table:
    rows = []
    for (name, kind, depth), d in learned(cells).items():
        s = d["stability"]
        rows.append(
            (
                name,
                kind,
                str(depth),
                d["setting"],
                str(d["parameters"]),
                _power(d["gradient_start"]["spread"]),
                _power(d["gradient_end"]["spread"]),
                f"{_figure(s['distance_least'])} to {_figure(s['distance_most'])}",
                _figure(s["radius"]),
                _figure(s["drift"]),
                "-" if d["resampled"] is None else f"{100 * d['resampled']:.1f}",
            )
        )
    columns = (
        "set",
        "network",
        "layers",
        "chosen",
        "parameters",
        "gradients, untrained",
        "gradients, trained",
        "distances",
        "radius",
        "energy drift",
        "in 1000 layers, %",
    )
    notes = (
        "Gradients: norm of the loss's gradient at the states, largest over smallest among all layers. "
        "Distances: between 32 test points after the layers, divided by those before. Radius: largest "
        "spectral radius of a layer at a test point. First seed.",
        "In 1000 layers: test accuracy after the weights are interpolated to 1000 layers, untrained.",
    )
    return Table("Signals and gradients", columns, rows, notes)


def _smooth(cells: list[Cell]) -> Table:
    rows = []
    for cell in data_of(cells, "smooth"):
        o, records = cell["options"], cell["data"]["records"]
        others = [key for key in records[0] if key.startswith("test_")]
        for smooth in dict.fromkeys(r["smooth"] for r in records):
            mine = [r for r in records if r["smooth"] == smooth]
            means = [100 * statistics.fmean(r[key] for r in mine) for key in ("test", *others)]
            rough = statistics.fmean(r["roughness"] for r in mine)
            layers = ", ".join(
                f"{m:.1f} in {k.removeprefix('test_')}" for k, m in zip(others, means[1:], strict=True)
            )
            rows.append(
                (
                    f"{o['net']}, {o['depth']} layers",
                    cell["data"]["setting"],
                    f"{smooth:g}",
                    f"{rough:.3g}",
                    f"{means[0]:.1f}",
                    layers,
                )
            )
    columns = ("network", "setting", "factor", "roughness", "test accuracy, %", "resampled, untrained, %")
    notes = ("On peaks; means over seeds. Roughness is what the regulariser measures, after training.",)
    return Table("Smooth weights (twnn_plugin.smoothness in the loss)", columns, rows, notes)


def _tuning(cells: list[Cell]) -> Table:
    rows = [
        (
            name,
            kind,
            str(depth),
            t["setting"],
            f"{100 * t['val']:.1f}",
            _figure(t["loss"]),
            str(t["skipped"]),
        )
        for (name, kind, depth), d in learned(cells).items()
        for t in d["tuned"]
    ]
    columns = (
        "set",
        "network",
        "layers",
        "setting",
        "validation accuracy, %",
        "training loss",
        "steps skipped",
    )
    return Table("Settings tried, first seed", columns, rows, long=True)


def claims(cells: list[Cell]) -> list[Claim]:
    """Lines of the index page."""
    failed = [
        Claim(c["key"], "-", "-", "the cell failed", "-", "not measured")
        for c in cells
        if c["status"] != "ok" and c["options"]["kind"].startswith("figure")
    ]
    return [*failed, *_claims2(cells), *_claims3(cells), *_claims_deep(cells)]


def _claims2(cells: list[Cell]) -> list[Claim]:
    made = []
    for cell in data_of(cells, "figure2"):
        for r in cell["data"]["panels"]:
            if r["convention"] != "Y K" or r["panel"] == "-":
                continue
            end, least, most = r["distance_end"][-1], r["distance_least"][-1], r["distance_most"][-1]
            target, met = {
                "b": (f"every distance grows by more than {KEPT:g}", min(end) > KEPT),
                "c": (f"every distance falls below 1 / {KEPT:g}", max(end) < 1 / KEPT),
            }.get(
                r["panel"],
                (f"distances within a factor of {KEPT:g}", least >= 1 / KEPT and most <= KEPT),
            )
            made.append(
                Claim(
                    f"figure 2({r['panel']}), {r['operator']}: distances over 21 layers",
                    f"'{WORDS[r['panel']]}'",
                    f"{least:.3g} to {most:.3g}",
                    ", ".join(f"{d:.3g}" for d in end) + " at the end",
                    target,
                    _yes(met),
                )
            )
    return made


def _claims3(cells: list[Cell]) -> list[Claim]:
    made = []
    for cell in data_of(cells, "figure3"):
        for r in cell["data"]["readings"]:
            n, size, drift = r["numbers"][-1], r["size"][-1], r["drift"][-1]
            where = f"figure 3, Verlet, {n} layers, {r['reading']}"
            peer = "'do not explode or vanish'"
            made += [
                Claim(
                    f"{where}: largest size over that of the start",
                    peer,
                    f"{size:.3f}",
                    f"{r['size'][0]:.3f} over the first {r['numbers'][0]}",
                    f"bounded: at most {KEPT:g}",
                    _yes(size <= KEPT),
                ),
                Claim(
                    f"{where}: energy drift",
                    "no figure",
                    f"{100 * drift:.2f} %",
                    f"{100 * r['drift'][0]:.2f} % over the first {r['numbers'][0]}",
                    f"under {100 * DRIFT:g} %",
                    _yes(drift < DRIFT),
                ),
            ]
    return made


def _claims_deep(cells: list[Cell]) -> list[Claim]:
    found = learned(cells)
    made = []
    asked = [c["options"] for c in cells if c["options"].get("depth") == DEEP]
    for name in dict.fromkeys(options["set"] for options in asked):
        plain = ", ".join(
            f"{kind} {100 * mean_of(found[name, kind, DEEP]):.1f} %"
            for kind in KINDS
            if kind.startswith("resnet") and (name, kind, DEEP) in found
        )
        for kind in STABLE:
            deep, shallow = found.get((name, kind, DEEP)), found.get((name, kind, SHALLOW))
            gap, met = "-", "not measured"
            if deep is not None and shallow is not None:
                more = mean_of(deep) - mean_of(shallow)
                gap, met = f"{100 * more:+.1f} points", _yes(more >= -POINT)
            made.append(
                Claim(
                    f"{kind} network, {DEEP} layers, `{name}`: test accuracy in %, beside plain networks",
                    plain or "-",
                    f"{_percent(deep)}; {SHALLOW} layers: {_percent(shallow)}",
                    gap,
                    f"within 1 point of {SHALLOW} layers",
                    met,
                )
            )
        spread = {
            kind: found[name, kind, DEEP]["gradient_start"]["spread"]
            for kind in KINDS
            if (name, kind, DEEP) in found
        }
        if all(kind in spread for kind in STABLE) and "resnet" in spread:
            made.append(
                Claim(
                    f"gradient norms over {DEEP} layers before training, largest over smallest, `{name}`",
                    f"resnet, {_power(spread['resnet'])}",
                    ", ".join(f"{kind}, {_power(spread[kind])}" for kind in STABLE),
                    "-",
                    "none",
                    "-",
                )
            )
    return made


def _yes(met: bool) -> str:
    return "yes" if met else "no"
