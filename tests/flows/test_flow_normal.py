"""Questions that differ in manners alone: served as semantic hits, and never embedded for it."""

from __future__ import annotations

import shutil

import pytest

from tests.flows.running import running

ASKED = "How do I repair a leaking garden hose?"


@pytest.mark.parametrize(
    "dressed",
    [
        "how do i repair a leaking garden hose",
        "Hi team - How do I repair a  leaking garden hose? Thanks in advance.",
        "Quick question: how do I repair a leaking garden hose, please",
    ],
)
async def test_manners_alone_are_served_without_embedding(ibid, up, dressed):
    first = await ibid.fill(ASKED)
    reply = await ibid.ask(dressed)
    assert (reply.cache, reply.tier, reply.text) == ("HIT", "semantic", first.text)
    line = ibid.log.line(reply)
    assert "embed_ms" not in line
    assert reply.headers["x-cache-similarity"].startswith("1")


async def test_another_tenant_or_number_is_not(ibid, up):
    await ibid.fill("How do I set 12 alarms on my phone?")
    assert (await ibid.ask("how do i set 13 alarms on my phone")).cache == "MISS"
    assert (await ibid.ask("how do i set 12 alarms on my phone", key="sk-other")).cache == "MISS"


async def test_what_is_not_served_is_embedded_as_before(ibid, up):
    """The account has no room for anything: the miss is stored with its vector, and is found by it."""
    await ibid.fill(ASKED)
    reply = await ibid.ask("hello, how do i repair a leaking garden hose", headers={"x-cache-max-error": "0"})
    assert reply.cache == "MISS"
    assert "embed_ms" in ibid.log.line(reply)


async def test_normal_forms_are_known_after_a_restart(data_dir, up):
    async with running(data_dir, up.url) as ibid:
        first = await ibid.fill(ASKED)
        await ibid.fill("How do I paint a garden fence?")
        purged = await ibid.ask("How do I paint a garden fence?")
        await ibid.admin("DELETE", f"/cache/entries/{purged.entry}")
    async with running(data_dir, up.url) as ibid:
        assert len(ibid.app.pipeline.entries.normals) == 1
        reply = await ibid.ask("Hello, how do i repair a leaking garden hose")
        assert (reply.tier, reply.text) == ("semantic", first.text)
        assert "embed_ms" not in ibid.log.line(reply)


async def test_what_another_process_stores_is_found_without_embedding(tmp_path, data_dir, up, pg_url):
    async with running(data_dir, up.url, database=pg_url) as ibid:
        theirs = shutil.copytree(data_dir, tmp_path / "other", symlinks=True)  # with its secret
        async with running(theirs, up.url, database=pg_url) as other:
            first = await ibid.fill(ASKED)
            await other.app.semantic.follow()  # what the timer does
            reply = await other.ask("Hello, how do i repair a leaking garden hose")
            assert (reply.tier, reply.text) == ("semantic", first.text)
            assert "embed_ms" not in other.log.line(reply)
