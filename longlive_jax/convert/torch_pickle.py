"""Pickles of `torch.save`, read by an interpreter that can build tensors and plain values only.

No class is looked up, nothing is imported and nothing is called. A name in the pickle is a text;
the few names that tensors need stand in a table, every other one is refused. Sizes, depth and
counts are limited, so that no pickle takes much memory or time.

All errors are `ValueError`s whose text continues a sentence that starts with the file's name.
"""

import pickletools
from collections.abc import Callable, Iterator
from typing import Any

from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_tensor import (
  DTYPES,
  MOST_TEXT,
  STORAGES,
  Name,
  Storage,
  View,
  is_size,
  short,
  sizes,
  storage_of,
  view_of,
)

MOST_BYTES = 1 << 24  # of the pickle; those of real checkpoints are below 1 MiB
MOST_OPCODES = 1_000_000
MOST_TENSORS = 100_000
MOST_VALUES = 500_000  # of the tree; a value that is shared counts each time
MOST_DEPTH = 100

# builder -> fewest and most arguments
BUILDERS = {
  "torch._utils._rebuild_tensor": (4, 4),
  "torch._utils._rebuild_tensor_v2": (6, 7),
  "torch._utils._rebuild_tensor_v3": (7, 8),
  "torch._utils._rebuild_parameter": (3, 3),
  "torch._utils._rebuild_parameter_with_state": (4, 4),
  "collections.OrderedDict": (0, 0),
  "torch.Size": (1, 1),
  "torch.device": (1, 2),
}
KEYS = (str, int, float, bool, type(None))


class Ordered(dict):
  """A dict that was an OrderedDict; `torch.save` gives those of modules a state."""

  __slots__ = ()


class Machine:
  """The state of the interpreter; one method a kind of opcode."""

  def __init__(self, make: Callable[[View], Stored]) -> None:
    self.make = make
    self.stack: list = []
    self.marks: list[int] = []
    self.memo: list = []
    self.tensors = 0

  def pop(self) -> object:
    """The value on top, above the last mark."""
    self.top()
    return self.stack.pop()

  def top(self) -> object:
    """The value on top, which stays."""
    if len(self.stack) <= (self.marks[-1] if self.marks else 0):
      raise ValueError("has a damaged pickle: a value is missing")
    return self.stack[-1]

  def pop_mark(self) -> list:
    """All values above the last mark, which goes."""
    if not self.marks:
      raise ValueError("has a damaged pickle: a mark is missing")
    start = self.marks.pop()
    values = self.stack[start:]
    del self.stack[start:]
    return values

  def pop_many(self, count: int) -> tuple:
    """The last `count` values, in the order in which they came."""
    return tuple(reversed([self.pop() for _ in range(count)]))

  def put(self, index: int) -> None:
    """Remembers the value on top."""
    value = self.top()
    if index > len(self.memo):
      raise ValueError(f"has a damaged pickle: {index} is remembered after {len(self.memo)}")
    self.memo[index : index + 1] = [value]

  def get(self, index: int) -> None:
    """Repeats a value that was remembered."""
    if index >= len(self.memo):
      raise ValueError(f"has a damaged pickle: there is no value {index} to repeat")
    self.stack.append(self.memo[index])

  def integer(self, value: int) -> None:
    """An integer of at most 64 bits."""
    if not -(1 << 63) <= value < 1 << 64:
      raise ValueError("has an integer of more than 64 bits")
    self.stack.append(value)

  def append(self, values: list) -> None:
    """Values for the list on top."""
    target = self.top()
    if type(target) is not list:
      raise ValueError("has a damaged pickle: it appends to what is not a list")
    target.extend(values)

  def set_items(self, values: list) -> None:
    """Keys and values, in turn, for the dict on top."""
    target = self.top()
    if not isinstance(target, dict) or len(values) % 2:
      raise ValueError("has a damaged pickle: it sets items without a dict, or a key has no value")
    for key, value in zip(values[::2], values[1::2], strict=True):
      if type(key) not in KEYS:
        raise ValueError(f"has a dict with a key of type {short(key)}; it must be a text or number")
      target[key] = value

  def name(self, module: object, name: object) -> None:
    """A name, if tensors need it."""
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError("has a damaged pickle: a name is not a text")
    text = f"{module}.{name}"
    if text not in BUILDERS and text not in STORAGES and text not in DTYPES:
      raise ValueError(f"asks for {short(text)}; only tensors are read from a .pt file")
    self.stack.append(Name(text))

  def build(self) -> None:
    """The state of an OrderedDict, which tells nothing about tensors."""
    state = self.pop()
    if not isinstance(self.top(), Ordered) or not isinstance(state, dict):
      raise ValueError("sets the state of an object; only tensors are read from a .pt file")

  def reduce(self) -> None:
    """What a call of a known name gives."""
    args, called = self.pop(), self.pop()
    if not isinstance(called, Name) or not isinstance(args, tuple):
      raise ValueError("has a damaged pickle: it calls what has no name")
    least, most = BUILDERS.get(called.text, (1, 0))
    if not least <= len(args) <= most:
      raise ValueError(f"calls {short(called.text)} with {len(args)} arguments")
    self.stack.append(self.built(called.text, args))

  def built(self, name: str, args: tuple) -> object:
    """The value of a builder."""
    if name == "collections.OrderedDict":
      return Ordered()
    if name == "torch.Size":
      return sizes(args[0], "size")
    if name == "torch.device":
      kind, index = args[0], args[1] if len(args) > 1 else 0
      if not isinstance(kind, str) or len(kind) > MOST_TEXT or not is_size(index):
        raise ValueError("has a damaged device")
      return kind if len(args) == 1 else f"{kind}:{index}"
    if "_rebuild_parameter" in name:
      if not isinstance(args[0], Stored):
        raise ValueError("has a parameter that is not a tensor")
      return args[0]
    return self.tensor(name, args)

  def tensor(self, name: str, args: tuple) -> Stored:
    """A tensor, from the arguments of a builder of tensors."""
    self.tensors += 1
    if self.tensors > MOST_TENSORS:
      raise ValueError(f"has more than {MOST_TENSORS} tensors")
    has_dtype = name.endswith("_v3")
    metadata = args[6 + has_dtype] if len(args) > 6 + has_dtype else None
    if isinstance(metadata, dict) and any(value is not False for value in metadata.values()):
      raise ValueError("has a tensor that is lazily negated or conjugated; save its resolve_neg()")
    return self.make(view_of(args[:4], args[6] if has_dtype else None))


