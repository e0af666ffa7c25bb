"""Every benchmark out of files in its published layout: gold answers give all, known wrong ones the known score."""

import collections
import json

import openpyxl
import published_files
import pytest

from mllm_jax.benchmarks import scoring
from mllm_jax.benchmarks.catalogue import BENCHMARKS, table
from mllm_jax.benchmarks.source import Source, check
from mllm_jax.data.records import DataError
from mllm_jax.evaluate import read_questions


def gold(question) -> str:
  """An answer that is right: what most people gave, or the gold text, or the box as a model that pads says it."""
  if isinstance(question.gold, tuple):
    width, height = question.images[0].size()
    side, (left, top, right, bottom) = max(width, height), question.gold
    x, y = (side - width) // 2, (side - height) // 2
    return str([(left + x) / side, (top + y) / side, (right + x) / side, (bottom + y) / side])
  if isinstance(question.gold, list):
    return collections.Counter(question.gold).most_common(1)[0][0]
  return question.gold


def results(name, root, change=None, padded=True):
  """(questions, results) with gold answers but for `change`, answers by id."""
  benchmark = BENCHMARKS[name]
  getattr(published_files, family(name))(root)
  questions = read_questions(benchmark, Source(root, padded))
  answers = {question.id: {"text": (change or {}).get(question.id) or gold(question)} for question in questions}
  return questions, scoring.answered(benchmark, questions, answers)


def family(name: str) -> str:
  """Who makes the files of a benchmark."""
  for start in ("mmbench", "refcoco", "hrbench"):
    if name.startswith(start):
      return start
  return {"textvqa_no_ocr": "textvqa", "docvqa_test": "docvqa"}.get(name, name)


# name: (questions, {id: a wrong answer}, the score with it)
WRONG = {
  "vqav2_val": (2, {"2": "2"}, 80),  # given by two of ten: 0.6
  "gqa": (2, {"2": "chair"}, 50),
  "vizwiz_val": (2, {"a.jpg": "unanswerable"}, 50),
  "textvqa": (2, {"34603": "noon"}, 100),  # by six of ten
  "textvqa_no_ocr": (2, {"34603": "night"}, 50),
  "pope": (12, {"0": "No, there is not."}, 100 * (2 / 3 + 1 + 1) / 3),
  "mme": (8, {"existence/0001.png 0": "no"}, 75 + 50),
  "scienceqa": (2, {"1": "B."}, 50),  # the released parser does not know this form
  "seed": (2, {"1": "B."}, 50),
  "mmvp": (4, {"3": "(a) Open"}, 50),
  "ai2d": (3, {"1": "C"}, 100 * 2 / 3),
  "mmstar": (3, {"0": "B"}, 75),  # half of a category and all of the other
  "realworldqa": (2, {"1": "A. 1 m"}, 50),
  "hrbench4k": (3, {"1": "C"}, 50),  # all of the first order, none of the second
  "hrbench8k": (3, {"1": "C"}, 50),
  "mmbench_en_dev": (5, {"1000003": "A"}, 50),
  "mmbench_cn_dev": (5, {"2000005": "B"}, 50),
  "docvqa": (2, {"11": "Jon Doe"}, 100 * (1 - 1 / 8 + 1) / 2),
  "chartqa": (2, {"0": "104"}, 100),
  "ocrbench": (2, {"0": "center"}, 1),
  "mmmu": (2, {"Math_7": "3"}, 100),
  **{f"refcoco{kind}": (3, {"0-1": "[0, 0, 1, 1]"}, 200 / 3) for kind in ("_val", "_testA", "_testB")},
  **{f"refcoco+{kind}": (3, {"0-1": "there"}, 200 / 3) for kind in ("_val", "_testA", "_testB")},
  **{f"refcocog{kind}": (3, {"0-0": "[]"}, 200 / 3) for kind in ("_val", "_test")},
}
FULL = {"mme": 200, "ocrbench": 2}  # of the tiny folders; one subtask of perception, two questions
HIDDEN = {"vqav2", "vizwiz", "mmbench_en_test", "mmbench_cn_test", "docvqa_test"}
JUDGED = {"llava_wild", "mm_vet", "mathvista"}


def test_every_benchmark_is_tried_here_or_where_its_judge_is():
  assert WRONG.keys() | HIDDEN | JUDGED == BENCHMARKS.keys()


