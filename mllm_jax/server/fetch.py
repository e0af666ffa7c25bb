"""Remote pictures: from hosts that were allowed by name, and never from an inner address.

A name is resolved here and the connection made to the very address that was looked at: a name that points elsewhere the
second time it is asked for gains nothing.
"""

import dataclasses
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse

MOST_REDIRECTS = 3
SECONDS = 15.0  # for all of one picture, redirects included
CHUNK = 2**16
# They carry an IPv4 address inside, to which a gateway would pass the connection on.
TRANSLATED = [ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]
PORTS = {"https": 443, "http": 80}


class FetchError(Exception):
  """Why a picture was not fetched; nothing in it tells of the network inside."""


@dataclasses.dataclass(frozen=True)
class Origin:
  """What was allowed: a scheme, a host in lower case, and a port."""

  scheme: str
  host: str
  port: int


def origin(allowed: str) -> Origin:
  """HOST, HOST:PORT, or with http:// before it for a host without encryption. Raises ValueError for anything else."""
  parts = urllib.parse.urlsplit(allowed if "://" in allowed else f"https://{allowed}")
  if parts.scheme not in PORTS or not _is_host(parts.hostname) or parts.path not in ("", "/") or parts.query:
    raise ValueError(f"{allowed!r} is no host; write it like images.example.org")
  return Origin(parts.scheme, parts.hostname, parts.port or PORTS[parts.scheme])


def fetch(url: str, allowed: tuple[Origin, ...], max_bytes: int) -> bytes:
  """The content of a URL of an allowed origin, followed through redirects that are allowed, too.

  Raises FetchError: not allowed, an inner address, not reachable, not status 200, more than max_bytes, or too slow.
  """
  deadline = time.monotonic() + SECONDS
  for _ in range(1 + MOST_REDIRECTS):
    where, path = _checked(url, allowed)
    content, moved = _get(where, path, max_bytes, deadline)
    if not moved:
      return content
    url = urllib.parse.urljoin(url, moved)
  raise FetchError(f"it was redirected more than {MOST_REDIRECTS} times")


def is_public(address: str) -> bool:
  """Whether an address belongs to the open internet, and to nothing inside it."""
  found = ipaddress.ip_address(address.partition("%")[0])
  if found.version == 6 and found.ipv4_mapped:
    found = found.ipv4_mapped
  translated = found.version == 6 and any(found in network for network in TRANSLATED)
  return found.is_global and not found.is_multicast and not translated


def _is_host(host: str | None) -> bool:
  return bool(host and re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:.]+", host))


def _checked(url: str, allowed: tuple[Origin, ...]) -> tuple[Origin, str]:
  """(where, path and query) of a URL."""
  try:
    parts = urllib.parse.urlsplit(url)
    where = Origin(parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0))
  except ValueError:
    raise FetchError("it is no valid URL") from None
  if where not in allowed or parts.username is not None or parts.password is not None:
    raise FetchError(f"{where.scheme}://{where.host[:100]} is not among the hosts that --allow_url names")
  path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
  return where, path + (f"?{urllib.parse.quote(parts.query, safe='/?%:@!$&()*+,;=~-._[]')}" if parts.query else "")


def _get(where: Origin, path: str, max_bytes: int, deadline: float) -> tuple[bytes, str]:
  """(content, where it has moved to)."""
  connection = http.client.HTTPConnection(where.host, where.port)
  connection.default_port = PORTS[where.scheme]  # which is not written behind the host's name
  connection.sock = _connect(where, deadline)
  # A timeout of a socket starts anew with each byte; this one does not.
  watch = threading.Timer(max(deadline - time.monotonic(), 0), _hang_up, [connection.sock])
  watch.start()
  try:
    connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "mllm_jax", "Connection": "close"})
    response = connection.getresponse()
    if response.status in (301, 302, 303, 307, 308):
      return b"", response.headers.get("Location") or "/"
    if response.status != 200:
      raise FetchError(f"its host answers with status {response.status}")
    content = response.read(max_bytes + 1)
    if time.monotonic() >= deadline:  # without Content-Length, being hung up on looks like the end
      raise TimeoutError
    if len(content) > max_bytes:
      raise FetchError(f"it has more than {max_bytes} bytes")
    if response.length:  # what Content-Length promised and the connection's end kept back
      raise FetchError("it ended too early")
    return content, ""
  except (OSError, http.client.HTTPException) as error:
    late = time.monotonic() >= deadline
    raise FetchError(f"it did not come within {SECONDS:.0f} s" if late else "its host broke off") from error
  finally:
    watch.cancel()
    connection.close()


def _connect(where: Origin, deadline: float) -> socket.socket:
  try:
    found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as error:
    raise FetchError("its host is not known") from error
  if not found or not all(is_public(address[4][0]) for address in found):
    raise FetchError("its host has no public address")
  try:
    plain = socket.create_connection(found[0][4][:2], timeout=max(deadline - time.monotonic(), 0.01))
    if where.scheme == "http":
      return plain
    try:
      return ssl.create_default_context().wrap_socket(plain, server_hostname=where.host)
    except BaseException:
      plain.close()
      raise
  except OSError as error:
    raise FetchError("its host cannot be reached") from error


def _hang_up(sock: socket.socket) -> None:
  try:
    sock.shutdown(socket.SHUT_RDWR)
  except OSError:
    pass  # it is closed already
