"""Nothing phones home, nothing is written there, and a start loads no more than it needs before it listens."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TALKATIVE = {"onnxruntime", "torch", "sentence_transformers", "transformers", "huggingface_hub", "optimum"}
HEAVY = ("faiss", "numba", "onnxruntime", "tokenizers", "torch", "sentence_transformers", "genai_prices", "pydantic")
PATIENCE_S = 120.0


def imports(path: Path) -> set[str]:
    """First names of what a file imports, by a statement or by `import_module` of a literal."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "importorskip"):
                found.add(str(node.args[0].value))
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("folder", ["proxy", "index", "migrations", "deploy", "tests"])
def test_what_reports_home_is_imported_through_its_one_door(folder: str) -> None:
    """A statement would import it before anybody told it to keep quiet."""
    found = {str(path.relative_to(ROOT)): imports(path) & TALKATIVE for path in (ROOT / folder).rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_door_silences_before_it_imports(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text("import os\nSEEN = dict(os.environ)\n")
    code = "import json, sys; from index.quiet import SILENCE, library\n"
    code += "seen = library('talkative').SEEN\nprint(json.dumps([SILENCE, {n: seen.get(n) for n in SILENCE}]))"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{tmp_path}", "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    wanted, seen = json.loads(done.stdout)
    assert seen == wanted
    assert wanted["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("module", ["proxy.commands.serve", "proxy.commands.main", "proxy.doorstep"])
def test_what_a_start_imports_before_it_listens_is_light(module: str) -> None:
    heavy = (*HEAVY, "sqlalchemy", "aiohttp", "numpy") if module != "proxy.commands.serve" else HEAVY
    code = f"import sys, {module}\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[]", done.stderr
