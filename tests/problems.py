"""The problems that are shipped with ``twnn_plugin.testing``."""

from twnn_plugin.testing.problems import (
    ALL,
    EVERY,
    Problem,
    affine,
    mixed,
    non_symmetric,
    reference,
    relative,
    vector,
)

__all__ = ["ALL", "EVERY", "Problem", "affine", "mixed", "non_symmetric", "reference", "relative", "vector"]
