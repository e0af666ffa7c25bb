"""The configuration of a run: its stages in a table, and every field."""

import dataclasses
from html import escape
from typing import Any

from mllm_jax.config import Config, VdimStage


def configuration(config: Config) -> str:
  """Every field of the configuration by its dotted path, as the command line would name it, folded away."""

  def fields(value, path):
    if isinstance(value, dict):
      return [entry for name, inner in value.items() for entry in fields(inner, f"{path}.{name}" if path else name)]
    return [(path, value)]

  rows = "".join(
    f"<tr><th scope='row'>{escape(path)}</th><td>{setting(value)}</td></tr>"
    for path, value in fields(dataclasses.asdict(config), "")
  )
  stages = "".join(
    f"<tr><th scope='row'>{escape(stage)}</th>{stage_cells(getattr(config, stage))}</tr>"
    for stage in filter(None, config.stages.split(","))
    if hasattr(config, stage)
  )
  columns = "".join(f"<th scope='col'>{name}</th>" for name in ("stage", "data", "batch", "length", "LoRA", "trained"))
  return (
    f"<section><h2>Configuration</h2><div class='scroll'><table class='stages'><thead><tr>{columns}</tr></thead>"
    f"<tbody>{stages}</tbody></table></div><details><summary>Every field</summary><div class='scroll'>"
    f"<table class='fields'><tbody>{rows}</tbody></table></div></details></section>"
  )


def stage_cells(stage) -> str:
  """What a row of the table says of a stage."""
  if isinstance(stage, VdimStage):
    data = f"<code>{escape(stage.data.path)}</code><br>{stage.steps:,} steps, {stage.jitters} views of each image"
    trained = f"VDIM and its heads at {stage.learning_rate:g}, {escape(stage.optimizer)}"
    cells = (data, f"{stage.batch_size:,}", "&ndash;", "none", trained)
    return "".join(f"<td>{cell}</td>" for cell in cells)
  amount = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"
  lora = f"rank {stage.lora.rank}, alpha {stage.lora.alpha:g}" if stage.lora.rank else "none"
  trained = "<br>".join(f"<code>{escape(pattern)}</code> at {rate:g}" for pattern, rate in stage.parameters if rate)
  data = f"<code>{escape(stage.data.path)}</code><br>{amount}, {escape(stage.data.template)}"
  cells = (data, f"{stage.batch_size:,}", f"{stage.data.max_length:,}", lora, trained or "nothing")
  return "".join(f"<td>{cell}</td>" for cell in cells)


def setting(value: Any) -> str:
  """A field's value."""
  return "<em>empty</em>" if value in ("", ()) else escape(str(value))
