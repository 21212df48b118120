"""A second device for machines that have none: tensors that say they live on `away:0` and hold numbers of the host.

Inside ``second_device()`` an operation fails that mixes the two (``refuse_mixed`` says what a GPU takes of the host),
that draws away with a generator of the host, or that reads an away tensor as numpy. `away` goes the ways of a GPU
(``diffdpo.gpus``): packed attention without padding, fused AdamW, fused norms, unrounded half-precision products,
grouped experts, copies on a stream of their own, its own memory figures.

Not covered, because below the dispatcher: what streams do at once (``Streams`` keeps account of who waits for whom),
page-locked memory, 4-bit weights of bitsandbytes, torch.compile (which passes over it), DeepSpeed, collectives. What
has no kernel on a CPU is computed from what has one (``EMULATED``).
"""

import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from diffdpo import gpus

NAME = "away"
_setup_privateuseone_for_python_backend(NAME)
# torch.utils.checkpoint asks an accelerator for it, of code on the host too
torch.away.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
AWAY = torch.device(NAME, 0)
GIB = 2**30
aten = torch.ops.aten


class Memory:
    """What away tensors hold, by storage, and the most they held: a GPU of ``total`` bytes."""

    total = 4 * GIB

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()
        self.now = self.peak = 0

    def hold(self, tensor: "Away") -> None:
        storage = tensor.raw.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self.uses[key] += 1
        if self.uses[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._let_go, key, size, storage)

    def _let_go(self, key: int, size: int, storage: Any) -> None:
        self.uses[key] -= 1
        if not self.uses[key]:
            self.now -= size


MEMORY = Memory()


class Streams:
    """Streams that run nothing beside anything. ``told``: how often each thing was asked of them."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.work = Stream(self)

    def Stream(self, device: torch.device) -> "Stream":
        return Stream(self)

    def current_stream(self, device: torch.device) -> "Stream":
        return self.work

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        assert stream is not self.work
        yield


class Event:
    """A mark of now, in milliseconds as torch.cuda's."""

    def __init__(self) -> None:
        self.when = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.when - self.when)


class Stream:
    """One of ``streams``, which keeps the account."""

    def __init__(self, streams: Streams):
        self.streams = streams

    def wait_stream(self, other: "Stream") -> None:
        self.streams.told["wait_stream"] += 1

    def record_event(self) -> "Stream":
        assert self is not self.streams.work
        self.streams.told["record_event"] += 1
        return self

    def wait_event(self, event: "Stream") -> None:
        assert self is self.streams.work is not event
        self.streams.told["wait_event"] += 1


class AwayKind:
    """As ``diffdpo.gpus.Cuda``. Flash attention over rows of unequal length has no kernel on a CPU: a test puts a
    function of the same arguments in its place, and ``flash`` on."""

    flash = False

    def __init__(self) -> None:
        self.its_streams, self.synchronized = Streams(), 0

    def name(self, device: torch.device) -> str:
        return "a second device"

    def timed_event(self) -> "Event":
        return Event()

    def streams(self) -> Streams:
        return self.its_streams

    def page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        self.its_streams.told["page_locked"] += 1
        return torch.empty_like(tensor, device="cpu")

    def total_memory(self, device: torch.device) -> int:
        return MEMORY.total

    def held_by_others(self, device: torch.device) -> int:
        return 0

    def peak_allocated(self, device: torch.device) -> int:
        return MEMORY.peak

    peak_reserved = peak_allocated

    def reset_peaks(self, device: torch.device) -> None:
        MEMORY.peak = MEMORY.now

    def synchronize(self, device: torch.device) -> None:
        self.synchronized += 1

    def tiles_flash(self, device: torch.device) -> bool:
        return self.flash

    def has_bf16(self, device: torch.device) -> bool:
        return False


class Away(torch.Tensor):
    """Numbers of the host that claim to be elsewhere."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), **layout, device=AWAY)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw
        MEMORY.hold(self)

    def __repr__(self, **_):
        return f"Away({self.raw!r})"

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, *_, **__):
        raise TypeError("an away tensor has no numpy; .cpu() first")

    def record_stream(self, stream: "Stream") -> None:
        stream.streams.told["record_stream"] += 1

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return a.to(dtype) @ b.to(dtype)


EMULATED = {aten.mm.dtype: _product}
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""A GPU's tensor may be indexed by one of the host; what is put there is the GPU's."""
NUMBER_OF_THE_HOST = {*INDEXING, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor, aten.fill.Tensor}
"""Beside what goes element by element: where a GPU reads a tensor without a dimension as if it were a number."""


def run(func, args, kwargs):
    """An operation on the host, its results away where one of its arguments is, or where it was asked for."""
    asked = kwargs.get("device")
    leaves = tree_flatten((args, kwargs))[0]
    there = [x for x in leaves if isinstance(x, Away)]
    away = torch.device(asked).type == NAME if asked is not None else bool(there)
    if there and func not in CROSSING:
        refuse_mixed(func, args, kwargs)
    if away and any(isinstance(x, torch.Generator) and x.device.type != NAME for x in leaves):
        raise RuntimeError(f"{func}: expected a {NAME!r} device type for generator but found 'cpu'")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = tree_map(_raw, args), tree_map(_raw, kwargs)
    out = EMULATED.get(func, func)(*raw_args, **raw_kwargs)
    if func is aten._local_scalar_dense.default:
        return out
    if func is aten.copy_.default:
        return args[0]
    if not away:
        return out
    known = {id(x.raw): x for x in there}
    return tree_map(lambda x: (known[id(x)] if id(x) in known else Away(x)) if _is_plain(x) else x, out)


def refuse_mixed(func, args, kwargs):
    """RuntimeError where a GPU could not do it with these tensors of the host.

    A number without a dimension is read from there, element by element; it is never written to, and never one of many.
    """
    takes_numbers = torch.Tag.pointwise in func.tags or func in NUMBER_OF_THE_HOST
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        host = [x for x in tree_flatten(given.get(argument.name))[0] if _is_plain(x)]
        if argument.alias_info is None or not argument.alias_info.is_write:
            if argument.name == "indices" and func in INDEXING and isinstance(args[0], Away):
                continue
            host = [x for x in host if x.dim() or not takes_numbers]
        if host:
            what = f"{argument.name} of {[tuple(x.shape) for x in host]}"
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but the host has {what}")


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Away) else x


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, Away)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


BUILDERS = (torch.tensor, torch.as_tensor, torch.asarray)


class _Functions(TorchFunctionMode):
    """What does not reach the dispatcher: torch.tensor builds on the host first, and addresses are those of the host's
    memory, by which safetensors tells shared tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in BUILDERS and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(AWAY)
        if func in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr) and isinstance(args[0], Away):
            return func(args[0].raw)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[AwayKind]:
    """Inside there is an ``AWAY``, which goes a GPU's ways."""
    kind = AwayKind()
    gpus.KINDS[NAME] = kind
    try:
        with _Functions(), _Dispatch():
            yield kind
    finally:
        del gpus.KINDS[NAME]
