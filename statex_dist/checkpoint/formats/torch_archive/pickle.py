"""The pickles inside ``torch.save`` files, read without running anything and without torch.

A pickle may name any function and call it. Here every name becomes an inert class that only remembers how it was
called: nothing of torch, DeepSpeed or the file's author is imported, let alone run. Names outside :data:`ALLOWED` are
refused all the same, because what we write from such a file will be opened by software that does run them.

Tensors become :class:`TensorRef`: where the values lie, not the values. What a pickle may cost is bounded before
anything is made of it (:mod:`statex_dist.checkpoint.formats.torch_archive.scan`).
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from statex_dist.checkpoint.dtypes import ITEM_BYTES, TORCH_NAMES
from statex_dist.checkpoint.formats.torch_archive.scan import A_LEAF, A_MEMBER, scan
from statex_dist.checkpoint.formats.torch_archive.scan import MAX_DEPTH as MAX_DEPTH
from statex_dist.checkpoint.formats.torch_archive.scan import UnsafePickleError as UnsafePickleError
from statex_dist.errors import reason, shown

MAX_PICKLE_BYTES = 1 << 28
_MOST_KEPT_BYTES = 1 << 20
_MAX_AXES = 64
_MAX_NUMBER = 2**63

STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8"},
    **{"ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64"},
}
"""torch's typed storages and the dtype of their elements, by its name in safetensors."""

_DTYPES = {f"torch.{theirs}" for theirs in TORCH_NAMES.values()} | {"torch.complex128"}

ENUMS: Mapping[str, Mapping[str, int]] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3},
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": {
        "TORCH_CONTIGUOUS_FORMAT": 0,
        "TORCH_CHANNELS_LAST": 1,
        "TORCH_PRESERVE_FORMAT": 2,
    },
    "torch.distributed.checkpoint.planner.WriteItemType": {"TENSOR": 1, "SHARD": 2, "BYTE_IO": 3},
}
"""Enums that files hold: their members and values."""

GETATTR = {"builtins.getattr", "__builtin__.getattr"}
"""How Python 3.11.0 to 3.11.4 pickle a member of an enum: ``getattr(EnumClass, "member")``, where every other release
has ``EnumClass(value)``. It is read as the latter, and of the enums above alone."""

_OF_TORCH = """collections.OrderedDict torch.Size torch.Tensor torch.device torch.nn.parameter.Parameter
torch._tensor._rebuild_from_type_v2 torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3
torch._utils._rebuild_parameter torch.serialization._get_layout torch.storage.UntypedStorage"""
_OF_DEEPSPEED = """deepspeed.utils.tensor_fragment.fragment_address deepspeed.runtime.fp16.loss_scaler.LossScaler
deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"""
# What people put into client_state: states of random generators and parsed arguments.
_OF_CLIENTS = """_codecs.encode numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.ndarray numpy.dtype argparse.Namespace
__builtin__.xrange datetime.datetime datetime.date datetime.timedelta datetime.timezone"""
_BUILTINS = ("set", "complex", "frozenset", "bytearray", "slice", "range")
# A torch.distributed.checkpoint ``.metadata``, in which megatron-core keeps the ranks' plans.
_OF_DCP = """metadata.Metadata metadata.TensorStorageMetadata metadata.BytesStorageMetadata metadata.TensorProperties
metadata.ChunkStorageMetadata metadata.MetadataIndex metadata.StorageMeta filesystem._StorageInfo planner.SavePlan
planner.WriteItem planner.TensorWriteData"""
_OF_MEGATRON = """pathlib.PosixPath megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata
megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan"""

ALLOWED = {
    *" ".join((_OF_TORCH, _OF_DEEPSPEED, _OF_CLIENTS, _OF_MEGATRON)).split(),
    *(f"torch.{name}" for name in STORAGES),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
    *(f"torch.distributed.checkpoint.{name}" for name in _OF_DCP.split()),
    *(_DTYPES | ENUMS.keys() | GETATTR),
}
"""The names that a pickle may hold."""


