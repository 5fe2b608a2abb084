"""Chromium on the page of a server, as a person has it, and what must hold of every visit."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect, sync_playwright
from serving import KEY

REQUIRED = "FTKIT_BROWSER_REQUIRED"
"""Set to 1, a missing browser is a failure: CI skips none of these tests."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's Chromium. Skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        reason = "there is no Chromium here: `apt-get install chromium`, and these tests run"
        pytest.fail(reason) if os.environ.get(REQUIRED) == "1" else pytest.skip(reason)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as browser:
        yield browser


class Visit:
    """The page, with a key; what it asked the server for, and what it complained about."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self._besides: dict[str, Any] = {}
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._request)
        page.route("**/v1/chat/completions", self._send)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc and not request.url.startswith("data:"):
            self.elsewhere.append(request.url)

    def _send(self, route: Route) -> None:
        body = route.request.post_data_json
        self.asked.append(body)
        route.continue_(post_data=body | self._besides)

    def says(self, pattern: str) -> None:
        """Answers will match this expression: what a random model says otherwise can't be told in advance."""
        self._besides = {"response_format": {"type": "regex", "regex": pattern}}

    def says_much(self) -> None:
        """Answers will not end soon; few enough letters that they fit into the context with what follows."""
        self.says("[a-z ]{3000}")
        self._besides["max_tokens"] = 3500

    def ask(self, question: str) -> None:
        """Asks, and waits for the whole answer."""
        self.page.get_by_label("Message").fill(question)
        self.page.get_by_label("Message").press("Enter")
        self.done()

    def done(self) -> None:
        """Waits until nothing is answered."""
        expect(self.page.locator("#log")).to_have_attribute("aria-busy", "false", timeout=30_000)

    def answers(self) -> list[str]:
        """The texts of the answers that are shown."""
        return [text.strip() for text in self.page.locator("article .text").all_inner_texts()][1::2]

    def focused(self) -> str:
        """What has the focus, by its name."""
        script = """() => {
            const one = document.activeElement;
            return one.getAttribute("aria-label") || one.labels?.[0]?.textContent.trim() || one.textContent.trim();
        }"""
        return str(self.page.evaluate(script))


@contextmanager
def visit(browser: Browser, url: str, *, key: str | None = KEY, quiet: bool = True, **how: Any) -> Iterator[Visit]:
    """A visit that must complain about nothing, if it is to be `quiet`, and ask nobody else; `how`: of the context."""
    how = {"permissions": ["clipboard-read", "clipboard-write"], "viewport": {"width": 1000, "height": 800}} | how
    with browser.new_context(**how) as context:
        context.set_default_timeout(20_000)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('key', '{key}')")
        one = Visit(context.new_page(), url)
        one.page.goto(url)
        if key is not None:
            expect(one.page.locator("#model option")).not_to_have_count(0)
        yield one
        assert one.elsewhere == []
        assert not quiet or one.complaints == []
