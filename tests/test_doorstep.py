"""The ports before the program: what is refused at once, and who answers meanwhile."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import doorstep
from proxy.core.errors import ConfigError
from proxy.settings import config

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0


def settings_of(data_dir: Path, listen: str = "127.0.0.1:0", admin: str = "127.0.0.1:0") -> config.Settings:
    return config.load(config.Flags(listen=listen, admin=admin, data_dir=str(data_dir)), {})


@pytest.fixture
def taken() -> Iterator[str]:
    """An address somebody else listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


@pytest.mark.parametrize("which", ["listen", "admin"])
def test_a_port_that_is_taken_is_refused_and_the_other_let_go(tmp_path: Path, taken: str, which: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {taken}"):
        doorstep.bind(settings_of(tmp_path, **{which: taken}))


def test_a_directory_that_another_ibid_holds_is_refused(tmp_path: Path) -> None:
    doorstep.refuse_if_unusable(tmp_path)
    lock = os.open(tmp_path / doorstep.LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        doorstep.refuse_if_unusable(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another ibid") as refused:
            doorstep.refuse_if_unusable(tmp_path)
        assert refused.value.code == "data_dir_locked"
    finally:
        os.close(lock)
    doorstep.refuse_if_unusable(tmp_path)


def test_a_directory_that_cannot_be_made_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        doorstep.refuse_if_unusable(tmp_path / "file" / "data")
    doorstep.refuse_if_unusable(tmp_path / "not" / "there" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("trouble", ["port", "lock", "folder", "configuration"])
def test_what_can_be_refused_at_once_is_refused_before_the_program_is_imported(
    tmp_path: Path, taken: str, trouble: str
) -> None:
    data_dir = tmp_path / "data"
    flags = ["--listen", taken if trouble == "port" else "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    if trouble == "folder":
        data_dir.write_text("a file")
    else:
        data_dir.mkdir()
    if trouble == "configuration":
        flags += ["--upstream", "nonsense"]
    lock = None
    if trouble == "lock":
        lock = os.open(data_dir / doorstep.LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    command = ["serve", *flags, "--data-dir", str(data_dir)]
    code = (
        f"import sys; from proxy.commands import main as cli; code = cli.main({command!r});"
        " print(code, 'proxy.app' in sys.modules)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
        )
    finally:
        if lock is not None:
            os.close(lock)
    code_wanted = "75" if trouble in ("port", "lock") else "2"  # what may heal by itself, and what does not
    assert done.stdout.split() == [code_wanted, "False"], done.stderr
    assert done.stderr.startswith("ibid: ")
    assert done.stderr.count("\n") == 1


def ask(port: int, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def test_somebody_answers_until_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorstep.signal, "signal", lambda *_: None)  # they are those of this process
    door = doorstep.open_doorstep(settings_of(tmp_path / "data"))
    admin, clients = (one[0].getsockname()[1] for one in (door._sockets.admin, door._sockets.clients))
    waiting = socket.create_connection(("127.0.0.1", clients), timeout=PATIENCE_S)
    waiting.sendall(b"asked early")
    assert ask(admin, "GET", "/healthz")[:2] == (200, b'{"status":"ok"}')
    status, body, headers = ask(admin, "GET", "/readyz?verbose")
    assert (status, json.loads(body)) == (503, {"ready": False, "degraded": {"program": "loading"}})
    status, body, headers = ask(admin, "POST", "/cache/flush")
    assert (status, json.loads(body)["error"]["code"], headers["Retry-After"]) == (503, "loading", "1")
    assert ask(admin, "HEAD", "/healthz")[:2] == (200, b"")
    with socket.create_connection(("127.0.0.1", admin), timeout=PATIENCE_S) as rude:
        rude.sendall(b"\x00" * 100)
        rude.shutdown(socket.SHUT_WR)
        assert rude.recv(100) == b""
    assert ask(admin, "GET", "/healthz")[0] == 200
    sockets = door.take()
    sockets.clients[0].setblocking(True)
    served, _ = sockets.clients[0].accept()
    with served, waiting:
        assert served.recv(100) == b"asked early"
    sockets.close()
    assert not (tmp_path / "data").exists()
