"""The command: its line, its signals and its exit status."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from fake_serve import __file__ as FAKE
from serving import ask, content, data_uri, expected, picture, question, wait_for

from mllm_jax import serve


@contextlib.contextmanager
def command(tmp_path, *arguments, pause=0.03, words=15):
  """(process, URL) of a server that is ready. A process that still runs in the end is killed."""
  (tmp_path / "tiny").mkdir(exist_ok=True)
  line = [sys.executable, FAKE, str(pause), str(words), f"--model={tmp_path / 'tiny'}", "--port=0", *arguments]
  environment = os.environ | {"PYTHONPATH": str(Path(serve.__file__).parents[1])}
  with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
    try:
      first = process.stdout.readline()
      assert first.startswith("http://127.0.0.1:") and "serves tiny" in first, (first, process.stderr.read())
      url = first.split()[0]
      wait_for(lambda: healthy(url))
      yield process, url
    finally:
      process.kill()


def healthy(url):
  with contextlib.suppress(httpx2.TransportError):
    return httpx2.get(f"{url}/health").status_code == 200


def test_a_term_ends_it_after_what_it_is_answering(tmp_path, processor):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "a.png").write_bytes(picture())
  with command(tmp_path, f"--allow_files={tmp_path / 'pictures'}", "--rows=1") as (process, url):
    local = question(pictures=[f"file://{tmp_path}/pictures/a.png"], max_tokens=5)
    sent = question(pictures=[data_uri(picture())], max_tokens=5)
    assert (
      content(ask(url, local)) == content(ask(url, sent)) == " ".join(expected(processor, sent, count=15).split()[:5])
    )
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(url, question()))) for _ in range(2)]
    for thread in threads:
      thread.start()
    wait_for(lambda: "mllm_running_rows 1\n" in httpx2.get(f"{url}/metrics").text)
    wait_for(lambda: "mllm_open_requests 2\n" in httpx2.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
      thread.join()
    assert [content(answer) for answer in answers] == [expected(processor, question(), count=15)] * 2
    assert process.wait(20) == 0
    assert process.stderr.read().splitlines()[-2:] == ["ending; 2 requests are open", "ended"]


def test_interrupts_end_it_at_once(tmp_path):
  with command(tmp_path, "--grace=60", pause=0.05, words=10**5) as (process, url):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(url, question())))
    thread.start()
    wait_for(lambda: "mllm_running_rows 1\n" in httpx2.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: ask(url, question()).status_code == 503)
    process.send_signal(signal.SIGINT)
    thread.join(20)
    assert answers[0].status_code == 503
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_port_in_use_is_one_line(tmp_path, capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert serve.main([f"--model={tmp_path}", f"--port={port}"]) == 2
  message = capsys.readouterr().err
  assert message == f"error: --host=127.0.0.1 --port={port}: Address already in use; try another --port\n"


@pytest.mark.parametrize(
  "arguments, named",
  [
    *[(["--model=/nowhere"], "--model"), (["--rows=0"], "--rows"), (["--max_queue=-1"], "--max_queue")],
    *[(["--max_length=1"], "--max_length"), (["--timeout=nan"], "--timeout"), (["--allow_url=a/b"], "--allow_url")],
    *[(["--allow_files=/nowhere"], "--allow_files"), (["--max_pixels=0"], "--max_pixels"), (["--grace=x"], "--grace")],
  ],
)
def test_a_mistyped_line_is_answered_before_anything_heavy(arguments, named, tmp_path, capsys):
  with pytest.raises(SystemExit) as caught:
    serve.main([f"--model={tmp_path}", *arguments])
  message = capsys.readouterr().err
  assert caught.value.code == 2 and named in message and message.count("\n") == 1


def test_small_pieces_are_sent_without_delay():
  with serve.listener("127.0.0.1", 0) as bound:
    assert bound.proto == socket.IPPROTO_TCP  # what asyncio looks at before it turns Nagle's algorithm off


def test_a_port_that_there_is_not(tmp_path, capsys):
  for port in ("70000", "-1"):
    with contextlib.suppress(SystemExit):
      assert serve.main([f"--model={tmp_path}", f"--port={port}"]) == 2
    assert "--port" in capsys.readouterr().err


def test_help_needs_neither_jax_nor_a_server():
  code = (
    "import sys\nfrom mllm_jax import serve\ntry: serve.main(['--help'])\nexcept SystemExit: pass\n"
    "assert not {'jax', 'flax', 'transformers', 'uvicorn', 'starlette'} & set(sys.modules)"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=Path(serve.__file__).parents[1], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert "--allow_url" in result.stdout