@pytest.mark.parametrize("name", WRONG)
def test_gold_answers_give_all_and_wrong_ones_the_known_score(name, tmp_path):
  count, change, score = WRONG[name]
  questions, right = results(name, tmp_path)
  assert len(questions) == count
  assert all(result.credit == 1 for result in right)
  assert BENCHMARKS[name].summarise(right).score == FULL.get(name, 100)
  assert all(picture.load().mode == "RGB" for question in questions for picture in question.images)
  _, wrong = results(name, tmp_path, change)
  assert BENCHMARKS[name].summarise(wrong).score == pytest.approx(score)


def test_prompts_are_those_of_the_papers(tmp_path):
  short = "\nAnswer the question using a single word or phrase."
  letter = "\nAnswer with the option's letter from the given choices directly."
  asked = {
    "vqav2_val": f"Which colour?{short}",
    "vizwiz_val": "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + short,
    "textvqa": f"what is the brand?\nReference OCR token: MIA, NOKIA{short}",
    "textvqa_no_ocr": f"What is the Brand?{short}",
    "scienceqa": f"Context: N/A\nIs 0 cold?\nA. cold\nB. warm{letter}",
    "mmbench_en_dev": f"Where?\nA. up\nB. down{letter}",
    "mmbench_cn_dev": "Where?\nA. up\nB. down\n请直接回答选项字母。",
    "ai2d": f"Which?\nA. fox\nB. owl\nC. bee{letter}",
    "mmstar": f"Which?\nOptions: A: x, B: y, C: z, D: w{letter[:-1]}",
    "mmmu": f"Compare <image> and <image>.\nA. old\nB. new{letter}",
    "refcoco_val": "Please provide the bounding box coordinate of the region this sentence describes: man",
  }
  for name, prompt in asked.items():
    assert results(name, tmp_path / name)[0][0].prompt == prompt, name
  assert results("mmbench_en_dev", tmp_path / "hint")[0][1].prompt.startswith("Look twice.\nWho?\nA. fox")


def test_answers_are_as_long_as_in_the_papers():
  """128 tokens as LLaVA's script for short answers has it, 1024 as its other scripts and VLMEvalKit do."""
  long = {"scienceqa", "llava_wild", "mm_vet", "mathvista", "ocrbench", "mmmu", "realworldqa", "hrbench4k", "hrbench8k"}
  long |= {f"mmbench_{split}" for split in ("en_dev", "cn_dev", "en_test", "cn_test")}
  assert {name: benchmark.max_new_tokens for name, benchmark in BENCHMARKS.items()} == {
    name: 1024 if name in long else 128 for name in BENCHMARKS
  }


def test_summaries_hold_the_other_numbers_of_their_papers(tmp_path):
  mme = BENCHMARKS["mme"].summarise(results("mme", tmp_path, {"code_reasoning/0002.png 7": "Yes"})[1])
  assert mme.details == {
    "perception": 200,
    "cognition": 125,
    "existence acc": 100,
    "existence acc+": 100,
    "code_reasoning acc": 75,
    "code_reasoning acc+": 50,
  }
  assert mme.categories == {"existence": 200, "code_reasoning": 125}
  pope = BENCHMARKS["pope"].summarise(results("pope", tmp_path, {"0": "no"})[1])
  assert pope.categories == {"adversarial": pytest.approx(200 / 3), "popular": 100, "random": 100}
  assert pope.details["adversarial accuracy"] == 75 and pope.details["adversarial yes"] == 25
  mmbench = BENCHMARKS["mmbench_en_dev"].summarise(results("mmbench_en_dev", tmp_path, {"1000003": "A"})[1])
  assert mmbench.details == {"one pass": 100}
  assert mmbench.categories == {"object_localization": 0, "ocr": 100}
  chartqa = BENCHMARKS["chartqa"].summarise(results("chartqa", tmp_path, {"0": "104"})[1])
  assert chartqa.details == {"ANLS": pytest.approx(100 * (2 / 3 + 1) / 2)}
  mmvp = BENCHMARKS["mmvp"].summarise(results("mmvp", tmp_path, {"3": "(a)"})[1])
  assert mmvp.details == {"single questions": 75}


def test_a_model_that_does_not_pad_says_boxes_of_the_picture_itself(tmp_path):
  box = {"0-0": "[0.11, 0, 0.44, 0.8]", "0-1": "[0.1, 0.01, 0.45, .79]", "1-0": "[0,0,1,0.22]"}
  summarise = BENCHMARKS["refcoco_val"].summarise
  assert summarise(results("refcoco_val", tmp_path, box, padded=False)[1]).score == 100
  assert summarise(results("refcoco_val", tmp_path, box, padded=True)[1]).score == 0


