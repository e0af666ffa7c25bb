"""The ablations of the papers: of each suite what is compared with what.

A suite is rows of (label, recipe, overrides, demo): a file of configs/ and the fields that are set in it, by their
paths below the configuration, as `--config.PATH=VALUE` would. Fields that follow from them are among them. `demo` is
what the small version has besides or instead, as its tower has 8 x 8 patches and not 24 x 24.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
  label: str
  recipe: str
  overrides: dict[str, Any] = {}
  demo: dict[str, Any] = {}


STRIDE, MAPS, KERNEL = (f"model.projector.{name}" for name in ("stride", "maps", "dfi_kernel"))
SFE = {KERNEL: 0}  # LLaVA-SP's spatial features alone, without the details

SUITES: dict[str, tuple[Row, ...]] = {
  # LLaVA-SP, tables 4 and 5: 3, 6 and 12 maps, each a token, or sliding windows. The demo's patches make 1, 2 and 4.
  "sp_tokens": (
    Row("Cropping by 4", "sp_cropping", SFE | {STRIDE: 4}),
    Row("Cropping by 2", "sp_cropping", SFE | {STRIDE: 2}),
    Row("Cropping by 1", "sp_cropping", SFE | {STRIDE: 1}),
    Row("6 sliding windows", "sp_windows"),
    Row("49 sliding windows", "sp_conv49"),
  ),
  # Table 3, and a light one that is not in it.
  "sp_sfe": (
    Row("Cropping, convolution", "sp_cropping", SFE),
    Row("Cropping, transformer", "sp_cropping_transformer"),
    Row("Cropping, factorised", "sp_light"),
    Row("Pooling, convolution", "sp_pooling", SFE),
    Row("Pooling, transformer", "sp_pooling_transformer"),
    Row("Pooling, factorised", "sp_light", {MAPS: "pooling"}),
  ),
  # Table 6: kernels of 25, 49, 81 and 121 details. The demo's have 4, 9, 9 and 16.
  "sp_dfi": (
    Row("Without DFI", "sp_cropping", SFE),
    Row("Kernel 16", "sp_cropping", {KERNEL: 16}, {KERNEL: 5}),
    Row("Kernel 12", "sp_cropping", {KERNEL: 12}, {KERNEL: 4}),
    Row("Kernel 8", "sp_cropping", {KERNEL: 8}, {KERNEL: 3}),
    Row("Kernel 4", "sp_cropping", {KERNEL: 4}, {KERNEL: 2}),
  ),
  # Table 7. The demo has one tower, which stands for both: there SigLIP's rows show it with whole pictures and all its
  # tokens, InternVL's with tiles and a token for four patches. They have the same pictures and steps.
  "sp_towers": (
    *(
      Row(
        f"SigLIP, {name}", f"sp_siglip_{name}", {}, {"demo_shapes": True, "pretrain.steps": 440, "mesh.cpu_devices": 2}
      )
      for name in ("baseline", "cropping", "pooling")
    ),
    Row("InternVL 2, baseline", "internvl2"),
    Row("InternVL 2, cropping", "internvl2_sp_cropping"),
    Row("InternVL 2, pooling", "internvl2_sp_pooling"),
  ),
  # LLaVA-UHD v2, figure 5: what makes visual tokens of the same pyramid; its predecessor sees the tower's map alone.
  "uhd_modules": (
    Row("LLaVA-UHD v1's resampler", "uhd_v1"),
    Row("MLP on resized levels", "uhd_v2", {"model.projector.kind": "mlp144"}),
    Row("Perceiver", "uhd_v2", {"model.projector.kind": "perceiver"}),
    Row("Hiwin", "uhd_v2"),
  ),
  # Table 3.
  "uhd_pyramids": (
    Row("ConvNeXt", "uhd_convnext"),
    Row("Deconvolution", "uhd_deconv"),
    Row("Bilinear", "uhd_bilinear"),
    Row("VDIM", "uhd_v2"),
  ),
  # Table 4: which levels, and what VDIM learns them from. Level 3, the paper's last row, makes 64 pixels of each patch.
  "uhd_levels": (
    Row("0, 1", "uhd_v2", {"model.projector.levels": (0, 1)}),
    Row("0, 2", "uhd_v2", {"model.projector.levels": (0, 2)}),
    Row("0, 1, 2", "uhd_v2", {"model.projector.levels": (0, 1, 2)}),
    Row("0, 1, 2, 3", "uhd_v2", {"model.projector.levels": (0, 1, 2, 3)}),
    Row("0, 2, last level supervised", "uhd_v2", {"model.projector.levels": (0, 2), "vdim.supervision": "last"}),
  ),
  # Table 6.
  "uhd_pooling": (
    Row("Fixed", "uhd_v2", {"model.projector.pooling": "fixed"}),
    Row("Pyramid", "uhd_v2", {"model.projector.pooling": "pyramid"}),
    Row("Selective", "uhd_v2", {"model.projector.pooling": "selective"}),
  ),
}
