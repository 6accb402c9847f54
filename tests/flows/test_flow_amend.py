"""What an operator changes by hand holds at once for what is served: an entry's life and tags, a verdict, a sign-in."""

from __future__ import annotations

import re

from proxy.commands.serve import link
from tests.flows.running import Ibid
from tests.waiting import until


async def test_a_hit_follows_the_entrys_new_life_and_new_tags(exact: Ibid) -> None:
    await exact.fill("What is amended?", **{"cache": {"tags": ["old"]}})
    hit = await exact.ask("What is amended?")
    assert hit.cache == "HIT"
    amended = await exact.admin("PATCH", f"/cache/entries/{hit.entry}", {"ttl_s": 7200, "tags": ["doc:42"]})
    assert amended["tags"] == ["doc:42"]
    again = await exact.ask("What is amended?")
    assert again.entry == hit.entry
    ttl_s = int(re.search(r"ttl=(\d+)", again.headers["Cache-Status"])[1])  # type: ignore[index]
    assert 7100 < ttl_s <= 7200
    assert (await exact.admin("POST", "/cache/invalidate", {"tags": ["old"], "dry_run": False}))["count"] == 0
    assert (await exact.ask("What is amended?")).cache == "HIT"
    assert (await exact.admin("POST", "/cache/invalidate", {"tags": ["doc:42"], "dry_run": False}))["ids"] == [
        hit.entry
    ]
    assert (await exact.ask("What is amended?")).cache == "MISS"


async def test_an_amended_entry_is_still_found_by_meaning(ibid: Ibid) -> None:
    filled = await ibid.fill("What is the capital of France?")
    assert filled.status == 200
    (entry,) = await ibid.entries()
    await ibid.admin("PATCH", f"/cache/entries/{entry['id']}", {"tags": ["kept"]})
    alike = await ibid.ask("Tell me, what is the capital of France?")
    assert (alike.tier, alike.entry) == ("semantic", entry["id"])


async def test_a_near_miss_is_judged_by_its_comparison_and_stays_in_service(ibid: Ibid) -> None:
    await ibid.fill("How do I export the report?")
    near = await ibid.ask("How do I export the report as a spreadsheet, please?")
    await ibid.settled()
    found: list[dict[str, object]] = []

    async def is_compared() -> bool:
        found[:] = (await ibid.admin("GET", "/cache/near-misses"))["comparisons"]
        return bool(found)

    assert near.cache == "MISS"
    await until(is_compared)
    assert (await ibid.row(near))["entry_id"] == found[0]["entry_id"]
    wrong = {"request_id": near.headers["x-request-id"], "verdict": "wrong"}
    assert (await ibid.admin("POST", "/cache/feedback", wrong))["quarantined"] is False  # it did not answer
    said = {"comparison_id": found[0]["id"], "verdict": "wrong"}
    assert await ibid.admin("POST", "/cache/feedback", said) == said
    (judged,) = (await ibid.admin("GET", "/cache/near-misses"))["comparisons"]
    assert (judged["source"], judged["p_same"]) == ("feedback", 0.0)
    assert [entry["quarantined"] for entry in await ibid.entries()] == [False, False]


async def test_the_link_of_the_banner_signs_one_browser_in(exact: Ibid) -> None:
    address = re.search(r"http://127\.0\.0\.1:(\d+)/#ticket=(\S+)", link(exact.app))
    assert address is not None
    assert int(address[1]) == exact.app.admin_port
    for status in (200, 403):
        async with exact.session.post(f"{exact.admin_url}/session", json={"ticket": address[2]}) as response:
            assert response.status == status
