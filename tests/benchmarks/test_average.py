"""AvgN: the averages of the papers' tables."""

import pytest

from mllm_jax.benchmarks import average
from mllm_jax.benchmarks.catalogue import BENCHMARKS

ROW = "78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 66.2 63.4 30.5"  # such as LLaVA-1.5 7B has


def test_avg11_of_a_row():
  scores = dict(zip(average.AVERAGES["Avg11"], map(float, ROW.split()), strict=True))
  # By hand: MME's 1510.7 of 2000 is 75.535, the sum 701.335.
  assert average.averages(scores)["Avg11"] == pytest.approx(701.335 / 11, abs=1e-9)


def test_an_average_is_there_only_with_all_of_its_benchmarks():
  scores = dict.fromkeys(average.AVERAGES["Avg11"], 50.0)
  assert average.averages(scores).keys() == {"Avg11", "Avg8"}
  del scores["gqa"]
  assert average.averages(scores) == {}
  spatial = dict.fromkeys(average.AVERAGES["Avg6, spatial"], 60.0) | {"mme/position": 120.0}
  assert average.averages(spatial) == {"Avg6, spatial": 60}


def test_each_score_counts_by_its_highest():
  assert average.average({"mme": 2000, "mme/position": 100, "ocrbench": 250, "gqa": 25}) == 50


def test_uhds_average_is_of_fourteen():
  scores = dict.fromkeys(average.AVERAGES["Avg14, UHD"], 60.0) | {"mme": 1500.0, "ocrbench": 500.0}
  assert len(scores) == 14
  # By hand: 75 and 50 beside twelve times 60.
  assert average.averages(scores)["Avg14, UHD"] == pytest.approx(845 / 14, abs=1e-9)


def test_every_average_is_of_benchmarks_that_there_are():
  names = {name.partition("/")[0] for names in average.AVERAGES.values() for name in names}
  assert names <= BENCHMARKS.keys()
