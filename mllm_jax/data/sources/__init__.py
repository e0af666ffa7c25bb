"""Sources: what a run can read samples from. Each is a `Records`; the path says which kind.

FILE.json, FILE.jsonl           LLaVA's formats (`json_file`), local or PROTOCOL://
FOLDER, GLOB, FILE.arrayrecord  shards with the images inside, as `python -m mllm_jax.data prepare` writes them, local
                                or PROTOCOL:// (`shard_cache`)
FOLDER of image files           the images alone, without turns, for the stage "vdim" (`folder`)
tfds:NAME:SPLIT[:MAPPING]       a TensorFlow dataset in ArrayRecord format (`tfds`); data_dir is the image folder
"""

from mllm_jax import places
from mllm_jax.data.records import Records

SHARD = ".arrayrecord"


def open_source(path: str, image_folder: str) -> Records:
  """The samples of one source. Raises DataError where it cannot be used, with the remedy."""
  if path.startswith("tfds:"):
    from mllm_jax.data.sources.tfds import TfdsRecords

    return TfdsRecords.open(path, image_folder)
  from mllm_jax.data.sources.folder import FolderRecords, is_image_folder

  if is_image_folder(path):
    return FolderRecords.open(path)
  if is_shards(path):
    from mllm_jax.data.sources.array_record import ArrayRecords

    return ArrayRecords.open(path)
  from mllm_jax.data.sources.json_file import JsonRecords

  return JsonRecords.open(path, image_folder)


def is_shards(path: str) -> bool:
  """Whether a path names ArrayRecord shards: a file or pattern by its ending, a folder by what it is."""
  if path.rstrip("/").endswith(SHARD):
    return True
  return not path.endswith((".json", ".jsonl")) and places.is_dir(path)
