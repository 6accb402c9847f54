"""Content codings undone piece by piece, none of them into more than PIECE_BYTES at once.

gzip and deflate are in the standard library. `br` needs the package brotli (1.2 or later, which bounds what comes out),
`zstd` Python 3.14 or the package backports.zstd: the ones aiohttp uses. Without them those codings are not known here.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

PIECE_BYTES: Final = 256 * 1024
"""At most so much comes out of one step, however little was compressed into it."""
GZIP_MAGIC: Final = b"\x1f\x8b\x08"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_TEXTS: Final = (b"{", b"[", b"data", b"event", b":")


class Unpacker(Protocol):
    """Of one member of a body. `has_ended`: it was whole. `holds_more`: there is more without more input."""

    has_ended: bool
    holds_more: bool

    def unpack(self, packed: bytes) -> tuple[bytes, bytes]:
        """What came out, and what of the input is left. Raises ValueError for what is no such coding."""
        ...


class _Inflating:
    def __init__(self, bits: int) -> None:
        self._inflating = zlib.decompressobj(bits)
        self.has_ended = self.holds_more = False

    def unpack(self, packed: bytes) -> tuple[bytes, bytes]:
        inflating = self._inflating
        try:
            piece = inflating.decompress(packed, PIECE_BYTES)
        except zlib.error as error:
            raise ValueError("not deflated") from error
        self.has_ended = inflating.eof
        self.holds_more = len(piece) == PIECE_BYTES and not inflating.eof
        return piece, inflating.unused_data if inflating.eof else inflating.unconsumed_tail


class _Unbrotlied:
    def __init__(self, brotli: Any) -> None:
        self._fault = brotli.error
        self._decompressor = brotli.Decompressor()
        self.has_ended = self.holds_more = False

    def unpack(self, packed: bytes) -> tuple[bytes, bytes]:
        try:
            piece = self._decompressor.process(packed, output_buffer_limit=PIECE_BYTES)
        except self._fault as error:
            raise ValueError("not brotli") from error
        self.has_ended = self._decompressor.is_finished()
        self.holds_more = not self.has_ended and not self._decompressor.can_accept_more_data()
        return bytes(piece), b""


class _Unzstded:
    def __init__(self, zstd: Any) -> None:
        self._fault = zstd.ZstdError
        self._decompressor = zstd.ZstdDecompressor()
        self.has_ended = self.holds_more = False

    def unpack(self, packed: bytes) -> tuple[bytes, bytes]:
        try:
            piece = self._decompressor.decompress(packed, PIECE_BYTES)
        except self._fault as error:
            raise ValueError("not zstd") from error
        self.has_ended = self._decompressor.eof
        self.holds_more = not self.has_ended and not self._decompressor.needs_input
        return piece, self._decompressor.unused_data if self.has_ended else b""


def _of_gzip(start: bytes) -> Unpacker | None:
    return _Inflating(zlib.MAX_WBITS | 16) if start.startswith(GZIP_MAGIC) else None


def _of_deflate(start: bytes) -> Unpacker | None:
    if len(start) >= 2 and start[0] & 0x0F == 8 and (start[0] << 8 | start[1]) % 31 == 0:  # RFC 1950 §2.2
        return _Inflating(zlib.MAX_WBITS)
    return None if start.startswith(_TEXTS) else _Inflating(-zlib.MAX_WBITS)


def _codings() -> Mapping[str, Callable[[bytes], Unpacker | None]]:
    """What can be undone here: by the first bytes of a body, None where they are plain."""
    found: dict[str, Callable[[bytes], Unpacker | None]] = {
        "gzip": _of_gzip, "x-gzip": _of_gzip, "deflate": _of_deflate,
    }  # fmt: skip
    brotli = _module("brotli") or _module("brotlicffi")
    if brotli is not None and hasattr(brotli.Decompressor, "can_accept_more_data"):
        # its bytes have no mark: what begins as JSON or as an event is what it looks like
        found["br"] = lambda start: None if start.startswith(_TEXTS[2:]) or start[:2] == b'{"' else _Unbrotlied(brotli)
    zstd = _module("compression.zstd") or _module("backports.zstd")
    if zstd is not None:
        found["zstd"] = lambda start: _Unzstded(zstd) if start.startswith(ZSTD_MAGIC) else None
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


CODINGS: Final = _codings()
LONGEST_MARK: Final = 4  # bytes that `CODINGS` look at
