"""``twnn_prefix``, ``twnn_maze``, ``twnn_pathfinder``: wormhole networks that iterate until they are done.

One cell in a wormhole that is always open, the input beside the state at every step (recall), plain
iteration until the largest change at any position is small: the depth follows the input. ``rnn_*`` and
``deq_*`` are the same nets without recall and on torchdeq.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .reasoning_cells import Patches
from .reasoning_loops import Loop, loop_options, make_loop
from .staged import StagedNet, build, check_further, without_features

__all__ = [
    "WEIGHTS",
    "Iterated",
    "MazeNet",
    "PathfinderNet",
    "PrefixNet",
    "ReasoningNet",
    "check_input",
    "task_cfg",
]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""Where the weights are that ship with the package."""


@runtime_checkable
class Iterated(Protocol):
    """What training and analysis need of a network that iterates one step."""

    def inject(self, inputs: Tensor) -> Tensor:
        """What enters at every step."""
        ...

    def blank(self, x: Tensor) -> Tensor:
        """The state that the iteration starts from."""
        ...

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        ...

    def read(self, z: Tensor, x: Tensor) -> Tensor:
        """State and injection to logits."""
        ...


class ReasoningNet(nn.Module, ABC):
    """``z = cell(z, x)`` from ``z = 0``, x made of the input, logits read off z at every position.

    A subclass says how the input becomes x and how z becomes logits.

    Args:
        loop: the cell and how it is iterated.
        width: channels of the state.
    """

    num_classes = 2

    def __init__(self, loop: Loop, width: int):
        super().__init__()
        self.loop = loop
        self.num_features = width

    @abstractmethod
    def inject(self, inputs: Tensor) -> Tensor:
        """What enters at every step: (B, inputs, H, W)."""

    @abstractmethod
    def read(self, z: Tensor, x: Tensor) -> Tensor:
        """State (B, width, H, W) and injection to logits."""

    def blank(self, x: Tensor) -> Tensor:
        """The state that the iteration starts from."""
        return self.loop.first(x)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map, for training and for looking at its iterates."""
        return self.loop.step(z, x)

    def solved(self) -> tuple[Tensor, Tensor]:
        """Steps and statuses of the last forward pass, (B,) each."""
        return self.loop.solved()

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.get_submodule("head")

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs to logits, after as many steps as each sample needs."""
        x = self.inject(inputs)
        return self.read(self.loop(x), x)


class PrefixNet(ReasoningNet):
    """Bits to the parity of every beginning of the string, at any length.

    Args:
        num_classes: 2.
        in_chans: 1.
        width: channels of the state.
        blocks: residual blocks in the cell.
        loop: ``"wormhole"``, ``"torchdeq"`` or ``"no_recall"``.
        **settings: of the loop. Wormhole: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``,
            ``norm``, as in :func:`twnn_plugin.fix`, ``policy`` and ``jacobian``, as in
            :func:`twnn_plugin.attach`; swapped later by ``tw.configure``, and what happened read by
            ``tw.report``. In eval mode a sample whose solve fails is read off the first state.

    Raises:
        OptionError: an unknown option or an impossible value.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        width: int = 32,
        blocks: int = 2,
        loop: str = "wormhole",
        **settings: Any,
    ):
        check_further(PrefixNet, settings, loop_options(loop))
        _fixed("bits to parities", num_classes, in_chans, 1)
        super().__init__(make_loop(loop, width, 1, settings, kernel=(1, 3), blocks=blocks), width)
        self.head = nn.Conv2d(width, 2, 1)

    def inject(self, inputs: Tensor) -> Tensor:
        check_input(inputs, 3, 1, "bits of shape (B, 1, n)", self.head.weight)
        # Autocast cannot put halves of another kind than its own beside the state.
        return (2 * inputs - 1).unsqueeze(2).to(self.head.weight.dtype)

    def read(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, 2, n)."""
        return self.head(z).squeeze(2)


