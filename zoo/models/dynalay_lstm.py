"""``dynalay_lstm3``, ``dynalay_gru3``: DynaLay on text, and their plain twins ``lstm3`` and ``gru3``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .dynalay import CHOICES, as_names, fill_missing
from .staged import check_further, without_features

if TYPE_CHECKING:
    from twnn_plugin.policies import Policy
    from twnn_plugin.selection import LayerSelection

__all__ = ["DynaLayRNN", "RecurrentPart", "dynalay_gru3", "dynalay_lstm3", "gru3", "lstm3"]

TASKS = ("language", "classification")
CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
_EXAMPLE = 4  # time steps of the example that shapes are learnt from
_SCALE, _MESSAGE = 0.1, "linear"


class RecurrentPart(nn.Module):
    """One recurrent layer as a map of one tensor, from the zero state; a step of zeros is padding.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        inputs: features of a time step.
        hidden: width.
        padded: whether there may be padding: steps of zeros, after the valid ones, stay zeros.
        dropout: of the outputs.
    """

    def __init__(self, cell: str, inputs: int, hidden: int, padded: bool, dropout: float = 0.0):
        super().__init__()
        self.rnn = CELLS[cell](inputs, hidden, batch_first=True)
        self.padded = padded
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, hidden)."""
        out = self.drop(self.rnn(x)[0])
        # One direction never looks ahead: what padding gave is cut off.
        return torch.where((x != 0).any(dim=2, keepdim=True), out, 0.0) if self.padded else out


