"""Open questions: VQAv2, GQA, VizWiz, TextVQA. The questions with their prompts are LLaVA's question files."""

import json
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.benchmarks.prompts import SHORT, UNANSWERABLE
from mllm_jax.benchmarks.question import Benchmark, File, Question, Result
from mllm_jax.benchmarks.scorers.texts import gqa_answer
from mllm_jax.benchmarks.scorers.vqa import normalise, soft_accuracy
from mllm_jax.benchmarks.source import Source
from mllm_jax.data.records import DataError

LLAVA = "eval.zip of LLaVA (haotian-liu/LLaVA, docs/Evaluation.md)"
VQA = "visualqa.org, download page (v2.0)"
SOFT = "VQA accuracy (10 answers, leave one out)"


def from_llava(source: Source, rows: Sequence[dict], pictures: File) -> list[Question]:
  """Questions of a LLaVA question file: question_id, image, text."""
  return [
    Question(
      str(row["question_id"]),
      row["text"],
      (source.picture(pictures, row["image"]),),
      facts={"image": row["image"]},
    )
    for row in rows
  ]


def vqa_credit(question: Question, answer: str) -> float:
  """VQA accuracy of an answer whose gold is the list of what people answered."""
  return soft_accuracy(answer, question.gold)


def write_json(content, path: Path) -> Path:
  """Writes a submission; the path back."""
  path.write_text(json.dumps(content), encoding="utf-8")
  return path


# ---- VQAv2 -----------------------------------------------------------------------------------------------------------

VQAV2_ASKED = File("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", LLAVA)
VQAV2_ALL = File("vqav2/llava_vqav2_mscoco_test2015.jsonl", LLAVA)
VQAV2_PICTURES = File("vqav2/test2015/", "test2015.zip of COCO (cocodataset.org)")
VAL_QUESTIONS = File("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", VQA)
VAL_ANSWERS = File("vqav2/v2_mscoco_val2014_annotations.json", VQA)
VAL_PICTURES = File("vqav2/val2014/", "val2014.zip of COCO (cocodataset.org)")


def read_vqav2(source: Source) -> list[Question]:
  return from_llava(source, source.jsonl(VQAV2_ASKED), VQAV2_PICTURES)


def submit_vqav2(results: Sequence[Result], source: Source, folder: Path) -> Path:
  """Every question of the whole test set, those that are not of test-dev with an empty answer, as EvalAI wants it."""
  given = {result.question.id: normalise(result.answer) for result in results}
  ids = [row["question_id"] for row in source.jsonl(VQAV2_ALL)]
  content = [{"question_id": number, "answer": given.get(str(number), "")} for number in ids]
  return write_json(content, folder / "vqav2.json")


def read_vqav2_val(source: Source) -> list[Question]:
  answers = {row["question_id"]: row for row in source.json(VAL_ANSWERS)["annotations"]}
  questions = []
  for row in source.json(VAL_QUESTIONS)["questions"]:
    answered = answers[row["question_id"]]
    picture = source.picture(VAL_PICTURES, f"COCO_val2014_{row['image_id']:012d}.jpg")
    gold = [answer["answer"] for answer in answered["answers"]]
    questions.append(
      Question(str(row["question_id"]), row["question"] + SHORT, (picture,), gold, answered["answer_type"])
    )
  return questions


# ---- GQA -------------------------------------------------------------------------------------------------------------

GQA_ASKED = File("gqa/llava_gqa_testdev_balanced.jsonl", LLAVA)
GQA_ANSWERS = File("gqa/data/testdev_balanced_questions.json", "questions of GQA (Stanford, GQA download page)")
GQA_PICTURES = File("gqa/data/images/", "images of GQA (Stanford, GQA download page)")


def read_gqa(source: Source) -> list[Question]:
  known = source.json(GQA_ANSWERS)
  questions = []
  for row in source.jsonl(GQA_ASKED):
    of = known[str(row["question_id"])]
    picture = source.picture(GQA_PICTURES, row["image"])
    questions.append(
      Question(str(row["question_id"]), row["text"], (picture,), of["answer"], of["types"]["structural"])
    )
  return questions


# ---- VizWiz ----------------------------------------------------------------------------------------------------------

VIZWIZ_ASKED = File("vizwiz/llava_test.jsonl", LLAVA)
VIZWIZ_PICTURES = File("vizwiz/test/", "test.zip of VizWiz-VQA (vizwiz.org)")
VIZWIZ_VAL = File("vizwiz/val.json", "Annotations.zip of VizWiz-VQA (vizwiz.org)")
VIZWIZ_VAL_PICTURES = File("vizwiz/val/", "val.zip of VizWiz-VQA (vizwiz.org)")


def read_vizwiz(source: Source) -> list[Question]:
  return from_llava(source, source.jsonl(VIZWIZ_ASKED), VIZWIZ_PICTURES)


