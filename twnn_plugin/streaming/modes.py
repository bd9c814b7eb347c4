"""What torch keeps for each thread: carried from the caller to the threads that work for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Modes"]


@dataclass(frozen=True)
class Modes:
    """Modes of a thread that decide what an operation computes.

    Gradients are not among them: nothing is recorded while a stream works.

    Attributes:
        inference: whether inference mode is on.
        autocast: for each kind of device: its name, whether autocast is on, and its dtype.
        cache: whether autocast keeps the weights that it has cast.
        device: where tensors are made by default.
        stream: of CUDA, which includes the device; None without CUDA.
    """

    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool
    device: torch.device
    stream: Any

    @staticmethod
    def present() -> Modes:
        """Those of this thread, now."""
        kinds = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        return Modes(
            torch.is_inference_mode_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
            torch.is_autocast_cache_enabled(),
            torch.get_default_device(),
            torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within this they hold, and no gradients are recorded."""
        with ExitStack() as stack:
            now = Modes.present()
            if now.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.no_grad())
            if now.device != self.device:
                stack.enter_context(self.device)
            if self.stream is not None and now.stream != self.stream:
                stack.enter_context(torch.cuda.stream(self.stream))
            if (now.autocast, now.cache) != (self.autocast, self.cache):
                for kind, enabled, dtype in self.autocast:
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache)
                    )
            yield
