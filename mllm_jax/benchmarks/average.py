"""AvgN: the papers' averages over benchmarks."""

import statistics
from collections.abc import Mapping

# What a score is at most, where it is not 100.
FULL = {"mme": 2000, "mme/position": 200, "ocrbench": 1000}

# By the tables of the papers, first LLaVA-SP's. NAME/CATEGORY is a benchmark's score within a category.
AVERAGES = {
  "Avg11": "vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench_en_dev seed llava_wild mm_vet".split(),
  "Avg8": "gqa scienceqa textvqa pope mme mmbench_en_dev seed mm_vet".split(),
  "Avg6, spatial": [
    "mme/position",
    "mmbench_en_dev/object_localization",
    "mmbench_en_dev/physical_relation",
    "mmbench_en_dev/spatial_relation",
    "seed/Spatial Relation",
    "seed/Instance Location",
  ],
  # Of LLaVA-UHD v2, table 2. There TextVQA is asked without OCR tokens.
  "Avg14, UHD": (
    "mme gqa seed mmbench_en_test scienceqa ai2d mmmu mmstar docvqa chartqa textvqa_no_ocr ocrbench realworldqa "
    "hrbench4k"
  ).split(),
}


def average(scores: Mapping[str, float]) -> float:
  """The mean of the scores by name, each in percent of the highest it can have.

  LLaVA-SP, tables 3 to 8: MME's perception counts in percent of 2000 and its position in percent of 200. LLaVA-UHD v2,
  table 2: OCRBench counts in percent of 1000.
  """
  return statistics.fmean(100 * score / FULL.get(name, 100) for name, score in scores.items())


def averages(scores: Mapping[str, float]) -> dict[str, float]:
  """Those of AVERAGES whose scores are all there."""
  return {
    title: average({name: scores[name] for name in names})
    for title, names in AVERAGES.items()
    if all(name in scores for name in names)
  }
