"""Models registered with timm when this package is imported."""

from .cnn3 import ConvNet3, cnn3
from .deq import DEQNet, deq_small, deq_tiny
from .resnet_cifar import ResNetCifar, resnet8_cifar, resnet20_cifar, resnet38_cifar

NAMES = ("cnn3", "deq_small", "deq_tiny", "resnet20_cifar", "resnet38_cifar", "resnet8_cifar")
"""What ``timm.create_model`` knows them by."""

__all__ = [
    "NAMES",
    "ConvNet3",
    "DEQNet",
    "ResNetCifar",
    "cnn3",
    "deq_small",
    "deq_tiny",
    "resnet8_cifar",
    "resnet20_cifar",
    "resnet38_cifar",
]
