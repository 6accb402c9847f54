"""Commands beside a running ibid: `check` knows its own, `explain` says which tenants there are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import Mapping

import pytest

from proxy.commands import main as cli
from tests.flows.running import KEYED, TOKEN, chat_body, running, serving


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


async def checked(places: Mapping[str, str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and state and note of each part."""
    arguments = [word for name, value in places.items() for word in (f"--{name}", value)]
    code, out, _ = await asyncio.to_thread(command, "check", "--json", *arguments)
    return code, {row["part"]: (row["state"], row["note"]) for row in json.loads(out)}


async def test_check_beside_its_own_running_ibid_is_content_and_says_so(data_dir, up, tmp_path, monkeypatch):
    monkeypatch.setenv("IBID_CACHE__SEMANTIC", "false")
    async with serving(data_dir, up.url, {"cache": {"semantic": False}}) as ibid:
        ports = [int(url.rpartition(":")[2]) for url in (ibid.url, ibid.admin_url)]
        places = {"listen": f"127.0.0.1:{ports[0]}", "admin": f"127.0.0.1:{ports[1]}", "data-dir": str(data_dir)}
        code, found = await checked(places)
        assert (code, found["client port"][0], found["admin port"][0]) == (0, "ok", "ok"), found
        assert "the ibid that runs here" in found["client port"][1]
        elsewhere = tmp_path / "other"
        code, found = await checked({**places, "data-dir": str(elsewhere)})  # the ports of somebody else's
        assert (code, found["admin port"][0]) == (2, "fail")
        assert "another data directory" in found["admin port"][1]
        with socket.create_server(("127.0.0.1", 0)) as taken:  # by no ibid at all
            code, found = await checked({**places, "admin": f"127.0.0.1:{taken.getsockname()[1]}"})
        assert (code, found["admin port"][0]) == (2, "fail")


async def test_explain_names_the_tenants_by_project_key_and_last_use(data_dir, up, monkeypatch):
    monkeypatch.setenv("IBID_ADMIN_TOKEN", TOKEN)
    body = data_dir.with_suffix(".json")
    body.write_text(json.dumps(chat_body("Which one am I?")))

    async with running(data_dir, up.url, KEYED) as ibid:
        made = await ibid.admin("POST", "/cache/keys", {"project": "search"})
        for key in (made["secret"], "sk-passed-through"):
            await ibid.fill("Which one am I?", key=key)
        arguments = [
            "explain",
            str(body),
            "--admin",
            ibid.admin_url.removeprefix("http://"),
            "--data-dir",
            str(data_dir),
        ]
        code, _, err = await asyncio.to_thread(command, *arguments)
        assert code == 2
        assert "--tenant" in err
        rows = await ibid.sql("SELECT tenant, team FROM request")
        for row in rows:
            assert row["tenant"] in err
        assert f"project search, key {made['id']}" in err
        assert "a credential that is passed through" in err
        assert err.count("last used 20") == 2
        assert err.count("\n") == 1
        tenant = next(row["tenant"] for row in rows if row["team"] == "search")
        code, out, _ = await asyncio.to_thread(command, *arguments, "--tenant", tenant, "--json")
        assert (code, json.loads(out)["verdict"]) == (0, "hit")


@pytest.mark.parametrize("count", [1, 2])
async def test_one_tenant_needs_no_name(exact, count):
    for number in range(count):
        await exact.fill(f"Question {number}?")
    found = await exact.admin("POST", "/cache/explain", chat_body("Question 0?"))
    assert found["verdict"] == "hit"
