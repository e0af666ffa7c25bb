"""Multiple choice: ScienceQA, SEED-Bench, MMVP, AI2D, MMStar, RealWorldQA, HR-Bench."""

import re
import statistics
from collections.abc import Sequence

from mllm_jax.benchmarks.prompts import LETTER, LETTERS, options_of, with_options
from mllm_jax.benchmarks.question import Benchmark, File, Question, Result, Summary, by_category, grouped, percent
from mllm_jax.benchmarks.scorers.letters import letter_of, scienceqa_letter
from mllm_jax.benchmarks.source import Source, as_list
from mllm_jax.benchmarks.vqa import LLAVA
from mllm_jax.data.records import DataError

LETTER_METRIC, WITH_LETTER = "accuracy of the letter", "question + options + letter"


def letter_credit(question: Question, answer: str) -> float:
  """Whether the option that the answer chooses is the gold letter."""
  return float(letter_of(answer, question.facts["options"]) == question.gold)


# ---- ScienceQA -------------------------------------------------------------------------------------------------------

SQA_ASKED = File("scienceqa/llava_test_CQM-A.json", LLAVA)
SQA_PROBLEMS = File("scienceqa/problems.json", "data/scienceqa of ScienceQA (lupantech/ScienceQA)")
SQA_SPLITS = File("scienceqa/pid_splits.json", SQA_PROBLEMS.origin)
SQA_PICTURES = File("scienceqa/images/test/", "test.zip of ScienceQA (lupantech/ScienceQA)")


def read_scienceqa(source: Source) -> list[Question]:
  """The questions of the test split that have a picture."""
  problems, split = source.json(SQA_PROBLEMS), set(map(str, source.json(SQA_SPLITS)["test"]))
  questions = []
  for row in source.json(SQA_ASKED):
    if "image" not in row or str(row["id"]) not in split:
      continue
    problem = problems[str(row["id"])]
    prompt = row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
    picture = source.picture(SQA_PICTURES, row["image"])
    gold, options = LETTERS[problem["answer"]], problem["choices"]
    questions.append(
      Question(str(row["id"]), prompt, (picture,), gold, problem.get("subject", ""), {"options": options})
    )
  return questions


# ---- SEED-Bench ------------------------------------------------------------------------------------------------------

SEED_ASKED = File("seed_bench/llava-seed-bench.jsonl", LLAVA)
SEED_ANSWERS = File("seed_bench/SEED-Bench.json", "SEED-Bench (AILab-CVC/SEED-Bench)")
SEED_PICTURES = File("seed_bench/", "SEED-Bench-image.zip of SEED-Bench, unpacked there (AILab-CVC/SEED-Bench)")


def read_seed(source: Source) -> list[Question]:
  """The questions about pictures; those about videos are left out."""
  content = source.json(SEED_ANSWERS)
  kinds = {number: name for name, number in content["question_type"].items()}
  known = {str(row["question_id"]): row for row in content["questions"]}
  questions = []
  for row in source.jsonl(SEED_ASKED):
    of = known[str(row["question_id"])]
    if of["data_type"] == "image":
      picture, kind = source.picture(SEED_PICTURES, row["image"]), kinds[of["question_type_id"]]
      questions.append(Question(str(row["question_id"]), row["text"], (picture,), of["answer"], kind))
  return questions


# ---- MMVP ------------------------------------------------------------------------------------------------------------

MMVP_ASKED = File("MMVP/Questions.csv", "MMVP/MMVP on Hugging Face")
MMVP_PICTURES = File("MMVP/MMVP Images/", "MMVP/MMVP on Hugging Face")


def read_mmvp(source: Source) -> list[Question]:
  """Questions 1 and 2 are a pair, 3 and 4 the next one, and so on."""
  questions = []
  for row in source.csv(MMVP_ASKED):
    found = re.fullmatch(r"\s*\(a\)\s*(.*?)\s*\(b\)\s*(.*?)\s*", row["Options"], re.DOTALL)
    if found is None:
      raise DataError(f"{MMVP_ASKED.pattern}, question {row['Index']}: {row['Options']!r} are not options (a) and (b)")
    prompt = f"{row['Question']}\n(a) {found[1]}\n(b) {found[2]}{LETTER}"
    gold = row["Correct Answer"].strip().strip("()").upper()
    picture, facts = source.picture(MMVP_PICTURES, f"{row['Index']}.jpg"), {"options": list(found.groups())}
    questions.append(Question(str(row["Index"]), prompt, (picture,), gold, facts=facts))
  return questions


def mmvp_credit(question: Question, answer: str) -> float:
  """As `letter_credit`, with (a) and (b) in small letters too."""
  begins = re.match(r"\s*\(?([ab])(?:[).:,]|\s*$)", answer)
  return float((begins[1].upper() if begins else letter_of(answer, question.facts["options"])) == question.gold)


