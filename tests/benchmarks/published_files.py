"""Tiny folders in the layouts in which benchmarks are published, two or a few questions each."""

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."


def png(width=8, height=6, colour=(200, 40, 40)) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (width, height), colour).save(buffer, "PNG")
  return buffer.getvalue()


def put(path: Path, content) -> None:
  """Bytes, text, a list of objects as JSON lines, or JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
  else:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def parquet(path: Path, rows: list[dict], pictures=("image",)) -> None:
  """One row group for each two rows, pictures as Hugging Face stores them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  held = [
    row | {name: {"bytes": row[name], "path": None} for name in pictures if row.get(name) is not None} for row in rows
  ]
  pq.write_table(pa.Table.from_pylist(held), path, row_group_size=2)


def tsv(path: Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  cell = lambda value: '"' + str(value).replace('"', '""') + '"' if "\n" in str(value) else str(value)
  lines = [list(rows[0]), *(row.values() for row in rows)]
  path.write_text("".join("\t".join(map(cell, line)) + "\n" for line in lines), encoding="utf-8")


def code(content: bytes) -> str:
  return base64.b64encode(content).decode()


def vqav2(root: Path) -> None:
  rows = [
    {"question_id": n, "image": f"{n}.png", "text": f"What is {n}?{SHORT}", "category": "default"} for n in (7, 9)
  ]
  put(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
  put(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 8}, *rows])
  for n in (7, 9):
    put(root / f"vqav2/test2015/{n}.png", png())


def people(*answers: str) -> list[dict]:
  """Ten people's answers, the last one given as often as is needed."""
  return [{"answer": answer} for answer in [*answers, *[answers[-1]] * (10 - len(answers))]]


