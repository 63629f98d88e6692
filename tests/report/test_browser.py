"""Report and comparison page in a real browser: nothing fails, every picture is there, nothing is cut off sideways."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gohsp.report.html import render_comparison, render_html
from gohsp.report.schema import parse
from reports import edited, make_content, sampled, without_labels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (1280, 420)
PICTURES = """() => ({
    images: [...document.images].map(image => image.naturalWidth),
    drawn: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed, so pages are not looked at: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    small = make_content(1)
    other = edited(without_labels(make_content(1, seed=5)), "pruned", {"params": 2_000_000, "macs": 100_000_000})
    report, runs = parse(sampled(small)), {"a": parse(small), "b/" + 40 * "long": parse(other)}
    made = {"report": render_html(report), "comparison": render_comparison(runs)}
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_is_whole_at_every_width(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("() => document.querySelectorAll('details').forEach(part => part.open = true)")
        found = page.evaluate(PICTURES)
        assert all(found["images"]), "a picture is missing"
        assert len(found["images"]) == (18 if name == "report" else 0)
        assert found["drawn"]
        assert all(height > 100 for height in found["drawn"])
        assert found["wide"] <= 0, f"{found['wide']} pixels hang over at {width}"
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_is_too_wide_shows_it_and_scrolls_by_keyboard(
    browser: Any, pages: dict[str, Path], scheme: str
) -> None:
    page = browser.new_page(viewport={"width": 420, "height": 900}, color_scheme=scheme)
    page.goto(pages["report"].as_uri())
    region = page.get_by_role("region", name="Before and after", exact=True)

    def shade() -> int:
        """How far the edge on the right differs from the card, of which the middle shows, above all text."""
        shot = Image.open(io.BytesIO(region.screenshot())).convert("L")
        edge, card = (shot.getpixel((x, 3)) for x in (shot.width - 2, shot.width - 60))
        return abs(edge - card)

    assert region.evaluate("of => of.scrollWidth > of.clientWidth")
    assert shade() > 8
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("of => of.scrollLeft > 0", arg=region.element_handle())
    region.evaluate("of => of.scrollTo({left: of.scrollWidth, behavior: 'instant'})")
    assert shade() == 0
    page.close()


def test_values_are_told_to_mouse_and_keyboard_and_stay_on_the_page(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 420, "height": 900})
    page.goto(pages["comparison"].as_uri())
    spots = page.locator(".plot i[tabindex]")
    assert spots.count() == 2 * (2 + 3)  # one run has no top-1
    for index in range(spots.count()):
        spots.nth(index).focus()
        told = spots.nth(index).locator("b")
        assert told.is_visible()
        assert spots.nth(index).get_attribute("aria-label") == told.inner_text()
        box = told.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 420
    cell = page.locator(".plot div[aria-hidden] i").first
    cell.hover()
    assert "block 0: " in cell.locator("b").inner_text()
    assert cell.locator("b").is_visible()
    page.close()
