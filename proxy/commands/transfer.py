"""`ibid export` and `ibid import`: stored answers out of a running ibid and into one, line by line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from proxy.admin.routes import JSON_LINES
from proxy.commands import printing, running
from proxy.commands.codes import ACT, FINE
from proxy.core.errors import ConfigError
from proxy.settings.config import Settings

PIECE_BYTES = 256 * 1024
FOREIGN = (
    "This is an export of another installation: only answers of virtual keys can be hits here. For those of other "
    "credentials, start ibid with that installation's file `installation-secret`."
)


def export(settings: Settings, chosen: argparse.Namespace) -> int:
    """Lines to a file or to standard output. Raises ConfigError."""
    names = ("after", "namespace")
    wanted = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    total = int(running.ask(settings, "GET", "/cache/stats")["entries"]["entries"])
    last: dict[str, Any] = {}
    with (
        _target(chosen.file, is_more=chosen.after is not None) as target,
        running.answering(settings, "GET", f"/cache/export?{urllib.parse.urlencode(wanted)}") as response,
        contextlib.closing(printing.Bar("entries", total)) as bar,
    ):
        line = b""
        while read := response.readline():
            line = read
            target.write(line)
            bar.advance(1)
        target.flush()
    with contextlib.suppress(orjson.JSONDecodeError):
        last = orjson.loads(line)
    if last.get("ibid") == "end":
        print(f"entries exported: {last['entries']:,}", file=sys.stderr)
        return FINE
    after = last.get("after", last.get("id"))
    print(f"ibid: the export broke off; go on with --after {after}" if after else "ibid: the export broke off",
          file=sys.stderr)  # fmt: skip
    return ACT


@contextlib.contextmanager
def _target(name: str, *, is_more: bool) -> Iterator[BinaryIO]:
    """Questions and answers stand in it: its owner alone may read it. Nothing is overwritten."""
    if name == "-":
        yield sys.stdout.buffer
        return
    how = os.O_APPEND if is_more else os.O_EXCL
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | how, 0o600)
    except FileExistsError:
        raise ConfigError(f"{name} exists: name another file, or go on with --after ID") from None
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        yield file


def take_in(settings: Settings, chosen: argparse.Namespace) -> int:
    """Lines from a file or from standard input. Raises ConfigError."""
    wanted = {name: "true" for name in ("dry_run", "purged") if getattr(chosen, name)}
    path = f"/cache/import?{urllib.parse.urlencode(wanted)}"
    try:
        with sys.stdin.buffer if chosen.file == "-" else open(chosen.file, "rb") as file:
            pieces = _pieces(file, 0 if chosen.file == "-" else os.path.getsize(chosen.file))
            with running.answering(settings, "POST", path, pieces, JSON_LINES) as response:
                report = orjson.loads(response.read())
    except OSError as error:
        raise ConfigError(f"{chosen.file}: {error.strerror}") from error
    if chosen.json:
        sys.stdout.write(printing.as_json(report))
    else:
        _tell(report)
    return ACT if report["refused"] else FINE


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    with contextlib.closing(printing.Bar("bytes", size)) as bar:
        while piece := file.read(PIECE_BYTES):
            yield piece
            bar.advance(len(piece))


def _tell(report: dict[str, Any]) -> None:
    would = " would be" if report["dry_run"] else ""
    print(f"{report['stored']:,} of {report['read']:,} entries{would} stored")
    for name, about in (
        ("there", "there already"),
        ("expired", "expired"),
        ("purged", "purged since they were asked for; --purged stores them again"),
        ("refused", "refused"),
    ):
        if report[name]:
            print(f"{report[name]:,} {about}")
    for line in report["refused_lines"]:
        print(f"  line {line['line']}: {printing.printable(line['error'])}")
    if not report["is_whole"]:
        print("The export is not whole: its last line is missing.")
    if report["is_foreign"]:
        print(FOREIGN)
