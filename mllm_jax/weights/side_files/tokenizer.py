"""The tokenizer of an exported folder: ours, with a token for an image and one for padding."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mllm_jax.config import ConfigError, DecoderConfig
from mllm_jax.data import chat
from mllm_jax.weights.side_files.files import write_json

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"  # as llava-hf/llava-1.5-7b-hf calls them
MULTIPLE = 64  # of the embedding's rows there: 32000 become 32064
ENDLESS = 10**9  # transformers stands a number of 30 digits for a length without a limit
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclasses.dataclass(frozen=True)
class HfVocabulary:
  """The ids of an exported model. Its embedding and its head have `vocab_size` rows; the rows that the model has not
  are to be filled with the mean of the others: the logit of such a token is the mean of the other logits, so that
  greedy decoding never picks it."""

  image_token_id: int
  pad_token_id: int
  vocab_size: int


def hf_vocabulary(tokenizer_folder: str | Path, decoder: DecoderConfig) -> HfVocabulary:
  """The vocabulary by llava-hf's convention: `<image>` and `<pad>` are the two ids after the last, and the number of
  rows is the next multiple of 64. A tokenizer's own `<image>` is used where it has one, and its own padding token
  unless that stands for unknown characters too; where both lie within the model's rows nothing is added.

  Raises DataError where the folder's tokenizer cannot be used.
  """
  tokenizer = chat.hf_tokenizer(tokenizer_folder)
  ids = tokenizer.get_vocab()
  free = max(decoder.vocab_size, *(number + 1 for number in ids.values()))
  image, pad = ids.get(IMAGE_TOKEN), ids.get(_pad_token(tokenizer))
  if image is None:
    image, free = free, free + 1
  if pad is None:
    pad, free = free, free + 1
  rows = decoder.vocab_size if max(image, pad) < decoder.vocab_size else -(-free // MULTIPLE) * MULTIPLE
  return HfVocabulary(image, pad, rows)


def extended(tokenizer: Any, vocabulary: HfVocabulary) -> dict[str, Any]:
  """The content of tokenizer.json, with the image and the padding token as special tokens.

  The tokenizers library numbers added tokens itself, from the size of the vocabulary, and does not read their ids. An
  embedding may have more rows than that, as Qwen2's has; then all added tokens are made part of the vocabulary, where
  ids are read. No merge leads to them, so that nothing else is tokenized differently.

  Raises ConfigError where the ids cannot be had.
  """
  content = json.loads(tokenizer.backend_tokenizer.to_str())
  content["truncation"] = content["padding"] = None
  added = content["added_tokens"]
  names = {IMAGE_TOKEN: vocabulary.image_token_id, _pad_token(tokenizer): vocabulary.pad_token_id}
  for name, number in names.items():
    known = next((token for token in added if token["content"] == name), None)
    if known is None:
      added.append({"id": number, "content": name, **ADDED})
    else:
      known["special"] = True
  if _misnumbered(content) and isinstance(content["model"]["vocab"], dict):
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in added}
  owners = {number: name for name, number in tokenizer.get_vocab().items()}
  taken = [name for name, number in names.items() if owners.get(number, name) != name]
  if taken or _misnumbered(content):
    raise ConfigError(
      f"{tokenizer.name_or_path}: this tokenizer cannot give its tokens the ids {names}; use the vocabulary that "
      "hf_vocabulary makes for this folder, and a BPE tokenizer"
    )
  return content


def _misnumbered(content: dict[str, Any]) -> list[str]:
  """The added tokens that the tokenizers library gives another id than they should have."""
  backend = Tokenizer.from_str(json.dumps(content))
  return [token["content"] for token in content["added_tokens"] if backend.token_to_id(token["content"]) != token["id"]]


def write(folder: Path, source: Path, tokenizer: Any, content: dict[str, Any]) -> None:
  """Writes the tokenizer's files, `content` being that of tokenizer.json.

  The class is the one that takes tokenizer.json as it is. A class of a family builds its own from the vocabulary and
  decides anew, and differently by version, what the flag `legacy` means.
  """
  named = {
    f"{kind}_token": name for kind in ("bos", "eos", "unk") if (name := getattr(tokenizer, f"{kind}_token")) is not None
  } | {"pad_token": _pad_token(tokenizer)}
  own = content["added_tokens"]
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    **named,
    "added_tokens_decoder": {
      str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in own
    },
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",  # answers of a batch begin at one place
  }
  if tokenizer.model_max_length < ENDLESS:
    config["model_max_length"] = tokenizer.model_max_length
  write_json(folder / "tokenizer.json", content)
  write_json(folder / "tokenizer_config.json", config)
  write_json(folder / "special_tokens_map.json", named)
  base = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
  base = base if isinstance(base, dict) else {name for name, _ in base}
  write_json(
    folder / "added_tokens.json", {token["content"]: token["id"] for token in own if token["content"] not in base}
  )
  if (source / "tokenizer.model").is_file():
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")


def _pad_token(tokenizer: Any) -> str:
  """The tokenizer's padding token, `<pad>` where it has none of its own: Vicuna's is the unknown token, which may
  stand in a text and would be masked there."""
  own = tokenizer.pad_token
  return PAD_TOKEN if own is None or own == tokenizer.unk_token else own