class MazeNet(ReasoningNet):
    """Images of mazes to the pixels of the path, at any size: one token for each cell of the maze.

    A token sees the 6x6 pixels of its cell and the walls around it (two pixels a unit, after a border of
    one pixel: the layout of the deep-thinking benchmark) and answers for them.

    Args:
        num_classes: 2.
        in_chans: 3.
        width: channels of the state.
        blocks: residual blocks in the cell.
        reach: 1: only the cell's first convolution looks at neighbours, so that one step carries news
            from a cell of the maze to the next one; 3: the residual blocks do so, too.
        latching: the cell converges by construction; False: a tanh cell.
        loop: ``"wormhole"``, ``"torchdeq"`` or ``"no_recall"``.
        **settings: of the loop, see :class:`PrefixNet`.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 3,
        width: int = 32,
        blocks: int = 1,
        reach: int = 1,
        latching: bool = True,
        loop: str = "wormhole",
        **settings: Any,
    ):
        check_further(MazeNet, settings, loop_options(loop))
        _fixed("mazes to paths", num_classes, in_chans, 3)
        cell: dict[str, Any] = {
            "blocks": blocks,
            "inner": (reach, reach),
            "added": True,
            "latching": latching,
        }
        if latching and loop == "wormhole":  # it ends by itself; some dead ends are long
            settings = {"max_iter": 20_000, **settings}
        super().__init__(make_loop(loop, width, width, settings, **cell), width)
        self.patches = Patches(in_chans)
        self.embed = nn.Conv2d(self.patches.features, width, 1)
        self.head = nn.Conv2d(2 * width, 2 * self.patches.size**2, 1)

    def inject(self, inputs: Tensor) -> Tensor:
        check_input(inputs, 4, 3, "images of shape (B, 3, H, W)", self.embed.weight)
        return self.embed(self.patches.cut(inputs))

    def read(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, 2, H, W), of the image as it was padded."""
        return self.patches.join(self.head(torch.cat([z, x], dim=1)))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)[:, :, : inputs.shape[2], : inputs.shape[3]]


class PathfinderNet(StagedNet):
    """Are the two dots on one contour? A convolutional stem, a cell in a wormhole, a pooled classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        width: channels of the state.
        stem_width: channels of the stem, which enter the cell at every step.
        blocks: residual blocks in the cell.
        reach: kernel of their convolutions; 1: a step carries news to the next position and no farther.
        downsample: halvings of the image before the cell.
        questions: are answered at each position before the pooling, so that the classifier sees the most
            certain "yes" to each: of what latches, each channel is full somewhere in most images, and only
            together do they tell. 0: the state itself is pooled.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.
        **settings: of the wormhole, see :class:`PrefixNet`; the cell latches, and the gradient is that of
            all steps, 100 at most.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        width: int = 16,
        stem_width: int = 16,
        blocks: int = 1,
        reach: int = 3,
        downsample: int = 1,
        questions: int = 0,
        drop_rate: float = 0.0,
        global_pool: str = "max",
        **settings: Any,
    ):
        check_further(PathfinderNet, settings, loop_options("wormhole"))
        super().__init__(("stem", "loop"), num_classes, in_chans, drop_rate)
        self.stem = Stem(in_chans, stem_width, downsample)
        settings = {"adjoint": "unrolled", "max_iter": 100, **settings}
        cell: dict[str, Any] = {"blocks": blocks, "inner": (reach, reach), "latching": True}
        self.loop = make_loop("wormhole", width, stem_width, settings, **cell)
        self.feature_info = [{"num_chs": width, "reduction": 2**downsample, "module": "loop"}]
        self._add_head(width, global_pool, questions)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^(loop)"}

    def inject(self, inputs: Tensor) -> Tensor:
        """Images to what enters at every step: (B, stem_width, H', W')."""
        return self.stem(inputs)

    def blank(self, x: Tensor) -> Tensor:
        """The state that the iteration starts from: (B, width, H', W')."""
        return self.loop.first(x)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        return self.loop.step(z, x)

    def read(self, z: Tensor, x: Tensor) -> Tensor:
        """State to logits (B, num_classes); the injection is not read again."""
        return self.forward_head(z)


class Stem(nn.Module):
    """A convolution, and one more for every halving of the image.

    Args:
        in_chans: channels of the images.
        features: channels of the features.
        downsample: halvings of the image.
    """

    def __init__(self, in_chans: int, features: int, downsample: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, features, 5, padding=2)
        self.down = nn.ModuleList(
            nn.Conv2d(features, features, 3, stride=2, padding=1) for _ in range(downsample)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, features, H', W')."""
        x = F.relu(self.conv(x))
        for conv in self.down:
            x = F.relu(conv(x))
        return x


