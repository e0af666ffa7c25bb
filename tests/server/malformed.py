"""Malformed requests from a seed: JSON, pictures, sizes and headers."""

import json
import random
import socket
import struct
import zlib

from serving import data_uri, picture, question

ANYTHING = [None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [[]], [None], {"a": 1}, "\ud83d", "<image>", 1e308, [1, 2]]
FIELDS = ["messages", "model", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options"]
FIELDS += ["max_tokens", "max_completion_tokens", "tools", "logprobs", "logit_bias", "response_format", "modalities"]
GOOD = {kind: picture(kind=kind) for kind in ("png", "jpeg", "webp", "gif", "bmp")}


def png(width, height, data=b""):
  """A PNG of a size that its pixels do not have."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def body_of(rng: random.Random) -> bytes:
  """A body that is no JSON, or JSON that asks for what there is not."""
  good = json.dumps(question(pictures=[data_uri(GOOD["gif"])])).encode()
  kind = rng.randrange(6)
  if kind == 0:
    return good[: rng.randrange(len(good))]
  if kind == 1:
    return rng.randbytes(rng.randrange(300))
  if kind == 2:
    at = rng.randrange(1, len(good))
    return good[:at] + rng.choice([b"\xff", b"\x00", b'"{', b"\n]"]) + good[at:]
  if kind == 3:
    return rng.choice([b"[", b'{"a":', b'{"messages":[']) * rng.randrange(1, 20_000)
  wrong = question() | {rng.choice(["", "Messages", "messages ", "prompt", "best_of", "x" * 99]): 1}
  if kind == 4:
    wrong = question() | {rng.choice(FIELDS): rng.choice(["x", [1], {"a": 1}, -(10**30)])}
    if wrong.get("stop") in ("x", [1]) or wrong.get("seed") == -(10**30):
      wrong["n"] = 0
  return json.dumps(wrong).encode()


def messages_of(rng: random.Random) -> bytes:
  """Messages of another form."""
  thing = lambda: rng.choice(ANYTHING)
  content = rng.choice(
    [
      lambda: [{"type": rng.choice(["image", "audio", "file", None, 3]), "text": thing()}],
      lambda: [{"type": "text", "text": rng.choice([None, 3, [], {}, "\udc00", "<image>"])}],
      lambda: [{"type": "image_url", "image_url": thing()}],
      lambda: [{"type": "image_url", "image_url": {"url": thing()}}],
      lambda: rng.choice([None, 3, True, [], {}, [None], " ", "\ud800", "a <image>"]),
    ]
  )()
  bad = {"role": "user", "content": content}
  other = {"role": rng.choice(["tool", "user ", "USER", "function", None, 1, [], {}]), "content": "x"}
  hello = {"role": "user", "content": "hello"}
  messages = rng.choice(
    [[bad], [hello, bad], [other], [hello, hello], [], thing(), [hello, other], [hello, {}], [thing()]]
  )
  return json.dumps(question() | {"messages": messages}).encode()


def picture_of(rng: random.Random) -> bytes:
  """A picture that is none, is not whole, or is too large."""
  kind, content = rng.choice(list(GOOD.items()))
  wrong = rng.choice(
    [
      lambda: data_uri(content[: rng.randrange(len(content) // 2)], kind),
      lambda: data_uri(bytes(12) + content[12:], kind),
      lambda: data_uri(rng.randbytes(rng.randrange(2000)), kind),
      lambda: data_uri(png(rng.choice([0, 1, 9000, 2**31 - 1, 2**32 - 1]), rng.choice([0, 3000, 70_000, 2**31 - 1]))),
      lambda: data_uri(png(200, 200, bytes(rng.randrange(600)))),
      lambda: data_uri(content, kind)[: -rng.choice([1, 2, 3])] + rng.choice("?#\u00e4 "),
      lambda: data_uri(content, kind).replace(";base64,", rng.choice([",", ";base32,", ";base64", ""])),
      lambda: (
        rng.choice(["http", "https", "file", "ftp", "gopher", "blob", ""]) + "://" + rng.choice(["a", "127.0.0.1", ""])
      ),
      lambda: "file:///" + "../" * rng.randrange(9) + rng.choice(["etc/passwd", "dev/zero", "proc/self/mem", ""]),
    ]
  )()
  return json.dumps(question(pictures=[wrong])).encode()


def size_of(rng: random.Random) -> bytes:
  """More of something than is taken."""
  return json.dumps(
    rng.choice(
      [
        lambda: question("x" * (2**20 + rng.randrange(1000))),
        lambda: question("word " * rng.randrange(4000, 20_000)),
        lambda: question(pictures=[data_uri(GOOD["gif"])] * 65),
        lambda: question(n=rng.randrange(17, 10**6)),
        lambda: question(max_tokens=rng.randrange(2000, 10**9)),
        lambda: question(stop=["x"] * rng.randrange(17, 1000)),
      ]
    )()
  ).encode()


def head_of(rng: random.Random) -> bytes:
  """What no HTTP server should take for a request."""
  post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
  return rng.choice(
    [
      lambda: rng.randbytes(rng.randrange(1, 400)).replace(b"\n", b"") + b"\r\n\r\n",
      lambda: b"GET / HTTP/%s\r\n\r\n" % rng.choice([b"x", b"1", b"11.1", b""]),
      lambda: b"GET  /  HTTP/1.1\r\nHost: x\r\n\r\n",
      lambda: b"GET / HTTP/1.1\r\n\r\n",
      lambda: post + b"X: " + b"a" * rng.randrange(33_000, 90_000) + b"\r\n\r\n",
      lambda: post + b"no colon\r\n\r\n",
      lambda: post + b"A\x00: b\r\n\r\n",
      lambda: (
        post + b"Content-Length: %s\r\n\r\n{}" % rng.choice([b"-1", b"x", b"1e3", b"", b"+2", b"0x10", b"9" * 30])
      ),
      lambda: post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
      lambda: post + b"Transfer-Encoding: gzip\r\n\r\n{}",
      lambda: post + b"Transfer-Encoding: chunked\r\n\r\n%s\r\n" % rng.choice([b"zz", b"-1", b"f" * 21]),
      lambda: post + b"Content-Length: 2\r\n\r\n[]",
      lambda: post.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}",
      lambda: post + b"Content-Length: 99999999999\r\n\r\n{}",
      lambda: b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
      lambda: (
        b"GET /%s HTTP/1.1\r\nHost: [::\r\n\r\n"
        % rng.choice([b"..%2f..%2fetc", b"v1/models/%ff%00", b"%zz", b"a" * 5000])
      ),
      lambda: b"POST /preview HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
      lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
  )()


def status_of(url: str, request: bytes) -> int:
  """What a server answers to raw bytes; 0 where it hangs up without a word."""
  host, port = url.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port)), timeout=20) as connection:
    connection.sendall(request)
    try:
      line = connection.makefile("rb").readline()
    except ConnectionResetError:
      return 0
  return int(line.split()[1]) if line else 0
