"""Pictures that training enlarges: the released sizes, chance that seed and sample decide, lengths that agree."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax import processors
from mllm_jax.config import ConfigError, DataConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import images, lengths, slices
from mllm_jax.data.__main__ import main
from mllm_jax.data.aspects import Slices
from mllm_jax.data.enlarging import Enlarging
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records, Sample

GOLDENS = Path(__file__).parents[1] / "goldens" / "uhd"
CLIP = VisionConfig()
VISION = VisionConfig(image_size=28)  # 2 x 2 patches; six slices have 4704 pixels
TOKENS, N, SEED = 4, 40, 5


def sample(index: int = 0, *names: str) -> Sample:
  return Sample(str(index), index, (), (), names=names)


def size(given: tuple[int, int], share: float, name: str = "coco/1.jpg", max_slices: int = 6) -> tuple[int, int]:
  (found,) = Enlarging(CLIP, max_slices, share).sizes(sample(0, name), [given], seed=0)
  return found


def test_sizes_by_hand():
  # 6 x 336^2 = 677376 pixels; of 640 x 480 that is 2.205 times as many, the root of which is 1.4849
  assert size((640, 480), 1.0) == (950, 712) and slices.crops_of(950, 712, CLIP, 6) == 7
  assert size((1344, 672), 1.0) == (1344, 672)  # 3 x 2 slices already
  assert size((3000, 400), 1.0, max_slices=7) == (2253, 300)  # 7 x 1: to a smaller area
  assert [size(given, 1.0, max_slices=1) for given in ((640, 480), (4000, 3000))] == [(950, 712), (4000, 3000)]
  assert size((640, 480), 1e-12) == (640, 480)
  for name in ("textvqa/train_images/1.jpg", "sft/TextVQA/1.jpg"):
    assert [size(given, 1e-12, name) for given in ((640, 480), (1500, 2000))] == [(1024, 768), (768, 1024)]
  assert size((640, 480), 1e-12, "TEXTvqa/1.jpg") == (640, 480)
  assert Enlarging(CLIP, 6, 1.0).sizes(sample(), [(640, 480), (1344, 672)], 0) == [(950, 712), (1344, 672)]  # no names


@pytest.mark.parametrize("max_slices", [6, 7])
def test_the_released_sizes(max_slices):
  with np.load(GOLDENS / "slicing.npz") as file:
    table, extras = file["table"], {tuple(row[:2]): row[2:] for row in file["extras"].tolist()}
  unchanged = 0
  for width, height, most, _, _, _, _, count, *_ in table[table[:, 2] == max_slices].tolist():
    expected = (width, height) if count == 6 else tuple(extras[width, height][:2])
    assert size((width, height), 1.0, max_slices=most) == expected
    assert size((width, height), 1.0, "textvqa/1.jpg", most) == tuple(extras[width, height][2:])
    unchanged += count == 6
  assert 0 < unchanged < 70


def test_the_last_pixel_as_the_released_order_of_operations_rounds_it():
  assert slices.to_area((3, 162), 6 * 336**2) == (111, 6047)  # the area's root is 37.33..., times 162 just under 6048
  assert [slices.long_side(given, 1024) for given in ((107, 428), (197, 197))] == [(255, 1024), (1023, 1024)]


def drawn(share: float, seed: int, count: int = 20_000) -> np.ndarray:
  """bool [count, 2]: which of the samples' two pictures are enlarged."""
  enlarging, given = Enlarging(CLIP, 6, share), [(30, 20)] * 2
  found = [enlarging.sizes(sample(index), given, seed) for index in range(count)]
  return np.array(found)[:, :, 0] != 30


def test_chance_is_seeds_and_samples():
  first, second = drawn(0.1, 0), drawn(0.1, 1)
  deviation = np.sqrt(0.1 * 0.9 / first.size)
  assert abs(first.mean() - 0.1) < 5 * deviation and abs(second.mean() - 0.1) < 5 * deviation
  # Independent of one another: seeds, a sample's pictures, neighbours.
  pairs = ((first, second), (first[:, 0], first[:, 1]), (first[1:], first[:-1]))
  assert all(abs((a & b).mean() - 0.01) < 5 * np.sqrt(0.01 / a.size) for a, b in pairs)
  assert not drawn(0.0, 0, 500).any() and drawn(1.0, 0, 500).all()
  more = drawn(0.2, 0)
  assert more[first].all() and (more & ~first).any()  # a larger share adds to a smaller one
  # The very draws: a run that goes on under another version has to make them again.
  assert np.flatnonzero(first)[:6].tolist() == [1, 21, 24, 25, 28, 32]