def test_further_rounds_of_mmbench_are_made_where_the_file_has_none(tmp_path):
  made = {question.id: question for question in results("mmbench_cn_dev", tmp_path)[0]}
  published = {question.id: question for question in results("mmbench_en_dev", tmp_path)[0]}
  assert made.keys() == published.keys()
  for index, question in published.items():
    assert made[index].facts["options"] == question.facts["options"] and made[index].gold == question.gold


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_files_for_servers(name, tmp_path):
  benchmark = BENCHMARKS[name]
  getattr(published_files, family(name))(tmp_path)
  source = Source(tmp_path)
  questions = read_questions(benchmark, source)
  answers = {question.id: {"text": f"The answer {n}"} for n, question in enumerate(questions)}
  if name.startswith("mmbench"):
    answers[questions[1].id] = {"text": "=1+1\x08"}  # neither a formula nor a control character comes into a sheet
  answered = scoring.answered(benchmark, questions, answers)
  assert not benchmark.scored and all(result.credit is None for result in answered)
  path = benchmark.submission(answered, source, tmp_path)
  if name == "vqav2":
    expected = [(8, ""), (7, "answer 0"), (9, "answer 1")]
    assert json.loads(path.read_text()) == [{"question_id": n, "answer": text} for n, text in expected]
  elif name == "vizwiz":
    assert json.loads(path.read_text()) == [{"image": f"v{n}.jpg", "answer": f"answer {n}"} for n in (0, 1)]
  elif name == "docvqa_test":
    assert json.loads(path.read_text()) == [{"questionId": 11 + n, "answer": f"The answer {n}"} for n in (0, 1)]
  else:
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert rows[1] == (3, "Where?", "up", "down", "nan", "nan", "The answer 0", "dev")
    assert len(rows) == 3 and rows[2][6] == "=1+1"


def test_what_is_missing_is_named_with_where_it_comes_from(tmp_path):
  with pytest.raises(DataError, match=r"gqa: missing below(?s:.*)llava_gqa_testdev") as error:
    check(BENCHMARKS["gqa"], Source(tmp_path))
  assert str(error.value).count("published:") == 3 and "eval.zip of LLaVA" in str(error.value)
  published_files.gqa(tmp_path)
  (tmp_path / "gqa/data/images/n2.jpg").unlink()
  with pytest.raises(DataError, match="1 of 2 pictures are missing, the first is .*n2.jpg"):
    read_questions(BENCHMARKS["gqa"], Source(tmp_path))


def test_files_that_do_not_fit_are_named(tmp_path):
  published_files.gqa(tmp_path)
  (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text("{}")
  with pytest.raises(DataError, match=r"gqa: .*have not the published form \(KeyError: '1'\)"):
    read_questions(BENCHMARKS["gqa"], Source(tmp_path))
  published_files.pope(tmp_path)
  labels = tmp_path / "pope/coco/coco_pope_random.json"
  labels.write_text("".join(reversed(labels.read_text().splitlines(keepends=True))))
  with pytest.raises(DataError, match="coco_pope_random.json: question 8 of .* is not the next one"):
    read_questions(BENCHMARKS["pope"], Source(tmp_path))
  (tmp_path / "pope/llava_pope_test.jsonl").write_text('{"a": 1}\n{"a"')
  with pytest.raises(DataError, match="llava_pope_test.jsonl, line 2 is not JSON"):
    read_questions(BENCHMARKS["pope"], Source(tmp_path))


@pytest.mark.parametrize("name, file", [("chartqa", "*.parquet"), ("realworldqa", "*.tsv"), ("mmvp", "*.csv")])
def test_damaged_files_are_named(name, file, tmp_path):
  getattr(published_files, family(name))(tmp_path)
  (path,) = tmp_path.rglob(file)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
  with pytest.raises(DataError, match=f"{name}: .*get them again"):
    read_questions(BENCHMARKS[name], Source(tmp_path))


def test_the_table_names_every_benchmark_and_file():
  lines = table().splitlines()
  assert [line.split()[0] for line in lines if not line.startswith("    ")] == ["name", *BENCHMARKS]
  assert all(any(file.pattern in line for line in lines) for b in BENCHMARKS.values() for file in b.files)
