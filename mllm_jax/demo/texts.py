"""What is said about a scene: captions, and questions with short answers.

Every question has exactly one right answer: an object is referred to by its colour or its digit only where no other
object shares it, and left or right is asked only of objects in different columns.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mllm_jax.demo import scenes
from mllm_jax.demo.scenes import Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five")


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about one scene. `kind` is a key of KINDS."""

  kind: str
  text: str
  answer: str


def _pick(rng: np.random.Generator, options):
  return options[rng.integers(len(options))]


def _unique(scene: Scene, attribute: str) -> list[Object]:
  """The objects that no other object equals in `attribute`."""
  values = [getattr(thing, attribute) for thing in scene.objects]
  return [thing for thing, value in zip(scene.objects, values) if values.count(value) == 1]


def _references(scene: Scene) -> list[tuple[Object, str]]:
  """Every way to speak of exactly one object by its colour or its digit."""
  return [(thing, f"the {thing.colour} digit") for thing in _unique(scene, "colour")] + [
    (thing, f"the digit {thing.digit}") for thing in _unique(scene, "digit")
  ]


def _digit_at(rng, scene):
  thing = _pick(rng, scene.objects)
  text = _pick(rng, ("What digit is at the {}?", "Which digit stands at the {}?")).format(thing.place)
  return text, str(thing.digit)


def _digit_of_colour(rng, scene):
  things = _unique(scene, "colour")
  if not things:
    return None
  thing = _pick(rng, things)
  return _pick(rng, ("What digit is {}?", "Which digit is written in {}?")).format(thing.colour), str(thing.digit)


def _where(rng, scene):
  references = _references(scene)
  if not references:
    return None
  thing, name = _pick(rng, references)
  return _pick(rng, ("Where is {}?", "Where does {} stand?")).format(name), thing.place


def _count(rng, scene):
  if rng.random() < 0.5:
    text = _pick(rng, ("How many digits are there?", "How many digits does the picture show?"))
    return text, NUMBERS[len(scene.objects)]
  attribute = _pick(rng, ("colour", "digit"))
  values = [getattr(thing, attribute) for thing in scene.objects]
  absent = [value for value in (scenes.COLOURS if attribute == "colour" else range(10)) if value not in values]
  number = _pick(rng, sorted({0, *map(values.count, values)}))  # each number that occurs is asked for equally often
  value = _pick(rng, absent if number == 0 else sorted({value for value in values if values.count(value) == number}))
  texts = {
    "colour": ("How many digits are {}?", "How many {} digits are there?"),
    "digit": ("How many times is there a digit {}?", "How many times does the digit {} stand there?"),
  }
  return _pick(rng, texts[attribute]).format(value), NUMBERS[number]


def _colour(rng, scene):
  if rng.random() < 0.5:
    thing = _pick(rng, scene.objects)
    name = f"the digit at the {thing.place}"
  else:
    things = _unique(scene, "digit")
    if not things:
      return None
    thing = _pick(rng, things)
    name = f"the digit {thing.digit}"
  return _pick(rng, ("What colour is {}?", "In which colour is {} written?")).format(name), thing.colour


def _ground(rng, scene):
  return _pick(rng, ("What colour is the ground?", "Which colour does the ground show?")), scene.ground


def _side(rng, scene):
  references = _references(scene)
  pairs = [(first, second) for first in references for second in references if first[0].column != second[0].column]
  if not pairs:
    return None
  wanted = rng.random() < 0.5  # every pair is there in both orders, so either answer can be had
  pairs = [(first, second) for first, second in pairs if (first[0].column < second[0].column) == wanted]
  (_, first), (_, second) = _pick(rng, pairs)
  text = _pick(rng, ("Is {} left or right of {}?", "Does {} stand left or right of {}?")).format(first, second)
  return text, "left" if wanted else "right"


def _exists(rng, scene):
  attribute = _pick(rng, ("colour", "digit"))
  present = sorted({getattr(thing, attribute) for thing in scene.objects})
  everything = list(scenes.COLOURS) if attribute == "colour" else list(range(10))
  wanted = rng.random() < 0.5
  value = _pick(rng, [value for value in everything if (value in present) == wanted])
  name = f"a {value} digit" if attribute == "colour" else f"a digit {value}"
  return _pick(rng, ("Is there {}?", "Does the picture show {}?")).format(name), "yes" if wanted else "no"


KINDS: dict[str, Callable] = {
  "digit at a place": _digit_at,
  "digit of a colour": _digit_of_colour,
  "where": _where,
  "count": _count,
  "colour": _colour,
  "ground": _ground,
  "left or right": _side,
  "exists": _exists,
}


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
  """A question of that kind, or None where the scene allows none."""
  made = KINDS[kind](rng, scene)
  return None if made is None else Question(kind, *made)


def converse(
  rng: np.random.Generator, scene: Scene, turns: int, kinds: tuple[str, ...] = tuple(KINDS)
) -> list[Question]:
  """`turns` questions, no wording twice. Their kinds are drawn from `kinds`, in which one may stand several times."""
  chosen: dict[str, Question] = {}
  while len(chosen) < turns:
    question = ask(rng, scene, _pick(rng, kinds))
    if question is not None:
      chosen.setdefault(question.text, question)
  return list(chosen.values())


def caption(rng: np.random.Generator, scene: Scene) -> str:
  """One sentence that names everything in the scene, the objects in reading order."""
  things, number = scene.objects, len(scene.objects)
  opening = "There is one digit" if number == 1 else f"There are {NUMBERS[number]} digits"
  if rng.random() < 0.5:
    listing = ", ".join(f"a {thing.colour} {thing.digit} at the {thing.place}" for thing in things)
  else:
    listing = ", ".join(f"at the {thing.place} a {thing.colour} {thing.digit}" for thing in things)
  return f"{opening} on {scene.ground} ground: {listing}."
