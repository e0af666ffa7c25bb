"""MMBench, English and Chinese: dev with CircularEval and in one pass, test as a file for its server."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.benchmarks.choices import letter_credit
from mllm_jax.benchmarks.prompts import LETTER, LETTER_CN, LETTERS, options_of, with_options
from mllm_jax.benchmarks.question import Benchmark, File, Question, Result, Summary, by_category, grouped, percent
from mllm_jax.benchmarks.source import Source

ROUND = 1_000_000  # indices of a question's further rounds are higher by multiples of it
LEFT_OUT = {"hint", "category", "source", "image", "comment", "l2-category"}  # of the server's file, as LLaVA does
ORIGIN = "MMBench (open-compass/MMBench)"
FILES = {
  "en_dev": File("mmbench/mmbench_dev_20230712.tsv", ORIGIN),
  "cn_dev": File("mmbench_cn/mmbench_dev_cn_20231003.tsv", ORIGIN),
  "en_test": File("mmbench/mmbench_test_en_20231003.tsv", ORIGIN),
  "cn_test": File("mmbench_cn/mmbench_test_cn_20231003.tsv", ORIGIN),
}


def read(source: Source, split: str) -> list[Question]:
  """The questions in all rounds: those of the file or, for a dev file without any, made here."""
  rows = source.tsv(FILES[split])
  questions = [_question(row, split) for row in rows]
  if split.endswith("dev") and all(int(row["index"]) < ROUND for row in rows):
    made = (_question(turned, split) for row in rows for turned in turns(row))
    return [*questions, *made]
  return questions


def turns(row: dict) -> list[dict]:
  """A question's further rounds: the options move up a place in each, and the gold letter with them."""
  options, gold = options_of(row), LETTERS.index(row["answer"])
  rounds = []
  for step in range(1, len(options)):
    moved = dict(zip(LETTERS, options[step:] + options[:step]))
    answer, index = LETTERS[(gold - step) % len(options)], str(int(row["index"]) + step * ROUND)
    rounds.append(row | moved | {"answer": answer, "index": index})
  return rounds


def _question(row: dict, split: str) -> Question:
  hint, options = (row.get("hint") or "").strip(), options_of(row)
  hint = "" if hint.lower() in ("nan", "none") else hint
  asked = f"{hint}\n{row['question']}" if hint else row["question"]
  prompt = with_options(asked, options, LETTER_CN if split.startswith("cn") else LETTER)
  kept = {name: cell for name, cell in row.items() if name not in LEFT_OUT}
  facts = {"options": options, "row": kept}
  gold = row.get("answer") if split.endswith("dev") else None
  return Question(row["index"], prompt, (row["image"],), gold, row.get("category") or "", facts)


def circular(results: Sequence[Result]) -> float:
  """The share of questions that are answered right in all of their rounds, in percent."""
  rounds = grouped(results, lambda result: int(result.question.id) % ROUND).values()
  return 100 * statistics.fmean(all(result.credit for result in group) for group in rounds)


def summarise(results: Sequence[Result]) -> Summary:
  first = [result for result in results if int(result.question.id) < ROUND]
  details = {"one pass": percent(first)} if first else {}
  return Summary(circular(results), details, by_category(results, circular))


def submit(results: Sequence[Result], source: Source, folder: Path, name: str) -> Path:
  """The file's rows in their order with a column of predictions behind the options, as the server wants them."""
  import openpyxl
  from openpyxl.cell import WriteOnlyCell

  book = openpyxl.Workbook(write_only=True)
  sheet = book.create_sheet()
  before = ["index", "question", "A", "B", "C", "D"]
  columns = before + [column for column in results[0].question.facts["row"] if column not in before]
  sheet.append([*columns[:6], "prediction", *columns[6:]])
  for result in results:
    cells = [result.question.facts["row"].get(column) for column in columns]
    cells[0] = int(cells[0])
    cells = [WriteOnlyCell(sheet, _allowed(cell)) for cell in [*cells[:6], result.answer, *cells[6:]]]
    for cell in cells[1:]:
      cell.data_type = "s"  # "=..." would be a formula
    sheet.append(cells)
  path = folder / f"{name}.xlsx"
  book.save(path)
  return path


def _allowed(value):
  """What a sheet can hold: control characters, which a model may write, are not allowed in it."""
  if not isinstance(value, str):
    return value
  return "".join(character for character in value if character >= " " or character in "\t\n\r")


def _benchmark(split: str) -> Benchmark:
  language, part = split.split("_")
  name, dev = f"mmbench_{split}", part == "dev"
  return Benchmark(
    name,
    f"MMBench-{language.upper()} {part}",
    "CircularEval; one pass beside it" if dev else "none here; a file for its server",
    "hint + question + options + letter",
    (FILES[split],),
    lambda source: read(source, split),
    letter_credit if dev else None,
    summarise,
    submission=lambda results, source, folder: submit(results, source, folder, name),
    max_new_tokens=1024,
  )


BENCHMARKS = tuple(map(_benchmark, FILES))
