"""The dashboard in a real browser, on the traffic of a real ibid: every page, in both themes, at both sizes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from proxy.admin import manual
from tests.flows import browsing, months
from tests.flows.browsing import Watched, chromium, looking
from tests.flows.questions import stream
from tests.flows.running import TOKEN, Ibid, running
from tests.upstream import Chat, ScriptedUpstream, Seen
from tests.waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.skipif(not browsing.CHROMIUM, reason=browsing.ABSENT),
    pytest.mark.asyncio(loop_scope="module"),
]
expect.set_options(timeout=PATIENCE_S * 1000)

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
QUESTIONS = stream(40, 3)
ANSWERS = {question.text: question.answer for question in QUESTIONS}
PLAIN = """[...document.querySelectorAll(".prose *:not(code):not(pre)")].flatMap((one) =>
    [...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data)).join("\\n")"""
"""What stands in the prose outside of code."""
SERIOUS = ("serious", "critical")


def answer(seen: Seen) -> Chat:
    """What the help desk says, and to anything else something with markup in it."""
    return Chat(text=ANSWERS.get(seen.json["messages"][-1]["content"], f"{EVIL} is my answer"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ibid(tmp_path_factory: pytest.TempPathFactory, models: Any) -> AsyncIterator[Ibid]:
    """Some real requests of today, over weeks of a made-up team's, keys, and strings that would be markup."""
    data_dir = tmp_path_factory.mktemp("dashboard") / "data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "models").symlink_to(models, target_is_directory=True)
    async with (
        ScriptedUpstream(default=answer) as up,
        running(data_dir, up.url, {"cache": {"audit_share": 1.0}}) as ibid,
    ):
        ids = []
        for number, question in enumerate(QUESTIONS):
            await ibid.ask(question.text, headers={"x-cache-tags": f"doc:{number % 5}"})
            await ibid.settled()
            await ibid.ask(QUESTIONS[number // 2].text)
        for _ in range(2):
            await ibid.ask(EVIL, headers={"x-cache-namespace": "odd"})
            await ibid.settled()
        await ibid.admin("POST", "/cache/keys", {"project": "support", "name": EVIL[:90], "limit_usd": ["10/day"]})
        ids = [entry["id"] for entry in await ibid.entries()]
        now_ms = int(time.time() * 1000)
        await months.write(ibid.app.store.ledger, months.outcomes(now_ms, 30, 600, ids[:10]))
        await ibid.app.store.comparisons.flush()
        yield ibid


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def watched(browser: Browser, ibid: Ibid) -> AsyncIterator[Watched]:
    """A signed-in page at 1280 pixels; whatever its console complains of fails the test."""
    async with looking(browser, ibid) as watched:
        yield watched
        assert watched.troubles == []
        assert watched.asked == {ibid.admin_url}
        assert await watched.page.title() != "owned"


async def pages_of(ibid: Ibid) -> list[str]:
    hit = (await ibid.admin("GET", "/requests?cache_status=HIT&limit=1"))["requests"][0]
    miss = (await ibid.admin("GET", "/requests?cache_status=MISS&limit=1"))["requests"][0]
    odd = (await ibid.admin("GET", "/cache/entries?namespace=odd"))["entries"][0]
    key = (await ibid.admin("GET", "/cache/keys"))["keys"][0]
    return [
        "overview", "overview?since=24h", "requests", f"requests/{hit['id']}", f"requests/{miss['id']}", "entries",
        f"entries/{odd['id']}", "review", "review/audit", "whatif", "keys", f"keys/{key['id']}", "batches", "health",
        "docs", "docs/configuration",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_every_page_shows_itself_without_complaint_and_fits(
    browser: Browser, ibid: Ibid, theme: str, width: int
) -> None:
    found: dict[str, Any] = {}
    async with looking(browser, ibid, theme, width) as watched:
        for path in await pages_of(ibid):
            page = await watched.open(path)
            assert await page.title() == f"{await page.locator('h1').inner_text()} · ibid"
            assert "undefined" not in (text := await page.locator("main").inner_text()), path
            assert not re.search(r"(?m)^(null|false|NaN|\[object)", text), path
            if await watched.wide() > 0:
                found[path] = "wider than the window"
            elif (width == 1280) == (theme == "light"):  # colours in both themes, layout at both sizes
                found |= {f"{path} {one}": of for one, of in (await violations(page)).items()}
            if watched.troubles:
                found[path] = list(watched.troubles)
                watched.troubles.clear()
        assert watched.asked == {ibid.admin_url}
    assert found == {}


async def violations(page: Page) -> dict[str, Any]:
    """What axe finds serious or worse: the rule → the elements."""
    results = (await Axe().run(page)).response
    return {
        one["id"]: [node["html"][:200] for node in one["nodes"]]
        for one in results["violations"]
        if one["impact"] in SERIOUS
    }


async def test_the_sign_in_is_accessible_and_takes_the_token_only(browser: Browser, ibid: Ibid) -> None:
    async with looking(browser, ibid, signed_in=False) as watched:
        page = watched.page
        await page.goto(ibid.admin_url)
        token = page.get_by_label("Admin token")
        await expect(token).to_be_focused()
        assert await violations(page) == {}
        await expect(page.get_by_role("link", name="Requests")).to_be_hidden()
        await token.fill("not-the-token-not-the-token-not-the-token")
        await token.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("this is no admin token")
        assert [one for one in watched.troubles if "403" not in one] == []
        await token.fill(TOKEN)
        await token.press("Enter")
        await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        cookies = await page.context.cookies()
        assert [(one["httpOnly"], one["sameSite"]) for one in cookies] == [(True, "Strict")]
        assert TOKEN not in json.dumps([cookies, await page.evaluate("({...localStorage, ...sessionStorage})")])
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await page.reload()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_the_scan_finds_what_a_reader_could_not_use(browser: Browser, ibid: Ibid) -> None:
    async with looking(browser, ibid, signed_in=False) as watched:
        page = watched.page
        await page.goto(ibid.admin_url)
        await page.get_by_label("Admin token").evaluate("one => one.labels[0].remove()")
        assert "label" in await violations(page)


async def test_a_link_from_the_terminal_works_once_and_leaves_no_trace_in_the_address(
    browser: Browser, ibid: Ibid
) -> None:
    link = f"{ibid.admin_url}/#ticket={ibid.app.sessions.ticket()}"
    async with looking(browser, ibid, signed_in=False) as first:
        await first.page.goto(link)
        await expect(first.page.get_by_role("heading", name="Overview")).to_be_visible()
        assert "ticket" not in first.page.url
    async with looking(browser, ibid, signed_in=False) as second:
        await second.page.goto(link)
        await expect(second.page.get_by_role("alert")).to_contain_text("this link was used or is too old")


async def test_the_overview_says_what_the_ledger_says(watched: Watched, ibid: Ibid) -> None:
    page = await watched.open("overview?since=30d")
    days = await ibid.admin("GET", "/savings?group_by=day&since=29d")
    rows = [dict(zip(days["columns"], row, strict=True)) for row in days["rows"]]
    asked, hits = sum(row["requests"] for row in rows), sum(row["hits"] for row in rows)
    saved = sum(row["saved_usd"] for row in rows)
    tile = page.locator(".tile", has_text="Hit rate")
    await expect(tile).to_contain_text(f"{hits:,} of {asked:,} requests")
    await expect(page.locator(".tile", has_text="Saved").first).to_contain_text(f"${saved:.4f}"[:6])
    budget = page.locator(".tile", has_text="Wrong answers")
    await expect(budget).to_contain_text("budget 1 %")
    lanes = page.get_by_role("region", name="Latency by lane")
    await expect(lanes.get_by_role("rowheader", name="cache.exact")).to_be_visible()
    chart = page.locator("figure", has_text="Saved, by strategy")
    await chart.get_by_text("As a table").click()
    await expect(chart.get_by_role("columnheader", name="cached")).to_be_visible()
    assert await chart.get_by_role("row").count() == 31  # a head, and thirty days


async def test_requests_are_filtered_and_one_is_explained_to_the_nano_dollar(watched: Watched, ibid: Ibid) -> None:
    page = await watched.open("requests")
    await page.get_by_label("Lane").fill("cache.semantic")
    await page.get_by_role("button", name="Filter").click()
    await page.wait_for_selector('.page[data-path="requests?lane=cache.semantic"]')
    await expect(page.get_by_role("cell", name="cache.semantic").first).to_be_visible()
    assert await page.get_by_role("cell", name="cache.exact").count() == 0
    row = (await ibid.admin("GET", "/requests?lane=cache.semantic&limit=1"))["requests"][0]
    whole = await ibid.admin("GET", f"/requests/{row['id']}")
    page = await watched.open(f"requests/{row['id']}")
    await expect(page.locator("main")).to_contain_text("Answered from the cache by meaning: entry")
    steps = page.get_by_role("region", name="Money")
    assert await steps.get_by_role("rowheader").all_inner_texts() == [
        "Without ibid", *(step["mechanism"] for step in whole["savings"]), "Paid",
    ]  # fmt: skip


async def test_a_request_appears_while_one_looks(watched: Watched, ibid: Ibid) -> None:
    page = await watched.open("requests?model=gpt-live")
    await expect(page.get_by_text("No such request.")).to_be_visible()
    await page.get_by_label("Live").check()
    reply = await ibid.ask("Something for the tail", model="gpt-live")
    shown = page.locator(f'a[href="#/requests/{reply.headers["x-request-id"]}"]')
    await expect(shown).to_be_visible()
    await expect(page.get_by_role("status").first).to_have_text("1 new request")


async def test_older_requests_follow_page_by_page(watched: Watched) -> None:
    page = await watched.open("requests")
    await expect(page.locator("tbody tr")).to_have_count(50)
    await page.get_by_role("button", name="Older").click()
    await expect(page.locator("tbody tr")).to_have_count(100)
    links = await page.locator("tbody th a").evaluate_all("links => links.map(link => link.href)")
    assert len(set(links)) == 100


async def test_why_there_was_no_hit_is_told_in_words_and_numbers(watched: Watched, ibid: Ibid) -> None:
    await ibid.ask("How do I repair a leaking garden hose?")
    await ibid.settled()
    near = await ibid.ask("How do I repair 3 leaking garden hoses?")
    await ibid.app.store.ledger.flush()
    whole = await ibid.admin("GET", f"/requests/{near.headers['x-request-id']}")
    page = await watched.open(f"requests/{whole['id']}")
    for line in whole["story"]:
        await expect(page.get_by_text(line)).to_be_visible()
    looked = page.locator("section", has=page.get_by_role("heading", name="How it was looked up"))
    await expect(looked.get_by_role("row", name="numbers").first).to_be_visible()
    await expect(looked).to_contain_text("max error")


async def test_a_recorded_text_is_shown_as_text(watched: Watched, ibid: Ibid) -> None:
    row = (await ibid.admin("GET", "/requests?cache_status=MISS&limit=1"))["requests"][0]
    whole = await ibid.admin("GET", f"/requests/{row['id']}")
    whole |= {"story": [EVIL], "lookup": {"plan": EVIL, "candidates": [{"entry": 3, "reason": EVIL}]}}
    await watched.page.route(f"**/requests/{row['id']}", lambda route: route.fulfill(json=whole))
    page = await watched.open(f"requests/{row['id']}")
    await expect(page.get_by_text(EVIL).first).to_be_visible()
    await expect(page.get_by_role("cell", name=EVIL)).to_be_visible()


async def test_an_entry_gets_another_life_other_tags_and_goes_after_a_look(watched: Watched, ibid: Ibid) -> None:
    await ibid.ask("A question to be purged, please?", headers={"x-cache-tags": "old"})
    await ibid.settled()
    page = await watched.open("entries")
    await page.get_by_label("Question contains").fill("to be purged")
    await page.get_by_role("button", name="Search").click()
    await page.get_by_role("link", name="A question to be purged, please?").click()
    await page.get_by_label("Fresh for so many seconds from now").fill("7200")
    await page.get_by_label("Tags, with commas").fill("doomed, other")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("Saved. It ends in 2 h; tags: doomed, other.")).to_be_visible()
    (entry,) = (await ibid.admin("GET", "/cache/entries?tag=doomed"))["entries"]
    assert (await ibid.ask("A question to be purged, please?")).entry == entry["id"]
    page = await watched.open("entries")
    await page.locator("summary", has_text="Purge").click()
    form = page.get_by_role("form", name="Purge")
    await form.get_by_label("Tags, with commas").fill("doomed")
    await form.get_by_role("button", name="Show what would go").click()
    await expect(page.get_by_text("1 entry would go.")).to_be_visible()
    assert (await ibid.admin("GET", "/cache/entries?tag=doomed"))["entries"]
    await page.get_by_role("button", name="Purge 1 entry").click()
    await page.get_by_role("dialog").get_by_role("button", name="Purge").click()
    await expect(page.get_by_text("1 entry purged.")).to_be_visible()
    assert not (await ibid.admin("GET", "/cache/entries?tag=doomed"))["entries"]


async def test_near_misses_are_judged_from_the_keyboard_and_leave_the_entry_in_service(
    watched: Watched, ibid: Ibid
) -> None:
    newest, following = (await ibid.admin("GET", "/cache/near-misses?limit=2"))["comparisons"]
    page = await watched.open("review")
    card = page.get_by_role("region", name="Comparison")
    await expect(card).to_be_focused()
    sides = card.locator(".side")
    await expect(sides.nth(0)).to_contain_text(newest["asked"])
    await expect(sides.nth(1)).to_contain_text(newest["prompt"])
    marked = await card.locator("mark").all_inner_texts()
    words = [set(re.findall(r"\w+", newest[side].lower())) for side in ("asked", "prompt")]
    assert (words[0] ^ words[1]) <= {word.lower() for word in marked}
    await page.keyboard.press("w")
    await expect(page.get_by_role("status").first).to_have_text("Marked: Other answer")
    await expect(sides.nth(1)).to_contain_text(following["prompt"])

    async def is_judged() -> bool:
        rows = (await ibid.admin("GET", "/cache/near-misses?limit=50"))["comparisons"]
        return any((row["id"], row["source"]) == (newest["id"], "feedback") for row in rows)

    await until(is_judged)
    (kept,) = (await ibid.admin("GET", f"/cache/entries?ids={newest['entry_id']}"))["entries"]
    assert kept["quarantined"] is False
    await page.keyboard.press("ArrowLeft")
    await expect(card).to_contain_text("Marked: Other answer")


async def test_a_served_answer_marked_wrong_is_out_of_service(watched: Watched, ibid: Ibid) -> None:
    audits = (await ibid.admin("GET", "/cache/audit?limit=1"))["comparisons"]
    assert audits
    page = await watched.open("review/audit")
    await page.get_by_role("button", name="Wrong").click()
    await expect(page.get_by_role("status").first).to_have_text("Marked: Wrong")
    (entry,) = (await ibid.admin("GET", f"/cache/entries?ids={audits[0]['entry_id']}"))["entries"]
    assert entry["quarantined"] is True


async def test_a_budget_is_dragged_and_says_what_it_would_bring(watched: Watched) -> None:
    page = await watched.open("whatif")
    await page.get_by_label("Newest questions at most").fill("25")
    await page.get_by_role("button", name="Rehearse").click()
    slider = page.get_by_role("slider")
    await expect(slider).to_be_visible()
    assert await violations(page) == {}
    await expect(page.locator("label[for=budget]")).to_contain_text("1 % (today's)")
    await slider.press("End")
    await expect(page.locator("label[for=budget]")).to_contain_text("10 %")
    await expect(page.locator(".tile", has_text="Served by meaning")).to_contain_text("of 25 questions")
    rows = page.get_by_role("region", name="Every budget").get_by_role("rowheader")
    assert (await rows.all_inner_texts())[0] == "0.1 %"


async def test_a_key_is_made_shown_once_and_revoked(watched: Watched, ibid: Ibid) -> None:
    page = await watched.open("keys")
    await expect(page.get_by_role("link", name=EVIL[:90])).to_be_visible()
    await page.get_by_label("Project").fill("blue")
    await page.get_by_label("Requests at most").fill("100/hour")
    await page.get_by_role("button", name="Make").click()
    secret = await page.locator(".notice pre").inner_text()
    assert secret.startswith("ibid-")
    (key,) = [key for key in (await ibid.admin("GET", "/cache/keys"))["keys"] if key["project"] == "blue"]
    page = await watched.open(f"keys/{key['id']}")
    assert secret not in await page.content()
    await expect(page.get_by_role("rowheader", name="100 requests per hour")).to_be_visible()
    await page.get_by_role("button", name="Revoke").click()
    await page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    await expect(page.get_by_role("row", name=re.compile("blue")).get_by_text("revoked")).to_be_visible()


async def test_markup_in_questions_and_answers_is_text(watched: Watched, ibid: Ibid) -> None:
    odd = (await ibid.admin("GET", "/cache/entries?namespace=odd"))["entries"][0]
    page = await watched.open(f"entries/{odd['id']}")
    await expect(page.locator("pre.text").nth(0)).to_have_text(EVIL)
    await expect(page.locator("pre.text").nth(1)).to_have_text(f"{EVIL} is my answer")
    page = await watched.open("entries?namespace=odd")
    await expect(page.get_by_role("link", name=EVIL)).to_be_visible()
    assert await page.locator("main img, main script").count() == 0


async def test_every_page_of_the_manual_is_readable_and_its_links_lead_somewhere(watched: Watched) -> None:
    for name in (manual.LIST, *manual.names()):
        page = await watched.open(f"docs/{name}")
        text = await page.evaluate(PLAIN)
        assert not re.search(r"\]\(|\*\*|^#+ |<!--", text, re.MULTILINE), name
        for address in await page.locator(".prose a").evaluate_all("links => links.map(a => a.getAttribute('href'))"):
            if address.startswith("#/"):
                assert address.split("/")[2] in (manual.LIST, *manual.names()), (name, address)
            else:
                assert address.startswith("http"), (name, address)


async def test_the_keyboard_reaches_everything_and_the_theme_stays(watched: Watched) -> None:
    page = await watched.open("health")
    skip = page.get_by_role("link", name="Skip to content")
    await skip.focus()
    assert await skip.evaluate("one => one.getBoundingClientRect().left >= 0")
    for name in ("ibid, overview", "Overview", "Requests"):
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name=name, exact=True)).to_be_focused()
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Requests")).to_be_visible()
    await skip.focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("main")).to_be_focused()
    light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    await page.get_by_label("Theme").select_option("dark")
    dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    await page.reload()
    await page.wait_for_selector(browsing.SHOWN)
    assert light != dark == await page.evaluate("getComputedStyle(document.body).backgroundColor")


async def test_on_a_small_screen_the_pages_are_behind_a_button(browser: Browser, ibid: Ibid) -> None:
    async with looking(browser, ibid, width=400) as watched:
        page, link = watched.page, watched.page.get_by_role("link", name="Health")
        menu = page.get_by_role("button", name="Menu")
        await expect(link).to_be_hidden()
        await menu.click()
        assert await menu.get_attribute("aria-expanded") == "true"
        assert await violations(page) == {}
        await link.click()
        await expect(page.get_by_role("heading", name="Health", exact=True)).to_be_visible()
        await expect(link).to_be_hidden()
        assert watched.troubles == []
