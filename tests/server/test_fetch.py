"""Remote pictures: hosts that were allowed, public addresses, and nothing that takes for ever."""

import http.server
import threading
import time

import pytest

from mllm_jax.server import fetch
from mllm_jax.server.fetch import FetchError, Origin, origin


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    path = self.path.partition("?")[0]
    self.server.asked.append(self.path)
    if path == "/slow":
      self.send_response(200)
      self.end_headers()
      for _ in range(100):
        self.wfile.write(b"x")
        self.wfile.flush()
        time.sleep(0.05)
      return
    moves = {
      "/moved": "/picture",
      "/loop": "/loop",
      "/inner": "http://10.0.0.1/secret",
      "/elsewhere": f"http://localhost:{self.server.server_port}/picture",
      "/file": "file:///etc/passwd",
    }
    if path in moves:
      self.send_response(302)
      self.send_header("Location", moves[path])
      self.end_headers()
      return
    self.send_response(404 if path == "/missing" else 200)
    self.send_header("Content-Length", {"/short": "100"}.get(path, "7"))
    self.end_headers()
    self.wfile.write(b"picture")

  def log_message(self, *args):
    pass


@pytest.fixture
def host():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def allowed(host, monkeypatch):
  """The server's origin, as if its address were public."""
  monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
  return (origin(f"http://127.0.0.1:{host.server_port}"),)


def url_of(host, path):
  return f"http://127.0.0.1:{host.server_port}{path}"


@pytest.mark.parametrize(
  "address",
  [
    *["127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"],
    *[
      "::1",
      "::",
      "fe80::1%eth0",
      "fc00::1",
      "::ffff:127.0.0.1",
      "::ffff:10.0.0.1",
      "64:ff9b::7f00:1",
      "2002:7f00:1::",
    ],
    *["224.0.0.1", "255.255.255.255", "ff02::1", "192.0.2.1", "198.18.0.1", "2001:db8::1", "240.0.0.1"],
  ],
)
def test_inner_addresses(address):
  assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
  assert fetch.is_public(address)


def test_origins():
  assert origin("Images.example.org") == Origin("https", "images.example.org", 443)
  assert origin("http://a.org:8080/") == Origin("http", "a.org", 8080)
  assert origin("[2606:4700::1111]:444") == Origin("https", "2606:4700::1111", 444)
  for wrong in ("", "https://", "ftp://a.org", "a.org/path", "a b", "a.org:port", "*.org", "a.org?x"):
    with pytest.raises(ValueError):
      origin(wrong)


def test_a_picture_is_fetched_and_redirects_are_followed(host, allowed):
  assert fetch.fetch(url_of(host, "/picture?a=b c"), allowed, 100) == b"picture"
  assert fetch.fetch(url_of(host, "/moved"), allowed, 7) == b"picture"
  assert host.asked == ["/picture?a=b%20c", "/moved", "/picture"]


@pytest.mark.parametrize(
  "path, message",
  [
    *[("/inner", "allow_url"), ("/elsewhere", "allow_url"), ("/file", "allow_url"), ("/loop", "more than 3 times")],
    *[("/missing", "status 404"), ("/short", "too early")],
  ],
)
def test_what_is_not_fetched(host, allowed, path, message):
  with pytest.raises(FetchError, match=message):
    fetch.fetch(url_of(host, path), allowed, 1000)


def test_a_host_without_a_certificate_is_not_asked(host, monkeypatch):
  monkeypatch.setattr(fetch, "is_public", lambda address: True)
  with pytest.raises(FetchError, match="cannot be reached"):
    fetch.fetch(url_of(host, "/picture").replace("http:", "https:"), (origin(f"127.0.0.1:{host.server_port}"),), 100)
  assert host.asked == []


def test_more_bytes_than_allowed(host, allowed):
  with pytest.raises(FetchError, match="more than 6 bytes"):
    fetch.fetch(url_of(host, "/picture"), allowed, 6)


def test_a_host_that_drips_is_hung_up_on(host, allowed, monkeypatch):
  monkeypatch.setattr(fetch, "SECONDS", 0.3)
  with pytest.raises(FetchError, match="did not come"):
    fetch.fetch(url_of(host, "/slow"), allowed, 1000)


def test_an_allowed_name_with_an_inner_address_is_not_connected_to(host):
  for name in ("127.0.0.1", "localhost"):
    with pytest.raises(FetchError, match="no public address"):
      fetch.fetch(f"http://{name}:{host.server_port}/", (origin(f"http://{name}:{host.server_port}"),), 100)
  assert host.asked == []


def test_one_inner_address_among_public_ones_is_enough(monkeypatch):
  found = [(2, 1, 6, "", ("8.8.8.8", 443)), (2, 1, 6, "", ("10.0.0.1", 443))]
  monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: found)
  with pytest.raises(FetchError, match="no public address"):
    fetch.fetch("https://a.org/x.png", (origin("a.org"),), 100)


def test_the_address_that_was_looked_at_is_the_one_connected_to(monkeypatch):
  answers = iter([[(2, 1, 6, "", ("8.8.8.8", 443))], [(2, 1, 6, "", ("10.0.0.1", 443))]])
  asked, connected = [], []
  monkeypatch.setattr("socket.getaddrinfo", lambda host, *args, **options: asked.append(host) or next(answers))

  def connect(address, timeout):
    connected.append(address)
    raise OSError

  monkeypatch.setattr("socket.create_connection", connect)
  with pytest.raises(FetchError, match="cannot be reached"):
    fetch.fetch("https://a.org/x.png", (origin("a.org"),), 100)
  assert connected == [("8.8.8.8", 443)] and asked == ["a.org"]


@pytest.mark.parametrize(
  "url",
  [
    *["https://b.org/x", "http://a.org/x", "https://a.org:8443/x", "https://a.org.b.org/x", "https://me@a.org/x"],
    *["https://me:you@a.org/x", "https://a.org:99999/x", "https://[::1/x", "https:///x", "https://a.org\\@b.org/x"],
  ],
)
def test_urls_beside_what_was_allowed(url, monkeypatch):
  monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: pytest.fail("a name was looked up"))
  with pytest.raises(FetchError):
    fetch.fetch(url, (origin("a.org"),), 100)


def test_no_line_can_be_smuggled_into_the_request(host, allowed):
  with pytest.raises(FetchError):
    fetch.fetch(url_of(host, "/a") + " HTTP/1.1\r\nX: y", allowed, 3)
  assert all("X: y" not in path and "\n" not in path for path in host.asked)
