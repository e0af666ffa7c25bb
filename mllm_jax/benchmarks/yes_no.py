"""Yes or no: POPE and MME."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.benchmarks.prompts import SHORT
from mllm_jax.benchmarks.question import Benchmark, File, Question, Result, Summary, grouped, percent
from mllm_jax.benchmarks.scorers.yes_no import binary, mme_answer, pope_says_yes
from mllm_jax.benchmarks.source import Source
from mllm_jax.benchmarks.vqa import LLAVA
from mllm_jax.data.records import DataError

# ---- POPE ------------------------------------------------------------------------------------------------------------

POPE_ASKED = File("pope/llava_pope_test.jsonl", LLAVA)
POPE_PICTURES = File("pope/val2014/", "val2014.zip of COCO (cocodataset.org)")
POPE_LABELS = {
  name: File(f"pope/coco/coco_pope_{name}.json", "output/coco of POPE (AoiDragon/POPE)")
  for name in ("random", "popular", "adversarial")
}


def read_pope(source: Source) -> list[Question]:
  """The labels of a category stand in the order of its questions, as the released script takes them."""
  labels = {name: iter(source.jsonl(file)) for name, file in POPE_LABELS.items()}
  questions = []
  for row in source.jsonl(POPE_ASKED):
    category = row["category"]
    label = next(labels[category], None)
    if label is None or label["image"] != row["image"] or not row["text"].startswith(label["text"]):
      raise DataError(
        f"{POPE_LABELS[category].pattern}: question {row['question_id']} of {POPE_ASKED.pattern} is not the next one "
        "there; get both again"
      )
    picture = source.picture(POPE_PICTURES, row["image"])
    questions.append(Question(str(row["question_id"]), row["text"], (picture,), label["label"], category))
  return questions


def summarise_pope(results: Sequence[Result]) -> Summary:
  """The mean F1 of the categories; of each also accuracy, precision, recall and the share of yes."""
  details, f1 = {}, {}
  for category, group in grouped(results, lambda result: result.question.category).items():
    said = [pope_says_yes(result.answer) for result in group]
    found = binary(said, [result.question.gold == "yes" for result in group])
    f1[category] = 100 * found.f1
    for name in ("accuracy", "precision", "recall", "yes"):
      details[f"{category} {name}"] = 100 * getattr(found, name)
  return Summary(statistics.fmean(f1.values()), details, f1)


# ---- MME -------------------------------------------------------------------------------------------------------------

MME_ASKED = File("MME/llava_mme.jsonl", LLAVA)
MME_FOLDER = File("MME/MME_Benchmark_release_version/", "MME, on request from its authors (BradyFU, MME)")
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def read_mme(source: Source) -> list[Question]:
  golds = _mme_golds(source.root / MME_FOLDER.pattern)
  questions = []
  for number, row in enumerate(source.jsonl(MME_ASKED)):
    category = row["image"].split("/")[0]
    key = (category, Path(row["image"]).stem, _mme_question(row["text"]))
    if key not in golds:
      raise DataError(f"{MME_FOLDER.pattern}: no answer to {row['text']!r} about {row['image']}; get it again")
    picture = source.picture(MME_FOLDER, row["image"])
    questions.append(
      Question(f"{row['image']} {number}", row["text"], (picture,), golds[key], category, {"image": row["image"]})
    )
  return questions


def _mme_golds(folder: Path) -> dict[tuple[str, str, str], str]:
  """Answers by category, picture and question, out of the text files beside or below the pictures."""
  golds = {}
  for path in [*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")]:
    for line in path.read_text(encoding="utf-8").splitlines():
      question, tab, gold = line.partition("\t")
      if tab:
        golds[path.relative_to(folder).parts[0], path.stem, _mme_question(question)] = gold.strip().lower()
  return golds


def _mme_question(text: str) -> str:
  """The question without the sentences around it, which differ between the files."""
  return " ".join(text.replace(SHORT.strip(), "").replace("Please answer yes or no.", "").split())


def summarise_mme(results: Sequence[Result]) -> Summary:
  """The score of perception; a subtask's is its accuracy plus the share of pictures all whose questions are right."""
  subtasks, details = {}, {}
  for category, group in grouped(results, lambda result: result.question.category).items():
    pictures = grouped(group, lambda result: result.question.facts["image"]).values()
    both = 100 * statistics.fmean(all(result.credit for result in pair) for pair in pictures)
    details |= {f"{category} acc": percent(group), f"{category} acc+": both}
    subtasks[category] = percent(group) + both
  total = lambda names: sum(subtasks.get(name, 0.0) for name in names)
  halves = {"perception": total(PERCEPTION), "cognition": total(COGNITION)}
  return Summary(halves["perception"], halves | details, subtasks)


POPE_FILES, MME_FILES = (POPE_ASKED, *POPE_LABELS.values(), POPE_PICTURES), (MME_ASKED, MME_FOLDER)
WITH_SHORT = "question + short answer"

BENCHMARKS = (
  Benchmark(
    "pope",
    "POPE",
    "mean F1 of random, popular, adversarial",
    WITH_SHORT,
    POPE_FILES,
    read_pope,
    lambda question, answer: float(pope_says_yes(answer) == (question.gold == "yes")),
    summarise_pope,
  ),
  Benchmark(
    "mme",
    "MME perception",
    "accuracy + accuracy of pairs, by subtask",
    WITH_SHORT,
    MME_FILES,
    read_mme,
    lambda question, answer: float(mme_answer(answer) == question.gold),
    summarise_mme,
    full=2000,
  ),
)
