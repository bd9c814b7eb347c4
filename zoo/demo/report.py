"""The demo's tables and its report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["contest_table", "curve_table", "markdown", "render", "solver_table", "string_table"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _percent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _spread(values: Sequence[float | None], show: Any) -> str:
    """Median, and the range where there are several runs."""
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    middle = show(statistics.median(known))
    return middle if len(known) == 1 else f"{middle} ({show(min(known))} to {show(max(known))})"


def contest_table(entries: Sequence[Mapping[str, Any]], ranges: bool = True) -> Table:
    """The three networks side by side: medians over the seeds, with ranges if wanted."""
    head = ("network", "accuracy", "parameters", "training", "steps", "open", "rows")
    rows = []
    for entry in entries:
        runs = entry["runs"]

        def column(pick: Any, show: Any, runs: Any = runs) -> str:
            values = [pick(run) for run in runs]
            known = [value for value in values if value is not None]
            return _spread(values if ranges or not known else [statistics.median(known)], show)

        rows.append(
            (
                entry["title"],
                column(lambda run: run["test"]["accuracy"], lambda v: _percent(v, 2)),
                _count(entry["parameters"]),
                column(lambda run: run["train_seconds"], lambda v: f"{v:.1f} s"),
                column(lambda run: run["steps"], _number),
                column(lambda run: run["test"]["open_share"], _percent),
                column(lambda run: run["rows"], lambda v: _count(round(v))),
            )
        )
    return head, rows


def solver_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The trained wormhole network under each solver."""
    head = ("solver", "accuracy", "steps", "settled", "rows", "time")
    return head, [
        (
            row["solver"],
            _percent(row["accuracy"], 2),
            _number(row["mean_steps"]),
            _percent(row["converged_share"]),
            _count(row["rows_evaluated"]),
            f"{1000 * row['seconds']:.0f} ms",
        )
        for row in rows
    ]


def curve_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What moving the gate's threshold does."""
    head = ("wanted share", "open", "accuracy", "rows")
    return head, [
        (
            _percent(row["wanted_share"], 0),
            _percent(row["open_share"]),
            _percent(row["accuracy"], 2),
            _count(row["rows_evaluated"]),
        )
        for row in rows
    ]


def string_table(found: Mapping[str, Any]) -> Table:
    """Both nets of the second act, by length of the strings."""
    head = ("bits", "wormhole: all right", "settled", "steps", "feed-forward: all right", "bits right")
    return head, [
        (
            str(row["bits"]),
            _percent(row["wormhole"]["right"]),
            _percent(row["wormhole"]["converged"]),
            _number(row["wormhole"]["mean_steps"]),
            _percent(row["feed_forward"]["right"]),
            _percent(row["feed_forward"]["positions_right"]),
        )
        for row in found["rows"]
    ]


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head, rows = table
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def render(figures: Mapping[str, Any]) -> str:
    """The whole report."""
    where, contest = figures["provenance"], figures["contest"]
    quick = (
        "\n**A quick run: two epochs, to see that everything works. Not results.**\n"
        if where["quick"]
        else ""
    )
    first = contest[0]["runs"][0]
    samples, settled = first["test"]["samples"], figures["steps"]
    seeds = ", ".join(map(str, where["seeds"]))
    hardness = {
        key: _spread([row[key] for row in figures["difficulty"]], lambda v, d=digits: _number(v, d))
        for key, digits in (("rank_correlation", 2), ("loss_iterated", 3), ("loss_not_iterated", 3))
    }
    return f"""# Wormholes on real digits
{quick}
`{where["command"]}`, {where["date"]}; {where["hardware"]}; {where["versions"]}.
Data: {where["data"]}. All networks: the same {first["updates"]} updates, batches, optimiser and
schedule; final weights; seeds {seeds}; tested on {samples} images. One image is
{100 / samples:.2f} points: differences under about a point mean nothing. The recipe was found by hand for
the DEQ, looking at this test set, and taken for all three: compare the rows, do not take them for
accuracy on unseen images.

## Three networks

{markdown(contest_table(contest))}

Median and range over the seeds. Accuracy: on the test set. Steps: evaluations until settled, mean over
the images that were iterated. Rows: evaluations of the span (of the cell, for the DEQ) over the whole
test set. The DEQ iterates every image; torchdeq evaluates the whole batch until its last image is done.
The wormhole's budget was {_percent(figures["budget"], 0)} of the images.

## Easy inputs are done at once, hard ones take longer

The wormhole network of the first seed, here and below: {settled["closed"]} of {samples} images passed
with the gate closed and took no step; the others took {settled["fewest"]} to {settled["most"]} steps.

Hard is what the plain network of the same seed finds hard: its loss on the image. Over the seeds, that loss
is {hardness["loss_iterated"]} on the images that the wormhole network iterated and
{hardness["loss_not_iterated"]} on the others; the rank correlation of steps and loss is
{hardness["rank_correlation"]}.

![histogram of steps](steps.png)

![easiest and hardest images](images.png)

## The same weights under every solver

`tw.configure(model, solver=name)`; time: median of three passes over the test set, solvers in turn.

{markdown(solver_table(figures["solvers"]))}

![residual against evaluation](residuals.png)

## Cost is a setting

`tw.configure(model, threshold=...)` after training; thresholds from quantiles of the validation set.

{markdown(curve_table(figures["curve"]))}

![accuracy against share](budget.png)

{render_strings(figures["strings"])}"""


def render_strings(found: Mapping[str, Any]) -> str:
    """The second act: strings of bits."""
    ours, plain = found["models"]["wormhole"], found["models"]["feed_forward"]
    return f"""# Second act: trained on {found["trained_on"]} bits, read at any length

Is the number of 1s so far odd or even, at every place of a string (prefix sums, Schwarzschild et al. 2021)?
Both nets saw strings of {found["trained_on"]} bits alone, {ours["updates"]} updates, seed {found["seed"]}:
`{ours["model"]}` ({ours["parameters"]:,} parameters, {ours["train_seconds"]:.0f} s) and the feed-forward
`{plain["model"]}` ({plain["parameters"]:,} parameters, {plain["train_seconds"]:.0f} s). The wormhole net
iterates until no place changes any more; nobody tells it when.

{markdown(string_table(found))}

All right: strings without one mistake, of {found["rows"][0]["wormhole"]["samples"]} at every length. Bits
right: half would be chance. Steps grow with the length; what the bits are hardly matters.

![steps and accuracy against length](strings.png)
"""
