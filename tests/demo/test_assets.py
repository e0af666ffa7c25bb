"""The shipped towers and tokenizer: their size, and that the project and transformers can read them."""

import pathlib

import numpy as np
import pytest
import sentencepiece

from mllm_jax.data import chat
from mllm_jax.data.records import Turn
from mllm_jax.demo import scenes, texts, towers_decoder, towers_vision, write
from mllm_jax.weights import clip, llama
from mllm_jax.weights.io import open_weights

ASSETS = pathlib.Path(write.__file__).parent / "assets"
PICTURE = chat.IMAGE_TOKEN_INDEX


@pytest.fixture(scope="module")
def tokenizer():
  return chat.load_tokenizer(str(ASSETS / "llama"))


@pytest.fixture(scope="module")
def speaker():
  return towers_decoder.Speaker((ASSETS / "llama" / "tokenizer.model").read_bytes())


def conversations(count, turns):
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  for _ in range(count):
    scene = scenes.sample_scene(rng, scans)
    yield scene, texts.caption(rng, scene), texts.converse(rng, scene, turns)


def test_the_assets_are_small():
  assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 8e6


def test_the_folders_describe_what_was_trained():
  assert clip.read_config(ASSETS / "clip") == towers_vision.CONFIG
  decoder = llama.read_config(ASSETS / "llama")
  assert decoder == towers_decoder.config(decoder.vocab_size)


def test_the_clip_folder_holds_a_whole_tower():
  weights = open_weights(ASSETS / "clip")
  names = set(weights.names())
  assert {"vision_model.post_layernorm.weight", "vision_model.encoder.layers.4.mlp.fc2.bias"} <= names
  assert weights.shape("vision_model.embeddings.patch_embedding.weight") == (128, 3, 14, 14)
  assert weights.shape("vision_model.embeddings.position_embedding.weight") == (65, 128)
  assert all(weights.dtype(name) == np.float16 and np.isfinite(weights.read(name)).all() for name in names)


def test_transformers_reads_the_configurations():
  transformers = pytest.importorskip("transformers")
  vision = transformers.AutoConfig.from_pretrained(ASSETS / "clip")
  assert type(vision).__name__ == "CLIPVisionConfig" and (vision.image_size, vision.patch_size) == (112, 14)
  language = transformers.AutoConfig.from_pretrained(ASSETS / "llama")
  assert type(language).__name__ == "LlamaConfig"
  assert language.head_dim * language.num_attention_heads == language.hidden_size
  tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "llama")
  assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
  assert len(tokenizer) == language.vocab_size


def test_the_tokenizer_returns_every_text_and_keeps_words_whole(tokenizer):
  model = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "llama" / "tokenizer.model"))
  for _, caption, questions in conversations(50, 3):
    for text in (caption, *(part for question in questions for part in (question.text, question.answer))):
      ids = model.encode(text)
      assert tokenizer.decode(ids) == text and 0 not in ids
      marks = sum(text.count(mark) for mark in ".,:?")
      assert len(ids) == len(text.split()) + marks  # one piece a word
  other = "Zebras & \u00e4pfel: 42"  # other words are spelt out, down to bytes
  assert tokenizer.decode(model.encode(other)) == other
  assert len(model.encode(towers_decoder.SYSTEM + " USER: ")) == 32


def test_the_decoder_was_trained_on_rows_as_the_templates_make_them(tokenizer, speaker):
  for _, caption, questions in conversations(30, 5):
    turns = []
    for i, question in enumerate(questions):
      turns += [Turn("human", ("" if i else "<image>\n") + question.text), Turn("gpt", question.answer)]
    captioned = [Turn("human", "<image>"), Turn("gpt", caption)]
    for expected, (before, parts) in (
      (chat.encode(turns, "vicuna_v1", tokenizer, 1), speaker.conversation(questions)),
      (chat.encode(captioned, "plain", tokenizer, 1), speaker.caption(caption)),
    ):
      ids = [*before, PICTURE, *(i for part, _ in parts for i in part)]
      trained_on = [False] * (len(before) + 1) + [on for part, on in parts for _ in part]
      np.testing.assert_array_equal(ids, expected.ids)
      np.testing.assert_array_equal(trained_on, expected.trained_on)
