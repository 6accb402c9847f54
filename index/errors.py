"""Exceptions of index/. All of them turn a lookup into a bypass; none reaches a client."""

from __future__ import annotations


class IndexRoomError(Exception):
    """Root of the family; `reason` is the machine-readable word that verdicts, logs and metrics carry."""

    reason = "index_fault"


class Overloaded(IndexRoomError):
    """A bounded queue is full; said at once, nothing was enqueued."""

    reason = "embedder_busy"


class TextTooLong(IndexRoomError):
    """The text has more tokens than the model's window, so its embedding would ignore the rest."""

    reason = "too_long"


class EmbedderFault(IndexRoomError):
    """The model raised, hangs, or returned a vector that is not unit, finite and of its dimension."""

    reason = "embedder_down"


class EmbedderLate(EmbedderFault):
    """No vector within the deadline, of a model that may well give it later: busy, not broken."""

    reason = "embedder_late"


class IndexFault(IndexRoomError):
    """The vector index could not answer."""

    reason = "index_down"


class IndexRebuilding(IndexFault):
    """The index is still being loaded or rebuilt from SQL."""

    reason = "index_rebuilding"


class SnapshotRefused(IndexRoomError):
    """A snapshot is absent, damaged, or belongs to another embedder; rebuild from SQL instead."""

    reason = "snapshot_refused"


class ModelFault(IndexRoomError):
    """The model files are missing, do not match their checksum, or cannot be converted."""

    reason = "embedder_down"


FAULTS = (
    IndexRoomError, ValueError, TypeError, IndexError, KeyError, RuntimeError, MemoryError, AssertionError,
)  # fmt: skip
"""What NumPy, Numba and FAISS raise; anything else ends a thread of the index and every later call says IndexFault."""
