"""The report in a real headless Chromium, where there is one."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfsp.planning.allocation import allocate
from cfsp.planning.coarse import block_importance
from cfsp.report.channels import energy_removed
from cfsp.report.run_facts import RunFacts, read_run
from cfsp.report.write import write_report
from cfsp.settings import CLAMPS, Budget, Clamp
from report_runs import changed_copy, prune_tiny, recovered

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
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
def runs(
    tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    directory = tmp_path_factory.mktemp("runs")
    llama = tiny_checkpoint("llama")
    half = prune_tiny(llama, text_file, directory / "half", budget=Budget(0.5, multiple=8))
    model = prune_tiny(
        llama,
        text_file,
        directory / "of-model",
        budget=Budget(0.1, "model", multiple=4),
        restore="none",
        channel_metric="relative",
    )
    return [half, model, changed_copy(half, directory / "recovered", recovered)]


@pytest.fixture(scope="module")
def page(browser: Any, runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out.as_uri()


def view(browser: Any, page: str, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)


def text_of(browser: Any, identifier: str) -> str:
    return str(browser.find_element("id", identifier).text)


def slide_to(browser: Any, percent: int) -> None:
    browser.execute_script(
        "const s = document.getElementById('what-if-sparsity'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        percent,
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_is_drawn_without_complaint(
    browser: Any, page: str, tmp_path: Path, width: int, scheme: str
) -> None:
    view(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => {"
        " const seen = [...plot.querySelectorAll('svg')].filter(s => s.clientWidth > 0);"
        " return seen.map(s => [s.clientWidth, s.clientHeight,"
        "   s.querySelectorAll('.mark').length]);})"
    )
    assert len(drawn) == 6  # front, method, strengths, restoration, recovery, what-if
    for images in drawn:
        ((wide, high, marks),) = images
        assert 300 < wide <= width and high > 100 and marks >= 3
    # A phone scrolls downwards only.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    picture = tmp_path / f"report-{width}-{scheme}.png"
    picture.write_bytes(base64.b64decode(shot["data"]))
    print(f"screenshot: {picture}")
    assert picture.stat().st_size > 50_000


def test_dark_page_is_dark_and_light_page_is_light(browser: Any, page: str) -> None:
    brightness = []
    for scheme in ("dark", "light"):
        view(browser, page, scheme=scheme)
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(int(part) for part in colour[4:-1].split(",")))
    assert brightness[0] < 150 < 700 < brightness[1]


def test_widths_of_the_page_are_widths_of_the_package(
    browser: Any, page: str, runs: list[Path]
) -> None:
    view(browser, page)
    data = browser.execute_script("return window.cfspReport.runs")
    compared = 0
    for index, directory in enumerate(runs):
        facts = read_run(directory)
        plan, size = facts.plan, facts.size
        assert plan is not None and size is not None
        importance_L = [block.importance for block in plan.blocks]
        of, multiple = plan.criterion["of"], plan.criterion["multiple"]
        assert 0.2 < data[index]["most"] < 1
        for percent in range(0, round(100 * data[index]["most"]) + 1, 3):
            budget = Budget(percent / 100, of, multiple)
            expected = allocate(importance_L, budget, size, plan.criterion["clamp"])
            kept, parameters = browser.execute_script(
                "const r = window.cfspReport, run = r.runs[arguments[0]];"
                "const kept = r.allocate(run, arguments[1] / 100);"
                "return [kept, r.parametersWith(run, kept)]",
                index,
                percent,
            )
            assert kept == expected, (directory.name, percent)
            assert parameters == size.parameters_with(expected)
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("clamp", CLAMPS)
def test_page_plans_large_models_as_the_package_does(browser: Any, page: str, clamp: Clamp) -> None:
    """Uneven importances at real widths reach the clamp and ties of rounding."""
    from cfsp.planning.allocation import ModelSize

    view(browser, page)
    for width, multiple in ((1536, 32), (11008, 128), (18944, 1), (14336, 256)):
        distances = [0.5, *(0.06 + 0.01 * (i % 5) for i in range(30)), 0.24]
        size = ModelSize((width,) * 32, (3 * 4096,) * 32, 32 * width * 3 * 4096 * 2)
        importances = block_importance(distances)
        run = {
            "of": "ffn", "multiple": multiple, "clamp": clamp, "importances": importances,
            "widths": size.width_L, "parameters": size.parameters,
            "channelParameters": size.channel_parameters_L,
        }  # fmt: skip
        for sparsity in (0.0, 0.05, 0.2, 0.5, 0.75, 0.9):
            expected = allocate(importances, Budget(sparsity, "ffn", multiple), size, clamp)
            kept = browser.execute_script(
                "return window.cfspReport.allocate(arguments[0], arguments[1])", run, sparsity
            )
            assert kept == expected, (width, sparsity)


def test_page_starts_at_the_run_and_predicts_its_energy(
    browser: Any, page: str, runs: list[Path]
) -> None:
    view(browser, page)
    facts = read_run(runs[0])
    assert facts.plan is not None and facts.statistics is not None
    assert text_of(browser, "what-if-asked") == "50% of the FFN channels"
    assert text_of(browser, "what-if-parameters") == f"{facts.manifest['parameters_after']:,}"
    assert text_of(browser, "what-if-channels") == f"{sum(facts.plan.kept_widths):,}"
    pairs = zip(facts.statistics.blocks, facts.plan.blocks, strict=True)
    removed = [energy_removed(statistics, block.kept) for statistics, block in pairs]
    assert text_of(browser, "what-if-error") == f"{100 * sum(removed) / len(removed):.1f}%"


def test_slider_changes_numbers_bars_and_table(browser: Any, page: str, runs: list[Path]) -> None:
    view(browser, page)
    seen: list[tuple[int, int, float, list[float]]] = []
    for percent in (0, 30, 60):
        slide_to(browser, percent)
        heights = browser.execute_script(
            "return [...document.querySelectorAll('#what-if-plot .kept')]"
            ".map(bar => Number(bar.getAttribute('height')))"
        )
        seen.append(
            (
                int(text_of(browser, "what-if-channels").replace(",", "")),
                int(text_of(browser, "what-if-parameters").replace(",", "")),
                float(text_of(browser, "what-if-error")[:-1]),
                heights,
            )
        )
    channels, parameters, errors, heights = zip(*seen, strict=True)
    assert channels[0] == 288 > channels[1] > channels[2]
    assert parameters[0] == facts_of(runs).manifest["parameters_before"]
    assert parameters[0] > parameters[1] > parameters[2]
    assert errors[0] == 0 < errors[1] < errors[2] < 100
    assert sum(heights[0]) > sum(heights[1]) > sum(heights[2])
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#what-if-table tr')]"
        ".map(row => Number(row.children[3].textContent))"
    )
    assert sum(cells) == channels[2]


def test_choosing_a_run_without_activation_ranking_says_so(browser: Any, page: str) -> None:
    view(browser, page)
    assert not browser.find_element("id", "what-if-ranking").is_displayed()
    browser.execute_script(
        "const s = document.getElementById('what-if-run'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert text_of(browser, "what-if-asked") == "10% of all parameters"
    assert "chose its channels by “relative”" in text_of(browser, "what-if-ranking")


def test_everything_can_be_done_with_the_keyboard(browser: Any, page: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(browser).send_keys(key).perform()

    view(browser, page)
    reached: list[str] = []
    said: list[str] = []
    for _ in range(80):
        press(Keys.TAB)
        name, kind = browser.execute_script(
            "const a = document.activeElement; return [a.id, a.className || a.tagName]"
        )
        reached.append(kind)
        # The second one: the first shows models, not blocks.
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
        if name == "what-if-sparsity":
            before = text_of(browser, "what-if-channels")
            for _ in range(12):
                press(Keys.ARROW_LEFT)
            assert text_of(browser, "what-if-channels") != before
            assert "38% of the FFN channels" in text_of(browser, "what-if-asked")
        if name == "what-if-plot":
            press(Keys.ARROW_RIGHT)
            assert "Block 1: would keep" in _readout(browser)
            break
    assert reached.count("plot") == 6 and reached.count("SUMMARY") == 5
    assert said[0] == said[3] and said[0].startswith("Block 0: distance")
    assert "Block 1: keeps" in said[1] and "Block 2: keeps" in said[2]


def test_pointer_selects_the_same_block_in_every_chart(browser: Any, page: str) -> None:
    view(browser, page)
    browser.execute_script(
        "document.querySelector('.plot svg.wide .mark[data-index=\"2\"]')"
        ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    lit = browser.execute_script(
        "return [...document.querySelectorAll('.mark.lit')].map(mark => mark.dataset.index)"
    )
    assert set(lit) == {"2"} and len(lit) > 5


def test_hostile_names_do_not_script_the_page(
    browser: Any, runs: list[Path], tmp_path: Path
) -> None:
    def poison(manifest: dict[str, Any]) -> None:
        manifest["base_model"]["name"] = HOSTILE
        manifest["command"] = HOSTILE + "</script>" + HOSTILE

    name = HOSTILE.replace("/", "")
    copy = changed_copy(runs[0], tmp_path / name, poison)
    write_report([copy], tmp_path / "report.html")
    view(browser, (tmp_path / "report.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_element("tag name", "h1").text == f"{HOSTILE}, pruned"
    assert browser.find_elements("css selector", "img") == []


def test_policy_stops_markup_that_was_let_through(
    browser: Any, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    write_report(runs[:1], out)
    out.write_text(out.read_text().replace("<main>", f"<main>{HOSTILE}", 1))
    view(browser, out.as_uri())
    assert browser.execute_script("return window.hacked") is None
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def _readout(browser: Any) -> str:
    return str(
        browser.execute_script(
            "const r = document.activeElement.parentElement.querySelector('.readout');"
            "return [...r.children].map(line => line.textContent).join('\\n')"
        )
    )


def facts_of(runs: list[Path]) -> RunFacts:
    return read_run(runs[0])