class Remembered:
    """An object that was not made: its class's name, the arguments and the state that it would have got.

    Attributes:
        args: Arguments of the constructor.
        state: What ``__setstate__`` would have been given; None for none.
    """

    NAME = ""
    """Dotted name of the class or function (of subclasses)."""

    __slots__ = ("args", "by_call", "state")

    args: tuple[Any, ...]
    state: Any
    by_call: bool

    def __new__(cls, *args: Any) -> Remembered:  # noqa: D102 - documented by the class
        made = object.__new__(cls)
        made.args, made.state, made.by_call = args, None, False
        return made

    def __init__(self, *args: Any):
        # Only a call comes here: the NEWOBJ opcode makes objects with __new__ alone.
        self.by_call = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remembered) or type(other) is not type(self):
            return False
        return (self.args, self.state) == (other.args, other.state)

    def __hash__(self) -> int:
        # The state too: a .metadata has thousands of keys that differ in nothing else. Of their texts, because hashes
        # of numbers are not keyed: a file could hold any number of them that collide.
        state = frozenset(map(repr, self.state.items())) if isinstance(self.state, dict) else repr(self.state)
        return hash((self.NAME, repr(self.args), state))


class Size(tuple[int, ...]):
    """A ``torch.Size``."""

    __slots__ = ()