@pytest.fixture
def data(write_data):
  """(file, image folder) of pictures of many sizes, every fifth of TextVQA, every seventh sample with two."""
  samples = []
  for i in range(N):
    names = [f"{'textvqa_' if i % 5 == 0 else ''}{i}{part}.png" for part in ("a", "b")[: 1 + (i % 7 == 0)]]
    turns = [{"from": "human", "value": "<image>" * len(names) + "What?"}, {"from": "gpt", "value": "A dog."}]
    samples.append({"id": f"x{i}", "image": names, "conversations": turns})
  path, folder = write_data(samples)
  draw = np.random.default_rng(0)
  for file in sorted(Path(folder).iterdir()):
    Image.fromarray(draw.integers(0, 256, (*draw.integers(15, 60, 2), 3), np.uint8)).save(file)
  return path, folder


def maker(tokenizers, share: float = 0.5) -> Processor:
  enlarging = Enlarging(VISION, 6, share) if share else None
  aspect = Slices(VISION, TOKENS, 6, "spatial", (7, 8))
  return Processor(tokenizers[False], aspect, "vicuna_v1", 400, 14, enlarging)


def test_lengths_rows_and_batches_agree(data, tokenizers, tmp_path):
  records, processor = Records.load(*data), pickle.loads(pickle.dumps(maker(tokenizers)))
  table = lengths.measure(records, processor, seed=SEED)
  plain = lengths.measure(records, maker(tokenizers, 0), seed=SEED)
  other = lengths.measure(records, processor, seed=SEED + 1)
  ordinary = np.arange(N) % 5 != 0
  assert (table.crops != plain.crops)[~ordinary].all()
  assert 0.1 < (table.crops != plain.crops)[ordinary].mean() < 0.6
  assert (table.crops != other.crops)[ordinary].any() and (table.crops == other.crops)[~ordinary].all()
  for i in reversed(range(N)):
    row = processor.row(records[i], SEED)
    assert (row.segment_ids > 0).sum() == table.places[i] and row.grids.any(axis=1).sum() == table.crops[i]
    pictures = processor.pictures(records[i], SEED)
    crops = [crop for picture in pictures for crop in slices.crop(picture, VISION, 6)]
    for crop, patches, grid in zip(crops, row.patches, row.grids):
      np.testing.assert_array_equal(unpatchify(patches, grid, 14), crop)
    for picture, path in zip(pictures, records[i].images):
      np.testing.assert_array_equal(picture, images.load(path).resize(picture.size, Image.Resampling.BICUBIC))
  for options in (dict(batching="fixed"), dict(batching="pack", row_length=800)):
    batches = TrainingBatches(records, processor, lengths=table, batch_size=2, threads=0, seed=SEED, **options)
    seen = 0
    for step, (_, batch) in enumerate(batches):
      held = [list(samples) for samples in batches.rows(step)]
      assert (batch.segment_ids[0] > 0).sum(-1).tolist() == [table.places[row].sum() for row in held]
      assert batch.grids[0].any(-1).sum(-1).tolist() == [table.crops[row].sum() for row in held]
      seen += sum(map(len, held))
    assert seen > N // 2

  shards = tmp_path / "shards"
  main(["prepare", f"--path={data[0]}", f"--image_folder={data[1]}", f"--out={shards}", "--processes=1"])
  stored = Records.load(str(shards), "")
  assert [each.names for each in stored] == [each.names for each in stored.outlines()] == [s.names for s in records]
  for field in lengths.FIELDS:  # read from the outlines
    np.testing.assert_array_equal(getattr(lengths.measure(stored, processor, seed=SEED), field), getattr(table, field))
  np.testing.assert_array_equal(processor.row(stored[0], SEED).patches, processor.row(records[0], SEED).patches)


def test_prompts_are_never_enlarged(data, tokenizers):
  processor, found = maker(tokenizers, 1.0), Records.load(*data)[5]
  picture = images.load(found.images[0])
  prompt = processor.prompt(found.turns[:1], [picture])
  assert (prompt.visual_index >= 0).sum() == processor.aspect.crops_of(*picture.size) * TOKENS
  assert processor.row(found).grids.any(1).sum() > prompt.grids.any(1).sum()


def test_kept_lengths_know_what_is_enlarged(data, tokenizers):
  records = Records.load(*data)
  kept = lambda share, seed=0: lengths.fingerprint(records, maker(tokenizers, share), seed=seed)
  assert len({kept(0.0), kept(0.1), kept(0.2), kept(0.1, 1)}) == 4
  assert kept(0.1) == kept(0.1) and kept(0.0) == kept(0.0, 1)


def test_what_a_configuration_may_say(tokenizer_folders):
  model = ModelConfig(projector=ProjectorConfig(kind="hiwin"))
  make = lambda data: processors.make_processor(model, tokenizer_folders[False], data)
  data = DataConfig(image_aspect="slices", enlarge=0.1, max_images=7)
  assert make(data).enlarging == Enlarging(model.vision, 6, 0.1)
  assert make(dataclasses.replace(data, enlarge=0.0)).enlarging is None
  for wrong in (dict(enlarge=1.5), dict(enlarge=-0.1), dict(enlarge=float("nan")), dict(image_aspect="pad")):
    with pytest.raises(ConfigError, match=r"data.enlarge=.* between 0 and 1, and 0 unless data.image_aspect is slices"):
      make(dataclasses.replace(data, **wrong))
