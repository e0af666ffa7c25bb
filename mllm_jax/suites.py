"""The ablations of the papers: of each suite what is compared with what.

A suite is rows of (label, recipe, overrides): a file of configs/ and the fields that are set in it, by their paths
below the configuration, as `--config.PATH=VALUE` would. Fields that follow from them are among them.
"""

from typing import Any

Row = tuple[str, str, dict[str, Any]]

SUITES: dict[str, tuple[Row, ...]] = {
  # LLaVA-UHD v2, figure 5: what makes visual tokens of the same pyramid; its predecessor sees the tower's map alone.
  "uhd_modules": (
    ("LLaVA-UHD v1's resampler", "uhd_v1", {}),
    ("MLP on resized levels", "uhd_v2", {"model.projector.kind": "mlp144"}),
    ("Perceiver", "uhd_v2", {"model.projector.kind": "perceiver"}),
    ("Hiwin", "uhd_v2", {}),
  ),
  # Table 3.
  "uhd_pyramids": (
    ("ConvNeXt", "uhd_convnext", {}),
    ("Deconvolution", "uhd_deconv", {}),
    ("Bilinear", "uhd_bilinear", {}),
    ("VDIM", "uhd_v2", {}),
  ),
  # Table 4: which levels, and what VDIM learns them from. Level 3, the paper's last row, makes 64 pixels of each patch.
  "uhd_levels": (
    ("0, 1", "uhd_v2", {"model.projector.levels": (0, 1)}),
    ("0, 2", "uhd_v2", {"model.projector.levels": (0, 2)}),
    ("0, 1, 2", "uhd_v2", {"model.projector.levels": (0, 1, 2)}),
    ("0, 1, 2, 3", "uhd_v2", {"model.projector.levels": (0, 1, 2, 3)}),
    ("0, 2, last level supervised", "uhd_v2", {"model.projector.levels": (0, 2), "vdim.supervision": "last"}),
  ),
  # Table 6.
  "uhd_pooling": (
    ("Fixed", "uhd_v2", {"model.projector.pooling": "fixed"}),
    ("Pyramid", "uhd_v2", {"model.projector.pooling": "pyramid"}),
    ("Selective", "uhd_v2", {"model.projector.pooling": "selective"}),
  ),
}
