"""Libraries that report to their makers, fetch, or write under the home folder, imported after they were told not to.

ONNX Runtime from 1.29 on reports each start of a process from Linux as well, and keeps a device id under the home
folder, unless its switch is in the environment when its library is loaded (microsoft/onnxruntime pull request 27379).
Importing a module that uses one of them therefore changes the environment: here alone, and before the import.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

SILENCE: Final = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
}
"""What such libraries look for; a child process that imports them gets it in its environment."""


def library(name: str) -> Any:
    """The module of that name, silenced. Raises ImportError."""
    os.environ.update(SILENCE)
    return importlib.import_module(name)
