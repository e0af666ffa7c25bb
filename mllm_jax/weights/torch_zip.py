"""The directory of an uncompressed zip archive, as `torch.save` writes it, checked entry by entry.

Layout and names of the records: PKWARE's APPNOTE.TXT, sections 4.3.6 to 4.3.16. An archive lists its entries at its
end; each entry has a header of its own as well, and the two must agree. Entries must not overlap: otherwise a small
file could hold a thousand large tensors, or one that changes with another.
"""

import struct
from typing import NamedTuple

from mllm_jax.places import Bytes
from mllm_jax.weights.errors import brief

END = struct.Struct("<4s4H2LH")  # of the central directory
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
MAX_COMMENT = 2**16
PADDING = 160  # at least what an entry may have of it, with the 64-bit sizes
ENTRIES = 2**18  # storages and a handful more
DIRECTORY_BYTES = 64 * 2**20
ENCRYPTED, SIZES_FOLLOW = 1, 8  # flags
FULL = 0xFFFFFFFF  # the number stands in the 64-bit extra field


class ZipError(Exception):
  """What is wrong with an archive."""


class Entry(NamedTuple):
  """One entry: its bytes stand from `start` to `stop` of the file."""

  name: str
  start: int
  stop: int
  crc: int
  header: int  # where its own header starts


class Listed(NamedTuple):
  """One entry as the central directory lists it."""

  name: bytes
  flags: int
  crc: int
  size: int
  header: int


def entries(source: Bytes) -> dict[str, Entry]:
  """All entries of an archive by name. Raises ZipError."""
  start, stop, count = directory(source)
  if count > ENTRIES or stop - start > DIRECTORY_BYTES:
    most = f"{ENTRIES} in {DIRECTORY_BYTES}"
    raise ZipError(f"it lists {count} entries in {stop - start} bytes, and {most} are the most that is read")
  content = source.view(start, stop).tobytes()
  found: dict[str, Entry] = {}
  position = 0
  for _ in range(count):
    listed, position = read_listed(content, position)
    entry = locate(source, listed, start)
    if entry.name in found:
      raise ZipError(f"the entry {brief(entry.name)} stands there twice")
    found[entry.name] = entry
  if position != len(content):
    raise ZipError(f"its directory has {len(content) - position} bytes more than its {count} entries need")
  check_apart(found)
  return found


def directory(source: Bytes) -> tuple[int, int, int]:
  """Where the central directory starts and stops, and how many entries it lists."""
  tail_start = max(0, source.size - END.size - MAX_COMMENT)
  tail = source.view(tail_start, source.size).tobytes()
  place = tail.rfind(b"PK\x05\x06")
  if place < 0 or place + END.size > len(tail):
    raise ZipError("it is cut off: its end, where a zip archive lists what it holds, is missing")
  _, disk, first_disk, here, count, size, start, comment = END.unpack_from(tail, place)
  if place + END.size + comment != len(tail) or disk or first_disk or here != count:
    raise ZipError("its end is not that of a whole zip archive")
  stop = tail_start + place
  if place >= LOCATOR64.size and tail[place - LOCATOR64.size :][:4] == b"PK\x06\x07":
    short = count, size, start
    count, size, start, stop = directory64(source, stop - LOCATOR64.size)
    for number, told, full in zip((count, size, start), short, (0xFFFF, FULL, FULL)):
      if told not in (number, full):
        raise ZipError(f"its two ends disagree: {told} and {number}")
  if start + size != stop:
    raise ZipError(f"its directory of {size} bytes at byte {start} does not end at byte {stop}, where it should")
  return start, stop, count


def directory64(source: Bytes, locator: int) -> tuple[int, int, int, int]:
  """Count, size, start and stop of the central directory by the 64-bit end that torch always writes."""
  _, disk, end, disks = LOCATOR64.unpack(source.view(locator, locator + LOCATOR64.size).tobytes())
  if disk or disks > 1 or end + END64.size != locator:
    raise ZipError("its 64-bit end does not stand where it says")
  mark, length, *_, here, count, size, start = END64.unpack(source.view(end, end + END64.size).tobytes())
  if mark != b"PK\x06\x06" or length != END64.size - 12 or here != count:
    raise ZipError("its 64-bit end is damaged")
  return count, size, start, end


