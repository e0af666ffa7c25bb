"""Scorers: public example figures, cases worked out by hand, and what must hold for any answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_jax.benchmarks.scorers import boxes, letters, mmmu, texts, vqa, yes_no

# ---- VQA accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("people, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_how_many_of_ten_gave_the_answer(people, accuracy):
  # The figures that visualqa.org and Antol et al. give for leaving each person out once.
  gold = ["red"] * people + [f"other {n}" for n in range(10 - people)]
  assert vqa.soft_accuracy("Red.", gold) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
  "answer, normal",
  [
    ("The Red Car.", "red car"),
    ("two", "2"),
    ("None", "0"),
    ("ten dogs", "10 dogs"),
    ("3.5", "3.5"),
    ("1,000", "1000"),
    ("yes, it is", "yes it is"),
    ("dont know", "don't know"),
    ("couldntve", "couldntve"),  # the table restores one apostrophe only
    ("couldn'tve", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("'ows'at", "'ow's'at"),
    ("john's", "john 's"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("t-shirt", "t shirt"),
    ("a - b", "b"),  # the hyphen goes, then a counts as an article
    ("an apple\nand\ta pear", "apple and pear"),
    ("", ""),
  ],
)
def test_vqa_normalisation(answer, normal):
  assert vqa.normalise(answer) == normal


@given(st.text(max_size=30), st.lists(st.text(max_size=8), min_size=10, max_size=10))
def test_vqa_accuracy_is_a_fraction_and_normalisation_ignores_case(answer, gold):
  assert 0 <= vqa.soft_accuracy(answer, gold) <= 1
  assert vqa.soft_accuracy(gold[0], gold) >= 0.3 - 1e-12
  assert vqa.normalise(vqa.normalise(answer)).count("  ") == 0


# ---- letters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "answer, letter",
  [
    ("B", "B"),
    ("B. warm", "B"),
    ("The answer is B.", "B"),
    ("I think The answer is A. Or not", "A"),
    ("The answer is A. The answer is B.", None),
    ("b", None),
    ("B.", None),  # as the released script: neither the letter alone nor "B. ..."
    (" B", None),
    ("C", None),  # beyond the two options
    ("", None),
  ],
)
def test_scienceqa_letters(answer, letter):
  assert letters.scienceqa_letter(answer, 2) == letter


@pytest.mark.parametrize(
  "answer, letter",
  [
    ("B", "B"),
    ("B.", "B"),
    ("(C)", "C"),
    ("C: bee", "C"),
    ("D", None),
    ("The answer is B", "B"),
    ("Option A is the right one here", "A"),
    ("A fox is seen near the owl there", None),  # two options' words, and the article is no letter
    ("A bee sits on a flower", "C"),
    ("either A or B", None),
    ("It is an owl.", "B"),
    ("nothing of that", None),
    ("", None),
  ],
)
def test_letters_of_free_answers(answer, letter):
  assert letters.letter_of(answer, ["fox", "owl", "bee"]) == letter


@given(st.text(max_size=40), st.lists(st.text(max_size=6), min_size=1, max_size=6))
def test_a_letter_is_one_of_the_options_or_none(answer, options):
  known = letters.LETTERS[: len(options)]
  found = letters.letter_of(answer, options), letters.scienceqa_letter(answer, len(options))
  assert all(letter is None or letter in known for letter in found)
  for letter in known:
    assert letters.letter_of(f" ({letter}) ", options) == letter


# ---- yes or no -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "answer, pope, mme",
  [
    ("Yes", True, "yes"),
    ("No", False, "no"),
    ("no, there is none", False, "no"),
    ("There is not. Yes", False, "other"),
    ("Nothing", True, "no"),
    ("NO", True, "no"),
    ("Not at all", True, "no"),
    ("I do not", False, "other"),
    ("eyes", True, "yes"),
    ("", True, "other"),
  ],
)
def test_how_pope_and_mme_read_an_answer(answer, pope, mme):
  assert (yes_no.pope_says_yes(answer), yes_no.mme_answer(answer)) == (pope, mme)


def test_f1_precision_recall_and_the_share_of_yes():
  found = yes_no.binary([True, True, True, False, False], [True, True, False, True, False])
  assert found == yes_no.Binary(accuracy=0.6, precision=2 / 3, recall=2 / 3, f1=pytest.approx(2 / 3), yes=0.6)
  assert yes_no.binary([False], [True]) == yes_no.Binary(0.0, 0.0, 0.0, 0.0, 0.0)


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_are_read_and_padding_is_undone():
  assert boxes.parse("It is at [0.12, .5,0.9,1.0], or [0, 0, 1, 1]") == (0.12, 0.5, 0.9, 1.0)
  assert [boxes.parse(text) for text in ("", "[0.1,0.2,0.3]", "0.1,0.2,0.3,0.4", "[a,b,c,d]")] == [None] * 4
  assert boxes.in_pixels((0, 0.25, 1, 0.75), 80, 40, padded=True) == (0, 0, 80, 40)
  assert boxes.in_pixels((0.25, 0, 0.75, 1), 40, 80, padded=True) == (0, 0, 40, 80)
  assert boxes.in_pixels((0, 0.25, 1, 0.75), 80, 40, padded=False) == (0, 10, 80, 30)


def test_intersection_over_union():
  assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
  assert boxes.iou((0, 0, 2, 1), (0, 0, 1, 1)) == 0.5
  assert boxes.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
  assert boxes.iou((1, 1, 0, 0), (0, 0, 1, 1)) == 0


BOX = st.tuples(*[st.floats(0, 1)] * 4)


@given(BOX, BOX, st.integers(1, 999), st.integers(1, 999), st.booleans())
def test_iou_is_symmetric_and_at_most_one(a, b, width, height, padded):
  a, b = (boxes.in_pixels(box, width, height, padded) for box in (a, b))
  assert boxes.iou(a, b) == boxes.iou(b, a)
  assert 0 <= boxes.iou(a, b) <= 1 + 1e-9
  if a[0] < a[2] and a[1] < a[3]:
    assert boxes.iou(a, a) == 1


@given(st.text(max_size=60))
def test_any_text_has_a_box_or_none(text):
  found = boxes.parse(text)
  assert found is None or len(found) == 4


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_edit_distance():
  assert [texts.edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("a", "a"))] == [3, 3, 0]


@pytest.mark.parametrize(
  "answer, golds, score",
  [
    ("John Doe", ["john  doe"], 1.0),
    ("Jon Doe", ["John Doe"], 1 - 1 / 8),
    ("abcd", ["abxy"], 0.5),  # a distance of just half counts, as in the public scripts
    ("abcd", ["axyz"], 0.0),
    ("abcd", ["abcx", "zzzz"], 0.75),
    ("", ["a"], 0.0),
    ("", [""], 1.0),
  ],
)
def test_anls(answer, golds, score):
  assert texts.anls(answer, golds) == pytest.approx(score)


@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_anls_is_a_fraction_and_one_for_a_gold(answer, golds):
  assert texts.anls(answer, golds) == 0 or 0.5 <= texts.anls(answer, golds) <= 1
  assert texts.anls(golds[-1].upper() if golds[-1].isascii() else golds[-1], golds) == 1


@pytest.mark.parametrize(
  "answer, gold, right",
  [
    ("105", "100", True),
    ("95.0", "100", True),
    ("105.1", "100", False),
    ("5%", "0.05", True),
    ("5", "5%", False),
    ("-10.4", "-10", True),
    ("0", "0", True),
    ("0.0", "0", False),
    ("kenya ", "Kenya", True),
    ("Kenia", "Kenya", False),
    ("100 people", "100", False),
  ],
)
def test_relaxed_accuracy(answer, gold, right):
  assert texts.relaxed_match(answer, gold) is right


def test_ocrbench_looks_for_the_gold_inside():
  assert texts.ocrbench_match("The word is\ncentre.", ["CENTRE"], formula=False)
  assert not texts.ocrbench_match("center", ["CENTRE"], formula=False)
  assert texts.ocrbench_match(r"\frac{a}{b}", [r"\frac { a } { b }"], formula=True)
  assert not texts.ocrbench_match(r"\frac{A}{b}", [r"\frac { a } { b }"], formula=True)
  assert not texts.ocrbench_match("a b", ["ab"], formula=False)


# ---- MMMU ------------------------------------------------------------------------------------------------------------

OPTIONS = ["an old map", "a new map", "a photograph"]


@pytest.mark.parametrize(
  "answer, letter",
  [
    ("B", "B"),
    ("(C)", "C"),
    ("B.", "B"),
    ("(A) or rather (B)", "B"),
    ("A is wrong, so C is right", "C"),
    ("(A), but B too", "A"),  # a letter in brackets goes first
    ("one can see that this is a photograph of it", "C"),
    ("this is a new map, no: it is an old map", "A"),
  ],
)
def test_mmmu_choices(answer, letter):
  assert mmmu.choice(answer, OPTIONS, "q") == letter


def test_an_answer_without_a_choice_is_drawn_the_same_every_time():
  drawn = [mmmu.choice("no idea", OPTIONS, f"question {n}") for n in range(300)]
  assert drawn == [mmmu.choice("no idea", OPTIONS, f"question {n}") for n in range(300)]
  assert all(60 < drawn.count(letter) < 140 for letter in "ABC")  # a third each; 4.9 standard deviations


@pytest.mark.parametrize(
  "answer, golds, right",
  [
    ("2.5", ["2.5"], True),
    ("The length is 2.50 cm.", ["2.5"], True),
    ("x = 1\ny = 1,234", ["1234"], True),
    ("1.23e3", ["1230"], True),
    ("It is 3", ["2.5"], False),
    ("I think it is the left ventricle", ["left ventricle"], True),
    ("the right one", ["left ventricle", "right one"], True),
    ("vitamin C", ["C"], True),
    ("carbon", ["C"], False),
    ("", ["2"], False),
  ],
)
def test_mmmu_open_answers(answer, golds, right):
  assert mmmu.open_match(answer, golds) is right


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5))
def test_mmmu_reads_any_answer(answer, options):
  assert mmmu.choice(answer, options, "q") in letters.LETTERS[: len(options)]
  assert isinstance(mmmu.open_match(answer, options), bool)
