"""The page in Chromium: a chat and its versions, two adapters and a vote, a job from its rows to its answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Visit, chromium, visit
from managing import Managed
from playwright.sync_api import Browser, Page, expect
from serving import KEY

pytestmark = pytest.mark.server

LETTERS = "[a-z]{12}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(managed: Managed) -> Managed:
    managed.load("left", "v3")
    managed.load("right", "v4")
    return managed


@pytest.fixture
def here(browser: Browser, served: Managed) -> Iterator[Visit]:
    with visit(browser, served.server.url) as one:
        yield one


def set_up(here: Visit, **values: str) -> None:
    """Fills in fields of the settings by their ids."""
    if here.page.locator("#panel").is_hidden():
        here.page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        here.page.locator(f"#{name}").fill(value)
    here.page.get_by_role("button", name="Settings").click()


def letters(served: Managed, model: str, question: str) -> str:
    form = {"response_format": {"type": "regex", "regex": LETTERS}}
    return served.answer(model, messages=[{"role": "user", "content": question}], max_tokens=512, extra_body=form)


def test_an_answer_streams_and_can_be_stopped(here: Visit, served: Managed) -> None:
    here.says_much()
    here.page.get_by_label("Message").fill("Tell me everything.")
    here.page.get_by_role("button", name="Send").click()
    expect(here.page.locator(".assistant .text")).to_have_text(re.compile(".{40}", re.DOTALL))
    expect(here.page.locator("#log")).to_have_attribute("aria-busy", "true")
    here.page.get_by_role("button", name="Stop").click()
    here.done()
    expect(here.page.locator(".assistant .meta")).to_contain_text("stopped")
    expect(here.page.get_by_role("button", name="Send")).to_be_visible()
    served.server.until(lambda: served.server.metric("blocks_used") == 0)
    # what was said so far is part of the conversation
    here.says("ok")
    here.ask("And then?")
    assert [message["role"] for message in here.asked[-1]["messages"]] == ["user", "assistant", "user"]
    assert here.answers()[-1] == "ok"


def test_who_is_chosen_answers(here: Visit, served: Managed) -> None:
    here.says(LETTERS)
    set_up(here, temperature="0")
    found = []
    for model in ("left", "right"):
        here.page.get_by_label("Model").select_option(model)
        here.page.get_by_role("button", name="New chat").click()
        here.ask("Who are you?")
        found += here.answers()
        expect(here.page.locator(".assistant .meta")).to_contain_text(f"{model} · ")
    assert found == [letters(served, model, "Who are you?") for model in ("left", "right")]
    assert found[0] != found[1]


def test_a_vote_between_two_is_kept_and_the_better_one_goes_on(here: Visit, served: Managed) -> None:
    here.says(LETTERS)
    set_up(here, temperature="0", system="Be good.")
    here.page.get_by_label("Model").select_option("left")
    here.page.get_by_label("Compare with").select_option("right")
    before = served.http.get("/v1/feedback").json()["pairs"]
    here.ask("Which way?")
    left, right = (text.strip() for text in here.page.locator(".pair .text").all_inner_texts())
    here.page.get_by_role("region", name="Answer of right").get_by_role("button", name="This one is better").click()
    expect(here.page.locator("#status")).to_contain_text("Kept")
    assert served.http.get("/v1/feedback").json()["pairs"] == before + 1
    kept = json.loads((served.state / "feedback" / "feedback.jsonl").read_text().splitlines()[-1])
    assert (kept["chosen"], kept["rejected"]) == (right, left)
    assert kept["adapter"] == served.http.get("/v1/adapters/right").json()["hash"]
    assert [message["content"] for message in kept["prompt"]] == ["Be good.", "Which way?"]
    here.page.get_by_label("Compare with").select_option("Nobody")
    here.ask("Why?")
    assert [message["content"] for message in here.asked[-1]["messages"]] == ["Be good.", "Which way?", right, "Why?"]


def test_thumbs_are_kept(here: Visit, served: Managed) -> None:
    here.says(LETTERS)
    here.ask("Is this good?")
    before = served.http.get("/v1/feedback").json()
    here.page.get_by_role("button", name="Bad answer").click()
    expect(here.page.get_by_role("button", name="Bad answer", pressed=True)).to_be_disabled()
    kept = json.loads((served.state / "feedback" / "feedback.jsonl").read_text().splitlines()[-1])
    assert served.http.get("/v1/feedback").json() != before
    assert (kept["completion"], kept["label"]) == (here.answers()[0], False)


def test_versions_of_answers_and_questions(here: Visit) -> None:
    page = here.page
    here.says(LETTERS)
    here.ask("First?")
    (one,) = here.answers()
    page.get_by_role("button", name="Answer again").click()
    here.done()
    expect(page.locator(".assistant .versions")).to_have_text("2 of 2")
    (two,) = here.answers()
    assert here.asked[1]["messages"] == here.asked[0]["messages"]
    assert two != one
    here.ask("Second?")
    assert [message["content"] for message in here.asked[-1]["messages"]] == ["First?", two, "Second?"]
    end = here.answers()
    # back at the first answer, nothing was said after it
    page.get_by_role("button", name="Previous version").first.click()
    assert here.answers() == [one]
    assert here.focused() == "Next version"
    here.ask("Other?")
    assert [message["content"] for message in here.asked[-1]["messages"]] == ["First?", one, "Other?"]
    # each version keeps what came after it
    page.get_by_role("button", name="Next version").first.click()
    assert here.answers() == end
    # another question in place of the second, after the second answer
    page.get_by_role("button", name="Edit question").last.click()
    page.get_by_label("Question").and_(page.locator("textarea")).fill("Third?")
    page.keyboard.press("Enter")
    here.done()
    assert [message["content"] for message in here.asked[-1]["messages"]] == ["First?", two, "Third?"]
    expect(page.locator(".user .versions").last).to_have_text("2 of 2")
    page.locator(".user").last.get_by_role("button", name="Previous version").click()
    assert here.answers() == end
    # an edit that is left changes nothing
    page.get_by_role("button", name="Edit question").last.click()
    page.keyboard.press("Escape")
    assert here.focused() == "Edit question"
    assert page.locator(".user .text").all_inner_texts() == ["First?", "Second?"]


def test_an_edit_waits_for_the_answer_under_way(here: Visit) -> None:
    here.says("ok")
    here.ask("First?")
    here.page.get_by_role("button", name="Edit question").click()
    field = here.page.get_by_label("Question").and_(here.page.locator("textarea"))
    field.fill("Edited?")
    here.says_much()
    here.page.get_by_label("Message").fill("Second?")
    here.page.get_by_label("Message").press("Enter")
    expect(here.page.locator(".assistant")).to_have_count(2)
    field.press("Enter")
    expect(field).to_be_visible()
    here.page.get_by_role("button", name="Stop").click()
    here.done()
    assert [asked["messages"][-1]["content"] for asked in here.asked] == ["First?", "Second?"]
    here.says("ok")
    field.press("Enter")
    here.done()
    assert [message["content"] for message in here.asked[-1]["messages"]] == ["Edited?"]


def test_all_settings_reach_the_server(here: Visit) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "max_tokens": 30,
        "seed": 7,
    }
    set_up(here, system="Be brief.", stop="END\n###", **{name: str(value) for name, value in fields.items()})
    here.ask("Go.")
    asked = here.asked[-1]
    assert {name: asked[name] for name in fields} == fields
    assert asked["stop"] == ["END", "###"]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    here.page.reload()
    here.ask("Go on.")
    assert {name: here.asked[-1][name] for name in fields} == fields
    here.page.get_by_role("button", name="Settings").click()
    here.page.get_by_role("button", name="Defaults").click()
    here.ask("And on.")
    names = {"messages", "model", "stream", "stream_options", "temperature", "max_tokens"}
    assert set(here.asked[-1]) == names
    assert len(here.asked[-1]["messages"]) == 3


def test_what_else_was_likely_is_told(here: Visit) -> None:
    here.page.get_by_role("button", name="Settings").click()
    here.page.get_by_label("Probabilities of tokens").check()
    here.says(LETTERS)
    here.ask("Which letter?")
    tokens = here.page.locator(".token")
    assert tokens.count() == 12
    lines = (tokens.first.get_attribute("title") or "").splitlines()
    assert len(lines) == 4
    assert 0 < sum(float(line.rpartition(" ")[2]) for line in lines) <= 1.02
    tokens.first.click()
    expect(here.page.locator("#status")).to_have_text("  ".join(lines))


def test_code_is_shown_and_copied(here: Visit) -> None:
    here.says(r"Look:\n\n```python\nif a < b:\n    print\(1\)\n```\n\nThat is all\.")
    here.ask("Code, please.")
    code = here.page.locator(".assistant .code")
    assert code.locator("pre").inner_text() == "if a < b:\n    print(1)\n"
    code.get_by_role("button", name="Copy code").click()
    expect(code.get_by_role("button")).to_have_text("Copied")
    assert here.page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print(1)\n"
    here.page.get_by_role("button", name="Copy answer").click()
    assert here.page.evaluate("navigator.clipboard.readText()").endswith("```\n\nThat is all.")


def test_what_a_model_writes_does_nothing(here: Visit) -> None:
    here.says(
        r'<img src="http://evil\.example/" onerror="alert\(1\)"><script>alert\(1\)</script>!\[x\]\(http://evil\.example/\)'
    )
    here.page.on("dialog", lambda dialog: here.complaints.append(dialog.message))
    here.ask("Attack!")
    assert here.page.locator(".assistant img, .assistant script").count() == 0
    expect(here.page.locator(".assistant .text")).to_contain_text("<img src=")


def test_an_error_is_shown_and_the_question_can_be_asked_again(browser: Browser, served: Managed) -> None:
    with visit(browser, served.server.url, quiet=False) as here:
        here.says(LETTERS)
        set_up(here, max_tokens="0")
        here.ask("Hello?")
        expect(here.page.locator(".assistant .wrong")).to_contain_text("max_tokens: expected")
        set_up(here, max_tokens="50")
        here.ask("Still there?")
        # a question without an answer is not part of what was said
        assert [message["content"] for message in here.asked[-1]["messages"]] == ["Still there?"]
        here.page.get_by_role("button", name="Answer again").first.click()
        here.done()
        expect(here.page.locator(".assistant .versions")).to_have_text("2 of 2")
        assert len(here.answers()[0]) == 12


def test_a_key_is_asked_for(browser: Browser, served: Managed) -> None:
    with visit(browser, served.server.url, key=None, quiet=False) as here:
        expect(here.page.get_by_label("API key")).to_be_focused()
        here.page.keyboard.type(KEY)
        here.page.keyboard.press("Tab")
        expect(here.page.locator("#model option")).not_to_have_count(0)
        here.says("ok")
        here.ask("Hello?")
        assert here.answers() == ["ok"]


def test_a_job_from_its_rows_to_its_answers(here: Visit, tmp_path: Path) -> None:
    page = here.page
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "yes yes yes"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"messages": talk}) + "\n") * 8, encoding="utf-8")
    page.get_by_role("tab", name="Training").click()
    page.get_by_label("Rows").set_input_files(rows)
    page.get_by_label("Epochs").fill("4")
    page.get_by_role("textbox", name="Name").fill("from-the-page")
    page.get_by_role("button", name="Train").click()
    card = page.locator("#jobs .card").first
    expect(card).to_contain_text("supervised", timeout=30_000)
    expect(card).to_contain_text("succeeded", timeout=90_000)
    expect(card.get_by_role("img", name=re.compile(r"Loss from \d"))).to_be_visible()
    expect(card.get_by_role("list", name="Planned memory").get_by_role("meter")).not_to_have_count(0)
    card.get_by_text("Samples").click()
    expect(card.locator("dl")).to_have_count(1)  # all rows have the same prompt
    terms = card.locator("dt").all_inner_texts()
    assert terms == ["Prompt", "In the data", "Before", "After"]
    assert card.locator("dd").all_inner_texts()[:2] == ["Say it.", "yes yes yes"]
    page.get_by_role("tab", name="Training").click()  # asks the server again
    expect(card.locator("dl")).to_be_visible()
    name = card.get_by_role("heading").inner_text()
    assert "from-the-page" in name
    page.get_by_role("tab", name="Adapters").click()
    expect(page.locator("#adapters .card", has_text=name)).to_contain_text("lora")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Model").select_option(name)
    here.says(LETTERS)
    here.ask("Say it.")
    assert here.asked[-1]["model"] == name
    assert len(here.answers()[0]) == 12


def test_adapters_come_and_go(here: Visit, served: Managed) -> None:
    page = here.page
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("textbox", name="Name").fill("mine")
    page.get_by_label("Path").fill("v3")
    page.get_by_role("button", name="Load").click()
    expect(page.locator("#adapters-status")).to_have_text("mine answers.")
    page.get_by_label("Path").fill("v4")
    page.get_by_role("button", name="Load").click()
    card = page.locator("#adapters .card").filter(has=page.get_by_role("heading", name="mine", exact=True))
    expect(card).to_contain_text("Generation 2")
    card.get_by_role("button", name="Roll back").click()
    expect(card).to_contain_text(served.http.get("/v1/adapters/left").json()["hash"][:12])
    card.get_by_role("button", name="Take away").click()
    expect(card).to_have_count(0)
    assert served.http.get("/v1/adapters/mine").status_code == 404


def test_by_keys_alone(here: Visit) -> None:
    keyboard = here.page.keyboard

    def tab_to(name: str, back: bool = False) -> None:
        for _ in range(40):
            keyboard.press("Shift+Tab" if back else "Tab")
            if here.focused() == name:
                return
        raise AssertionError(f"no way to {name}")

    assert here.focused() == "Message"
    here.says_much()
    keyboard.type("One line")
    keyboard.press("Shift+Enter")
    keyboard.type("and another")
    keyboard.press("Enter")
    expect(here.page.locator(".assistant .text")).to_have_text(re.compile(".{9}", re.DOTALL))
    keyboard.press("Escape")
    here.done()
    assert here.asked[-1]["messages"][0]["content"] == "One line\nand another"
    assert here.focused() == "Message"
    here.says(LETTERS)
    tab_to("Answer again", back=True)
    keyboard.press("Enter")
    here.done()
    expect(here.page.locator(".assistant .versions")).to_have_text("2 of 2")
    tab_to("Previous version", back=True)
    keyboard.press("Space")
    assert here.focused() == "Next version"
    tab_to("Edit question", back=True)
    keyboard.press("Enter")
    assert here.focused() == "Question"
    keyboard.press("Control+A")
    keyboard.type("Something else")
    keyboard.press("Enter")
    here.done()
    assert here.asked[-1]["messages"][0]["content"] == "Something else"
    tab_to("Good answer", back=True)
    keyboard.press("Enter")
    expect(here.page.locator("#status")).to_contain_text("Kept")
    tab_to("Chat", back=True)
    for key, name in [("ArrowRight", "Training"), ("ArrowLeft", "Chat"), ("ArrowLeft", "Adapters"), ("Home", "Chat")]:
        keyboard.press(key)
        assert here.focused() == name
        expect(here.page.get_by_role("tab", name=name, selected=True)).to_be_visible()
    tab_to("Settings")
    keyboard.press("Enter")
    tab_to("System prompt")
    tab_to("Probabilities of tokens")
    keyboard.press("Space")
    expect(here.page.get_by_label("Probabilities of tokens")).to_be_checked()


ASKING = {
    "button",
    "textbox",
    "combobox",
    "checkbox",
    "spinbutton",
    "tab",
    "tabpanel",
    "article",
    "log",
    "region",
    "form",
}


def test_everything_has_a_name(here: Visit) -> None:
    """What Chromium tells a screen reader."""
    page = here.page
    here.says(r"```\ncode\n```")
    here.ask("Code?")
    page.get_by_label("Compare with").select_option("left")
    here.ask("Which?")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Edit question").last.click()
    devtools = page.context.new_cdp_session(page)
    seen = set()
    for tab in ("Chat", "Training", "Adapters"):
        page.get_by_role("tab", name=tab).click()
        for node in devtools.send("Accessibility.getFullAXTree")["nodes"]:
            role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "")
            if role in ASKING and not node["ignored"]:
                assert name.strip(), (tab, node)
                seen.add(role)
    assert seen == ASKING
    # two controls that do different things to different answers are told apart by the article they are in
    assert page.locator("#log > :not(article)").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_the_dark(browser: Browser, served: Managed, scheme: str) -> None:
    size = {"width": 390, "height": 800}
    with visit(browser, served.server.url, color_scheme=scheme, viewport=size) as here:
        page = here.page
        here.says(r"```\n[a-z]{200}\n```\n\n[a-z]{100}\n\n(\| [a-z]{9} ){9}\|\n(\|-){9}\|\n(\| [a-z]{9} ){9}\|")
        page.get_by_label("Compare with").select_option("left")
        here.ask("x" * 200)
        page.get_by_role("button", name="Settings").click()
        for tab in ("Chat", "Training", "Adapters"):
            page.get_by_role("tab", name=tab).click()
            for place in (
                "document.documentElement",
                "document.querySelector('#log')",
                "document.querySelector('#panel')",
            ):
                assert page.evaluate(f"{place}.scrollWidth - {place}.clientWidth") == 0, (tab, place)
        page.get_by_role("tab", name="Chat").click()
        # WCAG's 4.5 for text, on what it stands on
        for text, ground in (("body", "body"), (".meta", "body"), (".user .text", ".user .text"), ("#send", "#send")):
            assert contrast(page, text, ground) >= 4.5, (text, scheme)
        assert (luminance(page, "body", "backgroundColor") < 0.2) == (scheme == "dark")


def luminance(page: Page, selector: str, what: str) -> float:
    """WCAG's relative luminance of a colour of an element."""
    colour = page.locator(selector).first.evaluate(f"(one) => getComputedStyle(one).{what}")
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(page: Page, text: str, ground: str) -> float:
    low, high = sorted((luminance(page, text, "color"), luminance(page, ground, "backgroundColor")))
    return (high + 0.05) / (low + 0.05)
