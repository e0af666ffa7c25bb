"""In place of an engine: gives the replies it was told to, to whatever question holds their key."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import tiny

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Processor
from mllm_jax.inference.likelihood import Likelihood
from mllm_jax.inference.requests import Answer, Event
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors import tokens_per_crop
from mllm_jax.weights import folder
from mllm_jax.weights.tensors import InMemory

MODEL = ModelConfig(
  vision=VisionConfig(image_size=28, width=16, layers=2, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64),
  projector=ProjectorConfig(kind="mlp2x_gelu"),
  dtype="float32",
  remat="none",
)


def write_tokenizer(path: Path) -> str:
  path.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(tiny.GOLDENS / "tiny_spm.model", path / "tokenizer.model")
  words = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **words}
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  (path / "config.json").write_text('{"model_type": "llama"}')
  return str(path)


def processor(path: Path) -> Processor:
  tokenizer = chat.load_tokenizer(write_tokenizer(path))
  return Processor(tokenizer, Square(MODEL.vision, tokens_per_crop(MODEL)), "vicuna_v1", 256, 1)


def write_model(path: Path, vocab_size: int = MODEL.decoder.vocab_size) -> str:
  """A model's folder, with random values that make its greedy answers vary. Of the tokenizer's 512 tokens a smaller
  vocabulary cannot have all."""
  config = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab_size=vocab_size))
  draw = np.random.default_rng(3)
  fill = lambda name, shape: np.ones(shape) if name.endswith("scale") else draw.normal(0, 0.3, shape)
  flat = {name: fill(name, x.shape).astype(np.float32) for name, x in parameters.flatten(abstract(config))[1].items()}
  parts = {"vision": config.vision, "decoder": config.decoder, "projector": config.projector}
  tokenizer = write_tokenizer(path.with_name(path.name + "_tokenizer"))
  folder.write(path, folder.Manifest(parts, "vicuna_v1"), InMemory(flat), tokenizer)
  return str(path)


class Replies:
  """Answers after a few steps, the last that came first.

  Of given answers those that are replies are likely, and more so the shorter they are.

  prompts: the requests' texts in the order they came, each picture a "#".
  """

  def __init__(self, processor: Processor, replies: dict[str, str], rows: int = 3):
    self.processor, self.rows, self.replies = processor, rows, replies
    self.requests, self.prompts, self.weighed, self.most_waiting = [], [], [], 0
    self._open = []

  @property
  def waiting(self) -> int:
    return max(0, len(self._open) - self.rows)

  @property
  def running(self) -> int:
    return min(len(self._open), self.rows)

  def submit(self, request) -> int:
    if request.beams > self.rows:
      raise ValueError(f"beams is {request.beams}, and there are {self.rows} rows")
    self.requests.append(request)
    self.prompts.append(self._text(request.row))
    self._open.append(len(self.requests) - 1)
    self.most_waiting = max(self.most_waiting, self.waiting)
    return self._open[-1]

  def cancel(self, ticket: int) -> None:
    self._open.remove(ticket)

  def step(self) -> list[Event]:
    ticket = self._open.pop(min(self.rows, len(self._open)) - 1)
    found = [reply for key, reply in self.replies.items() if key in self.prompts[ticket]]
    assert len(found) == 1, (self.prompts[ticket], found)
    return [Event(ticket, found[0], Answer(found[0], (1,), "stop"))]

  def likelihoods(self, rows) -> list[Likelihood]:
    self.weighed.append(len(rows))
    return [self._likelihood(row) for row in rows]

  def _likelihood(self, row) -> Likelihood:
    places = np.flatnonzero(row.loss_weights)
    self.prompts.append(self._text(row))
    answer = self.processor.tokenizer.decode(row.targets[places])
    told = any(key in self.prompts[-1] and reply == answer for key, reply in self.replies.items())
    return Likelihood(-len(answer) / (8 if told else 1), len(places), told)

  def _text(self, row) -> str:
    """The prompt; what every picture takes is one "#"."""
    per_crop = self.processor.tokens_per_crop
    pieces, ids = [], []
    for place, visual in enumerate(row.visual_index):
      if visual < 0:
        ids.append(int(row.tokens[place]))
      elif visual % per_crop == 0:
        pieces += [self.processor.tokenizer.decode(ids), "#"]
        ids = []
    return "".join([*pieces, self.processor.tokenizer.decode(ids)])
