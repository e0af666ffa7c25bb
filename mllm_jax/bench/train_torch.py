"""PyTorch's side of `python -m mllm_jax.bench train`: the same step from transformers' towers and PEFT's adapters.

What one would run instead, without what would slow it down: eager modules with SDPA attention, the tower only as deep
as its features need, no attention mask (padding stands at the end, where causal attention does not see it), whole maps
under one product where a convolution covers them, fused AdamW. Frozen weights are in the type of the computation, what
is trained is float32 under autocast. The loss is transformers' own, of all logits.
"""

import contextlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, get_cosine_schedule_with_warmup

from mllm_jax.batch import Batch
from mllm_jax.bench.train_case import SCHEDULE_STEPS, TURN, Case
from mllm_jax.bench.vdim import resident
from mllm_jax.config import ModelConfig
from mllm_jax.data.images import normalise
from mllm_jax.data.patches import unpatchify
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.models.projectors.spatial import DFI_STRIDE
from mllm_jax.weights.side_files.files import text_config
from mllm_jax.weights.side_files.hf import vision_config

IGNORED = -100  # the label of a token that is not predicted


class Projector(nn.Module):
  """LLaVA-SP's cropping projector with DFI under the released names: features [B, P, C] -> [B, T, D]."""

  def __init__(self, model: ModelConfig):
    super().__init__()
    self.grid, config = model.vision.grid, model.projector
    channels, inner, width = model.vision.width, config.conv_width, model.decoder.width
    self.sizes = map_sizes(config, self.grid)
    for size in self.sizes:
      self.add_module(f"conv_{size}", nn.Conv2d(channels, inner, size, bias=False))
    self.conv_CM = nn.Conv2d(channels, inner, config.dfi_kernel, DFI_STRIDE, bias=False)
    normed = lambda: nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, inner))
    self.query_projector, self.key_projector, self.value_projector = normed(), normed(), normed()
    self.conv_linear = nn.Sequential(nn.GELU(), nn.Linear(2 * inner, width))
    self.mm_projector = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))

  def forward(self, features: torch.Tensor) -> torch.Tensor:
    patch_map = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
    crops = []
    for size in self.sizes:
      start = (self.grid - size) // 2
      crop = patch_map[:, :, start : start + size, start : start + size]
      crops.append(convolved(crop, getattr(self, f"conv_{size}")))
    tokens, details = torch.cat(crops, dim=1), convolved(patch_map, self.conv_CM)
    queries, keys, values = self.query_projector(tokens), self.key_projector(details), self.value_projector(details)
    found = F.scaled_dot_product_attention(queries, keys, values)
    return torch.cat([self.conv_linear(torch.cat([tokens, found], -1)), self.mm_projector(features)], dim=1)


def convolved(patch_map: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
  """What the layer gives for a map [B, C, G, G], row by row [B, M, E], as one product of all its windows."""
  (size, _), (stride, _) = layer.kernel_size, layer.stride
  windows = patch_map.unfold(2, size, stride).unfold(3, size, stride)
  return F.linear(windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), layer.weight.flatten(1))


