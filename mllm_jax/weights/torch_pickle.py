"""Reading the pickles of `torch.save`, without torch and without running anything they say.

Python's own unpickler calls what a pickle names, and sizes its tables by numbers in the file. Here pickletools only
reads the arguments of opcodes, and a small stack machine knows those that describe dictionaries of tensors. A name in a
pickle is compared with the few of tensors and never imported; everything else is refused by its name.
"""

import dataclasses
import pickletools

import ml_dtypes
import numpy as np

from mllm_jax.places import Bytes
from mllm_jax.weights.errors import brief

STORAGE_DTYPES = {
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "DoubleStorage": np.float64,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# Types younger than torch's typed storages: their storages count bytes, and the tensor names the type.
TENSOR_DTYPES = {
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "float8_e5m2": ml_dtypes.float8_e5m2,
  "uint16": np.uint16,
  "uint32": np.uint32,
  "uint64": np.uint64,
}
# A tensor takes about 150 bytes and 50 opcodes. An opcode of one byte can take a hundred bytes of memory.
PICKLE_BYTES = 64 * 2**20
OPCODES = 4_000_000
CHUNK_BYTES = 2**20
ONLY_TENSORS = (
  "only plain dictionaries of tensors are read, so save it again as `torch.save(model.state_dict(), path)` or as "
  "safetensors"
)


class Refused(Exception):
  """What a pickle asks for that is no part of a tensor, or where it is damaged, and the remedy."""

  def __init__(self, message: str, remedy: str = ONLY_TENSORS):
    super().__init__(message)
    self.remedy = remedy


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
  """A function or class that a pickle may call; the machine knows what to do instead."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class StorageType:
  """The class of a storage; an untyped one counts bytes."""

  dtype: np.dtype
  typed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TensorType:
  """A type of torch's own, such as torch.float8_e4m3fn."""

  dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
  """A storage as a pickle describes it: `numel` elements of `type` under `key`."""

  key: str
  type: StorageType
  numel: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor as a pickle describes it. Offset, shape and strides can be anything; they count elements."""

  storage: Storage
  dtype: np.dtype
  offset: object
  shape: object
  strides: object


ORDERED_DICT = Function("collections.OrderedDict")
REBUILD_V2 = Function("torch._utils._rebuild_tensor_v2")
REBUILD_V3 = Function("torch._utils._rebuild_tensor_v3")
PARAMETER = Function("torch._utils._rebuild_parameter")
# By "module name", as pickletools gives the two.
KNOWN = {
  "collections OrderedDict": ORDERED_DICT,
  "torch._utils _rebuild_tensor_v2": REBUILD_V2,
  "torch._utils _rebuild_tensor_v3": REBUILD_V3,
  "torch._utils _rebuild_parameter": PARAMETER,
  "torch.storage UntypedStorage": StorageType(np.dtype(np.uint8), False),
}
KNOWN |= {f"torch {name}": StorageType(np.dtype(dtype), True) for name, dtype in STORAGE_DTYPES.items()}
KNOWN |= {f"torch {name}": TensorType(np.dtype(dtype)) for name, dtype in TENSOR_DTYPES.items()}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STORES = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
FETCHES = ("BINGET", "LONG_BINGET")


class Stream:
  """A file's bytes from `position` on, for pickletools: a megabyte of them at a time, up to `stop`."""

  def __init__(self, source: Bytes, position: int, stop: int):
    self.source, self.position, self.stop = source, position, min(stop, position + PICKLE_BYTES)
    self._start, self._chunk = position, b""

  def tell(self) -> int:
    return self.position

  def read(self, count: int) -> bytes:
    """As many of `count` bytes as there are."""
    count = min(count, self.stop - self.position)
    offset = self.position - self._start
    if offset + count > len(self._chunk):
      end = min(self.stop, self.position + max(count, CHUNK_BYTES))
      self._start, self._chunk, offset = self.position, self.source.view(self.position, end).tobytes(), 0
      self.source.release(self.position, end)
    self.position += count
    return self._chunk[offset : offset + count]

  def readline(self) -> bytes:
    """A line of at most 4096 bytes; names of modules are shorter."""
    start = self.position
    line = self.read(4096)
    end = line.find(b"\n") + 1
    line = line[:end] if end else line
    self.position = start + len(line)
    return line


class Machine:
  """Runs one pickle.

  id_parts: how many parts the description of a storage has: 5 in zip files, 6 in the older format.
  storages: after `run`, the storages that the pickle names, by key.
  """

  def __init__(self, id_parts: int):
    self.id_parts = id_parts
    self.stack: list = []
    self.below: list[list] = []  # the stacks under the marks that are open
    self.memo: dict[int, object] = {}
    self.storages: dict[str, Storage] = {}

  def run(self, stream: Stream):
    """The value that the pickle describes: dictionaries, lists, tuples, numbers, texts, tensors. The stream stands
    behind the pickle then. Raises Refused.
    """
    position = stream.position
    try:
      for _ in range(OPCODES):
        position = stream.position
        opcode = read_opcode(stream)
        if opcode.name == "STOP":
          break
        self.step(opcode.name, read_argument(stream, opcode))
      else:
        raise Refused(f"its pickle has more than {OPCODES} opcodes")
      value = self.pop()
    except Refused as error:
      raise Refused(f"{error} (at byte {position})", error.remedy) from None
    except ValueError as error:  # what pickletools raises
      text = f"its pickle is damaged or cut off at byte {position}: {str(error)[:200]}"
      raise Refused(text, "download it again") from error
    if self.stack or self.below:
      raise Refused("its pickle ends before it is complete")
    return value

  def step(self, name: str, argument) -> None:
    """One opcode."""
    if name in CONSTANTS:
      self.stack.append(CONSTANTS[name])
    elif name in NUMBERS or name in TEXTS:
      self.stack.append(argument)
    elif name in STORES:
      # The memo is a dictionary, so an index from the file costs nothing, however large.
      self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.top()
    elif name in FETCHES:
      if argument not in self.memo:
        raise Refused(f"its pickle fetches value {argument}, which it never stored")
      self.stack.append(self.memo[argument])
    elif name == "MARK":
      self.below.append(self.stack)
      self.stack = []
    elif name in TUPLES:
      self.stack.append(tuple(reversed([self.pop() for _ in range(TUPLES[name])])))
    elif name == "TUPLE":
      items = self.since_mark()
      self.stack.append(tuple(items))
    elif name in HANDLERS:
      HANDLERS[name](self, argument)

  def top(self):
    if not self.stack:
      raise Refused("its pickle takes a value where there is none")
    return self.stack[-1]

  def pop(self):
    self.top()
    return self.stack.pop()

  def since_mark(self) -> list:
    if not self.below:
      raise Refused("its pickle closes a list that it never opened")
    items, self.stack = self.stack, self.below.pop()
    return items

  def new_dict(self, _) -> None:
    self.stack.append({})

  def new_list(self, _) -> None:
    self.stack.append([])

  def append(self, _) -> None:
    self.extend([self.pop()])

  def appends(self, _) -> None:
    self.extend(self.since_mark())

  def extend(self, items: list) -> None:
    if not isinstance(self.top(), list):
      raise Refused(f"its pickle appends to {brief(self.top())}")
    self.stack[-1].extend(items)

  def set_item(self, _) -> None:
    value, key = self.pop(), self.pop()
    self.update([key, value])

  def set_items(self, _) -> None:
    self.update(self.since_mark())

  def update(self, items: list) -> None:
    target = self.top()
    if not isinstance(target, dict) or len(items) % 2:
      raise Refused(f"its pickle puts {len(items)} keys and values into {brief(target)}")
    for key, value in zip(items[::2], items[1::2]):
      # Only keys whose hash is cheap: that of nested tuples can take forever.
      if type(key) not in (str, int):
        raise Refused(f"a dictionary of it has {brief(key)} as a key; texts and whole numbers are read")
      if key in target:
        raise Refused(f"the name {brief(key)} stands twice in a dictionary of it")
      target[key] = value

  def named(self, argument: str) -> None:
    if argument not in KNOWN:
      raise Refused(f"it refers to {show(argument)}, which is no part of a tensor")
    self.stack.append(KNOWN[argument])

  def named_by_stack(self, _) -> None:
    name, module = self.pop(), self.pop()
    if not isinstance(name, str) or not isinstance(module, str):
      raise Refused(f"it refers to {brief(name)} of {brief(module)}")
    self.named(f"{module} {name}")

  def build(self, _) -> None:
    """Modules hang `_metadata` on their dictionary of tensors; it is of no use here and nothing else is let through."""
    state = self.pop()
    if not isinstance(self.top(), dict) or not isinstance(state, dict):
      raise Refused(f"its pickle sets the state of {brief(self.top())} to {brief(state)}")

  def storage(self, _) -> None:
    pid = self.pop()
    if not isinstance(pid, tuple) or not pid or pid[0] != "storage":
      kind = pid[0] if isinstance(pid, tuple) and pid else pid
      raise Refused(f"it refers to {brief(kind)} instead of a storage: a whole model was saved, not its weights")
    if len(pid) != self.id_parts or pid[5:] not in ((), (None,)):
      raise Refused(f"a storage of it is described by {len(pid)} parts, or is a view of another")
    _, kind, key, location, numel = pid[:5]
    texts = isinstance(key, str) and isinstance(location, str)
    if not isinstance(kind, StorageType) or not texts or type(numel) is not int or not 0 <= numel < 2**60:
      raise Refused(f"it describes a storage as {brief(key)} of {brief(kind)} with {brief(numel)} elements")
    storage = self.storages.setdefault(key, Storage(key, kind, numel))
    if storage.type is not kind or storage.numel != numel:
      raise Refused(f"it describes the storage {brief(key)} twice, differently")
    self.stack.append(storage)

  def call(self, _) -> None:
    arguments, function = self.pop(), self.pop()
    if not isinstance(function, Function) or not isinstance(arguments, tuple):
      raise Refused(f"its pickle calls {brief(function)} with {brief(arguments)}")
    self.stack.append(CALLS[function](*self.checked(function, arguments)))

  def checked(self, function: Function, arguments: tuple) -> tuple:
    """The arguments that matter of a call."""
    if function is ORDERED_DICT and not arguments:
      return ()
    if function is PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Tensor):
      return arguments[:1]
    typed = function is REBUILD_V2
    needed = 6 if typed else 7
    if function in (REBUILD_V2, REBUILD_V3) and len(arguments) in (needed, needed + 1):
      storage, dtype = arguments[0], None if typed else arguments[6]
      if isinstance(storage, Storage) and storage.type.typed is typed and (typed or isinstance(dtype, TensorType)):
        # torch marks conjugated and negated tensors so, whose bytes say something else.
        if len(arguments) > needed and arguments[needed] is not None and arguments[needed] != {}:
          raise Refused("a tensor of it has metadata, which changes what its numbers mean")
        return storage, dtype.dtype if dtype else storage.type.dtype, *arguments[1:4]
    raise Refused(f"its pickle calls {function.name} with {len(arguments)} arguments it does not take")


