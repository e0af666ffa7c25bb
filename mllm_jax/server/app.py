"""App: the routes of the server."""

import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mllm_jax.data.records import DataError
from mllm_jax.server import metrics, site
from mllm_jax.server.chat_request import Picture, parse_json
from mllm_jax.server.completions import Completions
from mllm_jax.server.connection import read_body
from mllm_jax.server.errors import ApiError
from mllm_jax.server.front import Front
from mllm_jax.server.pictures import sizes
from mllm_jax.server.preview import preview


def make(front: Front) -> Starlette:
  """The application. It starts the front's engine when it is started, and ends the front's threads with itself."""
  begun = int(time.time())
  page = site.make(front.model, front.limits.max_tokens, bool(front.api_key))

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    front.start()
    yield
    front.close()

  async def index(request: Request) -> Response:
    return HTMLResponse(page.html, headers=page.headers)

  async def health(request: Request) -> Response:
    return JSONResponse({"status": front.state}, 200 if front.state == "ok" else 503)

  async def show_metrics(request: Request) -> Response:
    front.authorise(request)
    return Response(front.metrics.text(front.gauges()), media_type=metrics.CONTENT_TYPE)

  async def models(request: Request) -> Response:
    front.authorise(request)
    model = {"id": front.model, "object": "model", "created": begun, "owned_by": "mllm_jax"}
    if "name" not in request.path_params:
      return JSONResponse({"object": "list", "data": [model]})
    if request.path_params["name"] != front.model:
      raise ApiError(404, f"there is no such model; {front.model!r} is here", param="model", code="model_not_found")
    return JSONResponse(model)

  async def show_preview(request: Request) -> Response:
    front.authorise(request)
    with front.place() as place:
      body = await read_body(request, front.limits.max_body, place.refusal)
      picture = Picture((await front.in_thread(parse_json, body)).get("image"), "image")
      if not isinstance(picture.url, str):
        raise ApiError(400, "image must be the address of a picture, such as a data URI", param="image")
      contents = await front.contents([picture])
      [(width, height)] = await front.in_thread(sizes, [picture], contents, front.limits.max_pixels)
      try:
        return JSONResponse(preview(front.processor.aspect, width, height))
      except DataError as error:
        raise ApiError(400, str(error), param="image") from error

  app = Starlette(
    routes=[
      Route("/", index),
      Route("/health", health),
      Route("/metrics", show_metrics),
      Route("/v1/models", models),
      Route("/v1/models/{name:path}", models),
      Route("/v1/chat/completions", Completions(front), methods=["POST"]),
      Route("/preview", show_preview, methods=["POST"]),
    ],
    exception_handlers={
      ApiError: _api_error,
      HTTPException: _http_error,
      ClientDisconnect: _gone,
      Exception: _broken,
    },
    lifespan=lifespan,
  )
  app.router.redirect_slashes = False  # it would make URLs of whatever the client says its host is
  return app


async def _api_error(request: Request, error: ApiError) -> Response:
  return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
  path = request.scope["path"][:200].encode("utf-8", "replace").decode()
  what = {404: f"there is nothing at {path}", 405: f"{request.method[:20]} is not for {path}"}
  response = ApiError(error.status_code, what.get(error.status_code, error.detail)).response()
  response.headers.update(error.headers or {})
  return response


async def _gone(request: Request, error: ClientDisconnect) -> Response:
  return Response(status_code=400)  # which nobody reads


async def _broken(request: Request, error: Exception) -> Response:
  return ApiError(500, "something broke; the server's log says what").response()
