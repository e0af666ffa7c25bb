"""What a language model must judge: LLaVA-Bench (In-the-Wild), MM-Vet, MathVista.

LLaVA-Bench is judged with its published instructions, which are one of its files. Those of MM-Vet and MathVista are
part of their authors' programs; here stand others to the same end, so that scores are near the published ones, not
the same. Scores depend on the judge in any case and compare only under one judge.
"""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.benchmarks.prompts import LETTERS
from mllm_jax.benchmarks.question import (
  Benchmark,
  File,
  Judge,
  Question,
  Result,
  Summary,
  by_category,
  grouped,
  percent,
)
from mllm_jax.benchmarks.scorers.texts import edit_distance
from mllm_jax.benchmarks.source import Source
from mllm_jax.benchmarks.vqa import LLAVA, write_json

# ---- LLaVA-Bench (In-the-Wild) ---------------------------------------------------------------------------------------

WILD_ORIGIN = "liuhaotian/llava-bench-in-the-wild on Hugging Face"
WILD = {
  name: File(f"llava-bench-in-the-wild/{name}", WILD_ORIGIN)
  for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images/")
}
WILD_RULE = File("llava-bench-in-the-wild/rule.json", "llava/eval/table/rule.json of LLaVA (haotian-liu/LLaVA)")


def read_wild(source: Source) -> list[Question]:
  contexts = {row["image"]: row["caption"] for row in source.jsonl(WILD["context.jsonl"])}
  references = {row["question_id"]: row["text"] for row in source.jsonl(WILD["answers_gpt4.jsonl"])}
  rules, questions = source.json(WILD_RULE), []
  for row in source.jsonl(WILD["questions.jsonl"]):
    context = contexts[row["image"]]
    facts = {
      "context": context if isinstance(context, str) else "\n".join(context),
      "rule": rules[f"llava_bench_{row['category']}"],
    }
    picture, gold = source.picture(WILD["images/"], row["image"]), references[row["question_id"]]
    questions.append(Question(str(row["question_id"]), row["text"], (picture,), gold, row["category"], facts))
  return questions


def ask_wild(question: Question, answer: str) -> list[dict[str, str]]:
  """The reference is the first answer, the model's the second."""
  role = question.facts["rule"]["role"]
  parts = [("Context", question.facts["context"]), ("Question", question.prompt)]
  text = "".join(f"[{title}]\n{content}\n\n" for title, content in parts)
  for number, given in enumerate((question.gold, answer), start=1):
    text += f"[{role} {number}]\n{given}\n\n[End of {role} {number}]\n\n"
  system = "You check the quality of answers, helpfully and precisely."
  user = f"{text}[System]\n{question.facts['rule']['prompt']}\n\n"
  return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def wild_scores(verdict: str) -> tuple[float, float] | None:
  """(the reference's, the model's) score: the two numbers that a verdict's first line is, else None."""
  try:
    scores = [float(word) for word in verdict.strip().split("\n")[0].replace(",", " ").split()]
  except ValueError:
    return None
  return (scores[0], scores[1]) if len(scores) == 2 else None


def wild_credit(question: Question, verdict: str) -> float | None:
  scores = wild_scores(verdict)
  return None if scores is None else min(1.0, max(0.0, scores[1] / 10))


def summarise_wild(results: Sequence[Result]) -> Summary:
  """The model's scores in percent of the reference's."""

  def relative(group: Sequence[Result]) -> float:
    reference, model = map(sum, zip(*(wild_scores(result.verdict) for result in group)))
    return 100 * model / reference if reference else 0.0

  return Summary(relative(results), categories=by_category(results, relative))


# ---- MM-Vet ----------------------------------------------------------------------------------------------------------

VET_ASKED = File("mm-vet/llava-mm-vet.jsonl", LLAVA)
VET_ANSWERS = File("mm-vet/mm-vet.json", "mm-vet.zip of MM-Vet (yuweihao/MM-Vet)")
VET_PICTURES = File("mm-vet/images/", VET_ANSWERS.origin)
VET_SYSTEM = (
  "You grade answers to questions about pictures against the right answer. In the right answer <AND> joins parts "
  "that must all be there and <OR> parts of which one will do. 1.0 is a right and complete answer, 0.0 a wrong one; an "
  "answer with some of the parts gets as much in between, in steps of 0.1. Wording does not matter. Reply with the "
  "number alone."
)


def read_vet(source: Source) -> list[Question]:
  known = source.json(VET_ANSWERS)
  questions = []
  for row in source.jsonl(VET_ASKED):
    of = known[f"v1_{row['question_id']}"]
    picture, kinds = source.picture(VET_PICTURES, row["image"]), sorted(of["capability"])
    facts = {"capabilities": kinds}
    questions.append(
      Question(f"v1_{row['question_id']}", row["text"], (picture,), of["answer"], "+".join(kinds), facts)
    )
  return questions


