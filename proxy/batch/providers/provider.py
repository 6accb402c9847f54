"""What the batch API of a model server is to us: whether there is one, hand in lines, ask how far it is, read what came
of them.

A line travels under a name of ours, `TAG-NUMBER`: what comes back in any order is matched by it. OpenAI's batches carry
our tag in their metadata; Anthropic's carry nothing, so one whose id was lost in a crash is found by its age and size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from proxy.core.batches import Part

PART_LIMIT_BYTES: Final = 190 * 1024 * 1024
METADATA_NAME: Final = "ibid"

RawHeaders = Sequence[tuple[bytes, bytes]]


class NoBatchApi(Exception):
    """This upstream answers, but not to this."""


class Refused(Exception):
    """It has a batch API and does not take this batch."""

    def __init__(self, status: int, said: Any) -> None:
        super().__init__(f"the upstream answered {status}")
        self.status = status
        self.said = said


class Progress(NamedTuple):
    """How far a provider is. `lost` is the state of lines that it did not answer: "expired", "cancelled", "error"."""

    has_ended: bool
    lost: str = "error"
    error: Mapping[str, Any] | None = None  # why all of it failed
    places: tuple[str, ...] = ()  # paths of its results


class Result(NamedTuple):
    """What came of one line: a response, or a loss with its error."""

    number: int
    status: int = 0
    body: bytes = b""
    lost: str = ""  # "expired" | "cancelled" | "error"
    error: Mapping[str, Any] | None = None


class Handed(NamedTuple):
    """Lines to hand in: each a name and a body, and the bytes of all of them together as `wrapped` makes them."""

    tag: str
    path: str
    lines: AsyncIterator[tuple[int, bytes]]
    size_bytes: int


class Provider(Protocol):
    """One dialect's batch API."""

    @property
    def limit(self) -> int:
        """Lines in one batch."""
        ...

    @property
    def is_per_model(self) -> bool:
        """Whether all lines of a batch name one model."""
        ...

    def overhead(self, tag: str, path: str, number: int) -> int:
        """Bytes around a body in what is handed in."""
        ...

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        """Raises UpstreamError, and Refused where nothing follows from what it said."""
        ...

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        """What comes before `create`: the id of a file, or "" where there is no such step."""
        ...

    async def create(self, upstream: str, headers: RawHeaders, handed: Handed, file_id: str) -> str:
        """The provider's id of the batch. Raises NoBatchApi, Refused, UpstreamError."""
        ...

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        """The id of a batch that was created, though nobody was told; or ""."""
        ...

    async def progress(self, part: Part, headers: RawHeaders) -> Progress: ...

    def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]: ...

    async def cancel(self, part: Part, headers: RawHeaders) -> None: ...

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        """Take away what only we can want."""
        ...
