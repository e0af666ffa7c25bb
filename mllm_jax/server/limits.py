"""Limits: what one client, and all of them together, may ask of the server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """rows: requests answered at once. max_queue: more of them that may wait. max_length: tokens of a prompt and its
  answer. max_tokens: of an answer. max_body: bytes of a request. max_pixels: of its pictures together. timeout: seconds
  for a request from its arrival to its last token.
  """

  rows: int
  max_length: int
  max_queue: int = 64
  max_tokens: int = 1024
  max_body: int = 32 * 2**20
  max_pixels: int = 32 * 10**6
  timeout: float = 600.0
