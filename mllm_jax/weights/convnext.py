"""ConvNeXt's weights for a pyramid: under the names of transformers (`ConvNextModel`), or of timm, which open_clip has
behind `visual.trunk.`.
"""

from collections.abc import Mapping

from mllm_jax.models.projectors.convnext import STAGES
from mllm_jax.places import Place
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.mapping import Ours
from mllm_jax.weights.tables import CONV, Permute, Row, Table, linear, norm
from mllm_jax.weights.tensors import Tensors

PATH = "projector/pyramid/convnext/"
DEPTHWISE = Permute((2, 3, 0), rank=4)  # (C, 1, rows, columns) -> [rows, columns, C]
# What each kind of tensor is called, by our name: of a stage, and of a layer in it. The first stage halves nothing.
TRANSFORMERS = {
  "stem": "embeddings.patch_embeddings",
  "stem_norm": "embeddings.layernorm",
  "stage": "encoder.stages.{stage}.",
  "norm": "downsampling_layer.0",
  "downsample": "downsampling_layer.1",
  "layer": "layers.{{layer}}.",
  "depthwise": "dwconv",
  "layers/norm": "layernorm",
  "fc1": "pwconv1",
  "fc2": "pwconv2",
  "gamma": "layer_scale_parameter",
}
TIMM = {
  "stem": "stem.0",
  "stem_norm": "stem.1",
  "stage": "stages.{stage}.",
  "norm": "downsample.0",
  "downsample": "downsample.1",
  "layer": "blocks.{{layer}}.",
  "depthwise": "conv_dw",
  "layers/norm": "norm",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
  "gamma": "gamma",
}
RENAMES = ((r"^(convnext|visual\.trunk|trunk|backbone)\.", ""),)
IGNORED = (
  (r"(layernorm|head|norm|classifier|hidden_states_norms|norm_pre)\..*", "behind the last stage"),
  (r"visual\.head\..*", "behind the last stage"),
  (
    r"(transformer\..*|text\..*|token_embedding\..*|ln_final\..*|positional_embedding|text_projection|logit_\w+|attn_mask)",
    "CLIP's text half",
  ),
)


def table(names: Mapping[str, str]) -> Table:
  """The table of one of the two ways of naming."""
  rows = [*linear(names["stem"], f"{PATH}stem", transform=CONV), *norm(names["stem_norm"], f"{PATH}stem_norm")]
  for stage in range(STAGES):
    foreign, ours = names["stage"].format(stage=stage), f"{PATH}stages/{stage}/"
    layer = foreign + names["layer"].format()
    if stage:
      rows += norm(foreign + names["norm"], f"{ours}norm")
      rows += linear(foreign + names["downsample"], f"{ours}downsample", transform=CONV)
    rows += linear(layer + names["depthwise"], f"{ours}layers/depthwise", transform=DEPTHWISE)
    rows += norm(layer + names["layers/norm"], f"{ours}layers/norm")
    for name in ("fc1", "fc2"):
      rows += linear(layer + names[name], f"{ours}layers/{name}")
    rows.append(Row(layer + names["gamma"], f"{ours}layers/gamma"))
  return Table(tuple(rows), IGNORED, RENAMES)


def open_convnext(path: Place, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
  """The parameters `shapes` names, {projector/pyramid/convnext/...: shape}, out of the checkpoint at a path; none is
  read. Raises WeightsError where it does not fit: convnext_widths and convnext_depths are of another one, most likely.
  """
  weights = open_weights(path)
  timm = any(".conv_dw." in name for name in weights.names())
  return Ours(weights, table(TIMM if timm else TRANSFORMERS), shapes)
