"""lmms-eval: its tasks ask our model in the same process: `lmms-eval --model mllm_jax --model_args pretrained=DIR ...`

Wherever lmms-eval runs it imports this module, with whatever other model; so it imports nothing itself.
"""


def manifest():
  """What lmms-eval registers by its entry point: both forms, of which --force_simple chooses the simple one."""
  from lmms_eval.models.registry_v2 import ModelManifest

  adapter = f"{__name__}.adapter"
  return ModelManifest("mllm_jax", simple_class_path=f"{adapter}.Simple", chat_class_path=f"{adapter}.Chat")
