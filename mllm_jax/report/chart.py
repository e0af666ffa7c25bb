"""Lines over steps, as SVG."""

import math
from collections.abc import Sequence
from html import escape


def line_chart(points: Sequence[tuple[int, float]], *, height: int, label: str, smooth: bool) -> str:
  """A line over steps as SVG; `smooth` draws it faintly and a moving average over it."""
  width, left, right, top, bottom = 560, 52, 12, 8, 24
  last, highest = max(points[-1][0], 1), max(value for _, value in points)
  lowest = min(0.0, *(value for _, value in points))
  ticks = round_ticks(lowest, highest, 4) if smooth else [lowest, highest]
  span = highest - lowest or 1.0
  x = lambda step: left + (width - left - right) * step / last
  y = lambda value: top + (height - top - bottom) * (1 - (value - lowest) / span)
  line = lambda values: " ".join(f"{x(step):.1f},{y(value):.1f}" for (step, _), value in zip(points, values))

  parts = []
  for tick in ticks:
    parts.append(
      f"<line class='grid' x1='{left}' x2='{width - right}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
      f"<text x='{left - 8}' y='{y(tick) + 4:.1f}' text-anchor='end'>{tick_label(tick)}</text>"
    )
  for tick in round_ticks(0, last, 5):
    parts.append(f"<text x='{x(tick):.1f}' y='{height - 6}' text-anchor='middle'>{tick:,.0f}</text>")
  values = [value for _, value in points]
  if smooth and len(points) >= 20:
    parts.append(f"<polyline class='raw' points='{line(values)}'/>")
    values = moving_average(values)
  parts.append(f"<polyline class='line' points='{line(values)}'/>")
  end = f"<circle class='end' cx='{x(points[-1][0]):.1f}' cy='{y(values[-1]):.1f}' r='4'/>"
  return (
    f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(label)}'>"
    f"<title>{escape(label)}: {points[0][1]:.4g} at step {points[0][0]:,}, "
    f"{points[-1][1]:.4g} at step {points[-1][0]:,}</title>{''.join(parts)}{end}</svg>"
  )


def moving_average(values: Sequence[float]) -> list[float]:
  """The mean of each value's neighbours, as many on both sides, so that the curve is not moved along the steps."""
  radius = max(2, len(values) // 40)
  means = []
  for i in range(len(values)):
    reach = min(radius, i, len(values) - 1 - i)
    means.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
  return means


def round_ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers from `low` to `high`."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
  return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
  """A number at an axis."""
  return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:g}"
