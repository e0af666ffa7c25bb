"""How fast a compiled program can be on its chips at best."""

import dataclasses

from mllm_jax.chips import Chip
from mllm_jax.compilation.hlo import Cost


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that a step takes at least by each of a chip's rates, everything else being hidden behind it.

  The largest is the step's: a bound from below, which no overlap beats. mfu: model FLOPs over what the chip could have
  done in that time, so a bound from above. A chip without known rates has zeros.
  """

  compute: float
  memory: float
  ici: float
  dcn: float
  step: float
  bound: str
  mfu: float


def roofline(cost: Cost, chip: Chip, model_flops: float) -> Roofline:
  """Of one chip's program. model_flops: of one chip too."""
  sent = {crosses: sum(c.sent * c.times for c in cost.collectives if c.crosses == crosses) for crosses in (False, True)}
  over = lambda amount, rate: amount / rate if rate else 0.0
  seconds = {
    "compute": over(cost.flops, chip.flops),
    "memory": over(cost.bytes, chip.bandwidth),
    "ici": over(sent[False], chip.ici),
    "dcn": over(sent[True], chip.dcn),
  }
  bound = max(seconds, key=seconds.get)
  step = seconds[bound]
  return Roofline(**seconds, step=step, bound=bound, mfu=over(over(model_flops, step), chip.flops))
