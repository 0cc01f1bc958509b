"""Read a pickle without running it.

The pickle format is a small program that calls functions and sets attributes. This reader follows the program but calls
nothing and imports nothing: a function stays a name, a call becomes a `Record` of the name and its arguments. What a
record means is for the caller to decide. Use it for formats that are pickles and that we must still read: the index of
old checkpoints, CIFAR batches.
"""

import pickletools
from typing import Any

MOST_OPCODES = 20_000_000  # a CIFAR batch has some 30,000; an index a hundred for each tensor and process

_CONSTANTS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class PickleError(ValueError):
    """The bytes are no pickle, or a pickle that does more than build plain data and records."""


class Record:
    """A call that was not made, or a global that was not imported (`args` is None then)."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple | None = None):
        self.name = name  # module.name
        self.args: Any = args
        self.state: Any = None  # what BUILD would have set


def read(data: bytes) -> Any:
    """The object in a pickle, of dict, list, tuple, str, bytes, bytearray, int, float, bool, None and `Record`.

    Strings that Python 2 wrote come as str, a character for each byte (latin-1). Raises PickleError.
    """
    try:
        return _run(data)
    except PickleError:
        raise
    except Exception as error:  # damaged bytes make pickletools and the stack raise nearly anything
        raise PickleError(f"not a readable pickle ({type(error).__name__}: {error})"[:200]) from None


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count > MOST_OPCODES:
            raise PickleError(f"more than {MOST_OPCODES} instructions")
        if name in _CONSTANTS:
            stack.append(arg)
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(arg or 0)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(_plain(stack[-size:], size))]
        elif name in ("TUPLE", "LIST", "DICT"):
            items = _above_mark(stack)
            stack.append(_as_dict(items) if name == "DICT" else tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else _above_mark(stack)
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _above_mark(stack)
            _expect(stack[-1], dict).update(_as_dict(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, called = str(arg).split(" ", 1) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
            stack.append(Record(f"{_expect(module, str)}.{_expect(called, str)}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args = _expect(stack.pop(), tuple)
            function = _expect(stack.pop(), Record)
            if function.args is not None:
                raise PickleError(f"it calls what {function.name} returns")
            stack.append(Record(function.name, args))
        elif name == "BINPERSID":  # torch's storages
            stack.append(Record("persistent id", (stack.pop(),)))
        elif name == "BUILD":
            state = stack.pop()
            built = _expect(stack[-1], Record)
            if built.args is None or built.state is not None:
                raise PickleError(f"it sets attributes of {built.name}")
            built.state = state
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            (result,) = _plain(stack, 1)
            return result
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            raise PickleError(f"it uses the instruction {name}")
    raise PickleError("it ends too early")


def _above_mark(stack: list[Any]) -> list[Any]:
    for at in range(len(stack) - 1, -1, -1):
        if stack[at] is _MARK:
            items = stack[at + 1 :]
            del stack[at:]
            return items
    raise PickleError("it closes what it never opened")


def _as_dict(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise PickleError("a key without a value")
    for key in items[::2]:  # no tuples: the hash of nested ones can take forever
        _expect(key, (str, bytes, int, Record))
    return dict(zip(items[::2], items[1::2], strict=True))


def _plain(items: list[Any], count: int) -> list[Any]:
    if len(items) != count or any(item is _MARK for item in items):
        raise PickleError("its stack is out of order")
    return items


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"it holds a {type(value).__name__} where none belongs")
    return value
