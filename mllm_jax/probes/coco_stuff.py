"""COCO-Stuff's classes (Caesar et al. 2018): 171 of things and stuff, and the 27 groups that they belong to.

A label map of the 2017 release holds a category's number less one, and 255 where nothing is labelled. Of the numbers 1
to 182 eleven, all of things, stand for nothing.
"""

import numpy as np

VOID = 255  # a pixel without a class
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)

# The categories of each group, as first and last number of each run of them.
GROUPS = {
  "electronic": ((72, 77),),
  "appliance": ((78, 83),),
  "food": ((52, 61),),
  "furniture": ((62, 71),),
  "indoor": ((84, 91),),
  "kitchen": ((44, 51),),
  "accessory": ((26, 33),),
  "animal": ((16, 25),),
  "outdoor": ((10, 15),),
  "person": ((1, 1),),
  "sports": ((34, 43),),
  "vehicle": ((2, 9),),
  "ceiling": ((102, 103),),
  "floor": ((101, 101), (114, 118)),
  "food-stuff": ((121, 122), (153, 153), (170, 170)),
  "furniture-stuff": ((98, 98), (107, 108), (110, 110), (112, 112), (123, 123), (130, 130), (133, 133), (156, 156))
  + ((161, 161), (165, 165)),
  "raw-material": ((100, 100), (132, 132), (139, 139), (143, 143)),
  "textile": ((92, 93), (104, 105), (109, 109), (131, 131), (137, 137), (141, 141), (152, 152), (167, 168)),
  "wall": ((171, 177),),
  "window": ((180, 181),),
  "building": ((95, 96), (128, 128), (151, 151), (158, 158), (166, 166)),
  "ground": ((111, 111), (125, 126), (136, 136), (140, 140), (144, 145), (147, 147), (149, 149), (154, 154))
  + ((159, 159),),
  "plant": ((94, 94), (97, 97), (119, 119), (124, 124), (129, 129), (134, 134), (142, 142), (163, 163), (169, 169)),
  "sky": ((106, 106), (157, 157)),
  "solid": ((127, 127), (135, 135), (150, 150), (160, 160), (162, 162), (182, 182)),
  "structural": ((99, 99), (113, 113), (138, 138), (146, 146), (164, 164)),
  "water": ((120, 120), (148, 148), (155, 155), (178, 179)),
}
USED = tuple(number for number in range(1, 183) if number not in UNUSED)


def classes(count: int) -> tuple[str, ...]:
  """The names of the 27 groups, or the numbers of the 171 categories."""
  return tuple(GROUPS) if count == 27 else tuple(map(str, USED))


def table(count: int) -> np.ndarray:
  """uint8 [256]: the class, one of `classes(count)`, of each value of a label map, VOID where it has none."""
  found = np.full(256, VOID, np.uint8)
  for place, runs in enumerate(GROUPS.values()):
    for first, last in runs:
      found[first - 1 : last] = place
  if count == 171:
    found[[number - 1 for number in USED]] = np.arange(len(USED))
  found[[number - 1 for number in UNUSED]] = VOID
  return found
