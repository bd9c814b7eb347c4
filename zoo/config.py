"""The settings of a training run: one table for Python and for the command line.

Each field carries its help text; ``twnn train`` makes its options from them, under the names of timm's
training script. No import of torch here, so that ``twnn train --help`` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import CheckpointError, ConfigError

__all__ = ["FREE_FIELDS", "SCHEDULES", "SEED_MAX", "TrainConfig", "check_same_run"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "none")
CLIP_MODES = ("norm", "value", "agc")
AMP_DTYPES = ("float16", "bfloat16")
CROP_MODES = ("rrc", "rkrc", "rkrr")
LEVELS = ("word", "char")
MEASURES = ("accuracy", "probability", "likelihood")  # those of twnn_plugin.selection.Reward

_NOT_NEGATIVE = (
    *("seed", "workers", "warmup_epochs", "checkpoint_interval", "log_interval"),
    *("weight_decay", "min_lr", "warmup_lr", "mixup", "cutmix", "color_jitter", "momentum"),
    *("reward_alpha", "reward_beta", "reward_repeat", "reward_entropy", "closed_weight"),
)

SEED_MAX = 2**32 - 1
"""The largest seed that Python's, NumPy's and torch's generators all take."""

FREE_FIELDS = frozenset(
    ("data_dir", "dataset_download", "device", "workers", "output", "resume", "checkpoint_interval")
)
"""What may differ between a run and its continuation, since the result does not depend on it."""


