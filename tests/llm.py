"""A real LLM server for tests: llama.cpp on the loopback, ended by its own pid when the session ends.

Use the fixture `llm` by `from tests.llm import llm` in a conftest; `make test` puts the weights where it looks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.local_llm import MODEL_NAME, running

WEIGHTS = Path(os.environ.get("IBID_TEST_LLM") or Path(__file__).parent.parent / ".venv/share/ibid/smollm2.gguf")


class LocalLlm(NamedTuple):
    """`base_url` is what an OpenAI client sets, `http://127.0.0.1:PORT/v1`; `model` the name to ask for."""

    base_url: str
    model: str


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLlm]:
    """The server, one thread, shared by the whole session. At temperature 0 it answers the same text each time."""
    if not WEIGHTS.exists():
        pytest.fail("the test model is missing: run `make test`, or deploy/fetch_llm.py once")
    with (tmp_path_factory.mktemp("llm") / "server.log").open("w") as log, running(WEIGHTS, log) as address:
        yield LocalLlm(f"{address}/v1", MODEL_NAME)
