"""Models registered with timm when this package is imported."""

from .cnn3 import ConvNet3, cnn3
from .deq import DEQNet, deq_small, deq_tiny
from .dynalay import DynaLayCNN3, dynalay_cnn3
from .dynalay_lstm import DynaLayRNN
from .dynalay_timm import DynaLayNet, register_dynalay_models
from .propagation import (
    PropagationNet,
    antisymmetric_20,
    antisymmetric_50,
    euler_20,
    euler_50,
    hamiltonian_20,
    hamiltonian_50,
)
from .reasoning import MazeNet, PathfinderNet, PrefixNet, ReasoningNet
from .reasoning_baselines import FeedForwardMaze, FeedForwardPathfinder, FeedForwardPrefix
from .resnet_cifar import ResNetCifar, resnet8_cifar, resnet20_cifar, resnet38_cifar
from .resnet_tiny import ResNetTiny, resnet6_tiny, resnet8_tiny
from .sequence import SequenceModel
from .sequence_images import ImageSequenceNet

NAMES = (
    "antisymmetric_20",
    "antisymmetric_50",
    "cnn3",
    "deq_small",
    "deq_tiny",
    "euler_20",
    "euler_50",
    "hamiltonian_20",
    "hamiltonian_50",
    "resnet20_cifar",
    "resnet38_cifar",
    "resnet6_tiny",
    "resnet8_cifar",
    "resnet8_tiny",
)
"""What ``timm.create_model`` knows the image classifiers by."""

DYNALAY = ("dynalay_cnn3",)
"""Image classifiers whose layers a policy picks from; ``dynalay_<name>`` of timm's come on top."""

REASONING = (
    "deq_maze",
    "deq_prefix",
    "ff_maze",
    "ff_pathfinder",
    "ff_prefix",
    "rnn_maze",
    "rnn_prefix",
    "twnn_maze",
    "twnn_pathfinder",
    "twnn_prefix",
)
"""The models for the tasks of :mod:`zoo.tasks`."""

SEQUENCES = (
    "gru_pixels",
    "gru_rows",
    "lstm_pixels",
    "lstm_rows",
    "twnn_gru_pixels",
    "twnn_gru_rows",
    "twnn_lstm_pixels",
    "twnn_lstm_rows",
)
"""The recurrent image classifiers, which take their wormholes when they are built."""

TEXT = ("dynalay_gru3", "dynalay_lstm3", "gru3", "lstm3")
"""The models of text: language models and classifiers of tokens."""

__all__ = [
    "DYNALAY",
    "NAMES",
    "REASONING",
    "SEQUENCES",
    "TEXT",
    "ConvNet3",
    "DEQNet",
    "DynaLayCNN3",
    "DynaLayNet",
    "DynaLayRNN",
    "FeedForwardMaze",
    "FeedForwardPathfinder",
    "FeedForwardPrefix",
    "ImageSequenceNet",
    "MazeNet",
    "PathfinderNet",
    "PrefixNet",
    "PropagationNet",
    "ReasoningNet",
    "ResNetCifar",
    "ResNetTiny",
    "SequenceModel",
    "antisymmetric_20",
    "antisymmetric_50",
    "cnn3",
    "deq_small",
    "deq_tiny",
    "dynalay_cnn3",
    "euler_20",
    "euler_50",
    "hamiltonian_20",
    "hamiltonian_50",
    "register_dynalay_models",
    "resnet6_tiny",
    "resnet8_cifar",
    "resnet8_tiny",
    "resnet20_cifar",
    "resnet38_cifar",
]
