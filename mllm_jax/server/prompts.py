"""Prompts: a chat request and its pictures' bytes become requests to the engine. Runs in worker threads."""

from collections.abc import Sequence

from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError
from mllm_jax.inference.requests import Request
from mllm_jax.server.chat_request import Chat
from mllm_jax.server.errors import ApiError
from mllm_jax.server.limits import Limits
from mllm_jax.server.pictures import decode, sizes

CHARACTERS_PER_TOKEN = 64  # more than any tokenizer puts into its tokens on average


def requests(processor: Processor, chat: Chat, contents: Sequence[bytes], limits: Limits) -> list[Request]:
  """One request for each answer that is wanted, all with the same prompt.

  What is cheap is looked at first: the text's length, the pictures' headers, the prompt's length; then the pixels.

  Raises ApiError: a picture that is none or too large, or a prompt that leaves no room for its answer.
  """
  characters = sum(len(turn.text) for turn in chat.turns) + len(chat.system or "")
  if characters > CHARACTERS_PER_TOKEN * limits.max_length:
    raise _too_long(f"{characters} characters are more than {limits.max_length} tokens can hold")
  if chat.max_tokens is not None and chat.max_tokens > limits.max_tokens:
    raise ApiError(400, f"max_tokens is at most {limits.max_tokens} here; lower it", param="max_tokens")
  found = sizes(chat.pictures, contents, limits.max_pixels)
  try:
    length = processor.prompt_length(chat.turns, found, chat.system)
    room = limits.max_length - length
    if room < (chat.max_tokens or 1):
      raise _too_long(
        f"the prompt takes {length} tokens, its answer up to {chat.max_tokens or 1}, and there are "
        f"{limits.max_length} for both; shorten the prompt, send fewer pictures, or lower max_tokens"
      )
    pictures = [decode(picture, content) for picture, content in zip(chat.pictures, contents, strict=True)]
    row = processor.with_room(len(pictures)).prompt(chat.turns, pictures, system=chat.system)
    crops = max(1, sum(processor.aspect.crops_of(*size) for size in found))
  except DataError as error:
    raise ApiError(400, str(error), param="messages") from error
  row = row._replace(patches=row.patches[:crops], grids=row.grids[:crops])
  most = chat.max_tokens or min(room, limits.max_tokens)
  return [Request(row, most, chat.sampling, seed, chat.stop) for seed in chat.seeds]


def _too_long(message: str) -> ApiError:
  return ApiError(400, message, param="messages", code="context_length_exceeded")
