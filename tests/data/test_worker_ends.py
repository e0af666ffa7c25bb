"""Worker processes end with what they work for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def is_worker(pid: int) -> bool:
  try:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it has ended
  except OSError:
    return False


def workers_of(pid: int) -> list[int]:
  """The processes that a process's multiprocessing has started, of which one watches over its shared memory."""
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
      if parent == pid and is_worker(int(folder.name)):
        found.append(int(folder.name))
    except OSError:  # it has ended
      continue
  return found


def test_workers_end_with_the_process_that_started_them(tmp_path, records, tokenizer_folders):
  """When it closes them, though they are signalled with it, and when it is killed."""
  code = f"""
import sys
from mllm_jax.config import VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records
from mllm_jax.data.rows import RowMaker, Wanted
from mllm_jax.data.workers import in_processes

if __name__ == "__main__":
  records = Records.load({records.source!r}, {records.image_folder!r})
  processor = Processor(chat.load_tokenizer(sys.argv[1]), Square(VisionConfig(image_size=28), 3), "vicuna_v1", 230, 3)
  for name in ("first", "second"):
    maker = RowMaker(records, processor, False, "error", 0)
    rows = in_processes(maker, (Wanted((i % 23,), 230) for i in range(10**6)), 2)
    next(rows)
    print(name, flush=True)
    sys.stdin.readline()
    for _ in range(20):
      next(rows)
    rows.close()
    print("closed", flush=True)
"""
  (tmp_path / "main.py").write_text(code)
  process = subprocess.Popen(
    [sys.executable, str(tmp_path / "main.py"), tokenizer_folders[False]],
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "first\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    for pid in workers:  # as when a whole group of processes is signalled
      os.kill(pid, signal.SIGINT)
      os.kill(pid, signal.SIGTERM)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    assert_ended(workers)
    assert process.stdout.readline() == "second\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    assert_ended(workers)
  finally:
    process.kill()
    process.communicate()


def assert_ended(workers: list[int]) -> None:
  deadline = time.time() + 20
  while any(is_worker(pid) for pid in workers) and time.time() < deadline:
    time.sleep(0.1)
  assert not any(is_worker(pid) for pid in workers)
