"""What transformers makes of exported folders. Run as a script it uses the version that PYTHONPATH names, which may
not be the one that is installed.

  python ask_transformers.py QUESTIONS.json ANSWERS.npz FOLDER...

QUESTIONS.json: [{"messages": [...], "pictures": [path, ...]}, ...].
"""

import json
import sys
from pathlib import Path

import numpy as np

NEW_TOKENS = 6
BEAMS = (1, 3, 5)


def ask(folder: Path, questions: list[dict]) -> dict[str, np.ndarray]:
  """Of each question N: "N/ids", "N/ids_in_one_call" (by the template with tokenize=True), "N/pixels" (channels last),
  "N/logits" [S, V], "N/answer1" (greedy), "N/answer3" and "N/answer5" (of so many beams). "problems": what the
  weights and the model did not have in common."""
  import torch
  from PIL import Image
  from transformers import AutoProcessor, LlavaForConditionalGeneration

  model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
  problems = [f"{kind}: {item}" for kind, items in info.items() for item in items]
  processor = AutoProcessor.from_pretrained(folder)
  results = {"problems": np.array(problems, dtype=str)}
  for number, question in enumerate(questions):
    pictures = [Image.open(path) for path in question["pictures"]]
    text = processor.apply_chat_template(question["messages"], add_generation_prompt=True)
    inputs = processor(images=pictures or None, text=text, return_tensors="pt")
    in_one_call = processor.apply_chat_template(
      _with_paths(question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
      logits = model.eval()(**inputs).logits[0]
      ask = lambda beams: model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=beams)
      answers = {beams: ask(beams)[0] for beams in BEAMS}
    length = inputs["input_ids"].shape[1]
    results |= {
      f"{number}/ids": inputs["input_ids"][0].numpy(),
      f"{number}/ids_in_one_call": in_one_call["input_ids"][0].numpy(),
      f"{number}/logits": logits.numpy(),
    }
    results |= {f"{number}/answer{beams}": answer[length:].numpy() for beams, answer in answers.items()}
    if pictures:
      results[f"{number}/pixels"] = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
  return results


def _with_paths(question: dict) -> list[dict]:
  """The messages with each image part naming its file, as the template's own tokenization wants them."""
  paths = iter(question["pictures"])
  return [
    message
    | {"content": [part | ({"path": next(paths)} if part["type"] == "image" else {}) for part in message["content"]]}
    for message in question["messages"]
  ]


def main(questions: str, answers: str, *folders: str) -> None:
  """Writes every folder's answers under "FOLDER'S NAME/...", and "version"."""
  import transformers

  content = json.loads(Path(questions).read_text(encoding="utf-8"))
  arrays = {"version": np.array(transformers.__version__)}
  for folder in map(Path, folders):
    arrays |= {f"{folder.name}/{key}": value for key, value in ask(folder, content).items()}
  np.savez(answers, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