CALLS = {ORDERED_DICT: dict, PARAMETER: lambda tensor: tensor, REBUILD_V2: Tensor, REBUILD_V3: Tensor}
HANDLERS = {
  "EMPTY_DICT": Machine.new_dict,
  "EMPTY_LIST": Machine.new_list,
  "APPEND": Machine.append,
  "APPENDS": Machine.appends,
  "SETITEM": Machine.set_item,
  "SETITEMS": Machine.set_items,
  "GLOBAL": Machine.named,
  "STACK_GLOBAL": Machine.named_by_stack,
  "REDUCE": Machine.call,
  "BUILD": Machine.build,
  "BINPERSID": Machine.storage,
}


OPCODE_NAMES = {*CONSTANTS, *NUMBERS, *TEXTS, *TUPLES, *STORES, *FETCHES, *HANDLERS}
OPCODE_NAMES |= {"PROTO", "FRAME", "MARK", "TUPLE", "STOP"}


def read_opcode(stream: Stream) -> pickletools.OpcodeInfo:
  """The next opcode without its argument. Raises Refused for those that the machine does not know."""
  code = stream.read(1)
  if not code:
    raise Refused("its pickle is damaged or cut off: it ends before its last opcode", "download it again")
  opcode = pickletools.code2op.get(code.decode("latin-1"))
  if opcode is None:
    raise Refused(f"its pickle is damaged: {code[0]:#x} is no opcode", "download it again")
  if opcode.name not in OPCODE_NAMES:
    raise Refused(f"its pickle uses {opcode.name}, which no dictionary of tensors needs")
  return opcode


def read_argument(stream: Stream, opcode: pickletools.OpcodeInfo):
  """The argument of an opcode, None without one."""
  if opcode.name == "GLOBAL":  # pickletools would take backslashes in names for escapes
    module, name = stream.readline(), stream.readline()
    if not module.endswith(b"\n") or not name.endswith(b"\n"):
      raise ValueError("a name without an end")
    return f"{module[:-1].decode('utf-8', 'replace')} {name[:-1].decode('utf-8', 'replace')}"
  return opcode.arg.reader(stream) if opcode.arg else None


def show(name: str) -> str:
  """A "module name" of a pickle for a message."""
  text = name.replace(" ", ".")
  return text if len(text) <= 80 and text.isprintable() else brief(text)
