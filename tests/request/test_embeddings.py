"""Vectors in and out: base64 of the very float32 bytes, decimals that read back as the same float32, nothing else."""

from __future__ import annotations

import base64
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.request.embedding_rows import spell, vector_of
from proxy.request.embeddings import Read

FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=16)


def packed(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


@given(FLOATS)
def test_base64_goes_through_unchanged(numbers):
    told = packed(*numbers)
    kept = vector_of(told)
    assert kept == told
    assert json.loads(spell(kept, "base64")) == told


@given(FLOATS)
def test_decimals_are_the_shortest_that_read_back_as_the_same_float32(numbers):
    text = spell(packed(*numbers), "float")
    assert packed(*json.loads(text)) == packed(*numbers)
    for said, number in zip(text.decode()[1:-1].split(","), numbers, strict=True):
        assert float(said) == float(str(np.float32(number)))  # NumPy's repr is the shortest


def test_decimals_of_a_float32_are_not_those_of_its_double():
    assert spell(packed(0.1, 1.0, -0.0, 1e-8), "float") == b"[0.1,1.0,-0.0,1e-8]"


@given(FLOATS)
def test_floats_are_kept_as_float32(numbers):
    assert vector_of([float(number) for number in numbers]) == packed(*numbers)


def test_whole_numbers_among_floats_are_floats():
    assert vector_of([0, 0.5, 1]) == packed(0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "embedding",
    [
        "",
        "AAAA",  # three bytes
        "not base64!",
        "é",
        packed(float("nan")),
        packed(1.0, float("inf")),
        [],
        [1, 0, 1],
        [1.0, None],
        [1.0, "2"],
        [[1.0], [2.0]],
        [[1.0], [2.0, 3.0]],
        [1e39],
        [float("nan")],
        [2**70, 1],
        [True, False],
    ],
    ids=repr,
)
def test_anything_but_finite_floats_is_no_vector(embedding):
    assert vector_of(embedding) is None


async def test_a_body_that_is_all_here_is_read_in_pieces_or_whole():
    body = bytes(range(256)) * 3000
    source = Read(body)
    pieces = []
    while piece := await source.next():
        pieces.append(piece)
    assert b"".join(pieces) == body == await source.whole()
    assert max(map(len, pieces)) == Read.PIECE_BYTES
