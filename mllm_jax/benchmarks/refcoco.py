"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what an expression describes."""

from mllm_jax.benchmarks.question import Benchmark, File, Question
from mllm_jax.benchmarks.scorers.boxes import in_pixels, iou, parse
from mllm_jax.benchmarks.source import Source, as_list

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "
SPLITS = {
  "refcoco": ("RefCOCO", ("val", "testA", "testB")),
  "refcoco+": ("RefCOCOplus", ("val", "testA", "testB")),
  "refcocog": ("RefCOCOg", ("val", "test")),
}


def read(source: Source, file: File) -> list[Question]:
  """A question for each expression; the gold box is left, top, right, bottom in pixels of the picture."""
  questions = []
  for number, row in enumerate(source.parquet(file)):
    x, y, width, height = row["bbox"]
    gold = (x, y, x + width, y + height)
    for place, expression in enumerate(as_list(row["answer"])):
      questions.append(
        Question(f"{number}-{place}", PROMPT + expression, (row["image"],), gold, facts={"padded": source.padded})
      )
  return questions


def credit(question: Question, answer: str) -> float:
  """1 where the boxes overlap by at least half of what they cover; an answer without a box counts as wrong."""
  box = parse(answer)
  if box is None:
    return 0.0
  width, height = question.images[0].size()
  return float(iou(in_pixels(box, width, height, question.facts["padded"]), question.gold) >= 0.5)


def _benchmark(name: str, split: str) -> Benchmark:
  repository = SPLITS[name][0]
  file = File(f"{repository}/**/{split}-*.parquet", f"lmms-lab/{repository} on Hugging Face")
  return Benchmark(
    f"{name}_{split}",
    f"{repository.replace('plus', '+')} {split}",
    "IoU of at least 0.5",
    "'Please provide the bounding box ...: ' + expression",
    (file,),
    lambda source: read(source, file),
    credit,
  )


BENCHMARKS = tuple(_benchmark(name, split) for name, (_, splits) in SPLITS.items() for split in splits)