def read_listed(content: bytes, position: int) -> tuple[Listed, int]:
  """One entry of the central directory, and where the next one starts."""
  if position + CENTRAL.size > len(content):
    raise ZipError("its directory is cut off")
  mark, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, disk, _, _, header = CENTRAL.unpack_from(
    content, position
  )
  position += CENTRAL.size
  end = position + name + extra + comment
  if mark != b"PK\x01\x02" or end > len(content) or disk:
    raise ZipError("its directory is damaged")
  title = content[position : position + name]
  if flags & ENCRYPTED or method:
    what = "encrypted" if flags & ENCRYPTED else "compressed"
    raise ZipError(f"the entry {brief(title.decode('utf-8', 'replace'))} is {what}, which torch.save never does")
  fields = content[position + name : position + name + extra]
  size, packed, header = in_64_bits(fields, size, packed, header)
  if size != packed:
    raise ZipError(f"the entry {brief(title.decode('utf-8', 'replace'))} has two sizes, {size} and {packed}")
  return Listed(title, flags, crc, size, header), end


def in_64_bits(fields: bytes, *numbers: int) -> list[int]:
  """The numbers, with those that do not fit 32 bits replaced by their values in the extra field of id 1."""
  wide = extra_field(fields) if FULL in numbers else b""
  values = []
  for number in numbers:
    if number == FULL:
      if len(wide) < 8:
        raise ZipError("a 64-bit size in its directory is missing")
      number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
    values.append(number)
  return values


def extra_field(fields: bytes) -> bytes:
  """The content of the extra field of id 1, b"" without one."""
  position = 0
  while position + 4 <= len(fields):
    kind, length = struct.unpack_from("<HH", fields, position)
    if kind == 1:
      return fields[position + 4 : position + 4 + length]
    position += 4 + length
  return b""


def locate(source: Bytes, listed: Listed, limit: int) -> Entry:
  """Where an entry's bytes are, by its own header, which must agree with the list; `limit`: where the list starts."""
  try:
    name = listed.name.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ZipError(f"the name {listed.name[:80]!r} of an entry is not UTF-8") from error
  position = listed.header + LOCAL.size
  if position > limit:
    raise ZipError(f"the entry {brief(name)} should start at byte {listed.header}, beyond the end")
  # The name and torch's padding with it, in one go: of a remote file each range is a request.
  own = source.view(listed.header, min(limit, position + len(listed.name) + PADDING)).tobytes()
  mark, _, flags, method, _, _, crc, packed, size, length, extra = LOCAL.unpack_from(own)
  if mark != b"PK\x03\x04":
    raise ZipError(f"the entry {brief(name)} has no header at byte {listed.header}, where the directory says")
  start = position + length + extra
  if start + listed.size > limit:
    raise ZipError(f"the entry {brief(name)} of {listed.size} bytes is cut off")
  own = source.view(position, start).tobytes()
  if FULL in (size, packed):
    size, packed = in_64_bits(own[length:], size, packed)
  # An entry written in one go has its size and checksum behind it, and may have zeros in its header.
  zero = 0 if flags & SIZES_FOLLOW else listed.size
  sizes = all(number in (zero, listed.size) for number in (size, packed))
  checksum = crc == listed.crc or (crc == 0 and flags & SIZES_FOLLOW)
  if own[:length] != listed.name or method or flags & ENCRYPTED or not sizes or not checksum:
    raise ZipError(f"the entry {brief(name)} has another name, size or form in its own header than in the directory")
  return Entry(name, start, start + listed.size, listed.crc, listed.header)


def check_apart(found: dict[str, Entry]) -> None:
  """Raises ZipError where entries overlap."""
  ordered = sorted(found.values(), key=lambda entry: entry.header)
  for before, entry in zip(ordered, ordered[1:]):
    if before.stop > entry.header:
      raise ZipError(f"the entries {brief(before.name)} and {brief(entry.name)} overlap at byte {entry.header}")
