"""MMMU val: questions with up to seven pictures, of options or open."""

import re

from mllm_jax.benchmarks.prompts import SHORT, with_options
from mllm_jax.benchmarks.question import Benchmark, File, Question
from mllm_jax.benchmarks.scorers.mmmu import choice, open_match
from mllm_jax.benchmarks.source import Source, as_list

MMMU = File("MMMU/**/validation-*.parquet", "lmms-lab/MMMU on Hugging Face")
IMAGE = re.compile(r"<image (\d)>")


def read(source: Source) -> list[Question]:
  """`<image 2>` in a question or an option becomes `<image>`, and its picture stands in that place of the order."""
  questions = []
  for row in source.parquet(MMMU, [f"image_{number}" for number in range(1, 8)]):
    options = as_list(row["options"])
    asked = with_options(row["question"], options) if options else row["question"] + SHORT
    shown = tuple(row[f"image_{number}"] for number in IMAGE.findall(asked))
    gold = row["answer"]
    if not options:
      gold = as_list(gold) if gold.startswith("[") else [gold]
    subject = re.sub(r"^[a-z]+_|_\d+$", "", row["id"]).replace("_", " ")
    questions.append(Question(row["id"], IMAGE.sub("<image>", asked), shown, gold, subject, {"options": options}))
  return questions


def credit(question: Question, answer: str) -> float:
  options = question.facts["options"]
  if options:
    return float(choice(answer, options, question.id) == question.gold)
  return float(open_match(answer, question.gold))


BENCHMARKS = (
  Benchmark(
    "mmmu",
    "MMMU val",
    "accuracy by MMMU's parser",
    "question + options + letter, or question + short answer",
    (MMMU,),
    read,
    credit,
    max_new_tokens=1024,
  ),
)