class Ordered(OrderedDict[Any, Any]):
    """An ``OrderedDict`` of a pickle; attributes (torch's ``_metadata``) could hide its methods and are not kept."""

    def __setstate__(self, state: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One storage of an archive: its key, the dtype of its elements, their number, and the device it was on."""

    key: str
    dtype: str
    numel: int
    location: str = "cpu"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor: a storage and a view of it (offset and strides in elements)."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """Dtype, by its name in safetensors."""
        return self.storage.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value of a pickle with everything in it that holds no other values replaced by ``change`` of it.

    Raises:
        UnsafePickleError: A tensor is the key of a dict: keys stay as they are.
    """
    if isinstance(value, dict):
        if any(isinstance(key, TensorRef) for key in value):
            raise UnsafePickleError("tensors as keys of a dict are not supported")
        return type(value)((key, mapped(item, change)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, Remembered):
        made = type(value)(*mapped(value.args, change))
        made.by_call, made.state = value.by_call, mapped(value.state, change)
        return made
    return change(value)


def new_tensor(key: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    """Return a contiguous tensor that fills a storage of its own."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return TensorRef(StorageRef(key, dtype, step), 0, shape, tuple(reversed(stride)))


def named(name: str) -> type[Remembered]:
    """Return the inert class that stands for a dotted name."""
    return _class(name)


@cache
def _class(name: str) -> type[Remembered]:
    return type(name.rpartition(".")[2], (Remembered,), {"NAME": name, "__slots__": ()})


def _are_sizes(values: Any) -> bool:
    """Return whether a value is what torch writes as the sizes or strides of a tensor."""
    return (
        isinstance(values, tuple | list)
        and len(values) <= _MAX_AXES
        and all(isinstance(n, int) and 0 <= n < _MAX_NUMBER for n in values)
    )


def _size(sizes: Any = ()) -> Size:
    if not _are_sizes(sizes):
        raise UnsafePickleError("a torch.Size that torch does not write")
    return Size(sizes)


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not all(map(_are_sizes, ([offset], size, stride))):
        raise UnsafePickleError("a tensor whose storage, size or strides are not what torch writes")
    tensor = TensorRef(storage, offset, tuple(size), tuple(stride))
    if len(size) != len(stride):
        raise UnsafePickleError("a tensor with as many strides as it has not dimensions")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if tensor.numel and last >= storage.numel:
        raise UnsafePickleError(f"a tensor that reaches beyond its storage of {storage.numel} elements")
    return tensor


def _rebuild_untyped(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """Dtypes younger than typed storages name theirs apart."""
    ours = next((o for o, theirs in TORCH_NAMES.items() if f"torch.{theirs}" == getattr(dtype, "NAME", "")), None)
    if ours is None or not isinstance(storage, StorageRef):
        raise UnsafePickleError(f"a tensor of dtype {shown(getattr(dtype, 'NAME', dtype))}")
    typed = StorageRef(storage.key, ours, storage.numel // ITEM_BYTES[ours], storage.location)
    return _rebuild_tensor(typed, offset, size, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> TensorRef:
    if not isinstance(tensor, TensorRef):
        raise UnsafePickleError("a parameter that is no tensor")
    return tensor


def _rebuild_from_type(function: Any, _: Any, args: Any, *__: Any) -> TensorRef:
    if not isinstance(function, _Call) or not isinstance(args, tuple) or len(args) > _MAX_AXES:
        raise UnsafePickleError("a tensor of a class of its own that torch does not write")
    return _rebuild_parameter(function(*args))


def _enum_member(owner: Any = None, name: Any = None, *others: Any) -> Remembered:
    """Return the member of an enum as a call with its value makes it.

    Raises:
        UnsafePickleError: ``getattr`` of anything else.
    """
    is_class = isinstance(owner, type) and issubclass(owner, Remembered)
    of = owner.NAME if is_class else type(owner).__name__
    if others or not is_class or not isinstance(name, str) or name not in ENUMS.get(of, {}):
        asked = name[:80] if isinstance(name, str) else type(name).__name__
        raise UnsafePickleError(f"builtins.getattr of {of} and {asked!r}")
    return owner(ENUMS[of][name])


class _Call:
    """A function that may be called while reading; nothing can be set on it."""

    __slots__ = ("_function",)

    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafePickleError(f"an attempt to set {name} on a function")


_CALLS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_untyped),
    "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": _Call(_rebuild_from_type),
    "torch.Size": _Call(_size),
    "collections.OrderedDict": Ordered,
    **{name: _Call(_enum_member) for name in GETATTR},
}

_RESULTS = {
    **{name: A_LEAF for name, call in _CALLS.items() if isinstance(call, _Call)},
    **dict.fromkeys(GETATTR, A_MEMBER),
}
"""Stand-ins that the scan uses for the results of these calls."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: set[StorageRef] = set()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise UnsafePickleError(full)
        return _CALLS.get(full) or _class(full)

    def persistent_load(self, pid: Any) -> StorageRef:
        kind, storage, key, location, numel = pid
        name = storage.NAME if isinstance(storage, type) and issubclass(storage, Remembered) else ""
        dtype = "U8" if name == "torch.storage.UntypedStorage" else STORAGES.get(name.removeprefix("torch."))
        texts = isinstance(key, str) and isinstance(location, str) and "/" not in key and ".." not in key
        if kind != "storage" or dtype is None or not texts or not _are_sizes([numel]):
            raise UnsafePickleError(f"a storage that torch does not write: {shown(pid)}")
        made = StorageRef(key, dtype, numel, location)
        self.storages.add(made)
        return made


def loads(data: bytes) -> tuple[Any, frozenset[StorageRef]]:
    """Return the object of a pickle, inert, and the storages that its tensors refer to.

    Equal pickles give one object, which is not to be changed: those of a thousand ranks are the same, or nearly so.

    Raises:
        UnsafePickleError: It names what is not allowed, is damaged, or is too large once written out.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise UnsafePickleError(f"{len(data)} bytes of pickle; at most {MAX_PICKLE_BYTES} are read")
    return _kept(data) if len(data) <= _MOST_KEPT_BYTES else _load(data)


@lru_cache(maxsize=16)  # the GPUs of a node have a pickle each: it names them
def _kept(data: bytes) -> tuple[Any, frozenset[StorageRef]]:
    return _load(data)


def _load(data: bytes) -> tuple[Any, frozenset[StorageRef]]:
    scan(data, allowed=ALLOWED, results=_RESULTS)
    reader = _Reader(io.BytesIO(data))
    try:
        value = reader.load()
    except UnsafePickleError:
        raise
    except Exception as error:
        # A damaged or hostile pickle raises whatever it likes: AttributeError, TypeError, MemoryError, ...
        raise UnsafePickleError(f"not a readable pickle: {reason(error)}") from None
    return value, frozenset(reader.storages)
