"""The report in a real headless Chromium, where there is one."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfsp.result.page.page import write_report
from report_runs import changed_copy, measured, recovered

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory) -> list[Path]:
    """Two sizes, and a recovered one."""
    directory = tmp_path_factory.mktemp("runs")

    def larger(manifest: dict[str, Any]) -> None:
        manifest["parameters_after"] += 10_000
        for value in manifest["perplexity"].values():
            value["after"] *= 0.9

    half = changed_copy(run, directory / "half", lambda manifest: None)
    quarter = changed_copy(run, directory / "quarter", larger)
    return [half, quarter, changed_copy(half, directory / "recovered", recovered)]


@pytest.fixture(scope="module")
def page(browser, runs, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out.as_uri()


def view(browser: Any, page: str, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_page_is_drawn_without_complaint(browser, page, tmp_path, width, scheme):
    view(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour[4:-1].split(","))
    assert brightness < 150 if scheme == "dark" else brightness > 700
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => {"
        " const seen = [...plot.querySelectorAll('svg')].filter(s => s.clientWidth > 0);"
        " return seen.map(s => [s.clientWidth, s.clientHeight,"
        "   s.querySelectorAll('.mark').length]);})"
    )
    assert len(drawn) == 3  # front, blocks, recovery
    for images in drawn:
        ((wide, high, marks),) = images
        assert 300 < wide <= width and high > 100 and marks >= 3
    # A phone scrolls downwards only, and no word runs out of a drawing or a table.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ends = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].filter(t => t.getBBox().width)"
        ".map(t => t.getBoundingClientRect().right)"
    )
    assert len(ends) > 20 and max(ends) <= width
    ends, names = browser.execute_script(
        "const cells = [...document.querySelectorAll('.summary td, .summary td .note')];"
        "return [cells.map(e => e.getBoundingClientRect().right), cells.map(e =>"
        " getComputedStyle(e, '::before').content)]"
    )
    assert max(ends) <= width
    # On a phone its column's head is not shown.
    assert ('"quarter"' in names) == (width < 600)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    picture = tmp_path / f"report-{width}-{scheme}.png"
    picture.write_bytes(base64.b64decode(shot["data"]))
    print(f"screenshot: {picture}")
    assert picture.stat().st_size > 10_000


def test_size_table_fits_a_phone(browser, runs, tmp_path):
    """Numbers of a model of 8 billion parameters, with a name and a text as long as real ones."""

    def large(manifest: dict[str, Any]) -> None:
        manifest["base_model"]["name"] = "meta-llama/Llama-3.1-8B-Instruct"
        manifest["parameters_before"], manifest["parameters_after"] = 8_030_261_248, 6_878_000_128
        manifest["perplexity"] = measured("/data/texts/wikitext2/test.parquet", 10.5, 12.25)

    copy = changed_copy(runs[0], tmp_path / "Llama-3.1-8B-Instruct-20", large)
    write_report([copy], tmp_path / "report.html")
    view(browser, (tmp_path / "report.html").as_uri(), 360)
    assert browser.execute_script(
        "const box = document.querySelector('.summary');"
        "return [box.scrollWidth, document.documentElement.scrollWidth]"
    ) == [328, 360]


def test_names_without_a_space_fit_a_phone(browser, runs, tmp_path):
    """In tables and headings, and in legends, captions and lists of runs as well."""
    names = [f"{'unbroken_' * 8}{number}" for number in range(9)]
    copies = [changed_copy(runs[0], tmp_path / name, lambda manifest: None) for name in names]
    for shown in (copies[:2], copies):
        write_report(shown, tmp_path / "report.html")
        view(browser, (tmp_path / "report.html").as_uri(), 360)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360


def test_everything_can_be_done_with_the_keyboard(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(browser).send_keys(key).perform()

    view(browser, page)
    reached: list[str] = []
    said: list[str] = []
    for _ in range(80):
        press(Keys.TAB)
        kind = browser.execute_script(
            "const a = document.activeElement; return a.className || a.tagName"
        )
        if kind == "BODY":
            break  # once around
        reached.append(kind)
        # The second one: the first shows models instead of blocks.
        if kind == "plot" and reached.count("plot") == 2:
            said.append(_readout(browser))
            press(Keys.ARROW_RIGHT)
            said.append(_readout(browser))
            press(Keys.END)
            said.append(_readout(browser))
            press(Keys.HOME)
            said.append(_readout(browser))
        if kind == "SUMMARY":
            press(Keys.ENTER)
            assert browser.execute_script("return document.activeElement.parentElement.open")
            press(Keys.ENTER)
    assert reached.count("plot") == 3 and reached.count("SUMMARY") == 3
    assert said[0] == said[3] and said[0].startswith("Block 0: distance")
    assert "Block 1: keeps" in said[1] and "Block 2: keeps" in said[2]


def test_pointer_selects_the_same_block_in_every_chart(browser, page):
    view(browser, page)
    browser.execute_script(
        "document.querySelector('.plot svg.wide .mark[data-index=\"2\"]')"
        ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    lit = browser.execute_script(
        "return [...document.querySelectorAll('.mark.lit')].map(mark => mark.dataset.index)"
    )
    assert set(lit) == {"2"} and len(lit) > 5


def test_policy_stops_markup_that_was_let_through(browser, runs, tmp_path):
    out = tmp_path / "report.html"
    write_report(runs[:1], out)
    out.write_text(out.read_text().replace("<main>", f"<main>{HOSTILE}", 1))
    view(browser, out.as_uri())
    assert browser.execute_script("return window.hacked") is None
    said = "".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in said


def _readout(browser: Any) -> str:
    return str(
        browser.execute_script(
            "const r = document.activeElement.parentElement.querySelector('.readout');"
            "return [...r.children].map(line => line.textContent).join('\\n')"
        )
    )
