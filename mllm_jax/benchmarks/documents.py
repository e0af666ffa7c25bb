"""Text in pictures: DocVQA, ChartQA, OCRBench."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.benchmarks.prompts import SHORT
from mllm_jax.benchmarks.question import Benchmark, File, Question, Result, Summary, by_category, percent
from mllm_jax.benchmarks.scorers.texts import anls, ocrbench_match, relaxed_match
from mllm_jax.benchmarks.source import Source, as_list
from mllm_jax.benchmarks.vqa import write_json

DOCVQA = {
  split: File(f"DocVQA/DocVQA/{split}-*.parquet", "lmms-lab/DocVQA on Hugging Face") for split in ("validation", "test")
}
CHARTQA = File("ChartQA/**/test-*.parquet", "lmms-lab/ChartQA on Hugging Face")
OCRBENCH = File("OCRBench/**/test-*.parquet", "echo840/OCRBench on Hugging Face")
WITH_SHORT = "question + short answer"


def read_docvqa(source: Source, split: str) -> list[Question]:
  return [
    Question(
      str(row["questionId"]),
      row["question"] + SHORT,
      (row["image"],),
      as_list(row["answers"]) if split == "validation" else None,
      ", ".join(as_list(row.get("question_types") or [])),
    )
    for row in source.parquet(DOCVQA[split])
  ]


def submit_docvqa(results: Sequence[Result], source: Source, folder: Path) -> Path:
  content = [{"questionId": int(result.question.id), "answer": result.answer} for result in results]
  return write_json(content, folder / "docvqa_test.json")


def read_chartqa(source: Source) -> list[Question]:
  return [
    Question(str(number), row["question"] + SHORT, (row["image"],), row["answer"], row["type"].removesuffix("_test"))
    for number, row in enumerate(source.parquet(CHARTQA))
  ]


def summarise_chartqa(results: Sequence[Result]) -> Summary:
  """ANLS stands beside the relaxed accuracy: with it LLaVA-UHD v2's released script scores ChartQA."""
  similar = 100 * statistics.fmean(anls(result.answer, [result.question.gold]) for result in results)
  return Summary(percent(results), {"ANLS": similar}, by_category(results))


def read_ocrbench(source: Source) -> list[Question]:
  return [
    Question(
      str(number),
      row["question"],
      (row["image"],),
      as_list(row["answer"]),
      row["question_type"],
      {"formula": row["dataset"] == "HME100k"},
    )
    for number, row in enumerate(source.parquet(OCRBENCH))
  ]


def summarise_ocrbench(results: Sequence[Result]) -> Summary:
  """How many answers are right, of 1,000; the share of each kind in percent."""
  return Summary(sum(result.credit for result in results), categories=by_category(results))


BENCHMARKS = (
  Benchmark(
    "docvqa",
    "DocVQA val",
    "ANLS",
    WITH_SHORT,
    (DOCVQA["validation"],),
    lambda source: read_docvqa(source, "validation"),
    lambda question, answer: anls(answer, question.gold),
  ),
  Benchmark(
    "docvqa_test",
    "DocVQA test",
    "none here; a file for its server",
    WITH_SHORT,
    (DOCVQA["test"],),
    lambda source: read_docvqa(source, "test"),
    submission=submit_docvqa,
  ),
  Benchmark(
    "chartqa",
    "ChartQA test",
    "relaxed accuracy",
    WITH_SHORT,
    (CHARTQA,),
    read_chartqa,
    lambda question, answer: float(relaxed_match(answer, question.gold)),
    summarise_chartqa,
  ),
  Benchmark(
    "ocrbench",
    "OCRBench",
    "right answers of 1,000",
    "question",
    (OCRBENCH,),
    read_ocrbench,
    lambda question, answer: float(ocrbench_match(answer, question.gold, question.facts["formula"])),
    summarise_ocrbench,
    full=1000,
    max_new_tokens=1024,
  ),
)
