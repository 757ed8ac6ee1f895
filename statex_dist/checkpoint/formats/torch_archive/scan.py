"""A first pass over a pickle that builds nothing, so that a hostile one costs no more than its bytes.

A few bytes of pickle can ask for any amount of memory or time: an index into the memo, a length, a value that refers to
another one twice, and so on sixty times over, as the key of a dict. Here the opcodes are followed with a stand-in for
each value: its kind, how deeply it is nested, and how many parts it has once it is written out without references.
What exceeds a limit, and every opcode that Python's pickler does not write for data, is refused.

One rule keeps the stand-ins exact: what was fetched from the memo is not changed any more. Pickles of values that do
not contain themselves obey it, because a pickler fills a list or dict before it refers to it again.
(Opcodes: CPython, ``Lib/pickletools.py``; protocols 2 to 5.)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from statex_dist.errors import shown

MAX_DEPTH = 200
"""Levels of values in values."""

MAX_PARTS = 5_000_000
"""Parts of a value, written out without references: everything later walks through them."""

_MAX_OPCODES = 20_000_000
_MAX_ROOM = 1 << 23  # of containers, in units of about 64 bytes
_MAX_ARGS = 64  # calls copy them
_MAX_KEY_PARTS = 100  # hashing and comparing a key takes one step each
_MAX_TUPLE_KEYS = 10_000  # their hashes are not keyed, so that a file can make them collide
_MAX_INT_BYTES = 1024  # Python prints no integer of more than 4,300 digits
_PART_BYTES = 100  # of a long text, which counts as one part for each

ATOM, TEXT, INT, LARGE_INT, NAME, TUPLE, FROZENSET, OBJECT, LEAF, LIST, DICT, ORDERED, SET, BYTES = range(14)
"""Kinds of values. ATOM: None, booleans, floats, bytes; NAME: a class or function; LEAF: made by a call of bounded
cost, holds nothing else."""

_NUMBER = struct.Struct("<I")
_KEYS = {ATOM, TEXT, INT, NAME, TUPLE, FROZENSET, OBJECT}

_CONTAINERS = {ord("]"): (LIST, 1), ord("}"): (DICT, 2), 0x8F: (SET, 4)}
"""Opcodes that push an empty container: its kind, and its size in the units of ``_MAX_ROOM``."""

Value = Sequence[Any]
"""A stand-in: kind, depth, parts, and of a text or name the text, of a tuple its length. A list of kind, depth, parts
and whether it may still be changed for values that are filled after they are made."""

_ATOM, _TEXT, _INT, _LARGE_INT = (ATOM, 0, 1, None), (TEXT, 0, 1, None), (INT, 0, 1, None), (LARGE_INT, 0, 1, None)
A_LEAF: Value = (LEAF, 0, 1, None)
A_MEMBER: Value = (OBJECT, 2, 3, None)

_PLAIN: dict[int, tuple[Value, int]] = {
    **{ord(op): (_ATOM, 0) for op in ("N", "\x88", "\x89")},
    **{ord("G"): (_ATOM, 8), ord("K"): (_INT, 1), ord("M"): (_INT, 2), ord("J"): (_INT, 4)},
    ord(")"): ((TUPLE, 0, 1, 0), 0),
}
"""Opcodes that push a value: the value, and the bytes of their argument."""

_COUNTED: dict[int, tuple[Value, int]] = {
    **{ord("X"): (_TEXT, 4), 0x8C: (_TEXT, 1), 0x8D: (_TEXT, 8), ord("U"): (_TEXT, 1), ord("T"): (_TEXT, 4)},
    **{ord("B"): (_ATOM, 4), ord("C"): (_ATOM, 1), 0x8E: (_ATOM, 8), 0x96: ((BYTES, 0, 1, None), 8)},
    **{0x8A: (_INT, 1), 0x8B: (_INT, 4)},
}
"""Opcodes that push a value whose bytes follow: the value, and the bytes of their number."""


class UnsafePickleError(Exception):
    """A pickle that needs more than data; the message names what."""


def scan(data: bytes, *, allowed: Collection[str], results: Mapping[str, Value]) -> None:
    """Raise unless a pickle holds data of bounded depth, size and cost.

    Args:
        data: The pickle.
        allowed: Dotted names that it may hold.
        results: What a call of some of them gives; of the others, an object that only remembers its arguments.

    Raises:
        UnsafePickleError: It names what is not allowed, is damaged or too large, or its values refer to themselves.
    """
    try:
        _Walk(data, allowed, results).run()
    except (IndexError, struct.error):
        raise UnsafePickleError("not a readable pickle: it ends early, or takes a value that is not there") from None


def _extent(items: Sequence[Value]) -> tuple[int, int]:
    """Return the depth that values give to what holds them, and their parts together."""
    depth, size = -1, 0
    for value in items:
        size += value[2]
        if value[1] > depth:
            depth = value[1]
    return depth + 1, size


class _Walk:
    def __init__(self, data: bytes, allowed: Collection[str], results: Mapping[str, Value]):
        self._data, self._allowed, self._results = data, allowed, results
        self._protocol = 0
        self._stack: list[Value] = []
        self._outer: list[list[Value]] = []  # the stacks below the marks
        self._memo: list[Value] = []
        self._room, self._tuple_keys = _MAX_ROOM, _MAX_TUPLE_KEYS

    def run(self) -> None:
        """Follow the opcodes to the end."""
        data, stack, memo, position = self._data, self._stack, self._memo, 0
        plain, counted, handlers, unpack = _PLAIN.get, _COUNTED.get, _HANDLERS, _NUMBER.unpack_from
        for _ in range(_MAX_OPCODES):
            opcode = data[position]
            position += 1
            if found := plain(opcode):
                stack.append(found[0])
                position += found[1]
            elif opcode == 0x71:  # BINPUT
                self._put(data[position], stack[-1])
                position += 1
            elif opcode == 0x72:  # LONG_BINPUT
                self._put(unpack(data, position)[0], stack[-1])
                position += 4
            elif opcode == 0x68:  # BINGET
                stack.append(self._get(data[position]))
                position += 1
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(self._get(unpack(data, position)[0]))
                position += 4
            elif opcode == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif found := counted(opcode):
                value, width = found
                count = int.from_bytes(data[position : position + width], "little")
                position += width
                stack.append(self._counted(value, position, count))
                position += count
            elif opcode == 0x2E:  # STOP
                if len(stack) != 1 or self._outer:
                    raise UnsafePickleError("not a readable pickle: it does not end with one value")
                return
            elif opcode in handlers:
                position = handlers[opcode](self, position)
                stack = self._stack
            else:
                raise UnsafePickleError(f"the pickle opcode {shown(chr(opcode))}, which torch does not write")
        raise UnsafePickleError(f"a pickle of more than {_MAX_OPCODES} operations")

    def _get(self, index: int) -> Value:
        value = self._memo[index]
        if value.__class__ is list:
            value[3] = False
        return value

    def _put(self, index: int, value: Value) -> None:
        memo = self._memo
        if index == len(memo):
            memo.append(value)
        elif index < len(memo):
            memo[index] = value
        else:
            raise UnsafePickleError(f"the memo index {index} after {len(memo)} values")

    def _counted(self, value: Value, position: int, count: int) -> Value:
        """Return the stand-in of a value whose ``count`` bytes follow."""
        if count > len(self._data) - position:
            left = len(self._data) - position
            raise UnsafePickleError(f"not a readable pickle: {count} bytes announced, {left} left")
        if value is _INT:
            if count > _MAX_INT_BYTES:
                raise UnsafePickleError(f"an integer of {count} bytes; at most {_MAX_INT_BYTES} are read")
            return _INT if count <= 8 else _LARGE_INT
        kind = value[0]
        if count >= _PART_BYTES:
            return (kind, 0, 1 + count // _PART_BYTES, None)
        if kind == TEXT and self._protocol >= 4:  # names are texts there
            return (TEXT, 0, 1, self._data[position : position + count])
        return value

    def _marked(self) -> list[Value]:
        """Return what was pushed since the last mark, and take it away."""
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _new(self, value: Value, room: int) -> None:
        """Push a value that takes ``room`` times 64 bytes."""
        self._room -= room
        if self._room < 0 or value[1] > MAX_DEPTH or value[2] > MAX_PARTS:
            raise UnsafePickleError("values nested without end, or too many of them")
        self._stack.append(value)

    def _fill(self, items: Sequence[Value], *kinds: int) -> None:
        """Note that items go into the value on top, which must be of one of these kinds and not yet referred to."""
        target = self._stack[-1]
        if target[0] not in kinds or not isinstance(target, list):
            raise UnsafePickleError("not a readable pickle: a value that holds no others is filled")
        if not target[3]:
            raise UnsafePickleError("values nested without end: one is changed after it was referred to")
        depth, size = _extent(items)
        target[2] += size
        if depth > target[1]:
            target[1] = depth
        if depth > MAX_DEPTH or target[2] > MAX_PARTS:
            raise UnsafePickleError("values nested without end, or too many of them")

    def _check_keys(self, keys: Sequence[Value]) -> None:
        """Raise unless values can be hashed and compared at little cost."""
        if keys.count(_TEXT) == len(keys):
            return
        for kind, depth, size, _ in keys:
            if kind not in _KEYS or size > _MAX_KEY_PARTS or depth > _MAX_KEY_PARTS:
                raise UnsafePickleError("a key of a dict that is large, nested or not of a kind that torch writes")
            if kind in (TUPLE, FROZENSET):
                self._tuple_keys -= 1
        if self._tuple_keys < 0:
            raise UnsafePickleError(f"more than {_MAX_TUPLE_KEYS} keys that are tuples")

    def _resolve(self, name: str) -> None:
        if name not in self._allowed:
            raise UnsafePickleError(shown(name).strip("'"))
        self._stack.append((NAME, 0, 1, name))

    def _frame(self, position: int) -> int:
        count = int.from_bytes(self._data[position : position + 8], "little")
        if count > len(self._data) - position - 8:
            raise UnsafePickleError("not a readable pickle: a frame that reaches beyond its end")
        return position + 8

    def _proto(self, position: int) -> int:
        self._protocol = self._data[position]
        if position != 1 or not 2 <= self._protocol <= 5:
            raise UnsafePickleError(f"the pickle protocol {self._protocol}; 2 to 5 are read")
        return position + 1

    def _mark(self, position: int) -> int:
        if len(self._outer) > MAX_DEPTH:
            raise UnsafePickleError("values nested without end")
        self._outer.append(self._stack)
        self._stack = []
        return position

    def _tuple(self, items: Sequence[Value]) -> None:
        depth, size = _extent(items)
        self._new((TUPLE, depth, size + 1, len(items)), 1)

    def _marked_tuple(self, position: int) -> int:
        self._tuple(self._marked())
        return position

    def _short_tuple(self, position: int) -> int:
        count = self._data[position - 1] - 0x84  # TUPLE1, TUPLE2, TUPLE3
        if len(self._stack) < count:
            raise IndexError
        items = self._stack[-count:]
        del self._stack[-count:]
        self._tuple(items)
        return position

    def _container(self, position: int) -> int:
        kind, room = _CONTAINERS[self._data[position - 1]]
        self._new([kind, 0, 1, True], room)
        return position

    def _append(self, position: int) -> int:
        self._fill([self._stack.pop()], LIST)
        return position

    def _appends(self, position: int) -> int:
        self._fill(self._marked(), LIST)
        return position

    def _setitem(self, position: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._check_keys([key])
        self._fill([key, value], DICT, ORDERED)
        return position

    def _setitems(self, position: int) -> int:
        items = self._marked()
        if len(items) % 2:
            raise UnsafePickleError("not a readable pickle: a key without a value")
        self._check_keys(items[::2])
        self._fill(items, DICT, ORDERED)
        return position

    def _additems(self, position: int) -> int:
        items = self._marked()
        self._check_keys(items)
        self._fill(items, SET)
        return position

    def _frozenset(self, position: int) -> int:
        items = self._marked()
        self._check_keys(items)
        depth, size = _extent(items)
        self._new((FROZENSET, depth, size + 1, None), 4)
        return position

    def _global(self, position: int) -> int:
        ends = [self._data.find(b"\n", position, position + 300)]
        ends.append(self._data.find(b"\n", ends[0] + 1, ends[0] + 300) if ends[0] >= 0 else -1)
        if -1 in ends:
            raise UnsafePickleError("a name without end")
        module, name = self._data[position : ends[0]], self._data[ends[0] + 1 : ends[1]]
        self._resolve(f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}")
        return ends[1] + 1

    def _stack_global(self, position: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name[3], bytes) and isinstance(module[3], bytes)):
            raise UnsafePickleError("a name that is no short text")
        self._resolve(f"{module[3].decode('utf-8', 'replace')}.{name[3].decode('utf-8', 'replace')}")
        return position

    def _call(self, position: int) -> int:
        """REDUCE and NEWOBJ: what comes of a call depends on the name alone."""
        args, function = self._stack.pop(), self._stack.pop()
        if function[0] != NAME or args[0] != TUPLE:
            raise UnsafePickleError("a call without a name, or whose arguments are no tuple")
        name = function[3]
        if args[3] > _MAX_ARGS:
            raise UnsafePickleError(f"a call of {name} with {args[3]} arguments; at most {_MAX_ARGS} are read")
        if name == "collections.OrderedDict":
            if args[3]:
                raise UnsafePickleError(f"a call of {name} with arguments")
            self._new([ORDERED, 0, 1, True], 8)
        elif name == "torch.Size":  # a copy; the call refuses more numbers than a tensor has axes
            self._new((TUPLE, 1, args[2], _MAX_ARGS), 1)
        elif name in self._results:
            self._new(self._results[name], 2)
        else:
            self._new([OBJECT, args[1] + 1, args[2] + 1, True], 2)
        return position

    def _build(self, position: int) -> int:
        self._fill([self._stack.pop()], OBJECT, ORDERED)
        return position

    def _persistent_id(self, position: int) -> int:
        kind, depth, size, length = self._stack.pop()
        if kind != TUPLE or length != 5 or depth != 1 or size > 5 + _MAX_KEY_PARTS:
            raise UnsafePickleError("a storage that torch does not write: its id is not five plain values")
        self._new(A_LEAF, 2)
        return position


_HANDLERS: dict[int, Callable[[_Walk, int], int]] = {
    **{ord("("): _Walk._mark, ord("t"): _Walk._marked_tuple, **dict.fromkeys(_CONTAINERS, _Walk._container)},
    **{0x85: _Walk._short_tuple, 0x86: _Walk._short_tuple, 0x87: _Walk._short_tuple},
    **{ord("a"): _Walk._append, ord("e"): _Walk._appends, ord("s"): _Walk._setitem, ord("u"): _Walk._setitems},
    **{0x90: _Walk._additems, 0x91: _Walk._frozenset},
    **{ord("c"): _Walk._global, 0x93: _Walk._stack_global, ord("R"): _Walk._call, 0x81: _Walk._call},
    **{ord("b"): _Walk._build, ord("Q"): _Walk._persistent_id, 0x80: _Walk._proto, 0x95: _Walk._frame},
}
