"""Reads pickle streams without running anything that they name.

Python's own loader imports and calls whatever a stream asks for, and torch's `weights_only` loader has had holes of its
own. This is an interpreter of a closed list of opcodes that makes only values of its own: numbers, text, containers, what
the caller's `calls` build, and for everything else an inert `Record`. Text opcodes (protocols 0 and 1), extension codes
and out-of-band buffers are not understood. Names that exist to run code are refused outright.

Opcodes: Python's Lib/pickletools.py documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError

MAX_STREAM = 64 << 20
"""Bytes of one pickle stream, tensors not counted."""
MAX_OPCODES = 4_000_000
MAX_TEXT = 1 << 20
"""Bytes of one string."""
MAX_NAME = 512
"""Bytes of a module's or a class's name."""
MAX_INTEGER = 16
"""Bytes of one integer."""

# What a weight file can want from these is to run something.
_HARMFUL_MODULES = frozenset(
    "os posix nt subprocess sys shutil runpy pty socket ssl http urllib requests ctypes _ctypes importlib imp pickle "
    "_pickle cPickle dill cloudpickle joblib marshal code codeop webbrowser commands multiprocessing _thread threading "
    "asyncio signal smtplib ftplib pip pdb bdb timeit cProfile profile trace doctest zipimport pkgutil platform "
    "tempfile glob fileinput atexit gc".split()
)
_HARMFUL_NAMES = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in "eval exec execfile compile open __import__ breakpoint input exit quit globals vars apply reload".split()
) | {
    "io.open",
    "_io.open",
    "codecs.open",
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.package",
    "numpy.load",
}
_HARMFUL_PREFIXES = ("torch.hub.", "torch.jit.", "torch.package.", "torch.utils.cpp_extension.", "torch.ops.")


def _hashable(value: Any) -> bool:
    """Whether a value may be a key: one whose hashes cannot be chosen to collide by the thousand."""
    return isinstance(value, (str, float, bytes, type(None))) or (isinstance(value, int) and abs(value) < 1 << 63)


@dataclass(eq=False, slots=True)
class Record:
    """An object that was not made: its class's name, the arguments and the state that the stream gives it."""

    name: str
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a stream names; only a name."""

    name: str


class _Machine:
    """One run over one stream: pickle's stack machine with bounded work."""

    def __init__(
        self, stream: memoryview, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]
    ) -> None:
        self.stream, self.position = stream, 0
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # An honest stream spends some ten bytes or more on a container; one of empty containers spends one.
        self.allowance = self.memory = 50_000 + min(len(stream), MAX_STREAM) // 6

    def run(self) -> Any:
        opcodes = _OPCODES
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.stack.pop()
            operation = opcodes.get(code)
            if operation is None:
                raise CheckpointError(f"its pickle uses the opcode 0x{code:02x}, which a weight file does not need")
            operation(self)
        raise CheckpointError(f"its pickle has more than {MAX_OPCODES} operations")

    def take(self, count: int) -> memoryview:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.stream):
            raise CheckpointError("its pickle ends in the middle: the file is truncated or damaged")
        if self.position > MAX_STREAM:
            raise CheckpointError(f"its pickle is larger than {MAX_STREAM >> 20} MiB, tensors not counted")
        return self.stream[start : self.position]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to the end of the line, as GLOBAL has it."""
        window = bytes(self.stream[self.position : self.position + MAX_NAME])
        end = window.find(b"\n")
        if end < 0:
            raise CheckpointError("its pickle holds a name of absurd length")
        self.position += end + 1
        return window[:end].decode()

    def charge(self, containers: int = 1) -> None:
        self.allowance -= containers
        if self.allowance < 0:
            raise CheckpointError("its pickle would unfold into far more objects than its size allows")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    # Opcodes with more to do than a line.

    def mark(self) -> None:
        self.charge()
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def text(self, layout: str, encoding: str = "utf-8") -> None:
        self.push(str(self.chunk(layout), encoding, "surrogatepass" if encoding == "utf-8" else "strict"))

    def chunk(self, layout: str) -> memoryview:
        count = self.number(layout)
        if count > MAX_TEXT:
            raise CheckpointError(f"its pickle holds a text of {count} bytes")
        return self.take(count)

    def integer(self, layout: str) -> None:
        count = self.number(layout)
        if not 0 <= count <= MAX_INTEGER:
            raise CheckpointError(f"its pickle holds an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def container(self, value: Any) -> None:
        self.charge()
        self.push(value)

    def tuple(self, count: int) -> None:
        self.charge()
        if count > len(self.stack):
            raise IndexError
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def fill_list(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def fill_set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(v for v in values if _hashable(v))

    def fill_dict(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise IndexError
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.items
        if isinstance(target, dict):
            target.update(_pairs(zip(values[::2], values[1::2], strict=True)))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.memory:
            raise CheckpointError("its pickle would unfold into far more objects than its size allows")

    def find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if module.partition(".")[0] in _HARMFUL_MODULES or full in _HARMFUL_NAMES or full.startswith(_HARMFUL_PREFIXES):
            raise CheckpointError(
                f"it asks Python to run {full[:80]!r}, which no weights need. Nothing was run. Do not use this file; "
                "tell whoever shared it"
            )
        self.push(Global(full))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str) and max(len(name), len(module)) <= MAX_NAME):
            raise CheckpointError("its pickle names something that is not a name")
        self.find(module, name)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(self.call(function, arguments))

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def call(self, function: Any, arguments: Any) -> Any:
        """What calling a named thing makes: one of our own values, or a record of the call."""
        if not isinstance(arguments, tuple):
            raise CheckpointError("its pickle calls something without a list of arguments")
        self.charge()
        if not isinstance(function, Global):
            return Record(getattr(function, "name", type(function).__name__), arguments)
        if function.name in _COLLECTIONS:
            # Copies what it is given, which one stream may give it many times.
            self.charge(sum(len(a) for a in arguments if isinstance(a, (list, tuple, dict, set))) // 4)
            return _COLLECTIONS[function.name](arguments)
        made = self.calls.get(function.name)
        return Record(function.name, arguments) if made is None else made(*arguments)

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state


def _pairs(pairs: Iterable[Any]) -> dict:
    return {p[0]: p[1] for p in pairs if isinstance(p, tuple) and len(p) == 2 and _hashable(p[0])}


def _make_dict(arguments: tuple) -> dict:
    source = arguments[-1] if arguments else ()
    if isinstance(source, dict):
        return dict(source)
    return _pairs(tuple(p) if isinstance(p, list) else p for p in source) if isinstance(source, (list, tuple)) else {}


def _make_set(arguments: tuple) -> set:
    source = arguments[0] if arguments else ()
    return {v for v in source if _hashable(v)} if isinstance(source, (list, tuple, set)) else set()


def _make_sequence(kind: type) -> Callable[[tuple], Any]:
    def make(arguments: tuple) -> Any:
        return kind(arguments[0]) if arguments and isinstance(arguments[0], (list, tuple)) else kind()

    return make


_COLLECTIONS: dict[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": _make_dict,
    "torch.Size": _make_sequence(tuple),
}
for _module in ("builtins", "__builtin__"):
    _COLLECTIONS |= {
        f"{_module}.dict": _make_dict,
        f"{_module}.set": _make_set,
        f"{_module}.frozenset": _make_set,
        f"{_module}.list": _make_sequence(list),
        f"{_module}.tuple": _make_sequence(tuple),
    }

_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    ord(code): operation
    for code, operation in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME: a hint for readers of streams
        "(": _Machine.mark,
        "0": _Machine.pop,
        "1": _Machine.pop_mark,
        "2": lambda m: m.push(m.stack[-1]),  # DUP
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(m.number("<i")),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "\x8a": lambda m: m.integer("<B"),  # LONG1
        "\x8b": lambda m: m.integer("<i"),  # LONG4
        "G": lambda m: m.push(m.number(">d")),
        "X": lambda m: m.text("<I"),
        "\x8c": lambda m: m.text("<B"),
        "\x8d": lambda m: m.text("<Q"),
        "T": lambda m: m.text("<i", "latin-1"),  # BINSTRING: Python 2's text
        "U": lambda m: m.text("<B", "latin-1"),
        "B": lambda m: m.push(bytes(m.chunk("<I"))),
        "C": lambda m: m.push(bytes(m.chunk("<B"))),
        "\x8e": lambda m: m.push(bytes(m.chunk("<Q"))),
        "]": lambda m: m.container([]),
        ")": lambda m: m.push(()),
        "}": lambda m: m.container({}),
        "\x8f": lambda m: m.container(set()),
        "a": lambda m: m.fill_list([m.stack.pop()]),
        "e": lambda m: m.fill_list(m.pop_mark()),
        "s": lambda m: m.fill_dict([m.stack.pop(-2), m.stack.pop()]),
        "u": lambda m: m.fill_dict(m.pop_mark()),
        "\x90": lambda m: m.fill_set(m.pop_mark()),  # ADDITEMS
        "\x91": lambda m: m.container(_make_set((m.pop_mark(),))),  # FROZENSET
        "t": lambda m: m.container(tuple(m.pop_mark())),
        "\x85": lambda m: m.tuple(1),
        "\x86": lambda m: m.tuple(2),
        "\x87": lambda m: m.tuple(3),
        "l": lambda m: m.container(m.pop_mark()),
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
        "h": lambda m: m.push(m.memo[m.number("<B")]),
        "j": lambda m: m.push(m.memo[m.number("<I")]),
        "c": lambda m: m.find(m.line(), m.line()),
        "\x93": _Machine.stack_global,
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,  # NEWOBJ
        "\x92": _Machine.new_with_keywords,  # NEWOBJ_EX
        "b": _Machine.build,
        "Q": lambda m: m.push(m.persistent(m.stack.pop())),
    }.items()
}


def unpickle(
    stream: memoryview,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] = lambda identifier: None,
) -> tuple[Any, int]:
    """The value that a pickle stream describes, and the number of bytes it took.

    calls: what to make where the stream calls something of that name ("torch._utils._rebuild_tensor_v2"); collections
    are built in, every other call gives a `Record`. persistent: what to make of a persistent id.
    Raises CheckpointError for anything malformed, harmful or absurdly large.
    """
    machine = _Machine(stream, calls or {}, persistent)
    try:
        return machine.run(), machine.position
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error, UnicodeError) as error:
        raise CheckpointError(
            f"its pickle is malformed near byte {machine.position} ({type(error).__name__})"
        ) from None
