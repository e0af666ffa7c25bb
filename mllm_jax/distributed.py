"""Several processes as one run: how they find each other, how they decide the same, and how they end together.

`start` takes the first of these that it finds:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
                        host:port of process 0, how many there are, and which one this is (0, 1, ...); all three
    Slurm               a job step of several tasks (`srun`): one task a node with all of its GPUs, or one a GPU.
                        JAX_COORDINATOR_PORT chooses the port, where the one derived from the job's number is taken
    Cloud TPU           jax finds the hosts of a slice, and of several slices, in the machine's metadata

Elsewhere there is one process, and nothing is waited for.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.run_control import Stopped, message_of, status_of

CONNECT_SECONDS = 300
BARRIER_SECONDS = 12 * 3600  # what one process does alone may take hours: writing a model, measuring data
PORTS = range(61440, 65536)  # for coordinators on Slurm, one by the job's number
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LEAVE_SECONDS = 10
TEXT = 4096  # bytes that `gather` sends at least, so that it is compiled once

_barriers = itertools.count()


# ---- finding each other ----------------------------------------------------------------------------------------------


def start(seconds: int = CONNECT_SECONDS) -> None:
  """Joins the processes of the run, before jax is used for anything else. Does nothing where there is only this one.

  Raises ConfigError where the variables do not fit each other or process 0 cannot listen. Where the others are not
  there within `seconds` the process says so and ends with status 1: they may only be late.
  """
  found = variables(os.environ) or slurm(os.environ)
  import jax  # says in the environment whether this is a TPU's host

  on_tpu = "TPU_ML_PLATFORM" in os.environ and "tpu" in (jax.config.jax_platforms or "tpu")
  if jax.distributed.is_initialized() or not (found or on_tpu) or (found and found["num_processes"] == 1):
    return
  if found:
    who = f"process {found['process_id']} of {found['num_processes']}, coordinator {found['coordinator_address']}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  else:
    who = "a TPU's host, coordinator by the machine's metadata"
  # Of its own accord jax ends a process that finds no coordinator with a signal and a stack trace.
  watch = threading.Timer(seconds, _give_up, (who, seconds))
  watch.daemon = True
  watch.start()
  try:
    method = {"cluster_detection_method": "deactivate"} if found else {}
    jax.distributed.initialize(**(found or {}), **method, initialization_timeout=seconds + 60)
  except (ValueError, RuntimeError) as error:
    if found:
      raise ConfigError(f"{who}: {error}; see {', '.join(VARIABLES)}, or JAX_COORDINATOR_PORT on Slurm") from error
    if "should be defined" not in str(error):
      raise
  finally:
    watch.cancel()


def variables(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """The arguments of jax.distributed.initialize by plain variables; None where none is set. Raises ConfigError."""
  given = [name for name in VARIABLES if environment.get(name)]
  if not given:
    return None
  if len(given) < len(VARIABLES):
    missing = ", ".join(name for name in VARIABLES if name not in given)
    raise ConfigError(f"{', '.join(given)} is set and {missing} is not; set all of them, or none for one process")
  address, count, index = (environment[name] for name in VARIABLES)
  if not re.fullmatch(r".+:\d+", address):
    raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address} must be host:port, of process 0")
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise ConfigError(f"JAX_PROCESS_ID={index} must be one of 0 ... JAX_NUM_PROCESSES - 1, and that is {count}")
  return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """The same for a task of a Slurm step; None outside one. Several tasks on a node take one GPU each, unless Slurm
  shows each of them its own only."""
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
  if not count or any(not environment.get(name) for name in names):
    return None
  job, nodes, index, local = (environment[name] for name in names)
  head = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
  port = environment.get("JAX_COORDINATOR_PORT") or PORTS[int(job) % len(PORTS)]
  found = {"coordinator_address": f"{head[1]}{head[2] or ''}:{port}"}
  found |= {"num_processes": int(count), "process_id": int(index)}
  tasks = int(re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", count))[0])
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  if tasks > 1 and not (visible and len(visible.split(",")) < tasks):
    found["local_device_ids"] = [int(local)]
  return found


def _give_up(who: str, seconds: int) -> None:
  print(
    f"error: {who}: not all processes were there after {seconds} s. Look at what the others say; each needs the same "
    f"address, which must be open to it: {VARIABLES[0]} (on Slurm JAX_COORDINATOR_PORT), and its own {VARIABLES[2]} "
    f"below {VARIABLES[1]}",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


# ---- deciding the same -----------------------------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this is the process that talks, and writes what all of them have in common."""
  import jax

  return jax.process_index() == 0


