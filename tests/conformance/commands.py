"""Drives one command line for agents: every task is a session of its own, in one home and one empty folder.

Arguments: a name of COMMANDS, below, and the program. Tasks and answers as in loops.py. Imports nothing of this
repository.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 120
MODELS_OF_LLM = """
- model_id: through
  model_name: {model}
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
"""
WEATHER = 'def weather(city: str) -> str:\n    "How the weather is."\n    return f"It is warm in {city}."\n'


class Run(NamedTuple):
    """What to run for a task: arguments, environment, and what of its output it said."""

    arguments: list[str]
    env: dict[str, str]
    read: Callable[[str], str] = str.strip


def claude(task: Mapping[str, Any], home: Path) -> Run:
    form = "stream-json" if task["stream"] else "json"
    more = ["--verbose", "--include-partial-messages"] if task["stream"] else []
    if task["schema"]:
        more += ["--json-schema", json.dumps(task["schema"])]
    env = {
        "ANTHROPIC_BASE_URL": task["url"], "ANTHROPIC_API_KEY": task["key"], "IS_SANDBOX": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_RETRIES": "0",
    }  # fmt: skip

    def read(out: str) -> str:
        told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        result = told[-1]
        if result["is_error"]:
            raise RuntimeError(result["result"])
        if task["stream"]:
            deltas = [one["event"].get("delta", {}) for one in told if one["type"] == "stream_event"]
            return "".join(delta.get("text", "") for delta in deltas)
        return json.dumps(result["structured_output"]) if "structured_output" in result else str(result["result"])

    return Run(["-p", task["prompt"], "--model", task["model"], "--output-format", form, "--allowedTools", "Bash",
                *more], env, read)  # fmt: skip


def codex(task: Mapping[str, Any], home: Path) -> Run:
    where = home / ".codex"
    where.mkdir(exist_ok=True)
    said = where / "last-message"
    said.unlink(missing_ok=True)
    provider = (
        f'model_providers.through={{name="through",base_url="{task["url"]}/v1",env_key="OPENAI_API_KEY",'
        'wire_api="responses",request_max_retries=0,stream_max_retries=0}'
    )
    settings = ['model_provider="through"', provider, 'sandbox_mode="danger-full-access"', 'approval_policy="never"']
    more = [argument for setting in settings for argument in ("-c", setting)]
    if task["schema"]:
        schema = where / "schema.json"
        schema.write_text(json.dumps(task["schema"]))
        more += ["--output-schema", str(schema)]

    def read(out: str) -> str:
        return said.read_text() if said.exists() else out

    arguments = ["exec", "--skip-git-repo-check", "-o", str(said), "-m", task["model"], *more, task["prompt"]]
    return Run(arguments, {"OPENAI_API_KEY": task["key"], "CODEX_HOME": str(where)}, read)


def opencode(task: Mapping[str, Any], home: Path) -> Run:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{task['url']}/v1", "apiKey": task["key"]},
        "models": {task["model"]: {"name": task["model"]}},
    }
    named = f"through/{task['model']}"
    config = {"share": "disabled", "autoupdate": False, "model": named, "small_model": named, "permission": "allow",
              "provider": {"through": provider}}  # fmt: skip
    env = {"OPENCODE_CONFIG_CONTENT": json.dumps(config), "OPENCODE_DISABLE_MODELS_FETCH": "1"}

    def read(out: str) -> str:
        told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if failed := [one for one in told if one["type"] == "error"]:
            raise RuntimeError(json.dumps(failed[0]["error"]["data"].get("message")))
        return "".join(one["part"]["text"] for one in told if one["type"] == "text")

    return Run(["run", "--format", "json", task["prompt"]], env, read)


def aider(task: Mapping[str, Any], home: Path) -> Run:
    told = ["--yes-always", "--no-git", "--no-show-model-warnings", "--no-check-update", "--analytics-disable",
            "--no-pretty", "--no-show-release-notes", "--no-detect-urls", "--no-gitignore",
            "--map-tokens", "0"]  # fmt: skip
    stream = "--stream" if task["stream"] else "--no-stream"
    where = ["--openai-api-base", f"{task['url']}/v1", "--openai-api-key", task["key"]]
    name = ["--model", f"openai/{task['model']}"]

    def read(out: str) -> str:
        return re.sub(
            r"(?m)^(?:Aider v|Analytics|HTTPSConnectionPool|(?:Main|Weak) model|Model:|Git|Tokens:).*\n*", "", out
        )

    return Run(
        ["--message", task["prompt"], *name, *where, *told, stream], {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, read
    )


def llm(task: Mapping[str, Any], home: Path) -> Run:
    (home / "extra-openai-models.yaml").write_text(MODELS_OF_LLM.format(**task))
    more = [] if task["stream"] else ["--no-stream"]
    if task["schema"]:
        more += ["--schema", json.dumps(task["schema"])]
    if task["loop"]:
        more += ["--functions", WEATHER]
    arguments = ["-m", "through", "--no-log", "--key", task["key"], *more, task["prompt"]]
    return Run(arguments, {"LLM_USER_PATH": str(home)})


COMMANDS: dict[str, Callable[[Mapping[str, Any], Path], Run]] = {
    "claude": claude, "codex": codex, "opencode": opencode, "aider": aider, "llm": llm,
}  # fmt: skip


def said(run: Run, program: str, home: Path) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TERM", "SSL_CERT_FILE")}
    work = home / "work"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [program, *run.arguments], cwd=work, env={**kept, "HOME": str(home), **run.env}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    try:
        text = run.read(done.stdout)
    except (RuntimeError, ValueError, LookupError) as error:
        return {"error": {"message": f"{error}"[:500]}}
    if done.returncode:
        told = [line for line in (done.stdout + done.stderr).splitlines() if "Turned down" in line]
        return {"error": {"message": "".join(told[-1:]) or (done.stdout + done.stderr)[-500:]}}
    return {"objects": [], "text": text}


def tasks() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    name, program = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix=f"ibid-{name}-", ignore_cleanup_errors=True) as folder:
        for task in tasks():
            print(json.dumps({"said": [said(COMMANDS[name](task, Path(folder)), program, Path(folder))]}), flush=True)


if __name__ == "__main__":
    main()
