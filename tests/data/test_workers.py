"""Threads and processes that share work in order."""

import os
import signal

import numpy as np
import pytest

from mllm_jax.data import workers
from mllm_jax.data.records import DataError
from mllm_jax.data.workers import in_processes, in_threads


def arrays(number: int) -> tuple[int, np.ndarray, np.ndarray]:
  """A large array of its own for each number, and a small one."""
  return number, np.full((40_000 + number) * 2, number, np.int16), np.arange(number)


def check(found, count: int):
  numbers = []
  for number, large, small in found:
    # Before the next one is asked for: its memory is used again.
    np.testing.assert_array_equal(large, arrays(number)[1])
    np.testing.assert_array_equal(small, np.arange(number))
    numbers.append(number)
  assert numbers == list(range(count))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_give_results_in_order(threads):
  check(in_threads(arrays, range(30), threads, ahead=4), 30)


@pytest.mark.parametrize("options", [{}, {"threads": 3, "ahead": 5}, {"result_bytes": 200_000}, {"result_bytes": 10}])
@pytest.mark.parametrize("count", [0, 1, 23])
def test_processes_give_results_in_order(options, count):
  """With memory that is large enough for the arrays, too small, and none."""
  check(in_processes(arrays, range(count), 2, **options), count)


def test_a_result_lies_in_shared_memory_and_only_until_the_next():
  found = in_processes(arrays, range(9), 1, ahead=2, result_bytes=200_000)
  _, first, _ = next(found)
  _, second, _ = next(found)
  _, third, _ = next(found)
  assert np.shares_memory(first, third) and not np.shares_memory(second, third)
  found.close()


def fails(number: int) -> int:
  if number == 5:
    raise DataError("sample 5: is bad")
  if number == 7:
    os.kill(os.getpid(), signal.SIGKILL)
  return number


def test_an_error_comes_in_its_place():
  found = in_processes(fails, range(6), 2)
  assert [next(found) for _ in range(5)] == list(range(5))
  with pytest.raises(DataError) as error:
    next(found)
  assert type(error.value) is DataError and str(error.value) == "sample 5: is bad"
  assert "in a worker process" in error.value.__notes__[0] and "in fails" in error.value.__notes__[0]


def test_a_process_that_is_killed_is_told_of():
  with pytest.raises(RuntimeError, match="a worker process of the data ended with exit code -9; out of memory?"):
    list(in_processes(fails, [0, 1, 2, 7, 8], 1))


def test_no_more_memory_than_there_is_to_be(monkeypatch):
  monkeypatch.setattr(workers, "SHARED_MEMORY", 500_000)
  asked = []
  monkeypatch.setattr(workers._Process, "give", lambda self, task: asked.append(task) or setattr(self, "_given", 0))
  assert list(in_processes(arrays, range(50), 1, ahead=20, result_bytes=100_000)) == []
  assert len(asked) == 4  # of 100,032 bytes each
