"""The demo's tokenizer: a SentencePiece model of the Llama type, as Vicuna's is, whose words are those of the demo.

Byte-pair encoding with byte fallback, ids 0, 1, 2 for <unk>, <s>, </s>, and Vicuna's settings (`legacy` false). Only
the vocabulary is small, so that every word of the demo is one piece and rows are short.
"""

import io
import json
import pathlib

import numpy as np
import sentencepiece

from mllm_jax.demo import scenes, texts

SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VOCABULARY = 608  # about the smallest with which every word is one piece


def words() -> set[str]:
  """Every word that the demo's prompts and answers contain, without punctuation."""
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  lines = [SYSTEM, *scenes.COLOURS, *scenes.GROUNDS, *texts.NUMBERS, *map(str, range(10)), "yes no"]
  for _ in range(1000):
    scene = scenes.sample_scene(rng, scans)
    lines.append(texts.caption(rng, scene))
    for question in texts.converse(rng, scene, 5):
      lines += [question.text, question.answer]
  text = " ".join(lines)
  for mark in ".,:?'":
    text = text.replace(mark, " ")
  return set(text.split())


def train() -> bytes:
  """The serialised SentencePiece model."""
  vocabulary = sorted(words())
  # SentencePiece gives frequent pairs their piece first, so that every word must be frequent enough to become whole. A
  # word without its space occurs after a line break ("What") and after </s> ("USER"); here a comma takes their place.
  capitals = [word for word in vocabulary if word[0].isupper()] + ["USER", "ASSISTANT"]
  lines = [f"{word} " * 40 for word in [*vocabulary, "USER", "ASSISTANT"]]
  lines += [f",{word}" * 60 for word in capitals]
  lines += [". , : ? ' " * 40, ".,:?'" * 40]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type="bpe",
    vocab_size=VOCABULARY,
    byte_fallback=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    character_coverage=1.0,
    hard_vocab_limit=False,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def write(folder: pathlib.Path, model: bytes) -> None:
  """The files of a Llama tokenizer as Vicuna's repository has them."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model)
  special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  settings = {
    "add_bos_token": True,
    "add_eos_token": False,
    **special,
    "pad_token": None,
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 1024,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
  (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
