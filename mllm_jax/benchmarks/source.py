"""Source: the published files below one folder, read as they are published."""

import ast
import base64
import csv
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.benchmarks.question import Benchmark, File, Picture
from mllm_jax.data.records import DataError

csv.field_size_limit(2**31 - 1)  # a cell of a TSV file holds a whole picture


@dataclasses.dataclass(frozen=True)
class Source:
  """root: the folder of --data. padded: whether the model sees pictures padded to a square, so that the coordinates it
  says are the square's."""

  root: Path
  padded: bool = True

  def paths(self, file: File) -> list[Path]:
    """The file, or those that a pattern finds, sorted. Raises DataError where there is none."""
    found = [self.root / file.pattern] if "*" not in file.pattern else sorted(self.root.glob(file.pattern))
    found = [path for path in found if (path.is_dir() if file.pattern.endswith("/") else path.is_file())]
    if not found:
      raise DataError(missing(self.root, [file]))
    return found

  def json(self, file: File) -> Any:
    """The content of a JSON file. Raises DataError where it cannot be read."""
    (path,) = self.paths(file)
    try:
      return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
      raise DataError(f"{path} is not JSON ({error}); get it again: {file.origin}") from error

  def jsonl(self, file: File) -> list[dict]:
    """The objects of a file with one on each line. Raises DataError that names the line."""
    (path,) = self.paths(file)
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
      for number, line in enumerate(lines, start=1):
        try:
          rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
          raise DataError(f"{path}, line {number} is not JSON ({error}); get it again: {file.origin}") from error
    return rows

  def csv(self, file: File) -> list[dict[str, str]]:
    """The rows of a comma-separated file by the names of its columns."""
    (path,) = self.paths(file)
    with path.open(encoding="utf-8-sig", newline="") as lines:
      return list(csv.DictReader(lines))

  def tsv(self, file: File) -> list[dict[str, Any]]:
    """The rows of a tab-separated file; `image`, base64, becomes a Picture that is read again when it is asked for.

    A cell that is the index of another row stands for that row's picture, as in VLMEvalKit's files.
    """
    rows, places, shown = [], {}, []
    for path in self.paths(file):
      for offset, row in _tsv_rows(path):
        shown.append(cell if len(cell := row.pop("image", "")) <= 64 else row["index"])
        places[row["index"]] = (path, offset)
        rows.append(row)
    name = lambda row: f"{file.pattern}, index {row['index']}"
    whose = [other if other in places else row["index"] for row, other in zip(rows, shown)]
    return [row | {"image": _tsv_picture(*places[index], name(row))} for row, index in zip(rows, whose)]

  def parquet(self, file: File, pictures: Sequence[str] = ("image",)) -> list[dict[str, Any]]:
    """The rows of parquet files; the columns in `pictures` become Pictures, read when they are asked for, or None."""
    import pyarrow.parquet

    rows = []
    for path in self.paths(file):
      opened = pyarrow.parquet.ParquetFile(path)
      held = [name for name in pictures if name in opened.schema_arrow.names]
      plain = [name for name in opened.schema_arrow.names if name not in held]
      for group in range(opened.num_row_groups):
        for number, row in enumerate(opened.read_row_group(group, columns=plain).to_pylist()):
          name = f"{path}, row {len(rows)}"
          rows.append(row | {column: _parquet_picture(path, group, column, number, name) for column in held})
    return rows

  def picture(self, folder: File, name: str) -> Picture:
    """A file of a folder."""
    return Picture(str(self.root / folder.pattern / name))


def missing(root: Path, files: Sequence[File]) -> str:
  """What is not there, where it is published and where it belongs."""
  lines = [f"\n  {os.path.join(root, file.pattern)}\n    published: {file.origin}" for file in files]
  return f"missing below --data {root}:{''.join(lines)}"


def check(benchmark: Benchmark, source: Source) -> None:
  """Raises DataError that names all of the benchmark's files that are not there."""
  absent = []
  for file in benchmark.files:
    try:
      source.paths(file)
    except DataError:
      absent.append(file)
  if absent:
    raise DataError(f"{benchmark.name}: {missing(source.root, absent)}")


def check_pictures(benchmark: Benchmark, questions: Sequence) -> None:
  """Raises DataError where a question's picture is a file that is not there."""
  names = {picture.name for question in questions for picture in question.images if picture.content is None}
  absent = sorted(name for name in names if not os.path.isfile(name))
  if absent:
    raise DataError(f"{benchmark.name}: {len(absent)} of {len(names)} pictures are missing, the first is {absent[0]}")


def as_list(value: Any) -> list:
  """A list that a file may have stored as its text, "['a', 'b']"."""
  return list(ast.literal_eval(value)) if isinstance(value, str) else list(value)


def decode_picture(cell: str | bytes | Mapping[str, Any], name: str) -> bytes:
  """The encoded bytes of a picture as parquet files hold it: {"bytes": ...}, bytes, or base64. Raises DataError."""
  if isinstance(cell, Mapping):
    cell = cell.get("bytes")
  try:
    return base64.b64decode(cell, validate=True) if isinstance(cell, str) else bytes(cell)
  except (TypeError, ValueError) as error:
    raise DataError(f"{name}: its picture cannot be decoded ({error}); get the file again") from error


def _tsv_rows(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, str]]]:
  """(where a row begins in the file, the row), from the place `start` on; 0 is the first row."""
  with path.open("rb") as file:
    header = next(csv.reader([file.readline().decode("utf-8-sig")], delimiter="\t"))
    file.seek(start or file.tell())
    rows = csv.reader((line.decode("utf-8") for line in iter(file.readline, b"")), delimiter="\t")
    while True:
      offset = file.tell()
      row = next(rows, None)
      if row is None:
        return
      if row:
        yield offset, dict(zip(header, row))


def _tsv_picture(path: Path, offset: int, name: str) -> Picture:
  return Picture(name, lambda: decode_picture(next(_tsv_rows(path, offset))[1]["image"], name))


def _parquet_picture(path: Path, group: int, column: str, number: int, name: str) -> Picture | None:
  return Picture(name, lambda: decode_picture(_parquet_column(path, group, column)[number].as_py(), name))


@functools.lru_cache(maxsize=2)  # questions are asked in the file's order
def _parquet_column(path: Path, group: int, column: str):
  import pyarrow.parquet

  return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column])[column]
