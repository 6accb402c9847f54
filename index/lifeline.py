"""Child processes that end with whoever started them, however that one ends.

    python -m index.lifeline MODULE ARGUMENT...

runs a module as `python -m` would, while a thread reads standard input: the starter holds the other end of that pipe
and writes nothing, so its end comes when the starter closes it or is no more (kill -9 included).
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from typing import Final

MODULE: Final = "index.lifeline"
ORPHANED: Final = 3  # exit code of a child whose starter is gone


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os._exit(ORPHANED)


def main() -> None:
    """Watch standard input and become the module named first."""
    threading.Thread(target=_watch, name="lifeline", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
