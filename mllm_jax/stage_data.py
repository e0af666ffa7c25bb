"""The data of a training stage: every record looked at, lengths measured, an order of batches made."""

import os
from pathlib import Path

from mllm_jax.config import Config, StageConfig
from mllm_jax.data.records import DataError
from mllm_jax.run_control import say


def load_data(config: Config, stage: StageConfig, processor, folder: Path):
  """The batches of a stage, after a look at every record. Raises DataError with all that is wrong.

  Where the batching needs to know how long the samples are, that is kept in `folder` for when the run is continued.
  """
  import jax
  from tqdm import tqdm

  from mllm_jax.data import lengths
  from mllm_jax.data.bad_samples import MINIMUM, BadSamples
  from mllm_jax.data.pipeline import TrainingBatches
  from mllm_jax.data.sources.mix import open_data

  records = open_data(stage.data, config.seed)
  check_records(stage, records)
  table = None
  if stage.data.batching != "fixed":
    with tqdm(
      total=len(records), desc="lengths", unit="sample", disable=jax.process_index() > 0, dynamic_ncols=True
    ) as bar:
      table = lengths.measured(
        folder / "lengths.npz", records, processor, bar.update, stage.data.on_bad_sample, config.seed
      )
      bar.update(len(records) - bar.n)
  return TrainingBatches(
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
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=config.loader_threads,
    workers=config.loader_workers,
    on_bad_sample=stage.data.on_bad_sample,
    bad_samples=BadSamples(stage.data.max_bad_share, folder, minimum=min(MINIMUM, len(records))),
  )


def check_records(stage: StageConfig, records) -> None:
  """Looks at every record, images not decoded. Raises DataError where the stage does not put up with what is found."""
  from mllm_jax.data.bad_samples import check_share
  from mllm_jax.data.records import check

  problems = check(records, max_images=stage.data.max_images, processes=os.cpu_count() or 1)
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
