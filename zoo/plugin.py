"""The zoo's models in timm's registry; light, since ``import twnn_plugin`` imports it."""

from __future__ import annotations

from twnn_plugin import register_wormhole_models

__all__ = ["register_models"]

BACKBONES = (
    "cnn3",
    "resnet6_tiny",
    "resnet8_tiny",
    "resnet8_cifar",
    "resnet20_cifar",
    "resnet38_cifar",
    "euler_20",
    "euler_50",
    "antisymmetric_20",
    "antisymmetric_50",
    "hamiltonian_20",
    "hamiltonian_50",
)
"""The zoo's models that also come with wormholes, as ``twnn_<name>``."""


def register_models() -> list[str]:
    """Register the zoo's models with timm; their names. For once, at import."""
    from . import models

    dynamic = [name for name in BACKBONES if name.startswith("resnet")]
    return [
        *models.NAMES,
        *models.DYNALAY,
        *register_wormhole_models(BACKBONES),
        *models.register_dynalay_models(),
        *models.register_dynalay_models(dynamic),
    ]


register_models()