def _opt(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run; a mistake in them raises :class:`~zoo.errors.ConfigError`.

    The defaults suit small images and small networks: no augmentation, a schedule that moves with
    every update. Times are counted in epochs unless the name says otherwise.
    """

    model: str = _opt("twnn_resnet8_cifar", "Any model that timm.create_model knows, ours included.")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the model, NAME=VALUE, as many as wanted."}
    )
    pretrained: bool = _opt(False, "Start from the model's published weights.")
    initial_checkpoint: str | None = _opt(None, "Start from the weights in this file (not a resume).")
    dataset: str = _opt(
        "digits",
        "digits, cued_digits, mnist, fashion_mnist, cifar10, cifar100, folder, a path; texts: kjv-small, ...",
    )
    data_dir: str | None = _opt(None, "Folder where the data set is (default: $TWNN_DATA_DIR or the cache).")
    dataset_download: bool = _opt(False, "Fetch the data set if it is not there.")
    text_level: str = _opt("word", "Texts: what a token is.", LEVELS)
    text_length: int | None = _opt(None, "Texts: tokens of a window or document (default: the set's own).")
    vocab_size: int | None = _opt(None, "Texts: size of the vocabulary (default: the set's own).")
    img_size: int | None = _opt(None, "Height and width of the images, in pixels (default: the set's own).")
    contour_length: int | None = _opt(None, "Pathfinder: dashes in a contour (default: 14).")
    epochs: int = _opt(20, "Passes over the training set.")
    batch_size: int = _opt(64, "Images per update and process.")
    workers: int = _opt(0, "Processes that decode and augment images.")
    seed: int = _opt(42, "Seed of weights, order, augmentation and dropout.")
    opt: str = _opt("adamw", "Optimizer, by timm's name.")
    opt_eps: float | None = _opt(None, "Epsilon of the optimizer (default: its own).")
    lr: float = _opt(1e-3, "Learning rate.")
    weight_decay: float = _opt(0.01, "Weight decay; norms and biases are left out.")
    momentum: float = _opt(0.9, "Momentum, for optimizers that have one.")
    sched: str = _opt("cosine", "Learning rate schedule, by timm's name.", SCHEDULES)
    sched_on_updates: bool = _opt(True, "Move the schedule with every update instead of every epoch.")
    min_lr: float = _opt(0.0, "Where schedules that decay end.")
    warmup_lr: float = _opt(1e-5, "Learning rate at the start of the warm-up.")
    warmup_epochs: int = _opt(1, "Epochs of linear warm-up.")
    decay_epochs: float = _opt(90.0, "Interval of the step schedule.")
    decay_milestones: tuple[int, ...] = _opt((90, 180, 270), "Epochs at which multistep decays.")
    decay_rate: float = _opt(0.1, "Factor (step, multistep) or power (poly) of the decay.")
    clip_grad: float | None = _opt(None, "Clip gradients at this value (default: no clipping).")
    clip_mode: str = _opt("norm", "How to clip.", CLIP_MODES)
    smoothing: float = _opt(0.0, "Label smoothing.")
    mixup: float = _opt(0.0, "Mixup alpha; 0 is off.")
    cutmix: float = _opt(0.0, "Cutmix alpha; 0 is off.")
    mixup_prob: float = _opt(1.0, "Share of batches that are mixed.")
    hflip: float = _opt(0.0, "Probability of a horizontal flip.")
    vflip: float = _opt(0.0, "Probability of a vertical flip.")
    color_jitter: float = _opt(0.0, "Strength of colour jitter; 0 is off.")
    aa: str | None = _opt(None, "AutoAugment policy, such as rand-m9-mstd0.5.")
    reprob: float = _opt(0.0, "Probability of random erasing.")
    train_crop_mode: str | None = _opt(None, "Random crop, by timm's name (default: none).", CROP_MODES)
    policy: str | None = _opt(None, "Who is iterated: a policy's name ('twnn list policies').")
    policy_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the policy, NAME=VALUE, as many as wanted."}
    )
    policy_lr: float | None = _opt(None, "Learning rate of an agent (default: that of the model).")
    main_epochs: int | None = _opt(
        None, "Epochs at first in which the main model learns and choices are random (default: a fifth)."
    )
    main_share: float | None = _opt(
        None,
        "Share of each batch, the least certain samples, that iterates in these, each one layer at random "
        "(default: every choice is random).",
    )
    agent_epochs: int | None = _opt(
        None,
        "Epochs after the main ones in which the agent learns and the main model rests (default: a tenth).",
    )
    reward_alpha: float = _opt(0.5, "Agent: weight of the prediction's quality in the reward.")
    reward_beta: float = _opt(0.3, "Agent: weight of the cost, as a share of the model's multiply-adds.")
    reward_lambda: float = _opt(0.2, "Agent: weight of the reward in the loss.")
    reward_repeat: float = _opt(0.05, "Agent: penalty for choosing a layer again at once.")
    reward_entropy: float = _opt(0.01, "Agent: weight of the entropy bonus, against collapse to one choice.")
    reward_measure: str = _opt("accuracy", "Agent: what a prediction's quality is.", MEASURES)
    closed_weight: float = _opt(0.0, "Weight of a loss on the prediction before anything is iterated.")
    model_ema: bool = _opt(False, "Keep a moving average of the weights, and select on it.")
    model_ema_decay: float = _opt(0.999, "Decay of the moving average, per update.")
    model_ema_warmup: bool = _opt(False, "Let the decay grow at the start.")
    amp: bool = _opt(False, "Mixed precision.")
    amp_dtype: str = _opt("float16", "Its type; on a CPU always bfloat16.", AMP_DTYPES)
    device: str | None = _opt(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one).")
    deterministic: bool = _opt(True, "Kernels that give the same bits every time (on a GPU slower).")
    output: str | None = _opt(
        None, "Folder of the run (default: output/MODEL-DATASET; from Python: none, and nothing is written)."
    )
    resume: str | None = _opt(None, "A checkpoint or a run's folder; auto: --output's own, if there is one.")
    checkpoint_interval: int = _opt(0, "Updates between checkpoints; 0: one at the end of each epoch.")
    log_interval: int = _opt(50, "Updates between lines in metrics.jsonl; 0: one line per epoch.")

    def __post_init__(self) -> None:
        if isinstance(self.decay_milestones, list):  # as JSON has them
            object.__setattr__(self, "decay_milestones", tuple(self.decay_milestones))
        self._check_types()
        for name in ("epochs", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            self._require(name, value >= 0 and math.isfinite(value), "a finite number, at least 0")
        self._require("seed", self.seed <= SEED_MAX, f"a whole number from 0 to {SEED_MAX}")
        for name in ("lr", "decay_rate", "decay_epochs"):
            value = getattr(self, name)
            self._require(name, value > 0 and math.isfinite(value), "a positive number")
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "model_ema_decay"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check_schedule()
        self._require("smoothing", 0 <= self.smoothing < 1, "at least 0 and below 1")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "a positive number")
        for name in ("policy_lr", "reward_lambda"):
            value = getattr(self, name)
            good = value is None or (value > 0 and math.isfinite(value))
            self._require(name, good, "a positive number")
        self._check_policy()
        self._require("text_length", self.text_length is None or self.text_length >= 1, "at least 1 token")
        self._require("vocab_size", self.vocab_size is None or self.vocab_size >= 4, "at least 4")
        self._require("img_size", self.img_size is None or self.img_size >= 1, "at least 1 pixel")
        if self.contour_length is not None:
            self._require("contour_length", 2 <= self.contour_length <= 14, "2 to 14 dashes")
            self._require("contour_length", self.dataset == "pathfinder", "dataset pathfinder with it")
        for item in fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value is not None:
                self._require(item.name, value in choices, f"one of {', '.join(choices)}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(
                f"Mixup pairs images of a batch, so --batch-size={self.batch_size} must be even."
            )
        if 1 < self.epochs <= self.warmup_epochs and self.sched != "none":
            raise ConfigError(
                f"--warmup-epochs={self.warmup_epochs} leaves nothing of --epochs={self.epochs}; take fewer."
            )

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            good = any(_fits(getattr(self, name), kind) for kind in kinds)
            self._require(name, good, " or ".join(_WORDS[get_origin(kind) or kind] for kind in kinds))

    def _check_schedule(self) -> None:
        """What the schedules take without a word, and follow to somewhere else."""
        if self.sched == "multistep":
            stones = self.decay_milestones
            rising = list(stones) == sorted(set(stones)) and all(stone >= 1 for stone in stones)
            self._require("decay_milestones", rising, "epochs from 1 on, each later than the one before")
        if self.sched in ("cosine", "tanh", "poly"):
            first = self.lr if self.policy_lr is None else min(self.lr, self.policy_lr)
            self._require("min_lr", self.min_lr <= first, f"at most the learning rate, {first:g}")

    def _check_policy(self) -> None:
        if self.policy_kwargs and self.policy is None:
            raise ConfigError("--policy-kwargs are options of a policy; name one with --policy.")
        if self.reward_alpha + self.reward_beta <= 0:
            raise ConfigError(
                "--reward-alpha and --reward-beta are both 0: the reward says nothing. Set one of them."
            )
        for name in ("main_epochs", "agent_epochs"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "at least 0")
        self._require("main_share", self.main_share is None or 0 <= self.main_share <= 1, "between 0 and 1")
        if (self.main_epochs or 0) + (self.agent_epochs or 0) > self.epochs:
            raise ConfigError(
                f"--main-epochs={self.main_epochs} and --agent-epochs={self.agent_epochs} are more than "
                f"--epochs={self.epochs} together; take fewer."
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(
                f"{_option(name)}={getattr(self, name)!r} is not possible: expected {expected}."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``args.json`` and into checkpoints."""
        plain = asdict(self)
        plain["decay_milestones"] = list(self.decay_milestones)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`.

        Raises:
            ConfigError: a name that is no setting, a value of a wrong type, or an impossible one.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"Expected settings by name; got a {type(values).__name__}.")
        known = {item.name for item in fields(cls)}
        unknown = sorted(str(name) for name in set(values) - known)
        if unknown:
            raise ConfigError(f"Not a setting of a run: {', '.join(unknown)}.")
        values = dict(values)
        return cls(**values)


def _option(name: str) -> str:
    """A setting as users type it; messages are the same from Python."""
    return "--" + name.replace("_", "-")


_WORDS = {
    **{str: "text", int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"},
    **{dict: "values by name", tuple: "whole numbers"},
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the annotated type ``kind``; a whole number is a number too."""
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    return isinstance(value, get_origin(kind) or kind)


def check_same_run(saved: Mapping[str, Any], config: TrainConfig, path: object) -> None:
    """Refuse to continue a run under settings that would change its result.

    Args:
        saved: the settings inside the checkpoint.
        config: the settings asked for now.
        path: named in the message.

    Raises:
        CheckpointError: some setting outside :data:`FREE_FIELDS` differs.
    """
    now = config.as_dict()
    before = {**TrainConfig().as_dict(), **saved}  # settings that an older version did not have
    differing = [
        f"{_option(name)} was {before[name]!r} and is now {now[name]!r}"
        for name in now
        if name not in FREE_FIELDS and before[name] != now[name]
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {'; '.join(differing)}. Repeat the settings of "
            "that run, or begin a new one in another folder (--initial-checkpoint takes over the weights)."
        )