def check_input(inputs: Tensor, axes: int, channels: int, expected: str, weight: Tensor) -> None:
    """:class:`~twnn_plugin.errors.MapError` unless the shape fits, and the dtype that of ``weight``."""
    from twnn_plugin.errors import MapError

    if inputs.dim() != axes or inputs.shape[1] != channels or not _mixes(inputs, weight.dtype):
        raise MapError(
            f"Expected {expected} and {weight.dtype}, which the parameters are of; got "
            f"{tuple(inputs.shape)} of {inputs.dtype}."
        )


def _mixes(inputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether inputs can meet weights of a dtype: of the same one, or of another that autocast converts."""
    if inputs.dtype == dtype:
        return True
    device = inputs.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return inputs.is_floating_point() and torch.float64 not in (inputs.dtype, dtype)


def _fixed(task: str, num_classes: int, in_chans: int, channels: int) -> None:
    from twnn_plugin.errors import OptionError

    if num_classes != 2 or in_chans != channels:
        raise OptionError(
            f"This model maps {task}: num_classes is 2 and in_chans {channels}; got {num_classes} and "
            f"{in_chans}."
        )


def task_cfg(size: tuple[int, int, int], file: str = "", **kwargs: Any) -> dict[str, Any]:
    """timm's description of a model with two classes a position, and where its weights are."""
    return {
        "url": "",
        "file": str(WEIGHTS / file) if file else None,
        "num_classes": 2,
        "input_size": size,
        "mean": (0.0,) * size[0],
        "std": (1.0,) * size[0],
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


_BITS, _MAZE, _IMAGE = (1, 1, 32), (3, 24, 24), (1, 32, 32)
default_cfgs = generate_default_cfgs(
    {
        "twnn_prefix.bits32": task_cfg(
            _BITS, "twnn_prefix.safetensors", first_conv="loop.wormhole.body.enter"
        ),
        "rnn_prefix.untrained": task_cfg(_BITS, first_conv="loop.project"),
        "deq_prefix.untrained": task_cfg(_BITS, first_conv="loop.body.enter"),
        "twnn_maze.size9": task_cfg(_MAZE, "twnn_maze.safetensors", first_conv="embed"),
        "rnn_maze.untrained": task_cfg(_MAZE, first_conv="embed"),
        "deq_maze.untrained": task_cfg(_MAZE, first_conv="embed"),
        "twnn_pathfinder.untrained": task_cfg(_IMAGE, first_conv="stem.conv", classifier="fc"),
    }
)


@register_model
def twnn_prefix(pretrained: bool = False, **kwargs: Any) -> PrefixNet:
    """17 thousand parameters; float bits (B, 1, n) to logits (B, 2, n). Trained on 32 bits."""
    return without_features(PrefixNet, "twnn_prefix", pretrained, **kwargs)


@register_model
def rnn_prefix(pretrained: bool = False, **kwargs: Any) -> PrefixNet:
    """``twnn_prefix`` without recall: the bits are seen once, as the first state."""
    return without_features(PrefixNet, "rnn_prefix", pretrained, **{"loop": "no_recall", **kwargs})


@register_model
def deq_prefix(pretrained: bool = False, **kwargs: Any) -> PrefixNet:
    """``twnn_prefix`` as a torchdeq equilibrium."""
    return without_features(PrefixNet, "deq_prefix", pretrained, **{"loop": "torchdeq", **kwargs})


@register_model
def twnn_maze(pretrained: bool = False, **kwargs: Any) -> MazeNet:
    """21 thousand parameters; images (B, 3, H, W) to logits (B, 2, H, W). Trained on mazes of size 9."""
    return without_features(MazeNet, "twnn_maze", pretrained, **kwargs)


@register_model
def rnn_maze(pretrained: bool = False, **kwargs: Any) -> MazeNet:
    """``twnn_maze`` without recall and without latches."""
    options = {"loop": "no_recall", "latching": False, **kwargs}
    return without_features(MazeNet, "rnn_maze", pretrained, **options)


@register_model
def deq_maze(pretrained: bool = False, **kwargs: Any) -> MazeNet:
    """``twnn_maze`` as a torchdeq equilibrium, its cell without latches."""
    options = {"loop": "torchdeq", "latching": False, **kwargs}
    return without_features(MazeNet, "deq_maze", pretrained, **options)


@register_model
def twnn_pathfinder(pretrained: bool = False, **kwargs: Any) -> PathfinderNet:
    """12 thousand parameters; images (B, 1, H, W) to logits (B, 2): are the two dots joined? Not trained."""
    return build(PathfinderNet, "twnn_pathfinder", pretrained, feature_cfg={"out_indices": (0,)}, **kwargs)
