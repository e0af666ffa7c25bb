"""Malformed requests get a status of 4xx; the server is none the worse for them."""

import random
import socket

import httpx2
import malformed
import pytest
from serving import ask, content, expected, question, running, wait_for

BODIES = [malformed.body_of, malformed.messages_of, malformed.picture_of, malformed.size_of]


def send(url, count, seed):
  """Sends `count` requests; a few of the kinds at a time over one connection, as clients do."""
  rng = random.Random(seed)
  with httpx2.Client(timeout=30) as client:
    for number in range(count):
      make = rng.choice([*BODIES, malformed.head_of])
      request = make(rng)
      if make is malformed.head_of:
        status = malformed.status_of(url, request)
      else:
        path = rng.choice(["/v1/chat/completions"] * 9 + ["/preview"])
        headers = {"Content-Type": "application/json"}
        status = client.post(url + path, content=request, headers=headers).status_code
      assert 400 <= status < 500, (number, make.__name__, status, request[:500])


def unharmed(url, processor):
  assert content(ask(url, question())) == expected(processor, question())
  wait_for(lambda: url.front.open == 0 and not url.engine.running and not url.engine.waiting)
  assert not [status for status in url.front.metrics.statuses if status >= 500]


def test_a_few_hundred(url, processor):
  send(url, 300, seed=0)
  unharmed(url, processor)


@pytest.mark.long
def test_five_thousand(processor):
  with running(processor, max_body=2**20, max_pixels=200_000) as url:
    send(url, 5000, seed=1)
    unharmed(url, processor)


def test_a_client_that_stops_in_the_middle(url, processor):
  head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
  for request in (
    head + b"Content-Length: 100\r\n\r\n{",
    head,
    b"PO",
    head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
  ):
    with socket.create_connection(tuple(url.removeprefix("http://").split(":")), timeout=5) as connection:
      connection.sendall(request)
  unharmed(url, processor)


def test_a_client_that_dawdles_is_hung_up_on(processor, monkeypatch):
  monkeypatch.setattr("mllm_jax.server.connection.HEADER_SECONDS", 0.2)
  monkeypatch.setattr("mllm_jax.server.connection.BODY_SECONDS", 0.3)
  with running(processor) as url:
    assert malformed.status_of(url, b"") == malformed.status_of(url, b"GET / HT") == 0
    head = (
      b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    )
    assert malformed.status_of(url, head + b"{") == 408
    # Also the second request of a connection, whose first byte stops the clock of idle ones.
    assert malformed.status_of(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET") == 200
    unharmed(url, processor)
