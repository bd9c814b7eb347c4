"""CUDA by name: tensors that compute on the CPU and hold to CUDA's rules, for machines without a GPU.

Inside :func:`pretended_cuda` whatever is made on or moved to ``"cuda"`` is a :class:`Pretended` tensor. Its
arithmetic is the CPU's. As on a GPU it must not meet tensors of the CPU, and what would make the host wait
for the device is noted. Kernels, streams, graphs, memory and the precision of a GPU are not imitated.

Where C++ believes these tensors to be is the CPU. Two operations of torch that make tensors there are put
right by name; zeros of the CPU may be concatenated, since autograd makes them for missing gradients. torch's
recurrent layers change the strides of what they are given, and do not work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # checks what it stands in for when it is imported, which must be torch's own
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Pretended", "pretended_cuda"]

# `with torch.device(...)` keeps the functions it knows by when it first meets one: they must be torch's own.
with torch.device("cpu"):
    torch.empty(0)

_CUDA = torch.device("cuda", 0)
_FACTORIES = (
    *("arange", "asarray", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace"),
    *("ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor"),
    *("zeros", "zeros_like"),
)
# What takes tensors of both devices: copies, and indexing by indices on the CPU.
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_"}
# What the host learns a number or a size from.
_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}

_waits: list[str] = []


class Pretended(Tensor):
    """A tensor on ``cuda:0``, by its own account.

    Attributes:
        inner: the tensor on the CPU that it stands for.
    """

    inner: Tensor
    device = property(lambda self: _CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        _check_devices(func, name, args, kwargs)
        by_mask = name in _INDEXING and any(i.dtype == torch.bool for i in args[1] or () if i is not None)
        if name in _WAITS or by_mask:
            _waits.append(name)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # What an operation gives back that it was given, it gives back as it was given.
        given = {id(_inner(tensor)): tensor for tensor in tensors}
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return tree_map(lambda x: _wrapped(x, given), out)

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        _waits.append("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo: Any) -> Any:
        copied = Pretended(self.detach().inner.clone())
        if isinstance(self, nn.Parameter):
            return nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad)

    def __repr__(self, **kwargs: Any) -> str:
        return f"Pretended({self.detach().inner!r})"


def _wrapped(leaf: Any, given: dict[int, Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return given[id(leaf)] if id(leaf) in given else Pretended(leaf)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Pretended) else leaf


def _check_devices(func: Any, name: str, args: Any, kwargs: Any) -> None:
    leaves = tree_leaves((args, kwargs))
    here = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Pretended) and t.dim() > 0]
    if not here or name in _COPIES:
        return
    if name in _INDEXING and isinstance(args[0], Pretended):
        here = [t for t in here if t.is_floating_point()]  # indices may be on the CPU, values may not
        _waits.append(f"{name} by indices on the CPU")
    if name in ("cat", "stack") and not any(bool(t.any()) for t in here):
        return  # gradients of nothing, which autograd makes where C++ believes the others to be
    if here:
        raise RuntimeError(
            "Expected all tensors to be on the same device; one that was given to "
            f"{func}, of shape {tuple(here[0].shape)}, is on the CPU."
        )


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().inner.clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return Pretended(g.clone())


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g.inner.clone() if isinstance(g, Pretended) else g


def _moved(x: Tensor, device: Any) -> Tensor:
    if _is_cuda(device) == isinstance(x, Pretended):
        return x
    if isinstance(x, Pretended):
        _waits.append("cpu")
        return _Down.apply(x)  # type: ignore[return-value]
    if isinstance(x, nn.Parameter):
        return nn.Parameter(Pretended(x.detach().clone()), x.requires_grad)
    return _Up.apply(x) if x.requires_grad else Pretended(x.detach().clone())  # type: ignore[return-value]


def _is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


_to = Tensor.to


def _to_device(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, rest = kwargs.pop("device", None), []
    kwargs.pop("non_blocking", None)
    for argument in args:
        if isinstance(argument, (str, torch.device)):
            device = argument
        elif isinstance(argument, Tensor):
            device = argument.device
            rest.append(argument.dtype)
        elif isinstance(argument, torch.dtype):
            rest.append(argument)
    x = x if device is None else _moved(x, device)
    return _to(x, *rest, **kwargs) if rest or kwargs else x


def _factory(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        like = any(isinstance(argument, Pretended) for argument in args)
        if device is None or (not like and not _is_cuda(device)):
            return make(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        return _moved(make(*args, **kwargs), device)

    return made


def _by_inner(operation: Callable[..., Any]) -> Callable[..., Any]:
    def done(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Pretended):
            return operation(x, *args, **kwargs)
        return Pretended(operation(x.detach().inner, *map(_inner, args), **kwargs))

    return done


class _Event:
    """A CUDA event, on the host's clock."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


_DRIVER: dict[str, Any] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "get_device_name": lambda device=None: "pretended",
    "device": lambda device: nullcontext(),
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "synchronize": lambda device=None: _waits.append("synchronize"),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None,
    "Event": _Event,
}


@contextmanager
def pretended_cuda() -> Iterator[list[str]]:
    """``"cuda"`` means :class:`Pretended` tensors.

    Yields:
        What the host has waited for the device with, in order; clear it at will.
    """
    _waits.clear()
    compatible = torch._has_compatible_shallow_copy_type

    def replaceable(a: Tensor, b: Tensor) -> bool:
        return not isinstance(a, Pretended) and not isinstance(b, Pretended) and compatible(a, b)

    changes: list[tuple[Any, str, Any]] = [
        *((torch, name, _factory(getattr(torch, name))) for name in _FACTORIES),
        *((torch.cuda, name, value) for name, value in _DRIVER.items()),
        (Tensor, "to", _to_device),
        (Tensor, "cpu", lambda x, *args, **kwargs: _moved(x, "cpu")),
        (Tensor, "cuda", lambda x, *args, **kwargs: _moved(x, "cuda")),
        (torch, "quantile", _by_inner(torch.quantile)),
        (nn.functional, "one_hot", _by_inner(nn.functional.one_hot)),
        (torch, "_has_compatible_shallow_copy_type", replaceable),
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield _waits
