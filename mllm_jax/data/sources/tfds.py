"""TensorFlow Datasets in ArrayRecord format, read through `tfds.data_source` without TensorFlow.

"tfds:NAME:SPLIT" or "tfds:NAME:SPLIT:MAPPING", where NAME is as tfds writes it ("coco_captions/2014"), SPLIT may be a
slice ("train[:1000]") and MAPPING says what becomes of an example:

  captions   an image to write its first caption about (the default); for the template "plain"
  captionsN  N samples of each image, with its first N captions: captions5 for COCO. An image with fewer begins again
  images     an image alone, without turns

The folder that tfds calls data_dir is the image folder; "" is tfds's own (TFDS_DATA_DIR, or ~/tensorflow_datasets).
"""

import logging
import os
import re
from typing import Any

from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Records, Sample, Turn

SPEC = re.compile(
  r"tfds:(?P<name>[^:]+):(?P<split>[^:\[]+(?:\[[^\]]*\])?)(?::(?P<mapping>captions|images|captions(?P<number>[1-9]\d*)))?"
)


def caption(example: dict[str, Any], number: int) -> tuple[Turn, ...]:
  """The image as the question, its number-th caption as the answer. Raises KeyError where there is none."""
  captions = example["captions"]
  # Features that repeat are a dictionary of lists in one version of tfds and a list of dictionaries in others.
  texts = captions["text"] if isinstance(captions, dict) else [each["text"] for each in captions]
  if not len(texts):
    raise KeyError("text")
  return (Turn("human", IMAGE_PLACEHOLDER), Turn("gpt", _text(texts[number % len(texts)])))


class TfdsRecords(Records):
  """The examples of one split; their images stay encoded. Can be pickled. Made by `TfdsRecords.open`."""

  def __init__(self, source: str, examples: Any, captions: int):
    self.source, self._examples, self._captions = source, examples, captions  # 0 captions: images alone

  @classmethod
  def open(cls, path: str, data_dir: str) -> "TfdsRecords":
    """Opens a prepared data set; nothing is downloaded.

    Raises:
      DataError: the path is not written so, tfds is not installed, or there is no such data set in ArrayRecord format.
    """
    spec = SPEC.fullmatch(path)
    if not spec:
      raise DataError(
        f"{path}: write tfds:NAME:SPLIT or tfds:NAME:SPLIT:MAPPING, MAPPING captions, captionsN or images"
      )
    try:
      logging.getLogger("absl").setLevel(logging.WARNING)  # tfds tells of every file that it opens
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise DataError(f"{path}: tensorflow-datasets is not installed; pip install tensorflow-datasets") from error
    name, _, config = spec["name"].partition("/")
    try:
      # Not tfds.builder: that imports the data set's own code, and with it TensorFlow, to read what is there already.
      builder = tfds.core.read_only_builder.builder_from_files(
        name, config=config or None, data_dir=data_dir or os.environ.get("TFDS_DATA_DIR")
      )
      examples = builder.as_data_source(split=spec["split"], decoders={"image": tfds.decode.SkipDecoding()})
      count = len(examples)
    except Exception as error:  # tfds raises errors of many kinds
      where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
      raise DataError(
        f"{path}: cannot be opened in {where} ({type(error).__name__}: {str(error).strip()[:300]}); prepare it there "
        f"with `tfds build {spec['name']} --file_format=array_record --data_dir={where}`, and name that folder as "
        "data.image_folder"
      ) from error
    if not count:
      raise DataError(f"{path}: holds no samples; name another split")
    return cls(path, examples, 0 if spec["mapping"] == "images" else int(spec["number"] or 1))

  def __len__(self) -> int:
    return len(self._examples) * max(1, self._captions)

  def __getitem__(self, i: int) -> Sample:
    """Sample i. Raises IndexError past the end, DataError where the example has not what the mapping needs."""
    index = self._index(i)
    name = f"{self.source}, sample {index}"
    try:
      place, number = divmod(index, max(1, self._captions))
      example = self._examples[place]
      image = example["image"]
      turns = caption(example, number) if self._captions else ()
    except (KeyError, TypeError) as error:
      mapping = "captions" if self._captions else "images"
      raise DataError(f"{name}: the example has no {error}; the mapping {mapping!r} needs it") from error
    except (RuntimeError, ValueError, OSError) as error:
      raise DataError(f"{name}: cannot be read ({str(error)[:200]}); prepare the data set again") from error
    if not isinstance(image, bytes):
      raise DataError(f"{name}: its image is a {type(image).__name__}, not an encoded one")
    identity = next((example[key] for key in ("image/id", "image/filename", "id") if key in example), place)
    return Sample(_text(identity), index, (image,), turns, source=self.source)


def _text(value: Any) -> str:
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
