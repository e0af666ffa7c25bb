"""Every benchmark by its name."""

from mllm_jax.benchmarks import choices, documents, judged, mmbench, mmmu, refcoco, vqa, yes_no

FAMILIES = (vqa, yes_no, choices, mmbench, mmmu, documents, refcoco, judged)
BENCHMARKS = {benchmark.name: benchmark for family in FAMILIES for benchmark in family.BENCHMARKS}


def table() -> str:
  """Name, metric and prompt of every benchmark in columns, and below each its files."""
  rows = [("name", "metric", "prompt"), *((b.name, b.metric, b.prompt) for b in BENCHMARKS.values())]
  widths = [max(len(row[column]) for row in rows) for column in range(2)]
  lines = []
  for row, benchmark in zip(rows, [None, *BENCHMARKS.values()]):
    lines.append(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")
    lines += [f"    {file.pattern:56}  {file.origin}" for file in benchmark.files] if benchmark else []
  return "\n".join(lines)
