"""Gradient checkpointing of a model with wormholes: each block is computed again, no solve ever is."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm  # the documented common base of BatchNorm layers
from torch.utils.checkpoint import checkpoint

from ... import transforms
from ...blocks.frozen import PRESENT
from ...blocks.one_map import Bookmark, bookmark
from ...blocks.wormhole import Wormhole
from ...errors import AttachError
from ...trees import leaves, rebuild

__all__ = ["Recomputed", "blocks", "checkpointed", "switch", "without_checkpointing"]

_FLAG = "grad_checkpointing"  # where timm's models keep whether they checkpoint
_STOCK = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Recomputed:
    """Stands for the ``forward`` of one block; the block's hooks stay outside of what is computed again.

    Activations inside the block are not kept; in the backward pass the block is evaluated once more with the
    same random numbers, in the same place of the same pass: batch statistics and draws that a replay of a
    span holds fixed are held again, and running statistics are not counted a second time.

    Args:
        block: the module. Its class's ``forward`` is what is evaluated.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Some blocks write to the lists they are given (hrnet), some callers do so afterwards (densenet).
        args, kwargs = _copied((args, kwargs))
        run = functools.partial(self._evaluate, kwargs)
        # torch.func has no saved tensors to leave out, and a compiler has its own way of recomputing.
        if not torch.is_grad_enabled() or transforms.active() or torch.compiler.is_compiling():
            return run(*args)
        place, kernels = bookmark(), _attention_kernels()
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in given]
        out = checkpoint(
            run,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _Again(self.block, place, kernels)),
        )
        if versions != [leaf._version for leaf in given]:
            raise AttachError(
                f"A {type(self.block).__name__} changes its input in place, so that it cannot be computed "
                "again in the backward pass. Build the model without in-place activations, or leave gradient "
                "checkpointing off."
            )
        return out

    def _evaluate(self, kwargs: dict[str, Any], *args: Any) -> Any:
        args, kwargs = _copied((args, kwargs))
        PRESENT.recomputing += 1
        try:
            return type(self.block).forward(self.block, *args, **kwargs)
        finally:
            PRESENT.recomputing -= 1


def _attention_kernels() -> list[SDPBackend]:
    """Those that may be used here: other ones save other tensors, and the block must save the same again."""
    allowed = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    }
    return [kernel for kernel, enabled in allowed.items() if enabled()]


def _copied(given: Any) -> Any:
    """Nested arguments in containers of their own."""
    return rebuild(given, lambda leaf: leaf)


class _Again:
    """Entered for each time that a block is computed again: for each product of a backward solve, say."""

    def __init__(self, block: nn.Module, place: Bookmark, kernels: list[SDPBackend]):
        self.block, self.place, self.kernels = block, place, kernels
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.entered.append(_again(self.block, self.place, self.kernels))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


@contextmanager
def _again(block: nn.Module, place: Bookmark, kernels: list[SDPBackend]) -> Iterator[None]:
    """Within this, a block computes what it computed at ``place``, and leaves no trace."""
    if place.held:
        with place.again(), sdpa_kernel(kernels):
            yield
        return
    counted = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [(m, dict(m.named_buffers(recurse=False))) for m in counted]
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
        with place.again(), sdpa_kernel(kernels):
            yield
    finally:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def blocks(
    model: nn.Module, skip: Sequence[nn.Module] = (), outside: Sequence[nn.Module] = ()
) -> list[nn.Module]:
    """The modules that are worth computing again: the composite ones that the model is a chain of.

    Stock containers are opened, and so are stages that checkpoint on their own in timm. What solves an
    equation itself is left alone.

    Args:
        model: the model.
        skip: children to leave out.
        outside: modules that are to be called once a pass, for what their hooks do: no block has one inside.
    """
    found: list[nn.Module] = []
    for child in model.children():
        if child in skip or not any(True for _ in child.children()):
            continue
        inner: list[nn.Module] = []
        opened = type(child) in _STOCK or any(m in outside for m in child.modules())
        if opened or any(hasattr(m, _FLAG) for m in child.modules()):
            inner = blocks(child, (), outside)
        found += inner or ([child] if not opened and _plain(child) else [])
    return list(dict.fromkeys(found))


def _plain(module: nn.Module) -> bool:
    """Whether a module has parts with weights, its class's own ``forward``, and no equation inside.

    A normalisation with an activation in it is no block: its own hooks hold its statistics fixed.
    """
    own = "forward" not in vars(module) or isinstance(vars(module)["forward"], Recomputed)
    parts = any(next(child.parameters(), None) is not None for child in module.children())
    return own and parts and not isinstance(module, _BatchNorm) and not _solves(module)


def _solves(module: nn.Module) -> bool:
    return any(isinstance(part, Wormhole) for part in module.modules())


def switch(modules: Sequence[nn.Module], enable: bool) -> None:
    """Compute modules again in the backward pass, or no longer."""
    for module in modules:
        if enable and not checkpointed(module):
            setattr(module, "forward", Recomputed(module))  # noqa: B010 - a method for this instance alone
        elif not enable and checkpointed(module):
            delattr(module, "forward")


def checkpointed(module: nn.Module) -> bool:
    """Whether this module is computed again in the backward pass."""
    return isinstance(vars(module).get("forward"), Recomputed)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[bool]:
    """Within this, timm's own checkpointing is off; yields whether it was on.

    It would run spans inside of what is computed again. After an exception it is as it was before.
    """
    on = [module for module in model.modules() if getattr(module, _FLAG, False)]
    for module in on:
        setattr(module, _FLAG, False)
    try:
        yield bool(on)
    except BaseException:
        for module in on:
            setattr(module, _FLAG, True)
        raise