class _Head(nn.Module):
    """Outputs of the last layer (B, T, C) to logits, (B, K, T) or of the mean over valid steps (B, K)."""

    def __init__(self, features: int, classes: int, task: str, dropout: float):
        super().__init__()
        self.task = task
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(features, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.task == "language":
            return self.fc(self.drop(x)).transpose(1, 2)
        steps = (x != 0).any(dim=2).sum(dim=1, keepdim=True).clamp_min(1)
        return self.fc(self.drop(x.sum(dim=1) / steps))


class DynaLayRNN(nn.Module):
    """Embedding, three recurrent layers, a head; a policy picks which layer each sequence iterates.

    Mathur & Plis (2023), appendix D.2 and figure 7: fixed-point iteration on each layer of a three-layer
    LSTM. Layer l becomes ``z = layer(h + message(z))`` over the whole sequence, where the message of a step
    is made of that step alone. So, whatever is iterated, the prediction at a step depends on no later input
    but through the decision: the policy decides for a whole window of tokens, having seen all of it.

    Args:
        num_classes: labels, or for language models tokens (they have one output a token); 0: no head.
        vocab_size: tokens; None: as many as ``num_classes`` (language models).
        task: ``"language"``: logits (B, K, T) of the next token; ``"classification"``: logits (B, K), and
            token 0 is padding.
        cell: ``"lstm"`` or ``"gru"``.
        hidden: width of the embedding and of each layer.
        layers: how many: ``layer1``, ``layer2``, ...
        drop_rate: dropout of the embedding, after each layer and before the head; drawn once a pass.
        fpi_layers: names of the layers that can be iterated; None: all; (): none, the plain network.
        policy: registered name or instance: who iterates what; None: ``"dynalay"``.
        max_choices: decisions a sequence may make.
        scale: initial scale of the connections.
        message: what they send, ``"linear"`` or ``"mixer"``; see :class:`twnn_plugin.selection.Connection`.
        open_head: whether sequences that iterated are answered by a head of their own.
        in_chans: there are no channels; ignored.
        **settings: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm`` of the solves, as in
            :func:`twnn_plugin.fix`; by default tol=1e-3, max_iter=30, and norm="max" (at every step) or, for
            classification, "l2" (of the document, however far it is padded).

    Raises:
        ConfigError: an option that is not possible.
        OptionError: one that there is not, or an impossible value of the solves, with the nearest name.
        UnknownNameError: ``fpi_layers`` or ``policy`` names nothing; the message has the nearest name.
    """

    def __init__(
        self,
        num_classes: int = 10,
        vocab_size: int | None = None,
        task: str = "language",
        cell: str = "lstm",
        hidden: int = 128,
        layers: int = 3,
        drop_rate: float = 0.0,
        fpi_layers: Sequence[str] | None = None,
        policy: str | Policy | None = None,
        max_choices: int = CHOICES,
        scale: float = _SCALE,
        message: str = _MESSAGE,
        open_head: bool = False,
        in_chans: int = 3,
        **settings: Any,
    ):
        from twnn_plugin.blocks import SolveSettings  # importing twnn_plugin imports this module

        check_further(DynaLayRNN, settings, SolveSettings.names())
        super().__init__()
        vocab_size = num_classes if vocab_size is None else vocab_size
        _check(task=(task, TASKS), cell=(cell, tuple(CELLS)))
        _check_sizes(hidden=hidden, layers=layers, vocab_size=vocab_size)
        self.num_classes, self.vocab_size, self.task, self.drop_rate = (
            num_classes,
            vocab_size,
            task,
            drop_rate,
        )
        self.num_features = self.head_hidden_size = hidden
        padded = task == "classification"
        self.embed = nn.Embedding(vocab_size, hidden, padding_idx=0 if padded else None)
        self.names = tuple(f"layer{k + 1}" for k in range(layers))
        for name in self.names:
            self.add_module(name, RecurrentPart(cell, hidden, hidden, padded, drop_rate))
        self.head = _Head(hidden, num_classes, task, drop_rate)
        chosen = tuple(self.names if fpi_layers is None else as_names(fpi_layers))
        self.selection = self._select(
            chosen, policy, max_choices, settings, open_head, scale=scale, message=message, steps=True
        )
        self.register_load_state_dict_pre_hook(fill_missing)  # a plain twin's checkpoint loads

    def _select(
        self,
        chosen: tuple[str, ...],
        policy: str | Policy | None,
        max_choices: int,
        settings: dict[str, Any],
        open_head: bool,
        **connection: Any,
    ) -> LayerSelection | None:
        from twnn_plugin.backbones.given import check_flag  # importing twnn_plugin imports this module

        check_flag("open_head", open_head)
        if not chosen:
            plain = {"scale": _SCALE, "message": _MESSAGE, "steps": True}
            asked = {"policy": policy is not None, "open_head": open_head}
            asked |= {"max_choices": max_choices != CHOICES}
            asked |= {name: value != plain[name] for name, value in connection.items()}
            given = [*settings, *(name for name, said in asked.items() if said)]
            if given:
                raise ConfigError(
                    f"{', '.join(given)}: no layer can be iterated (fpi_layers is empty), so that this would "
                    f"do nothing. Leave it out, or name some of {', '.join(self.names)}."
                )
            return None
        # Here rather than above: importing twnn_plugin imports this module.
        from twnn_plugin.blocks import SolveSettings
        from twnn_plugin.policies import registry
        from twnn_plugin.selection import Connection, LayerSelection

        layers = {name: self.get_submodule(name) for name in self.names}
        example = torch.zeros(2, _EXAMPLE, self.num_features)
        return LayerSelection(
            layers,
            self.head,
            example,
            registry.resolve("dynalay" if policy is None else policy),
            chosen,
            max_choices,
            # Padding is zeros: it adds nothing to a norm, and would make the rms of a document smaller.
            settings=SolveSettings(norm="l2" if self.task == "classification" else "max").changed(**settings),
            connection=Connection(**connection),
            open_head=open_head,
        )

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0: none); there is no pooling to choose."""
        weight = self.embed.weight
        self.num_classes = num_classes
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.fc = fc.to(weight.device, weight.dtype)
        if self.selection is not None:
            self.selection.set_head(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) whole numbers to logits, (B, K, T) of a language model, (B, K) of a classifier."""
        x = self._embedded(tokens)
        return self._open_loop(x) if self.selection is None else self.selection(x)

    def forward_features(self, tokens: Tensor) -> Tensor:
        """(B, T) whole numbers to the last layer's open-loop outputs (B, T, hidden): nothing is iterated."""
        return self._layers(self._embedded(tokens))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Outputs (B, T, hidden) to logits, or as they are."""
        return x if pre_logits else self.head(x)

    def _layers(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x

    def _open_loop(self, x: Tensor) -> Tensor:
        return self.head(self._layers(x))

    def _embedded(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.shape[1]:
            raise ConfigError(
                f"This model takes (B, T) whole numbers, tokens; got {tuple(tokens.shape)} of {tokens.dtype}."
            )
        if tokens.numel():
            least, most = (int(value) for value in tokens.aminmax())
            if least < 0 or most >= self.vocab_size:
                raise ConfigError(
                    f"A token is outside the vocabulary of {self.vocab_size}: they go from {least} to "
                    f"{most}. Encode the text with the vocabulary that the model was built for."
                )
        # Not F.dropout of zeros: padding must stay exactly zero, and it does.
        return F.dropout(self.embed(tokens), self.drop_rate, self.training)


def _check(**chosen: tuple[str, tuple[str, ...]]) -> None:
    from twnn_plugin.errors import nearest

    for name, (value, known) in chosen.items():
        if value not in known:
            raise ConfigError(
                f"Unknown {name} {value!r}.{nearest(str(value), known)} Possible: {', '.join(known)}."
            )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1; got {value!r}.")


_NAMES = ("dynalay_lstm3", "dynalay_gru3", "lstm3", "gru3")

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, 1, 64),  # timm wants three numbers: a window of 64 tokens
            "pool_size": None,
            "first_conv": "embed",
            # What timm leaves out for another num_classes: the open head's, too, where there can be one.
            "classifier": ("head.fc", "selection.open_head.fc") if name.startswith("dynalay_") else "head.fc",
            "license": "apache-2.0",
        }
        for name in _NAMES
    }
)


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> DynaLayRNN:
    options: dict[str, Any] = {"cell": variant.removeprefix("dynalay_").removesuffix("3"), **kwargs}
    if not variant.startswith("dynalay_"):
        options = {"fpi_layers": (), **options}
    return without_features(DynaLayRNN, variant, pretrained, **options)


@register_model
def dynalay_lstm3(pretrained: bool = False, **kwargs: Any) -> DynaLayRNN:
    """Three LSTM layers on text, of which an agent picks what each sequence iterates (DynaLay, figure 7)."""
    return _create("dynalay_lstm3", pretrained, **kwargs)


@register_model
def dynalay_gru3(pretrained: bool = False, **kwargs: Any) -> DynaLayRNN:
    """Three GRU layers on text, of which an agent picks what each sequence iterates."""
    return _create("dynalay_gru3", pretrained, **kwargs)


@register_model
def lstm3(pretrained: bool = False, **kwargs: Any) -> DynaLayRNN:
    """Three LSTM layers on text: the plain twin of ``dynalay_lstm3``."""
    return _create("lstm3", pretrained, **kwargs)


@register_model
def gru3(pretrained: bool = False, **kwargs: Any) -> DynaLayRNN:
    """Three GRU layers on text: the plain twin of ``dynalay_gru3``."""
    return _create("gru3", pretrained, **kwargs)