def wait(name: str) -> None:
  """Returns when all processes are here; `name` is for messages. All of them wait equally often in the same order."""
  import jax

  if jax.process_count() > 1:
    from orbax.checkpoint import multihost

    # Not a collective: the devices' own time limits are too short for what is waited for.
    multihost.get_barrier_sync_fn()(key=f"{name} {next(_barriers)}", timeout_ms=1000 * BARRIER_SECONDS)


def gather(text: str) -> list[str]:
  """The texts of all processes, by process."""
  import jax
  import numpy as np

  if jax.process_count() == 1:
    return [text]
  from jax.experimental.multihost_utils import process_allgather

  content = np.frombuffer(text.encode(), np.uint8)
  sizes = process_allgather(np.array([len(content)], np.int32)).ravel()
  padded = np.zeros(-(-max(1, sizes.max()) // TEXT) * TEXT, np.uint8)
  padded[: len(content)] = content
  return [row[:size].tobytes().decode() for row, size in zip(process_allgather(padded), sizes, strict=True)]


def largest(number: int) -> int:
  """The largest of all processes' numbers, for each of them."""
  return max(map(int, gather(str(number))))


def first_says(answer: bool) -> bool:
  """What process 0 says; files that it is about to write must not be looked for by each process on its own."""
  return gather(str(int(answer)))[0] == "1"


def check_shared(folder: Path) -> None:
  """Raises ConfigError, or ends the run as `share` does, where a folder is not the same one for all processes."""
  mark = folder / gather(f".shared-{uuid.uuid4().hex}")[0]
  with agreed("a mark in the workdir"):
    if is_first():
      mark.touch()
  try:
    with agreed("the mark in the workdir"):
      if not mark.is_file():
        raise ConfigError(
          f"{folder} on {socket.gethostname()} is not the folder that process 0 sees; --workdir must lie on a file "
          "system that all hosts share, such as NFS, Filestore, Lustre or a mounted bucket"
        )
  finally:
    if is_first():
      mark.unlink()


class Flags:
  """A number of each process of which all get the largest: asked now and read later.

  It travels through the devices, in order with their other work: what is asked before a step is handed over is known
  when the step before that is done, and costs the host no waiting.
  """

  def __init__(self, mesh):
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    self._places = NamedSharding(mesh, P(mesh.axis_names))
    self._count = len(mesh.local_devices)
    self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
    self._several = jax.process_count() > 1

  def ask(self, number: Callable[[], int], *, now: bool = False) -> Callable[[], int]:
    """A function that gives the largest number. `now` waits for it. A single process gives its own when it is read."""
    import jax
    import numpy as np

    if not self._several:
      return number
    own = np.full(self._count, number(), np.int32)
    found = self._largest(jax.make_array_from_process_local_data(self._places, own))
    if now:
      found.block_until_ready()
    return lambda: int(found)


# ---- ending together -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
  """What is done inside succeeds in all processes, or ends all of them as `share` does. There must be nothing inside
  that processes do together."""
  problem = None
  try:
    yield
  except Exception as error:
    problem = error
  wait(what)
  share(problem)


def share(problem: Exception | None, status: int = 0) -> None:
  """Raises what went wrong, if anything did in any process: `problem` itself in a single process; else Stopped, with
  the message in the process it is of, and in process 0 where that had no problem of its own.

  status: of the process; 0: what `status_of` says.
  """
  import jax

  if jax.process_count() == 1:
    if problem is not None:
      raise problem
    return
  own = "" if problem is None else f"{status or status_of(problem) or 1} {explain(problem)}"
  found = [(number, *text.partition(" ")[::2]) for number, text in enumerate(gather(own)) if text]
  if not found:
    return
  number, code, text = found[0]
  if problem is not None:
    raise Stopped(int(code), explain(problem)) from problem
  raise Stopped(int(code), f"process {number}: {text}" if is_first() else "")


def explain(problem: Exception) -> str:
  """An error's own words, where they are meant for people."""
  return message_of(problem) if status_of(problem) else f"{type(problem).__name__}: {problem}"


def leave(error: BaseException, status: int) -> None:
  """Ends a process that has a problem of which the others may not know, where there are others.

  Left to itself, it would wait at its exit for those, which wait for it. They notice within two minutes and end too.
  Where they all have the same problem, as with a mistyped configuration, they meet here and each has said it.
  """
  jax = sys.modules.get("jax")
  if jax is None or isinstance(error, Stopped) or not jax.distributed.is_initialized():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  from orbax.checkpoint import multihost

  with contextlib.suppress(Exception):
    multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=1000 * LEAVE_SECONDS)
  if is_first():
    time.sleep(1)  # when the coordinator is gone, the others are ended with a stack trace
  os._exit(status)
