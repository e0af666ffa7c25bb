"""Preview: what a picture becomes, from its size alone."""

from collections.abc import Mapping

from mllm_jax.data.aspects import Anyres, Aspect, Slices, Square, Tiles


def preview(aspect: Aspect, width: int, height: int) -> Mapping:
  """How a picture is cut, for the page.

  frame: [x, y, width, height] in the picture's pixels, what the crops cover together; larger than the picture where it
  is padded, smaller where it is cut to a square. columns, rows: the grid that it is cut into, 0 where only the whole
  picture is seen. crops: all of them.
  visual_tokens, places: what they become in the text, and with separators.

  Raises DataError for a size that cannot be used.
  """
  crops, places = aspect.crops_of(width, height), aspect.places(width, height).rows
  columns, rows = aspect.tiling(width, height)
  cut = isinstance(aspect, Square) and aspect.cut
  squeezed = isinstance(aspect, Tiles) or (cut and not aspect.vision.class_token)  # SigLIP's square is the whole
  if isinstance(aspect, Slices) or squeezed:
    frame = (0, 0, width, height)
  else:
    ratio = columns / rows if isinstance(aspect, Anyres) else 1.0
    fit = min if cut else max
    framed_width, framed_height = fit(width, height * ratio), fit(height, width / ratio)
    frame = ((width - framed_width) / 2, (height - framed_height) / 2, framed_width, framed_height)
  return {
    "width": width,
    "height": height,
    "frame": [round(side, 2) for side in frame],
    "columns": columns,
    "rows": rows,
    "crops": crops,
    "visual_tokens": int((places >= 0).sum()),
    "places": len(places),
  }
