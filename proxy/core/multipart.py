"""multipart/form-data (RFC 7578), read as it arrives.

`Form.feed` takes bytes in any cut and gives the pieces of one file, the part `file`; small fields are kept, other files
are passed over. Nothing is held back but the last bytes that may be the beginning of a boundary.

By hand, although PyPI's multipart is well kept: its version 2.0.1 refuses blanks behind a boundary, which RFC 2046
§5.1.1 has receivers accept, and gives a filename without the backslashes that it came with.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core.errors import BadRequest

HEAD_LIMIT_BYTES: Final = 8 * 1024
FIELD_LIMIT_BYTES: Final = 64 * 1024
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"\r\n]{0,256})"', re.IGNORECASE)
_FILENAME = re.compile(rb'filename="((?:[^"\\\r\n]|\\.){0,512})"', re.IGNORECASE)


def boundary_of(content_type: str) -> bytes:
    """Raises BadRequest for a media type without one."""
    found = _BOUNDARY.search(content_type) if content_type.lower().startswith("multipart/form-data") else None
    if found is None:
        raise BadRequest("Content-Type must be multipart/form-data with a boundary.", code="invalid_content_type")
    return (found[1] or found[2]).encode("latin-1")


class Form:
    """`fields` as far as they were read; `filename` once the part `file` has begun. Raises BadRequest when broken."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, bytes] = {}
        self.repeated: set[str] = set()  # names of fields that came more than once; the last one counts
        self.filename: str | None = None
        self.ended = False
        self._mark = b"\r\n--" + boundary
        self._rest = b"\r\n"  # so that the first boundary looks like every other
        self._at = "preamble"  # | "boundary" | "head" | "file" | "field" | "other file"
        self._name = ""
        self._field = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Pieces of the file."""
        pieces: list[bytes] = []
        self._rest += chunk
        while not self.ended and self._step(pieces):
            pass
        return pieces

    def _step(self, pieces: list[bytes]) -> bool:
        """Whether there is more to do without more bytes."""
        match self._at:
            case "boundary":
                return self._after_boundary()
            case "head":
                return self._read_head()
            case _:
                return self._read_body(pieces)

    def _after_boundary(self) -> bool:
        line, end, rest = self._rest.partition(b"\r\n")
        if self._rest.startswith(b"--"):
            self.ended = True
            return False
        if not end:
            return self._refuse_if_longer(HEAD_LIMIT_BYTES)
        if line.strip(b" \t"):
            raise _broken()
        self._rest, self._at = b"\r\n" + rest, "head"
        return True

    def _read_head(self) -> bool:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            return self._refuse_if_longer(HEAD_LIMIT_BYTES)
        named = _NAME.search(head)
        if named is None:
            raise _broken()
        self._name = named[1].decode("utf-8", "replace")
        self._rest, self._field = rest, b""
        filename = _FILENAME.search(head)
        self._at = "file" if self._name == "file" else "field" if filename is None else "other file"
        if self._at == "file":
            if self.filename is not None:
                raise BadRequest("The form has more than one file.", code="invalid_value", param="file")
            self.filename = "upload" if filename is None else filename[1].decode("utf-8", "replace")
        return True

    def _read_body(self, pieces: list[bytes]) -> bool:
        body, mark, rest = self._rest.partition(self._mark)
        if not mark:
            held = len(self._mark) - 1
            body, rest = self._rest[:-held], self._rest[-held:]
        if self._at == "file" and body:
            pieces.append(body)
        elif self._at == "field":
            self._field += body
            if len(self._field) > FIELD_LIMIT_BYTES:
                raise BadRequest(f"The field {self._name[:64]!r} is too long.", code="invalid_value")
            if mark:
                if self._name in self.fields:
                    self.repeated.add(self._name)
                self.fields[self._name] = self._field
        self._rest = rest
        if mark:
            self._at = "boundary"
        return bool(mark)

    def _refuse_if_longer(self, limit: int) -> bool:
        if len(self._rest) > limit:
            raise _broken()
        return False


def _broken() -> BadRequest:
    return BadRequest("The body is not valid multipart/form-data.", code="invalid_multipart")