def modules(model: ModelConfig, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
  """Tower, decoder with adapters, and projector, with random weights that are made on the device."""
  with device:
    of = dict(dtype=getattr(torch, model.dtype), attn_implementation="sdpa")
    tower = AutoModel.from_config(CLIPVisionConfig(**vision_config(model.vision)), **of).eval()
    decoder = LlamaConfig(vocab_size=model.decoder.vocab_size, **text_config(model.decoder))
    decoder, projector = AutoModelForCausalLM.from_config(decoder, **of), Projector(model)
    lora = model.lora
    adapters = LoraConfig(
      r=lora.rank,
      lora_alpha=lora.alpha,
      lora_dropout=lora.dropout,
      target_modules=list(lora.targets),
      task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(decoder, adapters).train()
  if model.remat != "none":
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
  return tower, adapted, projector


class Torch:
  """The same step. Raises SystemExit where PyTorch has no such device."""

  def __init__(self, case: Case, batch: Batch, platform: str):
    if platform == "gpu" and not torch.cuda.is_available():
      raise SystemExit("jax has a GPU and this PyTorch has none; install one built for CUDA, or use --only=ours")
    if platform not in ("cpu", "gpu"):
      raise SystemExit(f"PyTorch is compared on GPU and CPU, and jax has a {platform.upper()}; use --only=ours")
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    self.device = torch.device("cuda" if platform == "gpu" else "cpu")
    self.before = resident("VmRSS")
    model, stage = case.model, case.stage
    self.mixed = model.dtype == "bfloat16"
    self.tower, self.decoder, self.projector = modules(model, self.device)
    # The adapters' inputs stay in 16 bits, as autocast would have them anyway.
    self.uncast = contextlib.ExitStack()
    self.uncast.enter_context(disable_input_dtype_casting(self.decoder, self.mixed))

    rate_of = lambda start: max(rate for path, rate in case.rates.items() if path.startswith(start))
    trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
    self.optimizer = torch.optim.AdamW(
      [
        {"params": trained, "lr": rate_of("decoder/")},
        {"params": list(self.projector.parameters()), "lr": rate_of("projector/")},
      ],
      betas=(stage.beta1, stage.beta2),
      eps=stage.eps,
      weight_decay=stage.weight_decay,
      fused=self.device.type == "cuda",
    )
    warmup = math.ceil(stage.warmup_ratio * SCHEDULE_STEPS)
    self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, SCHEDULE_STEPS)
    self._place(batch, model)
    device_kind = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
    self.facts = case.facts(batch, device_kind) | {"platform": platform, "attention": "sdpa"}

  def _place(self, batch: Batch, model: ModelConfig) -> None:
    """The batch on the device, with labels that the loss shifts itself."""
    vision = model.vision
    on_device = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
    picture = lambda patches: unpatchify(patches, (vision.grid, vision.grid), vision.patch_size)
    pixels = normalise(np.stack([picture(crops[0]) for crops in batch.patches[0]]), vision.mean, vision.std)
    self.pixels = on_device(np.moveaxis(pixels, -1, 1)).to(self.tower.dtype)
    self.tokens = on_device(batch.tokens[0])
    self.visual = on_device(batch.visual_index[0] >= 0)[..., None]
    labels = np.where(batch.loss_weights[0] > 0, batch.targets[0], IGNORED)
    self.labels = on_device(np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED)).long()

  def step(self) -> torch.Tensor:
    """Takes one step; returns its loss, which need not be there yet."""
    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
      with torch.no_grad():
        features = self.tower(pixel_values=self.pixels).last_hidden_state[:, 1:]
        text = self.decoder.get_input_embeddings()(self.tokens)
      visual = self.projector(features).to(text.dtype)
      embeddings = text.masked_scatter(self.visual, visual)
      loss = self.decoder(inputs_embeds=embeddings, labels=self.labels, use_cache=False).loss
    loss.backward()
    self.optimizer.step()
    self.schedule.step()
    self.optimizer.zero_grad()
    return loss.detach()

  def warm_up(self) -> None:
    """Two steps, after which the optimizer's moments are there; memory counts from then on."""
    losses = [self.step().item() for _ in range(2)]
    if not np.isfinite(losses).all():
      raise RuntimeError(f"the loss is not finite: {losses}")
    self.facts["loss"] = losses[0]
    if self.device.type == "cuda":
      torch.cuda.reset_peak_memory_stats()
    else:
      Path("/proc/self/clear_refs").write_text("5")  # the most that was resident starts anew

  def turn(self) -> float:
    """Seconds of TURN steps; the host waits for the last."""
    wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(TURN):
      self.step()
    wait()
    return time.perf_counter() - start

  def peak(self) -> tuple[int, str]:
    """Most bytes while the turns ran, and how that is known."""
    if self.device.type != "cuda":
      return resident("VmHWM") - self.before, "resident, more than before"
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    again = f", which had to make room {retries} times" if retries else ""
    return torch.cuda.max_memory_allocated(), f"of the device, by its allocator{again}"