def ask_vet(question: Question, answer: str) -> list[dict[str, str]]:
  user = f"Question: {question.prompt}\nRight answer: {question.gold}\nAnswer to grade: {answer}"
  return [{"role": "system", "content": VET_SYSTEM}, {"role": "user", "content": user}]


def vet_credit(question: Question, verdict: str) -> float | None:
  found = re.search(r"(?<![\d.])(?:0?\.\d+|[01](?:\.\d+)?)(?![\d.]*\d)", verdict)
  return float(found[0]) if found and float(found[0]) <= 1 else None


def summarise_vet(results: Sequence[Result]) -> Summary:
  """The mean credit in percent; of each capability that of the questions that need it."""
  names = sorted({name for result in results for name in result.question.facts["capabilities"]})
  needing = lambda name: [result for result in results if name in result.question.facts["capabilities"]]
  return Summary(percent(results), {name: percent(needing(name)) for name in names}, by_category(results))


def submit_vet(results: Sequence[Result], source: Source, folder: Path) -> Path:
  """The answers as MM-Vet's own evaluator takes them."""
  return write_json({result.question.id: result.answer for result in results}, folder / "mm_vet.json")


# ---- MathVista -------------------------------------------------------------------------------------------------------

MATHVISTA = File("MathVista/**/testmini-*.parquet", "AI4Math/MathVista on Hugging Face")
MATH_SYSTEM = (
  "You are given a question, with a hint about the form of its answer, and a reply to it. Say what the reply gives as "
  "its final answer, in that form, and nothing else: no reasoning and no correction. If it gives none, say: none"
)


def read_mathvista(source: Source) -> list[Question]:
  questions = []
  for row in source.parquet(MATHVISTA, ["decoded_image"]):
    facts = {name: row[name] for name in ("choices", "precision", "question_type", "answer_type")}
    task = (row.get("metadata") or {}).get("task") or ""
    questions.append(Question(row["pid"], row["query"], (row["decoded_image"],), row["answer"], task, facts))
  return questions


def ask_mathvista(question: Question, answer: str) -> list[dict[str, str]] | None:
  """Nothing where the reply is already a bare answer, or empty."""
  facts, reply = question.facts, answer.strip()
  bare = {"integer": int, "float": float}.get(facts["answer_type"])
  try:
    settled = bool(bare and [bare(reply)])
  except ValueError:
    settled = False
  if settled or not reply or reply in (facts["choices"] or ()):
    return None
  user = f"Question: {question.prompt}\n\nReply: {answer}"
  return [{"role": "system", "content": MATH_SYSTEM}, {"role": "user", "content": user}]


def mathvista_value(question: Question, extracted: str) -> str | None:
  """What was extracted, in the form of the gold answer; None where it has no such form.

  Of choices a letter or the text that differs least, as in MathVista's evaluation; an integer without what is behind
  the point; a float with the question's number of digits.
  """
  facts, text = question.facts, extracted.strip()
  if facts["question_type"] == "multi_choice":
    choices = list(facts["choices"])
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", text) or re.search(r"\(([A-Za-z])\)", text)
    if letter and letter[1].upper() in LETTERS[: len(choices)]:
      return choices[LETTERS.index(letter[1].upper())]
    return min(choices, key=lambda choice: edit_distance(text, choice)) if text else None
  try:
    if facts["answer_type"] == "integer":
      return str(int(float(text)))
    if facts["answer_type"] == "float":
      return str(round(float(text), int(facts["precision"])))
  except (ValueError, OverflowError):
    return None
  return text


def mathvista_credit(question: Question, verdict: str) -> float:
  return float(mathvista_value(question, verdict) == question.gold)


def summarise_mathvista(results: Sequence[Result]) -> Summary:
  types = grouped(results, lambda result: result.question.facts["question_type"])
  details = {name.replace("_", " "): 100 * statistics.fmean(r.credit for r in group) for name, group in types.items()}
  return Summary(percent(results), details, by_category(results))


BENCHMARKS = (
  Benchmark(
    "llava_wild",
    "LLaVA-Bench (In-the-Wild)",
    "judge: percent of GPT-4's score",
    "question",
    (*WILD.values(), WILD_RULE),
    read_wild,
    summarise=summarise_wild,
    judge=Judge(ask_wild, wild_credit),
    max_new_tokens=1024,
  ),
  Benchmark(
    "mm_vet",
    "MM-Vet",
    "judge: 0 to 1",
    "question",
    (VET_ASKED, VET_ANSWERS, VET_PICTURES),
    read_vet,
    summarise=summarise_vet,
    submission=submit_vet,
    judge=Judge(ask_vet, vet_credit),
    max_new_tokens=1024,
  ),
  Benchmark(
    "mathvista",
    "MathVista testmini",
    "accuracy; a judge extracts the answer",
    "query with hint",
    (MATHVISTA,),
    read_mathvista,
    summarise=summarise_mathvista,
    judge=Judge(ask_mathvista, mathvista_credit),
    max_new_tokens=1024,
  ),
)