OPCODES: dict[str, Callable[[Machine, Any], None]] = {
  "FRAME": lambda machine, arg: None,
  "MARK": lambda machine, arg: machine.marks.append(len(machine.stack)),
  "NONE": lambda machine, arg: machine.stack.append(None),
  "NEWTRUE": lambda machine, arg: machine.stack.append(True),
  "NEWFALSE": lambda machine, arg: machine.stack.append(False),
  "EMPTY_TUPLE": lambda machine, arg: machine.stack.append(()),
  "EMPTY_LIST": lambda machine, arg: machine.stack.append([]),
  "EMPTY_DICT": lambda machine, arg: machine.stack.append({}),
  "TUPLE": lambda machine, arg: machine.stack.append(tuple(machine.pop_mark())),
  "TUPLE1": lambda machine, arg: machine.stack.append(machine.pop_many(1)),
  "TUPLE2": lambda machine, arg: machine.stack.append(machine.pop_many(2)),
  "TUPLE3": lambda machine, arg: machine.stack.append(machine.pop_many(3)),
  "APPEND": lambda machine, arg: machine.append([machine.pop()]),
  "APPENDS": lambda machine, arg: machine.append(machine.pop_mark()),
  "SETITEM": lambda machine, arg: machine.set_items([*machine.pop_many(2)]),
  "SETITEMS": lambda machine, arg: machine.set_items(machine.pop_mark()),
  "MEMOIZE": lambda machine, arg: machine.put(len(machine.memo)),
  "GLOBAL": lambda machine, arg: machine.name(*arg.split(" ", 1)),
  "STACK_GLOBAL": lambda machine, arg: machine.name(*machine.pop_many(2)),
  "BINPERSID": lambda machine, arg: machine.stack.append(storage_of(machine.pop())),
  "REDUCE": lambda machine, arg: machine.reduce(),
  "BUILD": lambda machine, arg: machine.build(),
}
OPCODES |= dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), Machine.integer)
OPCODES |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine.put)
OPCODES |= dict.fromkeys(("BINGET", "LONG_BINGET"), Machine.get)
OPCODES |= dict.fromkeys(
  ("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
  lambda machine, arg: machine.stack.append(arg),
)


def load_pickle(data: bytes, make: Callable[[View], Stored]) -> object:
  """Reads a pickle that `torch.save` wrote.

  Args:
    data: the whole pickle.
    make: gives the tensor of a view; raises ValueError where its storage is not as it says.

  Returns:
    Nested dicts, lists and tuples of tensors, texts, numbers, booleans and None; nothing in them
    is shared except tensors. Devices are texts ("cuda:0"), and so are dtypes ("torch.bfloat16").

  Raises:
    ValueError: it is damaged, too large, or asks for anything else.
  """
  if len(data) > MOST_BYTES:
    raise ValueError(f"has a pickle of {len(data)} bytes; at most {MOST_BYTES} are read")
  machine, end = Machine(make), 0
  for count, (opcode, arg, at) in enumerate(operations(data)):
    if count >= MOST_OPCODES:
      raise ValueError(f"has a pickle of more than {MOST_OPCODES} opcodes")
    if opcode == "STOP":
      end = at + 1
    elif opcode == "PROTO":
      if at or not 2 <= arg <= 5:
        raise ValueError(f"has a pickle of protocol {arg} at byte {at}; it must be 2 to 5 at 0")
    elif opcode in OPCODES:
      OPCODES[opcode](machine, arg)
    else:
      raise ValueError(f"uses the pickle opcode {opcode}; only tensors are read from a .pt file")
  value = machine.pop()
  if machine.stack or machine.marks or end != len(data):
    raise ValueError("has a damaged pickle: something is left at its end")
  return plain(value)


def operations(data: bytes) -> Iterator[tuple[str, Any, int]]:
  """Yields (name, argument, position) of the opcodes."""
  last = 0
  try:
    for opcode, arg, at in pickletools.genops(data):
      last = at or 0
      yield opcode.name, arg, last
  except ValueError:
    raise ValueError(f"has a pickle that is damaged or cut short after byte {last}") from None


def plain(value: object) -> object:
  """A tree of its own, without names, without cycles, of bounded depth and size."""
  seen = 0

  def copy(value: Any, depth: int) -> Any:
    nonlocal seen
    seen += 1
    if seen > MOST_VALUES:
      raise ValueError(f"has more than {MOST_VALUES} values")
    if depth > MOST_DEPTH:
      raise ValueError(f"is nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
      return {key: copy(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return type(value)([copy(item, depth + 1) for item in value])
    if isinstance(value, Name) and value.text in DTYPES:
      return value.text
    if isinstance(value, Name | Storage):
      text = value.text if isinstance(value, Name) else value.key
      raise ValueError(f"holds {short(text)} where a tensor or a value belongs")
    return value

  return copy(value, 0)
