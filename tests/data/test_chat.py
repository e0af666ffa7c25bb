import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_jax.data import chat
from mllm_jax.data.records import DataError, Turn

TEMPLATE = {"v1": "vicuna_v1", "plain": "plain"}


def turns_of(case):
  turns = [Turn(turn["from"], turn["value"]) for turn in case["conversation"]]
  return turns if turns[0].role == "human" else turns[1:]


@pytest.fixture(scope="session")
def masking(goldens):
  return json.loads((goldens / "text_masking.json").read_text())


def talk(*texts):
  return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def runs(encoded):
  """The trained-on ids, one list for each stretch of them."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained_on, [0]])))
  return [encoded.ids[start:stop].tolist() for start, stop in edges.reshape(-1, 2)]


def test_ids_and_labels_are_the_released_ones(masking, tokenizers):
  assert len(masking["cases"]) == 22
  for case in masking["cases"]:
    encoded = chat.encode(turns_of(case), TEMPLATE[case["mode"]], tokenizers[case["legacy"]], int(case["has_image"]))
    assert encoded.ids.tolist() == case["input_ids"], case["name"]
    assert encoded.ids.dtype == np.int32 and encoded.trained_on.dtype == bool
    if case["name"] != "answer_contains_sep":  # where the released rule gives up
      assert np.where(encoded.trained_on, encoded.ids, -100).tolist() == case["labels"], case["name"]


def test_answer_with_separator_is_trained_on(masking, tokenizers):
  for case in masking["cases"]:
    if case["name"] == "answer_contains_sep":
      tokenizer = tokenizers[case["legacy"]]
      encoded = chat.encode(turns_of(case), "vicuna_v1", tokenizer, 1)
      (run,) = runs(encoded)
      assert tokenizer.decode(run) == "He said ASSISTANT: hello" and run[-1] == tokenizer.eos_id


def test_generation_prompts_are_the_released_ones(masking, tokenizers):
  for case in masking["gen_prompt"]:
    ids = chat.encode_prompt(talk("<image>\nWhat is in the image?"), "vicuna_v1", tokenizers[case["legacy"]], 1)
    assert ids.tolist() == case["ids"]


def test_chunks_around_images_are_the_released_ones(masking, tokenizers):
  for case in masking["tokenizer_image_token"]:
    pieces = []
    for i, text in enumerate(case["prompt"].split("<image>")):
      pieces += [chat.IMAGE] * (i > 0) + [chat.Piece("text", text)]
    assert chat._encode_pieces(pieces, tokenizers[case["legacy"]]).ids.tolist() == case["ids"]


def test_special_ids(tokenizers):
  for tokenizer in tokenizers.values():
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 0, 512)


@pytest.mark.parametrize("legacy", [False, True])
def test_leading_spaces_are_those_of_sentencepiece(legacy, tokenizers, goldens):
  sentencepiece = pytest.importorskip("sentencepiece")
  reference = sentencepiece.SentencePieceProcessor(str(goldens / "tiny_spm.model"))
  for text in ["", "a", " a", "  a", "\n", " \n", "\na", "   ", "the the", " two dogs ", "\u2713 ok", " \u4f60"]:
    assert tokenizers[legacy].encode_chunk([chat.Piece("text", text)]).ids.tolist() == reference.encode(text), text


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_typed_by_somebody_stay_text(legacy, tokenizers):
  tokenizer = tokenizers[legacy]
  text = "a </s> <s> <unk> <image> \ue000 b"
  encoded = chat.encode(talk("Q </s> \ue001", text), "vicuna_v1", tokenizer, 0)
  assert encoded.ids[0] == tokenizer.bos_id and encoded.ids[-1] == tokenizer.eos_id
  assert not {tokenizer.bos_id, tokenizer.eos_id, 0, chat.IMAGE_TOKEN_INDEX} & set(encoded.ids[1:-1].tolist())
  assert encoded.ids.max() < tokenizer.vocab_size
  assert [tokenizer.decode(run) for run in runs(encoded)] == [text]


# Everything but what the tokenizer itself cannot tell from a space, and half characters.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=12)
markers = st.sampled_from(
  ["</s>", "<s>", "<unk>", "ASSISTANT:", " ASSISTANT: ", "USER:", "\n", "  ", "\ue000", "\ue001", "\U0001f642"]
)
questions = st.lists(texts | markers, max_size=5).map("".join).filter(lambda text: "<image>" not in text)
answers = st.lists(texts | markers | st.just("<image>"), max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(
  pairs=st.lists(st.tuples(questions, answers), min_size=1, max_size=4),
  n_images=st.integers(0, 2),
  legacy=st.booleans(),
)
@example(pairs=[("", "")], n_images=1, legacy=False)
@example(pairs=[("Hi ", " x"), ("", "</s>"), ("\ue000", "")], n_images=0, legacy=False)
def test_exactly_the_answers_are_trained_on(pairs, n_images, legacy, tokenizers):
  tokenizer = tokenizers[legacy]
  turns = talk(*(text for pair in pairs for text in pair))
  turns[0] = Turn("human", "<image>" * n_images + turns[0].text)
  encoded = chat.encode(turns, "vicuna_v1", tokenizer, n_images)
  expected = [answer for _, answer in pairs if answer]
  found = runs(encoded)
  assert [tokenizer.decode(run) for run in found] == expected
  assert all(run[-1] == tokenizer.eos_id and run.count(tokenizer.eos_id) == 1 for run in found)
  assert (encoded.ids == tokenizer.eos_id).sum() == len(expected)
  assert (encoded.ids == chat.IMAGE_TOKEN_INDEX).sum() == n_images
  assert (encoded.ids == tokenizer.bos_id).sum() == 1


@settings(max_examples=50, deadline=None)
@given(caption=answers.filter(bool), legacy=st.booleans())
def test_exactly_the_caption_is_trained_on(caption, legacy, tokenizers):
  tokenizer = tokenizers[legacy]
  encoded = chat.encode(talk("Describe it.\n<image>", caption), "plain", tokenizer, 1)
  assert encoded.ids[:2].tolist() == [tokenizer.bos_id, chat.IMAGE_TOKEN_INDEX]
  assert not encoded.trained_on[:2].any() and encoded.trained_on[2:].all()
  assert tokenizer.decode(encoded.ids[2:]) == caption + "\n"


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(questions, answers), min_size=1, max_size=3), legacy=st.booleans())
def test_a_prompt_is_the_beginning_of_its_training_row(pairs, legacy, tokenizers):
  turns = talk(*(text for pair in pairs for text in pair))
  prompt = chat.encode_prompt(turns[:-1], "vicuna_v1", tokenizers[legacy], 0)
  assert chat.encode(turns, "vicuna_v1", tokenizers[legacy], 0).ids[: len(prompt)].tolist() == prompt.tolist()


def test_placeholders_move_to_the_front_of_their_turn(tokenizers):
  def ids(*texts, n_images):
    return chat.encode(talk(*texts), "vicuna_v1", tokenizers[False], n_images).ids.tolist()

  assert ids("Q\n<image>", "A", n_images=1) == ids("<image>\nQ", "A", n_images=1)
  assert ids("<image> Q <image>", "A", n_images=2) == ids("<image>\n<image>\nQ", "A", n_images=2)
  assert ids("Q", "A", "<image>R", "B", n_images=1) == ids("Q", "A", "<image>\nR", "B", n_images=1)
  only_image = ids("<image>", "A", n_images=1)
  assert only_image[only_image.index(-200) + 1 :][:1] != [13]  # no line break where no text follows


def test_system_text_is_replaced(tokenizers):
  tokenizer = tokenizers[False]
  default = chat.encode(talk("Q", "A"), "vicuna_v1", tokenizer, 0).ids
  assert tokenizer.decode(default) == chat.VICUNA_SYSTEM + " USER: Q ASSISTANT: A"
  assert (
    tokenizer.decode(chat.encode(talk("Q", "A"), "vicuna_v1", tokenizer, 0, "Be brief.").ids)
    == "Be brief. USER: Q ASSISTANT: A"
  )
  assert tokenizer.decode(chat.encode(talk("Q", "A"), "vicuna_v1", tokenizer, 0, "").ids) == "USER: Q ASSISTANT: A"


def test_plain_prompt_is_the_images_alone(tokenizers):
  assert chat.encode_prompt(talk("<image>Describe"), "plain", tokenizers[False], 1).tolist() == [1, -200]


@pytest.mark.parametrize(
  "turns,template,n_images,message",
  [
    (talk("Q", "A"), "llama_3", 0, "unknown template 'llama_3'; data.template must be one of vicuna_v1, plain"),
    (talk("Q", "A"), "vicuna_v1", 1, "0 <image> in the human turns but 1 images"),
    (talk("<image>", "A"), "vicuna_v1", 0, "1 <image> in the human turns but 0 images"),
    ([Turn("gpt", "A")], "vicuna_v1", 0, "turn 0 is of 'gpt' where one of 'human' is due"),
    ([Turn("human", "Q"), Turn("human", "Q")], "vicuna_v1", 0, "turn 1 is of 'human'"),
    (talk("Q", "A", "R", "B"), "plain", 0, "takes one question and one answer, not 4 turns"),
  ],
)
def test_bad_conversations(turns, template, n_images, message, tokenizers):
  with pytest.raises(DataError, match=message):
    chat.encode(turns, template, tokenizers[False], n_images)


def test_prompt_must_end_with_a_question(tokenizers):
  for turns in ([], talk("Q", "A")):
    with pytest.raises(DataError, match="the last turn is not a question"):
      chat.encode_prompt(turns, "vicuna_v1", tokenizers[False], 0)


def test_pickling_keeps_special_tokens_text(tokenizers):
  copy = pickle.loads(pickle.dumps(tokenizers[False]))
  turns = talk("</s>", "a </s> b", "c", "d")
  before, after = (chat.encode(turns, "vicuna_v1", tokenizer, 0) for tokenizer in (tokenizers[False], copy))
  assert before.ids.tolist() == after.ids.tolist() and before.trained_on.tolist() == after.trained_on.tolist()


@pytest.mark.parametrize(
  "given, expected", [({"eos_token_id": [7, 2, 9]}, {2, 7, 9}), ({"eos_token_id": 5}, {2, 5}), ({}, {2}), (None, {2})]
)
def test_further_tokens_that_end_answers(tokenizer_folders, tmp_path, given, expected):
  """generation_config.json travels with the tokenizer."""
  source = shutil.copytree(tokenizer_folders[False], tmp_path / "source")
  if given is not None:
    (source / "generation_config.json").write_text(json.dumps(given))
  chat.copy_tokenizer(source, tmp_path / "copy")
  tokenizer = chat.load_tokenizer(str(tmp_path / "copy"))
  assert tokenizer.end_ids == pickle.loads(pickle.dumps(tokenizer)).end_ids == expected


@pytest.mark.parametrize(
  "text, message", [("[", "no JSON"), ('{"eos_token_id": ["</s>"]}', "eos_token_id is"), ("3", "no JSON")]
)
def test_a_damaged_generation_config_is_named(tokenizer_folders, tmp_path, text, message):
  folder = shutil.copytree(tokenizer_folders[False], tmp_path / "source")
  (folder / "generation_config.json").write_text(text)
  with pytest.raises(DataError, match=f"generation_config.json: .*{message}"):
    chat.load_tokenizer(str(folder))


def test_tokenizer_folders_that_are_none(tmp_path):
  with pytest.raises(DataError, match="no such folder"):
    chat.load_tokenizer(str(tmp_path / "none"))
  with pytest.raises(DataError, match="looked for tokenizer.json, tokenizer.model, vocab.json"):
    chat.load_tokenizer(str(tmp_path))
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
    chat.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
  "kind, named", [("llava", True), ("llava", False), ("llava_llama", True), ("llava_llama", False)]
)
def test_the_config_beside_a_tokenizer_does_not_change_its_ids(tmp_path, kind, named):
  """transformers 5 leaves out the space before a text where config.json says llava."""
  shutil.copyfile(Path(__file__).parents[1] / "goldens" / "sp" / "tiny_spm.model", tmp_path / "tokenizer.model")
  settings = {"legacy": False, "add_bos_token": True, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  settings |= {"tokenizer_class": "LlamaTokenizer"} if named else {}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  text = [chat.Piece("text", "Hi there"), chat.END, chat.Piece("text", "USER: what\nis")]
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  expected = chat.load_tokenizer(str(tmp_path)).encode_chunk(text).ids
  (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {"model_type": "llama"}}))
  np.testing.assert_array_equal(chat.load_tokenizer(str(tmp_path)).encode_chunk(text).ids, expected)
