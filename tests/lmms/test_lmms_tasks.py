"""Tasks of lmms-eval on our adapter, offline: its prompts and scores, on a few documents with the published columns."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import replies
import yaml
from PIL import Image

pytestmark = pytest.mark.torch
pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed; README.md says how")

import lmms_eval  # noqa: E402
from datasets import Dataset, Features, Sequence, Value  # noqa: E402
from datasets import Image as ImageColumn  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models.registry_v2 import ModelRegistryV2  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from loguru import logger  # noqa: E402

import mllm_jax  # noqa: E402
from mllm_jax.data.records import Turn  # noqa: E402
from mllm_jax.inference.likelihood import answer_row  # noqa: E402
from mllm_jax.lmms_eval import adapter as adapter_lib  # noqa: E402
from mllm_jax.lmms_eval.adapter import Chat, Simple  # noqa: E402

PACKAGED = Path(lmms_eval.__file__).parent / "tasks"
TEXT, IMAGE = Value("string"), ImageColumn()
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
  return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def write_task(folder: Path, name: str, features: dict, documents: list[dict], **content) -> None:
  """A task's folder: a YAML and one parquet file."""
  data = folder / f"{name}_data"
  data.mkdir()
  columns = {column: [document[column] for document in documents] for column in features}
  Dataset.from_dict(columns, Features(features)).to_parquet(data / "test-00000-of-00001.parquet")
  content |= {"task": name, "dataset_path": str(data), "dataset_kwargs": {}}
  (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


# ---- published tasks -------------------------------------------------------------------------------------------------


def pope():
  features = {"question_id": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE}
  golds = ["yes", "no", "yes", "no", "yes", "no"]
  documents = [
    {"question_id": str(i), "question": f"Is there a thing {i} in the image?", "answer": gold, "image": picture(i // 2)}
    for i, gold in enumerate(golds)
  ]
  return "pope/pope.yaml", features, documents


def mme():
  features = {"question_id": TEXT, "question": TEXT, "answer": TEXT, "category": TEXT, "image": IMAGE}
  ask = "Is this thing {}? Please answer yes or no."
  documents = [
    {
      "question_id": f"{kind}/{i // 2}.png",
      "question": ask.format(f"{kind} {i}"),
      "answer": ("Yes", "No")[i % 2],
      "category": kind,
      "image": picture(i // 2),
    }
    for kind in ("existence", "code_reasoning")
    for i in range(4)
  ]
  return "mme/mme.yaml", features, documents


def scienceqa():
  features = {"question": TEXT, "choices": Sequence(TEXT), "answer": Value("int8"), "hint": TEXT, "image": IMAGE}
  documents = [
    {
      "question": f"Which one is it, {i}?",
      "choices": ["a cat", "a dog", "a cow"][: 2 + i % 2],
      "answer": i % 2,
      "hint": "Look closely." if i == 1 else "",
      "image": picture(i) if i != 2 else None,
    }
    for i in range(4)
  ]
  return "scienceqa/scienceqa_img.yaml", features, documents


def seedbench():
  choices = [f"choice_{letter}" for letter in "abcd"]
  names = ("question_id", "question", "answer", "data_type", *choices)
  features = dict.fromkeys(names, TEXT) | {"image": Sequence(IMAGE)}
  documents = [
    {
      "question_id": str(i),
      "question": f"How many are there, {i}?",
      "answer": "ABCD"[i],
      "data_type": "video" if i == 3 else "image",
      "image": [picture(i + k) for k in range(3 if i == 3 else 1)],
      **dict.fromkeys(choices, "some"),
    }
    for i in range(4)
  ]
  return "seedbench/seedbench.yaml", features, documents


def refcoco():
  features = {"question_id": TEXT, "answer": Sequence(TEXT), "bbox": Sequence(Value("float32")), "image": IMAGE}
  documents = [  # 200 x 100 pixels; a box is (left, top, width, height)
    {"question_id": "0", "answer": ["left man", "man there"], "bbox": [20, 10, 80, 40], "image": picture(0, 200, 100)},
    {"question_id": "1", "answer": ["right dog"], "bbox": [100, 50, 50, 50], "image": picture(1, 200, 100)},
  ]
  return "refcoco/refcoco_bbox_rec_val.yaml", features, documents


def seedbench_ppl():
  """As `seedbench`, with options that differ in length: lmms-eval ranks them by likelihood."""
  path, features, documents = seedbench()
  options = dict(zip((f"choice_{letter}" for letter in "abcd"), OPTIONS))
  return "seedbench/seedbench_ppl.yaml", features, [document | options for document in documents]


OPTIONS = ("cat", "white dog", "herd of cows", "two red hens and a fox")
UNTIL = "on"
# Task -> (what it asks, the gold answers, its scores, and the same for answers with known mistakes), by a text that
# stands in one question alone.
LEFT, RIGHT = "[0.10, 0.10, 0.50, 0.50]", "[0.50, 0.50, 0.75, 1.00]"
CASES = {
  "pope": (
    pope,
    {f"a thing {i} in": ("Yes", "no ")[i % 2] for i in range(6)},
    {"pope_accuracy": 1, "pope_precision": 1, "pope_recall": 1, "pope_f1_score": 1, "pope_yes_ratio": 0.5},
    {f"a thing {i} in": "yes" if i != 4 else "no" for i in range(6)},  # 2 of 3 found, 3 seen that are not there
    {"pope_accuracy": 2 / 6, "pope_precision": 2 / 5, "pope_recall": 2 / 3, "pope_f1_score": 0.5},
  ),
  "mme": (
    mme,
    {f"thing {kind} {i}?": ("Yes", "No.")[i % 2] for kind in ("existence", "code_reasoning") for i in range(4)},
    {"mme_perception_score": 200, "mme_cognition_score": 200},
    # existence: of two pictures one has both right; code_reasoning: one each, so no picture has both
    {f"thing existence {i}?": ("Yes", "No", "Yes", "Yes")[i] for i in range(4)}
    | {f"thing code_reasoning {i}?": "No" for i in range(4)},
    {"mme_perception_score": 75 + 50, "mme_cognition_score": 50},
  ),
  "scienceqa_img": (
    scienceqa,
    {f"is it, {i}?": ("A", "B. a dog")[i % 2] for i in range(4)},
    {"exact_match": 1},
    {"is it, 0?": "A", "is it, 1?": "A", "is it, 2?": "The answer is A.", "is it, 3?": "b"},
    {"exact_match": 0.5},
  ),
  "seedbench": (
    seedbench,
    {f"there, {i}?": "ABCD"[i] for i in range(4)},
    {"seed_image": 1, "seed_video": 1, "seed_all": 1},
    {"there, 0?": "A. some", "there, 1?": "A", "there, 2?": "b", "there, 3?": "D"},
    {"seed_image": 1 / 3, "seed_video": 1, "seed_all": 0.5},
  ),
  "refcoco_bbox_rec_val": (
    refcoco,
    {"left man": LEFT, "man there": f"It is at {LEFT}.", "right dog": RIGHT},
    {"refcoco_IoU": 1, "refcoco_ACC@0.5": 1, "refcoco_ACC@0.9": 1, "refcoco_Center_ACC": 1},
    # the upper half of the box: an intersection over union of 1/2; one that shares nothing; no box at all
    {"left man": "[0.10, 0.10, 0.50, 0.30]", "man there": "[0.60, 0.60, 0.70, 0.70]", "right dog": "on the right"},
    {"refcoco_IoU": 1 / 6, "refcoco_ACC@0.3": 1 / 3, "refcoco_ACC@0.7": 0},
  ),
}


# More clones of POPE, each to be answered in another way.
KINDS = {
  "long": {"max_new_tokens": 999, "temperature": 0},
  "short": {"max_new_tokens": 3, "do_sample": False},
  "until": {"until": [UNTIL], "max_new_tokens": 999},
  "drawn": {"do_sample": True, "temperature": 1.0, "max_new_tokens": 999},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
  return replies.processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
  """A task manager that has a local clone of each published task."""
  folder = tmp_path_factory.mktemp("clones")
  for name, (make, *_) in CASES.items():
    path, features, documents = make()
    local = {"include": str(PACKAGED / path), "dataset_name": None, "test_split": "test"}
    write_task(folder, f"{name}_local", features, documents, **local)
    if name == "pope":
      for kind, kwargs in KINDS.items():
        write_task(folder, f"pope_{kind}", features, documents, **local, generation_kwargs=kwargs)
  path, features, documents = seedbench_ppl()
  metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
  local = {"include": str(PACKAGED / path), "test_split": "test", "metric_list": metrics}
  write_task(folder, "seedbench_ppl_local", features, documents, **local)
  return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("form", [Simple, Chat])
@pytest.mark.parametrize("wrong", [False, True], ids=["gold", "mistakes"])
def test_published_tasks_score_what_they_are_told(clones, processor, form, wrong):
  told, expected = {}, {}
  for name, case in CASES.items():
    _, gold, scores, mistaken, lower = case
    told |= mistaken if wrong else gold
    expected |= {f"{name}_local": lower if wrong else scores}
  engine = replies.Replies(processor, told)
  found = simple_evaluate(form(engine), tasks=list(expected), task_manager=clones, log_samples=False)["results"]
  for task, scores in expected.items():
    for metric, score in scores.items():
      assert found[task][f"{metric},none"] == pytest.approx(score, abs=1e-6), (task, metric)  # boxes are float32


def test_published_tasks_ask_as_llava_does(clones, processor):
  gold = {key: reply for case in CASES.values() for key, reply in case[1].items()}
  engine = replies.Replies(processor, gold)
  simple_evaluate(Chat(engine), tasks=[f"{name}_local" for name in CASES], task_manager=clones, log_samples=False)
  asked = {key: next(i for i, prompt in enumerate(engine.prompts) if key in prompt) for key in gold}
  prompt = lambda key: engine.prompts[asked[key]].split("USER: ")[1].removesuffix(" ASSISTANT:")
  assert prompt("a thing 3 in") == f"#\nIs there a thing 3 in the image?{SHORT}"
  assert prompt("thing existence 0?") == f"#\nIs this thing existence 0?{SHORT}"
  assert prompt("is it, 1?") == f"#\nContext: Look closely.\nWhich one is it, 1?\nA. a cat\nB. a dog\nC. a cow{LETTER}"
  assert prompt("is it, 2?") == f"Which one is it, 2?\nA. a cat\nB. a dog{LETTER}"  # without a picture
  assert prompt("there, 3?").startswith("#\n#\n#\nHow many are there, 3?\nA. some\n")
  assert prompt("right dog").endswith("the region this sentence describes: right dog")
  settings = lambda key: (engine.requests[asked[key]].max_new_tokens, engine.requests[asked[key]].stop)
  assert settings("a thing 3 in") == (128, ())
  assert settings("thing existence 0?") == settings("is it, 1?") == (16, ())
  assert settings("there, 3?") == settings("right dog") == (128, ("ASSISTANT:",))


@pytest.mark.parametrize("wrong", [False, True], ids=["gold", "mistakes"])
def test_published_options_are_ranked_by_likelihood(clones, processor, tmp_path, wrong):
  """Also where lmms-eval keeps what was answered. Options are one of four lengths; the gold ones are a, b, c and d."""
  told = {f"there, {i}?": OPTIONS[i] for i in range(4)} | ({"there, 3?": OPTIONS[0]} if wrong else {})
  for _ in range(2):
    adapter = Simple(replies.Replies(processor, told))
    cached = dict(use_cache=str(tmp_path), log_samples=True, task_manager=clones)
    found = simple_evaluate(adapter, tasks=["seedbench_ppl_local"], **cached)
    scores = found["results"]["seedbench_ppl_local"]
    assert scores["acc,none"] == scores["acc_norm,none"] == (0.75 if wrong else 1)
    assert len(adapter.engine.prompts) == 16 and adapter.engine.prompts[12].count("#") == 3
    assert "#\nHow many are there, 0? Answer : ASSISTANT: cat" in adapter.engine.prompts[0]
    last = found["samples"]["seedbench_ppl_local"][3]["filtered_resps"]
    expected = [len(option) / (8 if option == told["there, 3?"] else 1) for option in OPTIONS]
    assert [tuple(each) for each in last] == [(value, value < 3) for value in expected]


# ---- a model ---------------------------------------------------------------------------------------------------------

TOKENS = 12  # the longest answers of the random model


def test_answers_are_the_same_at_any_batch_size_and_as_without_lmms_eval(clones, tmp_path):
  """Documents without a picture, with one and with several, and settings of every kind, all at once."""
  folder = replies.write_model(tmp_path / "model")
  tasks = ["scienceqa_img_local", "seedbench_local", *(f"pope_{kind}" for kind in KINDS)]

  def texts(adapter):
    samples = simple_evaluate(adapter, tasks=tasks, task_manager=clones, log_samples=True)["samples"]
    return {(task, each["doc_id"]): each["filtered_resps"][0] for task in tasks for each in samples[task]}

  given = f"pretrained={folder},dtype=float32,max_new_tokens={TOKENS}"
  alone = texts(Simple.create_from_arg_string(given, {"batch_size": "1", "device": None}))
  assert texts(Chat.create_from_arg_string(given, {"batch_size": 4, "max_batch_size": 8})) == alone

  whole = [alone["pope_long", i] for i in range(6)]
  model, processor = mllm_jax.load(folder, dtype="float32")
  questions = [document["question"] + SHORT for document in pope()[2]]
  pictures = [[document["image"]] for document in pope()[2]]
  answers = lambda count: mllm_jax.generate(model, processor, questions, pictures, max_new_tokens=count)
  assert whole == answers(TOKENS) and [alone["pope_short", i] for i in range(6)] == answers(3)
  assert len(set(whole)) == 6 and any(UNTIL in text for text in whole)
  assert [alone["pope_until", i] for i in range(6)] == [text.split(UNTIL)[0].strip() for text in whole]
  assert all(alone["pope_drawn", i] != text for i, text in enumerate(whole))
  assert len({alone["seedbench_local", i] for i in range(4)}) > 2


def test_likelihoods_are_the_same_at_any_batch_size_and_as_without_lmms_eval(clones, tmp_path):
  folder = replies.write_model(tmp_path / "model", vocab_size=512)

  def values(batch_size):
    adapter = Simple.create_from_arg_string(f"pretrained={folder},dtype=float32", {"batch_size": batch_size})
    samples = simple_evaluate(adapter, tasks=["seedbench_ppl_local"], task_manager=clones, log_samples=True)["samples"]
    return adapter.engine, np.array([each["filtered_resps"] for each in samples["seedbench_ppl_local"]])

  _, alone = values(1)
  engine, found = values(4)
  np.testing.assert_allclose(found, alone, rtol=1e-5)  # float32 in other shapes
  document = seedbench_ppl()[2][3]
  asked = [Turn("human", "<image>\n" * 3 + f"{document['question']} Answer :")]
  rows = [
    answer_row(engine.processor.with_room(3), [*asked, Turn("gpt", option)], document["image"]) for option in OPTIONS
  ]
  expected = [-each.log_probability for each in engine.likelihoods(rows)]
  np.testing.assert_allclose(found[3, :, 0], expected, rtol=1e-5)
  assert len(set(np.round(found[:, :, 0].ravel(), 3))) == 16 and (found[:, :, 0] > 0).all()


# ---- the adapter itself ----------------------------------------------------------------------------------------------


def instance(kind: str, *arguments, name: str = "task") -> Instance:
  metadata = {"task": name, "doc_id": arguments[-3], "repeats": 1}
  return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata, task_name=name)


@pytest.mark.parametrize("form", [Simple, Chat])
def test_rounds_go_on_until_the_task_says_so(processor, form):
  """Document n is asked n + 1 times, and shown one more picture each time."""
  calls = []

  def to_text(document, previous_output=None, round_idx=None, previous_round_info=None):
    calls.append((document, previous_output, round_idx, previous_round_info))
    over = round_idx > document
    shown = None if over else [picture(k) for k in range(round_idx + 1)]
    return shown, None if over else f"[{document} {round_idx}]", over, previous_output, f"info {round_idx}"

  def to_messages(document, round_idx=None, **told):
    if round_idx is None:
      return [{"role": "user", "content": [{"type": "image", "url": picture(0)}, text(f"[{document} 0]")]}]
    shown, question, over, *rest = to_text(document, round_idx=round_idx, **told)
    images = [{"type": "image", "url": each} for each in shown or []]
    return None if over else [{"role": "user", "content": [*images, text(question)]}], over, *rest

  text = lambda text: {"type": "text", "text": text}
  adapter = form(replies.Replies(processor, {f"[{d} {r}]": f"to {d} {r}" for d in range(3) for r in range(3)}))
  adapter.task_dict = {"task": {"test": [0, 1, 2]}}
  forms = {
    Simple: lambda d: (f"[{d} 0]", {}, lambda document: [picture(0)], to_text, d, "task", "test"),
    Chat: lambda d: ("", to_messages, {}, d, "task", "test"),
  }
  requests = [instance("generate_until_multi_round", *forms[form](d)) for d in range(3)]
  answers = adapter.generate_until_multi_round(requests)
  assert answers == [[f"to {d} {r}" for r in range(d + 1)] for d in range(3)]
  assert [prompt.count("#") for prompt in adapter.engine.prompts] == [1, 1, 1, 2, 2, 3]
  assert calls[-1] == (2, ["to 2 0", "to 2 1", "to 2 2"], 3, "info 2")


def test_repeated_documents_have_draws_of_their_own(processor):
  adapter = Simple(replies.Replies(processor, {"[0]": "a", "[1]": "b"}))
  adapter.task_dict = {"task": {"test": [0, 1]}}
  kwargs = {"temperature": 1.0, "repetition_penalty": 1.2, "image_aspect_ratio": "pad"}
  ask = lambda d: instance("generate_until", f"[{d}]", kwargs, lambda document: [], d, "task", "test")
  warnings = []
  sink = logger.add(lambda message: warnings.append(message.record["message"]))
  assert adapter.generate_until([ask(0), ask(0), ask(1)]) == ["a", "a", "b"]
  logger.remove(sink)
  seeds = [request.seed for request in adapter.engine.requests]
  assert len(set(seeds)) == 3
  adapter.generate_until([ask(1), ask(0)])
  assert [request.seed for request in adapter.engine.requests[3:]] == [seeds[2], seeds[0]]
  assert warnings == ["generation_kwargs without effect here: repetition_penalty"]


def test_a_document_that_cannot_be_asked_is_named(processor):
  adapter = Simple(replies.Replies(processor, {}))
  adapter.task_dict = {"films": {"test": ["film.mp4"]}}
  request = instance("generate_until", "What happens?", {}, lambda film: [film], 0, "films", "test", name="films")
  with pytest.raises(ValueError, match="films, split test, document 0: image film.mp4"):
    adapter.generate_until([request])
  weighed = instance("loglikelihood", "Who?", " he", lambda film: [film], 0, "films", "test", name="films")
  with pytest.raises(ValueError, match="films, split test, document 0: image film.mp4"):
    adapter.loglikelihood([weighed])


def test_answers_that_no_others_stand_beside_keep_their_log_probability(processor):
  """Of an output_type loglikelihood, whose perplexity lmms-eval makes of it; options are given as losses."""
  adapter = Simple(replies.Replies(processor, {"Who": "he"}))
  adapter.task_dict = {"task": {"test": [{"answer": " he"}]}}
  args = lambda answer: ("Who?", answer, lambda document: [], 0, "task", "test")
  asked = [instance("loglikelihood", *args(answer)) for answer in (lambda document: document["answer"], " he", "she")]
  found = [each.text for each in adapter.loglikelihood(asked)]
  assert found == [(-0.25, True), (0.25, True), (3.0, False)]


@pytest.mark.parametrize("axes, shape", [("", None), (",fsdp=2,tensor=4", (1, 2, 4))])
def test_a_model_lies_on_the_mesh_that_is_asked_for(monkeypatch, axes, shape):
  """On the tests' eight devices; options of `load` are passed on."""
  asked = {}

  def load(path, mesh, dtype, **parts):
    asked.update(mesh=mesh, dtype=dtype, parts=parts)
    return "model", "processor"

  monkeypatch.setattr(adapter_lib, "load", load)
  monkeypatch.setattr(adapter_lib, "Engine", lambda *made, rows, mesh: (*made, rows, mesh))
  adapter = Simple.create_from_arg_string(f"pretrained=folder,template=chatml{axes}", {"batch_size": "3"})
  assert adapter.engine == ("model", "processor", 3, asked["mesh"])
  assert asked["dtype"] is None and asked["parts"] == {"template": "chatml"}
  assert asked["mesh"] is None if shape is None else asked["mesh"].devices.shape == shape


def test_the_plugin_names_both_forms():
  project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
  (entry,) = project["entry-points"]["lmms_eval.models"].items()
  registry = ModelRegistryV2()
  registry.register_manifest(EntryPoint(*entry, "lmms_eval.models").load()())
  assert registry.get_model_class("mllm_jax") is Chat
  assert registry.get_model_class("mllm_jax", force_simple=True) is Simple