def vqav2_val(root: Path) -> None:
  asked = [{"question_id": n, "image_id": n, "question": "Which colour?"} for n in (1, 2)]
  put(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
  known = [
    {"question_id": 1, "answer_type": "other", "answers": people("red")},
    {"question_id": 2, "answer_type": "number", "answers": people("two", "two", "blue")},
  ]
  put(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": known})
  for n in (1, 2):
    put(root / f"vqav2/val2014/COCO_val2014_{n:012d}.jpg", png())


def gqa(root: Path) -> None:
  rows = [{"question_id": str(n), "image": f"n{n}.jpg", "text": f"Is it {n}?{SHORT}"} for n in (1, 2)]
  put(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)
  known = {str(n): {"answer": gold, "types": {"structural": "verify"}} for n, gold in ((1, "yes"), (2, "table"))}
  put(root / "gqa/data/testdev_balanced_questions.json", known)
  for n in (1, 2):
    put(root / f"gqa/data/images/n{n}.jpg", png())


def vizwiz(root: Path) -> None:
  rows = [{"question_id": f"v{n}.jpg", "image": f"v{n}.jpg", "text": "What?"} for n in (0, 1)]
  put(root / "vizwiz/llava_test.jsonl", rows)
  for n in (0, 1):
    put(root / f"vizwiz/test/v{n}.jpg", png())


def vizwiz_val(root: Path) -> None:
  rows = [
    {"image": "a.jpg", "question": "What is this?", "answers": people("soup"), "answer_type": "other"},
    {"image": "b.jpg", "question": "Which?", "answers": people("unanswerable"), "answer_type": "unanswerable"},
  ]
  put(root / "vizwiz/val.json", rows)
  for row in rows:
    put(root / f"vizwiz/val/{row['image']}", png())


def textvqa(root: Path) -> None:
  """One picture with two questions, which only their texts tell apart."""
  known = [
    {"image_id": "f0", "question_id": 34602, "question": "What is the Brand?", "answers": ["nokia"] * 10},
    {"image_id": "f0", "question_id": 34603, "question": "What time?", "answers": ["10:10"] * 4 + ["noon"] * 6},
  ]
  put(root / "textvqa/TextVQA_0.5.1_val.json", {"data": known})
  texts = [f"{row['question'].lower()}\nReference OCR token: MIA, NOKIA{SHORT}" for row in known]
  rows = [{"question_id": "f0", "image": "f0.jpg", "text": text} for text in texts]
  put(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
  put(root / "textvqa/train_images/f0.jpg", png())


def pope(root: Path) -> None:
  """Four questions in each category, yes and no in turn."""
  asked = []
  for category in ("adversarial", "popular", "random"):
    labels = [
      {"question_id": n + 1, "image": f"p{n // 2}.jpg", "text": f"Is there a {n}?", "label": ("yes", "no")[n % 2]}
      for n in range(4)
    ]
    put(root / f"pope/coco/coco_pope_{category}.json", labels)
    for label in labels:
      asked.append(label | {"question_id": len(asked), "text": label["text"] + SHORT, "category": category})
  put(root / "pope/llava_pope_test.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in asked])
  for n in (0, 1):
    put(root / f"pope/val2014/p{n}.jpg", png())


def mme(root: Path) -> None:
  """Two pictures of a subtask of each kind, a subtask's answers beside its pictures, the other's in their folder."""
  rows = []
  for category, answers in (("existence", ""), ("code_reasoning", "questions_answers_YN/")):
    folder = root / "MME/MME_Benchmark_release_version" / category
    for n in (1, 2):
      questions = [(f"Is it {n}? Please answer yes or no.", "Yes"), (f"Is it  {n + 5}? Please answer yes or no.", "No")]
      put(folder / f"{answers}{n:04d}.txt", "".join(f"{q}\t{a}\n" for q, a in questions))
      put(folder / f"{n:04d}.png", png())
      for question, _ in questions:
        text = question.replace(" Please answer yes or no.", "") + SHORT
        rows.append({"question_id": f"{category}/{n:04d}.png", "image": f"{category}/{n:04d}.png", "text": text})
  put(root / "MME/llava_mme.jsonl", rows)


def scienceqa(root: Path) -> None:
  """Of four questions one has no picture and one is of another split."""
  problems = {
    str(n): {"answer": n % 2, "choices": ["cold", "warm"], "subject": "natural science", "split": "test"}
    for n in range(4)
  }
  put(root / "scienceqa/problems.json", problems)
  put(root / "scienceqa/pid_splits.json", {"test": ["0", "1", "2"], "train": ["3"]})
  rows = []
  for n in range(4):
    text = f"<image>\nContext: N/A\nIs {n} cold?\nA. cold\nB. warm"
    rows.append({"id": str(n), "image": f"{n}/image.png", "conversations": [{"from": "human", "value": text}]})
  del rows[2]["image"]
  put(root / "scienceqa/llava_test_CQM-A.json", rows)
  for n in (0, 1, 3):
    put(root / f"scienceqa/images/test/{n}/image.png", png())


def seed(root: Path) -> None:
  known = [
    {"question_id": str(n), "data_type": kind, "question_type_id": n % 2 + 1, "answer": "AB"[n % 2]}
    for n, kind in enumerate(["image", "image", "video"])
  ]
  content = {"questions": known, "question_type": {"Scene Understanding": 1, "Spatial Relation": 2}}
  put(root / "seed_bench/SEED-Bench.json", content)
  rows = [{"question_id": n, "image": f"SEED-Bench-image/{n}", "text": "Where?\nA. x\nB. y\n..."} for n in range(3)]
  put(root / "seed_bench/llava-seed-bench.jsonl", rows)
  for n in (0, 1):
    put(root / f"seed_bench/SEED-Bench-image/{n}", png())


def mmvp(root: Path) -> None:
  lines = ["Index,Question,Options,Correct Answer"]
  for n in range(1, 5):
    lines.append(f'{n},"Open, or not?",(a) Open (b) Closed,({"ab"[n % 2]})')
    put(root / f"MMVP/MMVP Images/{n}.jpg", png())
  put(root / "MMVP/Questions.csv", "\n".join(lines) + "\n")


def ai2d(root: Path) -> None:
  rows = [
    {"question": "Which?", "options": ["fox", "owl", "bee"], "answer": str(n), "image": png(colour=(n, 0, 0))}
    for n in range(3)
  ]
  parquet(root / "ai2d/data/test-00000-of-00001.parquet", rows)


def mmstar(root: Path) -> None:
  """Two questions of one category and one of another, which counts as much."""
  rows = [
    {
      "index": n,
      "question": "Which?\nOptions: A: x, B: y, C: z, D: w",
      "answer": "ABD"[n],
      "category": c,
      "image": png(),
    }
    for n, c in enumerate(["math", "math", "logical reasoning"])
  ]
  parquet(root / "MMStar/mmstar.parquet", rows)


def realworldqa(root: Path) -> None:
  """A picture that another row refers to, and a question with a line break in it."""
  rows = [
    {"index": 0, "image": code(png()), "question": "Which way?", "A": "Left", "B": "Right", "C": "", "answer": "B"},
    {"index": 1, "image": "0", "question": "How\nfar?", "A": "1 m", "B": "9 m", "C": "2 m", "answer": "C"},
  ]
  tsv(root / "RealWorldQA.tsv", rows)


def hrbench(root: Path) -> None:
  """One question in two orders, and one of another category in one."""
  rows = []
  for n, (category, cycle, answer) in enumerate([("single", 0, "A"), ("single", 1, "B"), ("cross", 0, "A")]):
    options = dict(zip("ABCD", ("red", "blue", "green", "white")))
    row = {"index": n, "question": "Which colour?", "answer": answer, "category": category, "cycle_category": cycle}
    rows.append(row | options | {"image": code(png())})
  for size in ("4K", "8K"):
    tsv(root / f"HRBench{size}.tsv", rows)


def mmbench(root: Path) -> None:
  """dev: two questions in the published rounds; Chinese dev without rounds; test without answers."""
  base = {"hint": "nan", "category": "object_localization", "l2-category": "finegrained", "split": "dev"}
  first = {"index": 3, "question": "Where?", "A": "up", "B": "down", "C": "nan", "D": "nan", "answer": "A"} | base
  second = {"index": 5, "question": "Who?", "A": "fox", "B": "owl", "C": "bee", "D": "nan", "answer": "C"} | base
  second |= {"hint": "Look twice.", "category": "ocr"}
  turned = [
    first | {"index": 1000003, "A": "down", "B": "up", "answer": "B"},
    second | {"index": 1000005, "A": "owl", "B": "bee", "C": "fox", "answer": "B"},
    second | {"index": 2000005, "A": "bee", "B": "fox", "C": "owl", "answer": "A"},
  ]
  shown = lambda rows: [row | {"image": code(png())} for row in rows]
  tsv(root / "mmbench/mmbench_dev_20230712.tsv", shown([first, second, *turned]))
  tsv(root / "mmbench_cn/mmbench_dev_cn_20231003.tsv", shown([first, second]))
  hidden = [{key: value for key, value in row.items() if key != "answer"} for row in (first, second)]
  tsv(root / "mmbench/mmbench_test_en_20231003.tsv", shown(hidden))
  tsv(root / "mmbench_cn/mmbench_test_cn_20231003.tsv", shown(hidden))


def docvqa(root: Path) -> None:
  for split in ("validation", "test"):
    rows = [
      {
        "questionId": str(n),
        "question": "Who signed?",
        "image": png(),
        "answers": ["John Doe", "J. Doe"] if split == "validation" else [],
        "question_types": ["handwritten"],
      }
      for n in (11, 12)
    ]
    parquet(root / f"DocVQA/DocVQA/{split}-00000-of-00001.parquet", rows)


def chartqa(root: Path) -> None:
  rows = [
    {"type": "human_test", "question": "How many?", "answer": "100", "image": png()},
    {"type": "augmented_test", "question": "Which?", "answer": "Kenya", "image": png()},
  ]
  parquet(root / "ChartQA/data/test-00000-of-00001.parquet", rows)


def ocrbench(root: Path) -> None:
  rows = [
    {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition"}
    | {"answer": ["CENTRE"], "image": png()},
    {"dataset": "HME100k", "question": "the formula?", "question_type": "HMER"}
    | {"answer": [r"\frac { a } { b }"], "image": png()},
  ]
  parquet(root / "OCRBench/data/test-00000-of-00001.parquet", rows)


def refcoco(root: Path) -> None:
  """A wide picture of 90 x 30 with two expressions for one box."""
  rows = [
    {"question_id": "0", "answer": ["man", "left man"], "bbox": [10.0, 0.0, 30.0, 24.0], "image": png(90, 30)},
    {"question_id": "1", "answer": ["dog"], "bbox": [0.0, 0.0, 30.0, 20.0], "image": png(30, 90)},
  ]
  for name, splits in (("RefCOCO", "val testA testB"), ("RefCOCOplus", "val testA testB"), ("RefCOCOg", "val test")):
    for split in splits.split():
      parquet(root / f"{name}/data/{split}-00000-of-00001.parquet", rows)


def mmmu(root: Path) -> None:
  nothing = {f"image_{n}": None for n in range(1, 8)}
  shown = {"bytes": png(), "path": None}
  rows = [
    nothing
    | {"id": "validation_Art_Theory_1", "question": "Compare <image 1> and <image 2>.", "options": "['old', 'new']"}
    | {"answer": "B", "question_type": "multiple-choice", "image_1": shown, "image_2": shown},
    nothing
    | {"id": "validation_Math_7", "question": "How long is <image 1>?", "options": "[]", "answer": "2.5"}
    | {"question_type": "open", "image_1": shown},
  ]
  parquet(root / "MMMU/Art/validation-00000-of-00001.parquet", rows, pictures=())


def llava_wild(root: Path) -> None:
  folder = root / "llava-bench-in-the-wild"
  rows = [
    {"question_id": n, "image": "001.jpg", "text": f"Describe {n}.", "category": kind}
    for n, kind in enumerate(("conv", "detail"))
  ]
  put(folder / "questions.jsonl", rows)
  put(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A lake."}])
  put(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}."} for n in (0, 1)])
  put(folder / "rule.json", {f"llava_bench_{c}": {"role": "Assistant", "prompt": "Rate."} for c in ("conv", "detail")})
  put(folder / "images/001.jpg", png())


def mm_vet(root: Path) -> None:
  put(root / "mm-vet/llava-mm-vet.jsonl", [{"question_id": n, "image": f"v1_{n}.png", "text": "x?"} for n in (0, 1)])
  known = {
    "v1_0": {"answer": "4", "capability": ["ocr", "math"]},
    "v1_1": {"answer": "red<OR>blue", "capability": ["rec", "ocr"]},
  }
  put(root / "mm-vet/mm-vet.json", known)
  for n in (0, 1):
    put(root / f"mm-vet/images/v1_{n}.png", png())


def mathvista(root: Path) -> None:
  shown = {"image": "images/1.jpg", "decoded_image": png(), "metadata": {"task": "geometry"}}
  rows = [
    {"pid": "1", "query": "Hint: ...\nQuestion: how many?", "choices": None, "precision": None, "answer": "3"}
    | {"question_type": "free_form", "answer_type": "integer"},
    {"pid": "2", "query": "Question: which?", "choices": ["5", "7 cm"], "precision": None, "answer": "7 cm"}
    | {"question_type": "multi_choice", "answer_type": "text"},
    {"pid": "3", "query": "Question: how long?", "choices": None, "precision": 1.0, "answer": "1.2"}
    | {"question_type": "free_form", "answer_type": "float"},
  ]
  parquet(root / "MathVista/data/testmini-00000-of-00001.parquet", [row | shown for row in rows], ["decoded_image"])
