"""The data of a training stage: every record looked at, lengths measured, an order of batches made."""

import os
from pathlib import Path

from mllm_jax.config import Config, StageConfig
from mllm_jax.data.records import DataError
from mllm_jax.run_control import say

MUCH = 0.05  # of packed rows; what suits the data leaves half of it empty or less


def load_data(config: Config, stage: StageConfig, processor, folder: Path, mesh):
  """The batches of a stage on a mesh, after a look at every record. Raises DataError with all that is wrong.

  Where the batching needs to know how long the samples are, that is kept in `folder` for when the run is continued.
  """
  import jax
  from tqdm import tqdm

  from mllm_jax import sharding
  from mllm_jax.data import lengths
  from mllm_jax.data.bad_samples import MINIMUM, BadSamples
  from mllm_jax.data.pipeline import TrainingBatches
  from mllm_jax.data.sources.mix import open_data

  records = open_data(stage.data, config.seed)
  table = None
  if stage.data.batching == "fixed":
    check_records(stage, records)
  else:
    problems = []
    with tqdm(
      total=len(records), desc="lengths", unit="sample", disable=jax.process_index() > 0, dynamic_ncols=True
    ) as bar:
      table = lengths.measured(
        folder / "lengths.npz", records, processor, bar.update, stage.data.on_bad_sample, config.seed, problems
      )
      bar.update(len(records) - bar.n)
    judge(stage, records, problems)
  share, shares = sharding.row_share(mesh, jax.process_index())
  noted = folder if sharding.first_of_share(mesh, jax.process_index()) else None
  batches = TrainingBatches(
    records,
    processor,
    batch_size=stage.batch_size,
    accumulation=stage.accumulation,
    epochs=stage.epochs,
    steps=stage.steps,
    seed=config.seed,
    batching=stage.data.batching,
    buckets=stage.data.buckets,
    row_length=stage.data.row_length,
    lengths=table,
    process_index=share,
    process_count=shares,
    threads=config.loader_threads,
    workers=config.loader_workers,
    on_bad_sample=stage.data.on_bad_sample,
    bad_samples=BadSamples(stage.data.max_bad_share, noted, minimum=min(MINIMUM, len(records))),
  )
  if stage.data.batching == "pack" and batches.order.padding > MUCH:
    say(
      f"packing leaves {batches.order.padding:.0%} of the places empty; a larger data.max_images or data.row_length "
      "may do better, which `python -m mllm_jax.data stats` compares"
    )
  return batches


def check_records(stage: StageConfig, records) -> None:
  """Looks at every record, images not decoded. Raises DataError where the stage does not put up with what is found."""
  from mllm_jax.data.records import check

  judge(stage, records, check(records, max_images=stage.data.max_images, processes=os.cpu_count() or 1))


def judge(stage: StageConfig, records, problems: list[tuple[int, str]]) -> None:
  """Says which samples have problems. Raises DataError where the stage does not put up with them."""
  from mllm_jax.data.bad_samples import check_share

  if not problems:
    return
  bad = len({sample for sample, _ in problems})
  more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
  lines = "\n  " + "\n  ".join(line for _, line in problems[:10]) + more
  if stage.data.on_bad_sample == "error":
    raise DataError(f"{bad} of {len(records)} samples cannot be used:{lines}")
  check_share(bad, len(records), stage.data.max_bad_share)
  done = {"skip": "are skipped", "replace": "are replaced by others"}[stage.data.on_bad_sample]
  say(f"{bad} of {len(records):,} samples cannot be used and {done}:{lines}")
