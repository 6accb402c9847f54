"""What an agent writes of one run around a tool's output says nothing of what the tool said.

Codex heads each output with an id drawn at random and the time the command took, Gemini's command line ends it with a
process number: with them no loop would be found again. Only their own lines at their own place are known. Seen on the
wire of Codex 0.171 (2026-12-01), its earlier forms and Gemini's in public transcripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_HEAD: Final = re.compile(
    r"\A(?:Chunk ID: [0-9a-f]{1,16}\n)?(?P<exit>Exit code: -?\d+\n)?Wall time: (?P<s>\d+)(?:\.\d+)? seconds\n"
)
_METADATA: Final = re.compile(r'("metadata":\{"exit_code":-?\d+,"duration_seconds":\d+)(?:\.\d+)?\}\}\Z')
_TAIL: Final = re.compile(r"\nProcess Group PGID: \d+\Z")


def steady(output: Any) -> Any:
    """An output as it would be told of another run that said the same and took as many whole seconds."""
    if isinstance(output, str):
        headed = _HEAD.sub(r"\g<exit>Wall time: \g<s> seconds\n", output)
        return _TAIL.sub("", _METADATA.sub(r"\1}}", headed))
    if isinstance(output, list):
        return [steady(part) for part in output]
    if isinstance(output, Mapping):
        return {name: steady(value) if name in ("text", "output") else value for name, value in output.items()}
    return output
