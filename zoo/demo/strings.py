"""The demo's second act: strings sixteen times as long as those of the training."""

from __future__ import annotations

from typing import Any

from ..tasks import prefix_sums, recipe_for, score, train_task

__all__ = ["LENGTHS", "TRAINED_ON", "read_strings"]

LENGTHS = (32, 64, 128, 256, 512)
TRAINED_ON = 32
_MODELS = {"wormhole": "twnn_prefix", "feed_forward": "ff_prefix"}


def read_strings(seed: int, quick: bool, console: Any) -> dict[str, Any]:
    """Train the wormhole net and the feed-forward net on 32 bits, and test both on longer strings.

    Args:
        seed: of weights and strings.
        quick: a few updates and few strings.
        console: for progress bars.

    Returns:
        JSON values: ``models`` with parameters, updates and seconds, and ``rows``, one a length.
    """
    updates, count = (40, 8) if quick else (1000, 200)
    nets, models = {}, {}
    for kind, name in _MODELS.items():
        recipe = recipe_for(name, seed=seed, updates=updates)
        trained = train_task(recipe, console=console)
        nets[kind] = trained.model
        models[kind] = {
            "model": name,
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "updates": updates,
            "train_seconds": trained.seconds,
        }
    rows = []
    for bits in LENGTHS:
        strings = prefix_sums(bits, count, seed, "test")
        rows.append({"bits": bits, **{kind: score(net, strings).figures() for kind, net in nets.items()}})
    return {"trained_on": TRAINED_ON, "seed": seed, "models": models, "rows": rows}