def submit_vizwiz(results: Sequence[Result], source: Source, folder: Path) -> Path:
  """The answer to each picture of the test set that was asked about, as EvalAI wants it."""
  content = [{"image": result.question.facts["image"], "answer": normalise(result.answer)} for result in results]
  return write_json(content, folder / "vizwiz.json")


def read_vizwiz_val(source: Source) -> list[Question]:
  questions = []
  for row in source.json(VIZWIZ_VAL):
    picture = source.picture(VIZWIZ_VAL_PICTURES, row["image"])
    gold = [answer["answer"] for answer in row["answers"]]
    prompt = row["question"] + UNANSWERABLE + SHORT
    questions.append(Question(row["image"], prompt, (picture,), gold, row["answer_type"]))
  return questions


# ---- TextVQA ---------------------------------------------------------------------------------------------------------

TEXTVQA_ASKED = File("textvqa/llava_textvqa_val_v051_ocr.jsonl", LLAVA)
TEXTVQA_ANSWERS = File("textvqa/TextVQA_0.5.1_val.json", "TextVQA 0.5.1 (textvqa.org)")
TEXTVQA_PICTURES = File("textvqa/train_images/", "train_val_images.zip of TextVQA (textvqa.org)")


def read_textvqa(source: Source) -> list[Question]:
  """With OCR tokens in the prompt. A picture can have several questions, so the question itself finds its answers."""
  known = {(row["image_id"], row["question"].lower()): row for row in source.json(TEXTVQA_ANSWERS)["data"]}
  questions = []
  for row in source.jsonl(TEXTVQA_ASKED):
    asked = next(line for line in row["text"].split("\n") if not line.startswith("Reference OCR token:")).lower()
    if (row["question_id"], asked) not in known:
      raise DataError(f"{TEXTVQA_ANSWERS.pattern}: no question {asked!r} about {row['question_id']}; get both again")
    of = known[row["question_id"], asked]
    picture = source.picture(TEXTVQA_PICTURES, row["image"])
    questions.append(Question(str(of["question_id"]), row["text"], (picture,), of["answers"]))
  return questions


def read_textvqa_plain(source: Source) -> list[Question]:
  return [
    Question(
      str(row["question_id"]),
      row["question"] + SHORT,
      (source.picture(TEXTVQA_PICTURES, f"{row['image_id']}.jpg"),),
      row["answers"],
    )
    for row in source.json(TEXTVQA_ANSWERS)["data"]
  ]


VQAV2_FILES = (VQAV2_ASKED, VQAV2_ALL, VQAV2_PICTURES)
VAL_FILES = (VAL_QUESTIONS, VAL_ANSWERS, VAL_PICTURES)
GQA_FILES = (GQA_ASKED, GQA_ANSWERS, GQA_PICTURES)
VIZWIZ_FILES, VIZWIZ_VAL_FILES = (VIZWIZ_ASKED, VIZWIZ_PICTURES), (VIZWIZ_VAL, VIZWIZ_VAL_PICTURES)
TEXTVQA_FILES = (TEXTVQA_ASKED, TEXTVQA_ANSWERS, TEXTVQA_PICTURES)
SERVER = "none here; a file for EvalAI"
WITH_SHORT, WITH_UNANSWERABLE = "question + short answer", "question + 'Unanswerable' + short answer"

BENCHMARKS = (
  Benchmark("vqav2", "VQAv2 test-dev", SERVER, WITH_SHORT, VQAV2_FILES, read_vqav2, submission=submit_vqav2),
  Benchmark("vqav2_val", "VQAv2 val", SOFT, WITH_SHORT, VAL_FILES, read_vqav2_val, vqa_credit),
  Benchmark(
    "gqa",
    "GQA testdev-balanced",
    "exact match",
    WITH_SHORT,
    GQA_FILES,
    read_gqa,
    lambda question, answer: float(gqa_answer(answer) == question.gold.lower()),
  ),
  Benchmark("vizwiz", "VizWiz test", SERVER, WITH_UNANSWERABLE, VIZWIZ_FILES, read_vizwiz, submission=submit_vizwiz),
  Benchmark("vizwiz_val", "VizWiz val", SOFT, WITH_UNANSWERABLE, VIZWIZ_VAL_FILES, read_vizwiz_val, vqa_credit),
  Benchmark(
    "textvqa", "TextVQA val", SOFT, "question + OCR tokens + short answer", TEXTVQA_FILES, read_textvqa, vqa_credit
  ),
  Benchmark(
    "textvqa_no_ocr",
    "TextVQA val, no OCR tokens",
    SOFT,
    WITH_SHORT,
    TEXTVQA_FILES[1:],
    read_textvqa_plain,
    vqa_credit,
  ),
)
