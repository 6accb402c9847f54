"""From LiteLLM to ibid in three commands: adopt its file, start, make a key; the official client is answered."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from proxy.commands import main as cli
from tests.flows.running import ROOT, credential, started
from tests.upstream import Chat
from tests.waiting import PATIENCE_S, until

LITELLM = """
model_list:
  - model_name: gpt-4o-mini
    litellm_params:
      model: openai/gpt-4o-mini
      api_base: {url}/v1
      api_key: os.environ/LAB_KEY
      input_cost_per_token: 0.00000015
      output_cost_per_token: 6e-7
litellm_settings:
  cache: true
  cache_params: {{type: redis, host: localhost, ttl: 600}}
router_settings: {{timeout: 300, num_retries: 2}}
general_settings: {{master_key: sk-1234}}
"""


async def test_litellms_file_becomes_a_running_ibid_that_answers_the_official_client(data_dir, up, tmp_path):
    up.default = Chat(text="A pipe clamp will do.")
    (tmp_path / "config.yaml").write_text(LITELLM.format(url=up.url))
    made = tmp_path / "ibid.toml"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["adopt", "litellm", str(tmp_path / "config.yaml"), "--output", str(made)]) == 0
    assert "key_env = LAB_KEY" in said.getvalue()
    arguments = ["--config", str(made), "--data-dir", str(data_dir)]
    async with started(arguments, data_dir.with_suffix(".log"), {"LAB_KEY": "sk-of-the-lab"}) as ibid:
        key = (await ibid.admin("POST", "/cache/keys", {"project": "search"}))["secret"]

        async def ask(secret: str) -> dict[str, object]:
            return (await asyncio.to_thread(drive, ibid.url, secret))[0]

        assert (await ask("sk-1234"))["error"]["status"] == 401  # LiteLLM's own key is none here
        first = await ask(key)
        assert (first["cache"], first["text"]) == ("MISS", "A pipe clamp will do.")

        async def is_stored() -> bool:
            return len(await ibid.entries()) == 1

        await until(is_stored)
        again = await ask(key)
        assert (again["cache"], again["tier"], again["text"]) == ("HIT", "exact", first["text"])

        async def is_booked() -> bool:
            found = await ibid.admin("POST", "/savings/query", {"sql": "SELECT SUM(saved_nusd) FROM saving"})
            return bool(found["rows"][0][0])  # at the prices that LiteLLM's file gave

        await until(is_booked)
    (seen,) = up.requests
    assert credential(seen) == "sk-of-the-lab"


def drive(url: str, key: str) -> list[dict[str, object]]:
    asked = json.dumps({"base_url": f"{url}/v1", "key": key, "steps": [{"prompt": "How do I mend a pipe?"}]})
    driver = [sys.executable, str(Path(ROOT) / "tests/flows/sdk_driver.py")]
    done = subprocess.run(driver, input=asked + "\n", capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["results"])