def summarise_mmvp(results: Sequence[Result]) -> Summary:
  pairs = grouped(results, lambda result: (int(result.question.id) + 1) // 2).values()
  both = 100 * statistics.fmean(all(result.credit for result in pair) for pair in pairs)
  return Summary(both, {"single questions": percent(results)})


# ---- AI2D, MMStar ----------------------------------------------------------------------------------------------------

AI2D = File("ai2d/**/test-*.parquet", "lmms-lab/ai2d on Hugging Face")
MMSTAR = File("MMStar/**/*.parquet", "Lin-Chen/MMStar on Hugging Face")


def read_ai2d(source: Source) -> list[Question]:
  questions = []
  for number, row in enumerate(source.parquet(AI2D)):
    options = as_list(row["options"])
    prompt, gold = with_options(row["question"], options), LETTERS[int(row["answer"])]
    questions.append(Question(str(number), prompt, (row["image"],), gold, facts={"options": options}))
  return questions


def read_mmstar(source: Source) -> list[Question]:
  """The options stand in the question's text."""
  return [
    Question(
      str(row["index"]),
      row["question"] + LETTER.rstrip("."),
      (row["image"],),
      row["answer"],
      row["category"],
      {"options": [""] * 4},
    )
    for row in source.parquet(MMSTAR)
  ]


def summarise_mmstar(results: Sequence[Result]) -> Summary:
  """The mean of the categories, each of which counts the same."""
  categories = by_category(results)
  return Summary(statistics.fmean(categories.values()), {"all questions": percent(results)}, categories)


# ---- RealWorldQA, HR-Bench -------------------------------------------------------------------------------------------

REALWORLDQA = File("RealWorldQA.tsv", "VLMEvalKit's dataset files (OpenCompass)")
HRBENCH = {size: File(f"HRBench{size}.tsv", "VLMEvalKit's dataset files (OpenCompass)") for size in ("4K", "8K")}


def read_tsv(source: Source, file: File, last: str) -> list[Question]:
  """Questions of VLMEvalKit's multiple-choice files."""
  questions = []
  for row in source.tsv(file):
    options = options_of(row)
    facts = {"options": options, "cycle": row.get("cycle_category", "")}
    prompt = with_options(row["question"], options, last)
    questions.append(Question(row["index"], prompt, (row["image"],), row["answer"], row.get("category") or "", facts))
  return questions


def summarise_hrbench(results: Sequence[Result]) -> Summary:
  """The mean over the cyclic orders of the options."""
  cycles = grouped(results, lambda result: result.question.facts["cycle"]).values()
  return Summary(statistics.fmean(map(percent, cycles)), categories=by_category(results))


def _hrbench(size: str) -> Benchmark:
  return Benchmark(
    f"hrbench{size.lower()}",
    f"HR-Bench {size}",
    "mean over the 4 orders of the options",
    "question + options + 'Answer the option letter directly.'",
    (HRBENCH[size],),
    lambda source: read_tsv(source, HRBENCH[size], "\nAnswer the option letter directly."),
    letter_credit,
    summarise_hrbench,
    max_new_tokens=1024,
  )


SQA_FILES, SEED_FILES = (SQA_ASKED, SQA_PROBLEMS, SQA_SPLITS, SQA_PICTURES), (SEED_ASKED, SEED_ANSWERS, SEED_PICTURES)

BENCHMARKS = (
  Benchmark(
    "scienceqa",
    "ScienceQA-IMG",
    LETTER_METRIC,
    "context + question + options + letter",
    SQA_FILES,
    read_scienceqa,
    lambda question, answer: float(scienceqa_letter(answer, len(question.facts["options"])) == question.gold),
    max_new_tokens=1024,
  ),
  Benchmark(
    "seed",
    "SEED-Bench image",
    "exact match of the letter",
    WITH_LETTER,
    SEED_FILES,
    read_seed,
    lambda question, answer: float(answer.strip() == question.gold),
  ),
  Benchmark(
    "mmvp",
    "MMVP",
    "pairs with both right",
    "question + (a), (b) + letter",
    (MMVP_ASKED, MMVP_PICTURES),
    read_mmvp,
    mmvp_credit,
    summarise_mmvp,
  ),
  Benchmark("ai2d", "AI2D test", LETTER_METRIC, WITH_LETTER, (AI2D,), read_ai2d, letter_credit),
  Benchmark(
    "mmstar",
    "MMStar",
    "mean of the six categories",
    "question with options + letter",
    (MMSTAR,),
    read_mmstar,
    letter_credit,
    summarise_mmstar,
  ),
  Benchmark(
    "realworldqa",
    "RealWorldQA",
    LETTER_METRIC,
    WITH_LETTER,
    (REALWORLDQA,),
    lambda source: read_tsv(source, REALWORLDQA, LETTER),
    letter_credit,
    max_new_tokens=1024,
  ),
  _hrbench("4K"),
  _hrbench("8K"),
)
