"""Pickles of a few bytes that ask for unbounded time or memory, written opcode by opcode.

Run as a program, it reads the pickles of a directory within limits of memory and CPU time that the caller gives, and
prints a line for each; a pickle that exceeds a limit ends it.
"""

import resource
import struct
import sys
import time
from pathlib import Path

PROTO = b"\x80\x02"
ORDERED, SIZE, SET = b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"c__builtin__\nset\n"
REBUILD, PARAMETER = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"
TYPED, NAMESPACE = b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cargparse\nNamespace\n"
INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def large(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def doubled(levels: int, first: bytes = b"K\x01", pair: bytes = b"\x86") -> bytes:
    """Return a value that holds another one twice, ``levels`` times over; in the memo from 0 on."""
    return first + put(0) + b"".join(get(n) + pair + put(n + 1) for n in range(levels))


LISTS = b"".join(b"](" + (get(n - 1) * 2 if n else b"K\x01") + b"e" + put(n) for n in range(60))
PID = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x05tQ"
MANY = 5000
ITEMS = b"(" + b"".join(text(f"{n:04d}") + b"N" for n in range(MANY)) + b"u"


def hostile_pickles() -> dict[str, bytes]:
    """Return the pickles, each of at most 64 KiB, by name."""
    repeat = get(0) + get(1) + b"R"
    found = {
        "tuples as a key": b"}" + doubled(60) + b"Ns",
        "tuples as keys of setitems": b"}(" + doubled(60) + b"Nu",
        "tuples in a set": b"\x8f(" + doubled(60) + b"\x90",
        "tuples in a frozenset": b"(" + doubled(60) + b"\x91",
        "frozensets in a frozenset": b"((K\x01\x91"
        + put(0)
        + b"".join(b"(" + get(n) + b"(" + get(n) + b"N\x91\x91" + put(n + 1) for n in range(60))
        + b"t",
        "an object of tuples as a key": b"}" + INDEX + doubled(60) + b"\x85\x81Ns",
        "an object with a state of tuples as a key": b"}" + INDEX + b")\x81" + doubled(60) + b"bNs",
        "deep tuple as a key": b"}" + b")" + b"\x85" * 60_000 + b"Ns",
        "tuples in a persistent id": doubled(60) + b"Q",
        "tuples as part of a persistent id": b"(" + text("storage") + doubled(60) + b"NNNtQ",
        "long text as a persistent id": text("x" * 60_000) + b"Q",
        "memo index": b"N" + put(200_000_000) + b".",
        "memo index 2": b"N" + put(2**32 - 1),
        "memo indices of growing distance": b"".join(b"N" + put(2**n) for n in range(32)),
        "tuples without end": doubled(60),
        "lists without end": LISTS + b"t",
        "a list in itself": b"]" + put(0) + get(0) + b"a",
        "a list in its tuple": b"]" + put(0) + b"((" + get(0) + b"te",
        "a dict in itself": b"}" + put(0) + text("a") + get(0) + b"s",
        "an object in its state": NAMESPACE + b")\x81" + put(0) + b"}" + text("a") + get(0) + b"sb",
        "deep lists": b"]" * 30_000 + b"a" * 29_999,
        "deep tuples": b")" + b"\x85" * 60_000,
        "deep dicts": (b"}" + text("a")) * 8000 + b"N" + b"s" * 8000,
        "deep states": (NAMESPACE + b")\x81") * 1500 + b"b" * 1500,
        "deep parameters": b"(" + PARAMETER + put(0) + b")" + (b"\x85" + put(1) + get(0) + get(1) + b"R") * 3500 + b"t",
        "a parameter that is a tuple": PARAMETER + doubled(60) + b"\x85R",
        "marks": b"(" * 60_000,
        "marks closed": b"(" * 30_000 + b"t" * 30_000,
        "copies of an OrderedDict": b"("
        + ORDERED
        + put(0)
        + b"]("
        + b"".join(text(f"{n:04d}") + b"N\x86" for n in range(2500))
        + b"e\x85"
        + put(1)
        + repeat * 2000
        + b"t",
        "copies of a torch.Size": b"("
        + SIZE
        + put(0)
        + b"("
        + b"K\x01" * MANY
        + b"t\x85"
        + put(1)
        + repeat * 4000
        + b"t",
        "copies of a text as a torch.Size": b"("
        + SIZE
        + put(0)
        + text("1" * 20_000)
        + b"\x85"
        + put(1)
        + repeat * 3000
        + b"t",
        "copies of arguments": b"(" + SET + put(0) + b"(" + b"N" * 20_000 + b"t" + put(1) + repeat * 3000 + b"t",
        "copies of states": ORDERED + b")R}" + ITEMS + put(0) + b"b" + (get(0) + b"b") * 2000,
        "copies by a tensor of a type": b"("
        + TYPED
        + put(0)
        + SET
        + b"N("
        + b"N" * 9000
        + b"t\x87"
        + put(1)
        + repeat * 3000
        + b"t",
        "tensors of many axes": b"("
        + REBUILD
        + put(0)
        + b"("
        + PID
        + b"K\x00("
        + b"K\x01" * 9000
        + b"t"
        + put(1)
        + get(1)
        + b"\x89Nt"
        + put(1)
        + repeat * 3000
        + b"t",
        "a tensor of a negative size": REBUILD + b"(" + PID + b"K\x00J\xff\xff\xff\xff\x85K\x01\x85\x89NtR",
        "a tensor changed after it was made": REBUILD
        + b"("
        + PID
        + b"K\x00K\x05\x85K\x01\x85\x89NtR"
        + b"("
        + text("x")
        + b"K\x00NNtb",
        "methods of a dict hidden": ORDERED + b")R}" + text("items") + b"K\x01sb",
        "long4": b"\x8b\xff\xff\xff\x7f",
        "long4 negative": b"\x8b\xff\xff\xff\xff",
        "long4 of 60,000 bytes": b"\x8b" + struct.pack("<I", 60_000) + b"\x01" * 60_000,
        "unicode8": b"\x8d" + struct.pack("<Q", 2**62),
        "bytes8": b"\x8e" + struct.pack("<Q", 2**40),
        "bytearray8": b"\x96" + struct.pack("<Q", 2**40),
        "binbytes": b"B\xff\xff\xff\x7f",
        "binunicode": b"X\xff\xff\xff\xff",
        "frame": b"\x95" + struct.pack("<Q", 2**62) + b"N",
        "next buffer": b"\x97",
        "readonly buffer": b"N\x98",
        "a digit without end": b"I" + b"9" * 60_000 + b"\n",
        "a text integer": b"L" + b"9" * 60_000 + b"L\n",
        "duplicates": b"]" + b"2" * 60_000,
        "extension": b"\x82\x01",
        "instance": b"(i__builtin__\nset\n",
        "persistent text": b"P" + b"x" * 60_000 + b"\n",
        "a name without end": b"c" + b"x" * 60_000,
        "a name of names": b"\x8c\x01a\x8c\x01b\x93",
        "keyword arguments": SET + b")}\x92",
        "colliding integers": b"}(" + b"".join(large(n * (2**61 - 1)) + b"N" for n in range(1, 4000)) + b"u",
        "colliding objects": b"}("
        + INDEX
        + put(0)
        + b")\x81]bN"
        + b"".join(b"h\0)\x81]M" + struct.pack("<H", n) + b"abN" for n in range(5500))
        + b"u",
        "colliding states": b"}("
        + b"".join(INDEX + b")\x81}" + text("a") + large(n * (2**61 - 1)) + b"\x85sbN" for n in range(1, 600))
        + b"u",
        "large keys many times": b"}(" + (b"(" + b"N" * 90 + b"t" + put(0)) + b"N" + (get(0) + b"N") * 9000 + b"u",
        "empty sets": b"(" + b"\x8f" * 60_000 + b"t",
        "empty dicts": b"(" + b"}" * 60_000 + b"t",
        "empty ordered dicts": b"(" + ORDERED + put(0) + (b"h\0)R") * 15_000 + b"t",
        "nothing at the end": b"N0",
        "two values": b"NN",
        "an open mark": b"(N",
    }
    return {name: PROTO + data + b"." for name, data in found.items()}


def read_all(directory: Path, memory: int, seconds: int) -> None:
    """Read every file of a directory as a pickle; print its name, what came of it and what that cost."""
    from statex_dist.checkpoint.formats.torch_archive.pickle import UnsafePickleError, loads

    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + memory, base + memory))
    for path in sorted(directory.iterdir()):
        used = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds, -1))
        data = path.read_bytes()
        try:
            loads(data)
            outcome = "read"
        except UnsafePickleError as error:
            outcome = f"refused: {error}"
        sys.stdout.write(f"{path.name}\t{outcome}\t{time.process_time() - used:.3f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    read_all(Path(sys.argv[1]), memory=int(sys.argv[2]), seconds=int(sys.argv[3]))
