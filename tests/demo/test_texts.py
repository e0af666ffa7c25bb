"""Every answer is worked out again from the words of the question and the list of objects, by other code."""

import re

import numpy as np
import pytest

from mllm_jax.demo import scenes, texts

NUMBERS = ["zero", "one", "two", "three", "four", "five"]


def things(scene):
  return [{"colour": t.colour, "digit": str(t.digit), "at": t.place, "x": t.x} for t in scene.objects]


def find(scene, name):
  """The objects that a phrase may mean."""
  if match := re.fullmatch(r"(?:the|a) digit at the (.*)", name):
    key, value = "at", match[1]
  elif match := re.fullmatch(r"(?:the|a) digit (\d)", name):
    key, value = "digit", match[1]
  elif match := re.fullmatch(r"(?:the|a) (\w+) digit", name):
    key, value = "colour", match[1]
  else:
    raise AssertionError(name)
  return [thing for thing in things(scene) if thing[key] == value]


def only(found):
  assert len(found) == 1, "the question is ambiguous"
  return found[0]


def answer(scene, question):
  """The answer by reading the question."""
  rules = [
    (
      r"(?:What digit is|Which digit stands) at the (.*)",
      lambda at: only(find(scene, f"the digit at the {at}"))["digit"],
    ),
    (r"(?:What digit is|Which digit is written in) (\w+)", lambda c: only(find(scene, f"the {c} digit"))["digit"]),
    (r"Where (?:is|does) (.*?)(?: stand)?", lambda name: only(find(scene, name))["at"]),
    (r"How many digits (?:are there|does the picture show)", lambda: NUMBERS[len(scene.objects)]),
    (r"How many digits are (\w+)", lambda c: NUMBERS[len(find(scene, f"the {c} digit"))]),
    (r"How many (\w+) digits are there", lambda c: NUMBERS[len(find(scene, f"the {c} digit"))]),
    (
      r"How many times (?:is there a|does the) digit (\d)(?: stand there)?",
      lambda d: NUMBERS[len(find(scene, f"a digit {d}"))],
    ),
    (r"(?:What colour is the ground|Which colour does the ground show)", lambda: scene.ground),
    (
      r"(?:What colour|In which colour) is (the digit .*?)(?: written)?",
      lambda name: only(find(scene, name))["colour"],
    ),
    (
      r"(?:Is|Does) (the .*?)(?: stand)? left or right of (the .*)",
      lambda a, b: "left" if only(find(scene, a))["x"] < only(find(scene, b))["x"] else "right",
    ),
    (r"(?:Is there|Does the picture show) (a .*)", lambda name: "yes" if find(scene, name) else "no"),
  ]
  for pattern, rule in rules:
    if match := re.fullmatch(pattern + r"\?", question):
      return rule(*match.groups())
  raise AssertionError(f"no rule reads {question!r}")


@pytest.mark.parametrize("kind", texts.KINDS)
def test_answers_are_right_and_unambiguous(kind):
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  answers = []
  for _ in range(400):
    scene = scenes.sample_scene(rng, scans)
    question = texts.ask(rng, scene, kind)
    if question is not None:
      assert question.kind == kind
      assert question.answer == answer(scene, question.text), (question, scene)
      answers.append(question.answer)
  assert len(answers) > 200
  if len(set(answers)) == 2:  # yes or no, left or right: neither may be the safe guess; 400 draws scatter by 0.025
    assert abs(answers.count(answers[0]) / len(answers) - 0.5) < 0.1


def test_a_conversation_repeats_no_question_and_covers_all_kinds():
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  kinds = set()
  for _ in range(50):
    questions = texts.converse(rng, scenes.sample_scene(rng, scans), 5)
    assert len({question.text for question in questions}) == 5
    kinds |= {question.kind for question in questions}
  assert kinds == set(texts.KINDS)


def test_captions_name_every_object():
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  for _ in range(50):
    scene = scenes.sample_scene(rng, scans)
    caption = texts.caption(rng, scene)
    assert f"on {scene.ground} ground" in caption and f" {NUMBERS[len(scene.objects)]} digit" in caption
    for thing in things(scene):
      assert (
        f"a {thing['colour']} {thing['digit']} at the {thing['at']}" in caption
        or f"at the {thing['at']} a {thing['colour']} {thing['digit']}" in caption
      )
