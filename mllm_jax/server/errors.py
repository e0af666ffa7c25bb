"""Errors as OpenAI's clients expect them."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class ApiError(Exception):
  """What a client is told instead of an answer.

  status: of HTTP. message: what is wrong and the remedy. param: the field at fault, such as "messages[0].content".
  code: a word that programs can look at. retry_after: seconds after which the same request may succeed.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.message = message
    self.param = param
    self.code = code
    self.retry_after = retry_after

  @property
  def body(self) -> Mapping:
    """The JSON object."""
    kind = (
      "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
    )
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

  def response(self) -> JSONResponse:
    """The whole response."""
    headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
    if self.status == 401:
      headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(self.body, self.status, headers)
