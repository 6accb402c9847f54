"""Snapshots of the arena: written whole or not at all, believed only when every checksum holds.

A file is the magic, then pieces, then a JSON trailer, its length, its SHA-256 and the magic again. The trailer names
the format, the embedder, the rules of the token classes, the scopes and, per piece, its place, entries and SHA-256.
Reading starts at the end, so a cut file is refused before anything is copied. SHA-256 because the standard library's
runs at memory speed on processors with SHA instructions. No pickle, no memory map: a changed file cannot reach in
later.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from index.arena import Arena, Piece
from index.errors import SnapshotRefused
from index.tokens import STAMP, WIDTH

FORMAT: Final = 1
PIECE: Final = 2048
_MAGIC: Final = b"IBIDVEC\x01"
_TAIL: Final = struct.Struct("<Q32s8s")


def _layout(n: int, dimension: int) -> tuple[tuple[Any, tuple[int, ...]], ...]:
    """dtype and shape of each array of a piece of n entries, in the order of `arena.Piece`."""
    return (
        (np.dtype("<i8"), (n,)),
        (np.dtype("<i4"), (n,)),
        (np.dtype("<i8"), (n,)),
        (np.dtype("<f4"), (n,)),
        (np.dtype("<i2"), (n, dimension)),
        (np.dtype("<u8"), (n, WIDTH)),
    )


def write(
    path: Path, identity: str, dimension: int, pieces: Iterable[Piece], digests: Callable[[], list[bytes]]
) -> None:
    """Replace `path` by a snapshot of these pieces. `digests` is asked when all are read. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            os.chmod(temporary, 0o600)
            file.write(_MAGIC)
            sections = [_write_piece(file, piece) for piece in pieces]
            trailer = {
                "format": FORMAT,
                "identity": identity,
                "dimension": dimension,
                "width": WIDTH,
                "rules": STAMP,
                "entries": sum(section["entries"] for section in sections),
                "max_id": max((section["max_id"] for section in sections), default=-1),
                "scopes": [digest.hex() for digest in digests()],
                "pieces": sections,
            }
            raw = json.dumps(trailer).encode()
            file.write(raw)
            file.write(_TAIL.pack(len(raw), hashlib.sha256(raw).digest(), _MAGIC))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_piece(file: BinaryIO, piece: Piece) -> dict[str, Any]:
    digest = hashlib.sha256()
    at = file.tell()
    for array, (dtype, shape) in zip(piece, _layout(len(piece.ids), piece.rows.shape[1]), strict=True):
        raw = np.ascontiguousarray(array, dtype=dtype).reshape(shape).data
        digest.update(raw)
        file.write(raw)
    top = int(piece.ids.max()) if len(piece.ids) else -1
    return {"at": at, "entries": len(piece.ids), "max_id": top, "sha256": digest.hexdigest()}


def read(path: Path, identity: str, dimension: int, arena: Arena) -> int:
    """Fill an empty arena; returns the highest id.

    Raises SnapshotRefused when the file is absent, unreadable, damaged, of another embedder, dimension or rules; all
    but an absent one are renamed to *.bad. On a refusal the arena must be thrown away.
    """
    try:
        with path.open("rb") as file:
            trailer = _read_trailer(file)
            _check(trailer, identity, dimension)
            digests = [bytes.fromhex(text) for text in trailer["scopes"]]
            for section in trailer["pieces"]:
                arena.add_piece(_read_piece(file, section, dimension, digests), digests)
            if arena.live > trailer["entries"]:
                raise SnapshotRefused("more entries than the trailer says")
            return int(trailer["max_id"])
    except FileNotFoundError as fault:
        raise SnapshotRefused("there is no snapshot") from fault
    except SnapshotRefused:
        _set_aside(path)
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError, AttributeError) as fault:
        _set_aside(path)
        raise SnapshotRefused(f"the snapshot cannot be read: {type(fault).__name__}") from fault


def _read_trailer(file: BinaryIO) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    if size < len(_MAGIC) + _TAIL.size or file.read(len(_MAGIC)) != _MAGIC:
        raise SnapshotRefused("not a snapshot")
    file.seek(size - _TAIL.size)
    length, digest, magic = _TAIL.unpack(file.read(_TAIL.size))
    if magic != _MAGIC or length > size - _TAIL.size - len(_MAGIC):
        raise SnapshotRefused("the snapshot is cut")
    file.seek(size - _TAIL.size - length)
    raw = file.read(length)
    if hashlib.sha256(raw).digest() != digest:
        raise SnapshotRefused("the trailer is damaged")
    trailer: dict[str, Any] = json.loads(raw)
    return trailer


def _check(trailer: dict[str, Any], identity: str, dimension: int) -> None:
    wanted = {"format": FORMAT, "identity": identity, "dimension": dimension, "width": WIDTH, "rules": STAMP}
    for name, value in wanted.items():
        if trailer[name] != value:
            raise SnapshotRefused(f"the snapshot is of another {name}")


def _read_piece(file: BinaryIO, section: dict[str, Any], dimension: int, digests: list[bytes]) -> Piece:
    n = int(section["entries"])
    file.seek(int(section["at"]))
    digest = hashlib.sha256()
    arrays = []
    for dtype, shape in _layout(n, dimension):
        raw = file.read(int(np.prod(shape)) * dtype.itemsize)
        digest.update(raw)
        arrays.append(np.frombuffer(raw, dtype).reshape(shape))
    if digest.hexdigest() != section["sha256"]:
        raise SnapshotRefused("a piece is damaged")
    piece = Piece(*arrays)
    if n and (piece.scopes.min() < 0 or piece.scopes.max() >= len(digests) or piece.ids.min() < 0):
        raise SnapshotRefused("a piece names what the trailer does not")
    return piece


def _set_aside(path: Path) -> None:
    """Keep a refused file for whoever wants to know why; a directory in its place is moved as well."""
    target = path.with_name(path.name + ".bad")
    for turn in range(1, 10):
        try:
            os.replace(path, target)
        except (IsADirectoryError, NotADirectoryError, OSError):
            target = path.with_name(f"{path.name}.bad.{turn}")
        else:
            return
