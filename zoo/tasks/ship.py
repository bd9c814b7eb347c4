"""Put a run's weights into the package, with their card: ``python -m zoo.tasks.ship RUN --sizes 9:1000``.

The card says what the weights were trained on, by which command, and how right they are on held-out examples.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..models.reasoning import WEIGHTS
from .catalog import Task, find_task
from .recipe import RECIPES, Recipe
from .run import WEIGHTS_FILE, load_model, provenance
from .scoring import score

__all__ = ["card", "ship"]

_DEFAULT = {
    "prefix_sums": {32: 1000, 128: 1000, 512: 10_000, 4096: 100},
    "mazes": {9: 1000, 13: 1000, 33: 200, 59: 100},
}
_NUMBERS_AT_A_TIME = 2**19
_SEED = 1000


def ship(run: Path, sizes: dict[int, int] | None = None, folder: Path = WEIGHTS) -> Path:
    """Copy the weights of a run of ``twnn train`` and write the card beside them; its path.

    Args:
        run: the folder that ``twnn train`` wrote.
        sizes: held-out examples by size; None: as many as the targets ask for.
        folder: where the weights go.
    """
    recipe = Recipe.from_dict(json.loads((run / "args.json").read_text(encoding="utf-8")))
    task = find_task(recipe.task)
    model, _ = load_model(recipe.model, run / WEIGHTS_FILE)
    rows = []
    for size, count in (sizes or _DEFAULT[task.name]).items():
        examples = task.draw(size, count, _SEED, "test")
        batch = max(1, min(256, _NUMBERS_AT_A_TIME // examples.inputs[0].numel()))
        rows.append((size, score(model, examples, batch).figures()))
    shutil.copyfile(run / WEIGHTS_FILE, folder / f"{recipe.model}.safetensors")
    path = folder / f"{recipe.model}.md"
    count = sum(p.numel() for p in model.parameters())
    path.write_text(card(recipe, task, count, rows), encoding="utf-8")
    return path


def card(recipe: Recipe, task: Task, parameters: int, rows: list[tuple[int, dict[str, Any]]]) -> str:
    """The card as Markdown."""
    where = provenance()
    table = [
        f"| {size} | {f['samples']:,} | {f['right']:.2%} ({f['wrong']} wrong) | {f['converged']:.2%} | "
        f"{f['mean_steps']:.1f} ({f['least_steps']} to {f['most_steps']}) |"
        for size, f in rows
    ]
    return "\n".join(
        [
            f"# {recipe.model}",
            "",
            f"{parameters:,} parameters. `timm.create_model({recipe.model!r}, pretrained=True)`.",
            "",
            f"- Data: {task.name}, {recipe.size} {task.size}, generated (`zoo.tasks`, split `train`); "
            "nothing larger was seen.",
            f"- Command: `{command(recipe)}`; seed {recipe.seed}.",
            f"- {where['date']}, torch {where['torch']}, timm {where['timm']}, Python {where['python']}, "
            f"{where['hardware']}.",
            f"- Recipe: `{json.dumps(recipe.as_dict())}`",
            "",
            f"Held-out examples (split `test`, seed {_SEED}); the solver alone decides when to stop:",
            "",
            f"| {task.size} | examples | entirely right | converged | steps |",
            "|---|---|---|---|---|",
            *table,
            "",
        ]
    )


def command(recipe: Recipe) -> str:
    """The command that trains these weights again."""
    plain = RECIPES[recipe.model].as_dict()
    words = [f"twnn train --model {recipe.model} --seed {recipe.seed}"]
    options = {
        "updates": "updates",
        "method": "method",
        "batch_size": "batch-size",
        "lr": "lr",
        "clip": "clip-grad",
    }
    for name, flag in options.items():
        value = recipe.as_dict()[name]
        if value != plain[name]:
            words.append(f"--{flag} {value}")
    return " ".join(words)


def _sizes(text: str) -> dict[int, int]:
    return {int(size): int(count) for size, _, count in (part.partition(":") for part in text.split(","))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", type=_sizes, help="such as 9:1000,59:100")
    given = parser.parse_args()
    print(ship(given.run, given.sizes))
