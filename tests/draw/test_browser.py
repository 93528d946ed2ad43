"""The HTML page in a real browser: what it draws, what a mouse and a keyboard do, and that names stay text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.browser import Browser, browser, chromium
from fxslim.draw.html import html

from pictures import HOSTILE, picture

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed; the page was not opened")

SITE = "layers.0.mlp:ffn"
OPENED = "location.hash.startsWith('#site=') && document.querySelectorAll('.node.op').length"
"""A site's operations are there: they come after the address has changed."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM) as page:
        yield page


@pytest.fixture
def page(opened: Browser, tmp_path: Path) -> Iterator[Browser]:
    """A page with the picture; afterwards it has neither complained nor asked for anything."""
    path = tmp_path / "picture.html"
    path.write_text(html(picture()), encoding="utf-8")
    opened.errors.clear()
    opened.prefer("light")
    opened.open(path)
    yield opened
    assert opened.errors == []
    assert opened.requests == []


def count(page: Browser, selector: str) -> int:
    found = page.run(f"document.querySelectorAll({selector!r}).length")
    assert isinstance(found, int)
    return found


def focused(page: Browser) -> str:
    return str(page.run("document.activeElement.dataset.id ?? document.activeElement.id"))


def test_it_draws_every_site_with_its_kept_part(page: Browser) -> None:
    assert count(page, ".node.site") == 4 and count(page, ".node.end") == 2 and count(page, ".link") == 5
    parts = page.run(
        "[...document.querySelectorAll('.node.site')].map(n => n.querySelector('.kept').width.baseVal.value"
        " / n.querySelector('.units').width.baseVal.value)"
    )
    assert parts == pytest.approx([0.5, 0.25, 0.5, 0.25])
    assert page.run("document.querySelector('#title').textContent") == "Made up"
    overlap = """(() => { const boxes = [...document.querySelectorAll('.node')].map(n => n.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right
            && a.top < b.bottom && b.top < a.bottom)); })()"""
    assert page.run(overlap) is False


def test_search_finds_a_site_and_a_click_opens_it(page: Browser) -> None:
    page.press("/")
    assert focused(page) == "search"
    page.type("0.mlp FFN")
    assert page.run("[...document.querySelectorAll('#outline button')].map(b => b.dataset.site ?? 'op')") == [SITE]
    page.click(f"#outline [data-site='{SITE}']")
    page.wait(OPENED)
    assert count(page, ".node.op") == 3 and count(page, ".node.stub") == 2
    roles = page.run("[...document.querySelectorAll('.node.op .role')].map(t => t.textContent)")
    assert sorted(roles) == ["act", "down", "pinned up"]
    assert "B×S×48 → B×S×12" in page.run("document.querySelector('#graph').textContent")
    assert page.run("document.querySelector('#details h2').textContent") == SITE


def test_a_click_on_a_box_opens_it_and_hovering_says_more(page: Browser) -> None:
    page.hover(f"[data-id='s:{SITE}']")
    page.wait("!document.querySelector('#tip').hidden")
    assert "12 of 48 channels kept" in page.run("document.querySelector('#tip').textContent")
    page.click(f"[data-id='s:{SITE}']")
    page.wait(OPENED)
    page.click("[data-id='o:1']")
    assert "Pinned here, because" in page.run("document.querySelector('#details').textContent")


def test_the_keyboard_alone_goes_everywhere(page: Browser) -> None:
    page.run("document.querySelector('.node[tabindex=\"0\"]').focus()")
    page.run("document.querySelector('[data-id=\"s:input\"]').focus()")
    seen = []
    for _ in range(2):
        page.press("ArrowDown")
        seen.append(focused(page))
    assert seen == ["s:layers.0.attn:attention", f"s:{SITE}"]
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"{SITE}, 12 of 48 channels kept"
    page.press("Enter")
    page.wait(OPENED)
    page.press("Escape")
    page.wait("location.hash === ''")
    page.wait(f"document.activeElement.dataset.id === 's:{SITE}'")
    assert count(page, ".node[tabindex='0']") == 1


def test_before_and_after_stand_side_by_side(page: Browser) -> None:
    widths = {}
    for mode in ("before", "after"):
        page.click(f"#modes [data-mode='{mode}']")
        widths[mode] = page.run("[...document.querySelectorAll('.node.site .kept')].map(r => r.width.baseVal.value)")
    left_over = [b / a for b, a in zip(widths["after"], widths["before"], strict=True)]
    assert left_over == pytest.approx([0.5, 0.25, 0.5, 0.25])
    page.click("#modes [data-mode='both']")
    assert count(page, "[data-copy='before'] .site") == count(page, "[data-copy='after'] .site") == 4
    edges = "(copy, side) => [...document.querySelectorAll(`[data-copy=${copy}] .node`)]"
    edges += ".map(n => n.getBoundingClientRect()[side])"
    assert page.run(f"(() => {{ const edges = {edges}; return Math.max(...edges('before', 'right'))"
                    " < Math.min(...edges('after', 'left')); })()") is True  # fmt: skip


def test_modules_fold_and_unfold(page: Browser) -> None:
    page.click(".legend[data-module='layers.1']")
    assert count(page, ".node.site") == 2 and count(page, ".node.folded") == 1
    page.click(".node.folded")
    assert count(page, ".node.site") == 4 and count(page, ".node.folded") == 0
    page.click("#fold")
    assert count(page, ".node.site") == 0 and count(page, ".node.folded") == 2


def test_light_and_dark_follow_the_user_and_the_button(page: Browser) -> None:
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.prefer("dark")
    page.wait("document.documentElement.dataset.theme === 'dark'")
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, light[4:-1].split(","))) > 600 > 150 > sum(map(int, dark[4:-1].split(",")))
    page.click("#theme")
    assert page.run("getComputedStyle(document.body).backgroundColor") == light


def test_it_prints(page: Browser, tmp_path: Path) -> None:
    page.printed(tmp_path / "out.pdf")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")
    assert page.run("document.querySelector('#graph').getAttribute('viewBox')") is None


def test_names_stay_text(opened: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(html(picture(HOSTILE)), encoding="utf-8")
    opened.errors.clear()
    opened.open(path)
    opened.click(f"[data-id='s:{SITE}']")
    opened.wait(OPENED)
    opened.hover("[data-id='o:1']")
    opened.click("[data-id='o:1']")
    assert HOSTILE in opened.run("document.querySelector('#details').textContent")
    assert opened.run("window.hacked === undefined && document.images.length === 0") is True
    assert opened.errors == [] and opened.requests == []
