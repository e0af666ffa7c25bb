"""From answers to scores: credits, the judge's where rules cannot give them, and what is written about them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mllm_jax.benchmarks.judge import Endpoint
from mllm_jax.benchmarks.question import Benchmark, Question, Result, Summary
from mllm_jax.benchmarks.store import Store
from mllm_jax.data.records import DataError


@dataclasses.dataclass(frozen=True)
class Scored:
  """A benchmark with its results. of: how many questions it has in all. summary: None where nothing is scored here.
  settings: how it was asked, such as beams. submission: the file for the server, "" without one."""

  benchmark: Benchmark
  results: Sequence[Result]
  of: int
  summary: Summary | None
  settings: Mapping[str, int]
  submission: str = ""


def answered(benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, Mapping]) -> list[Result]:
  """Results without a judge's credits. Raises DataError where a question has no answer."""
  absent = sum(question.id not in answers for question in questions)
  if absent:
    raise DataError(
      f"{benchmark.name}: {absent} of {len(questions)} questions have no answer; ask without --score_only"
    )
  results = [Result(question, answers[question.id]["text"]) for question in questions]
  if benchmark.credit is None:
    return results
  return [dataclasses.replace(r, credit=benchmark.credit(r.question, r.answer)) for r in results]


def judged(
  benchmark: Benchmark, results: Sequence[Result], endpoint: Endpoint, store: Store, progress: Callable[[int], None]
) -> list[Result]:
  """The results with the judge's verdicts and credits. A verdict that the store holds on the same answer stands.

  Raises DataError where the judge gives none; those before are kept.
  """
  done = []
  for result in results:
    question, row = result.question, store.rows.get(result.question.id)
    if row is None or row["answer"] != result.answer:
      row = {
        "id": question.id,
        "answer": result.answer,
        "verdict": endpoint.judge(benchmark.judge, question, result.answer),
      }
      store.append(row)
    verdict = row["verdict"]
    credit = benchmark.judge.credit(question, verdict)
    done.append(dataclasses.replace(result, verdict=verdict, credit=credit))
    progress(1)
  return done
