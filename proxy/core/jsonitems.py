"""The elements of one array in a large JSON body, as they arrive: `{"requests": [ {…}, {…} ]}` without holding it."""

from __future__ import annotations

import re
from typing import Final

from proxy.core.errors import BadRequest

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|"', re.DOTALL)
_BEGIN: Final = re.compile(rb'\s*\{\s*"requests"\s*:\s*\[\s*')
_BETWEEN: Final = re.compile(rb"\s*(,)?\s*(\])?")
_END: Final = re.compile(rb"\s*\}\s*")
_PROLOGUE_LIMIT_BYTES: Final = 1024


class Items:
    """`feed` gives every element that is whole; `close` makes sure that the body ended as it must.

    The array must be the first and only member, as the provider's clients write it. An element longer than `limit`
    raises BadRequest (413); anything that is not such a body raises BadRequest (400).
    """

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._rest = b""
        self._at = "begin"  # | "between" | "item" | "end"
        self._depth = 0
        self._seen = 0  # of the rest, where tokens were looked for
        self._after_comma = True

    def feed(self, chunk: bytes) -> list[bytes]:
        self._rest += chunk
        items: list[bytes] = []
        while self._step(items):
            pass
        if len(self._rest) > self._limit:
            message = f"requests.{self.count}: larger than {self._limit} bytes."
            raise BadRequest(message, code="request_too_large", status=413)
        return items

    def close(self) -> None:
        if self._at != "end" or _END.fullmatch(self._rest) is None:
            raise _unfit()

    def _step(self, items: list[bytes]) -> bool:
        match self._at:
            case "begin":
                return self._begin()
            case "between":
                return self._between()
            case "item":
                return self._item(items)
            case _:
                return False

    def _begin(self) -> bool:
        found = _BEGIN.match(self._rest)
        if found is None or found.end() == len(self._rest):
            if len(self._rest) > _PROLOGUE_LIMIT_BYTES:
                raise _unfit()
            return False
        self._rest, self._at = self._rest[found.end() :], "between"
        return True

    def _between(self) -> bool:
        found = _BETWEEN.match(self._rest)
        assert found is not None
        if found[2] is None and found.end() == len(self._rest):
            return False
        self._after_comma = bool(found[1]) or not self.count
        self._rest = self._rest[found.end() :]
        if found[2] is not None:
            if found[1]:
                raise _unfit()
            self._at = "end"
            return False
        if not self._after_comma or (found[1] and not self.count) or self._rest[:1] != b"{":
            raise _unfit()
        self._at, self._depth, self._seen = "item", 0, 0
        return True

    def _item(self, items: list[bytes]) -> bool:
        for token in _TOKEN.finditer(self._rest, self._seen):
            mark = token[0]
            if mark == b'"':  # a string that has not ended
                self._seen = token.start()
                return False
            if mark in b"{[":
                self._depth += 1
            elif mark in b"}]":
                self._depth -= 1
                if not self._depth:
                    items.append(self._rest[: token.end()])
                    self._rest, self._at = self._rest[token.end() :], "between"
                    self.count += 1
                    return True
            self._seen = token.end()
        return False


def _unfit() -> BadRequest:
    message = 'The body must be {"requests": [...]} with an array of requests and nothing else.'
    return BadRequest(message, code="invalid_json", param="requests")
