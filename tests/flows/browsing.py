"""A real Chromium that looks at a dashboard: it keeps what went wrong on the page, and where else the page went."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from playwright.async_api import Browser, Page, async_playwright

from tests.flows.running import Ibid
from tests.waiting import PATIENCE_S

CHROMIUM = os.environ.get("IBID_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
ABSENT = "Chromium is not installed (apt-get install chromium), so nobody looked at the dashboard"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
SHOWN = "main[aria-busy=false]"


@dataclass
class Watched:
    """A page, what its console and its scripts complained of, and the hosts it asked."""

    page: Page
    url: str
    troubles: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    async def open(self, path: str) -> Page:
        """The page of this name, when it has all it shows."""
        await self.page.goto(f"{self.url}/#/{path}")
        if path != await self.page.evaluate("document.querySelector('main .page')?.dataset.path"):
            await self.page.wait_for_selector(f'main[aria-busy=false] .page[data-path="{path}"]')
        await self.page.wait_for_selector(SHOWN)
        return self.page

    async def wide(self) -> int:
        """Pixels that the page is wider than its window."""
        return int(await self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def looking(
    browser: Browser, ibid: Ibid, theme: str = "light", width: int = 1280, *, signed_in: bool = True
) -> AsyncIterator[Watched]:
    """A fresh browser profile on an ibid's dashboard, signed in by its link."""
    height = 800 if width < 600 else 860
    context = await browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if theme == "dark" else "light"
    )
    context.set_default_timeout(PATIENCE_S * 1000)
    try:
        page = await context.new_page()
        watched = Watched(page, ibid.admin_url)
        page.on(
            "console", lambda said: watched.troubles.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: watched.troubles.append(str(error)))
        page.on("dialog", lambda dialog: watched.troubles.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: watched.asked.add("/".join(request.url.split("/")[:3])))
        if signed_in:
            await page.goto(f"{ibid.admin_url}/#ticket={ibid.app.sessions.ticket()}")
            await page.wait_for_selector("main .page")
            await page.wait_for_selector(SHOWN)
        yield watched
    finally:
        await context.close()
