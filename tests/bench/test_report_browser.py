"""The report in a browser, wide and on a phone, light and dark, by keyboard, without scripts and in print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from report_parts import HOSTILE, comparison, dense, gallery, result, seconds
from sidetuning_bench.report import write_report
from sidetuning_bench.results import markdown, measures_table, summary_table


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    odd = [
        result(HOSTILE * 4, variant="x" * 200, tasks=["t" * 120, HOSTILE]),
        result("ewc", tasks=["t" * 120, HOSTILE]),
    ]
    of = {"comparison": comparison(), "single": [result()], "odd": odd}
    made = {k: write_report(v, folder / f"{k}.html", title=k * 20) for k, v in of.items()}
    pictures = [gallery(folder / f"gallery-{i}", i) for i in range(3)]
    runs = [*dense("sidetune", "finetune", "ewc"), *seconds()]
    made["dense"] = write_report(runs, folder / "dense.html", title="dense", galleries=[*pictures, pictures[2]])
    return made


def show(browser: Any, file: Path, width: int, scheme: str = "light") -> None:
    """Open a report in a window of that width; headless windows have a minimum width, the emulated ones have none."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())


# Names and headings that are wrong, and the width of everything that does not scroll by itself.
AUDIT = """
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const named = (e) => (e.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean)
  .map((id) => document.getElementById(id)?.textContent.trim()).join("") || e.getAttribute("aria-label") || e.alt;
const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
const levels = [...document.querySelectorAll("h1,h2,h3,h4")].map((h) => +h.localName[1]);
return {
  unnamed: [...document.querySelectorAll("svg:not([aria-hidden=true]),img,[role=region],section,nav")]
    .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 100)),
  repeated: ids.filter((id, i) => ids.indexOf(id) !== i),
  headings: levels.filter((l) => l === 1).length === 1 && levels.every((l, i) => i === 0 || l <= levels[i - 1] + 1),
  landmarks: ["header", "nav", "main", "footer"].map((l) => document.querySelectorAll(l).length),
  unscoped: document.querySelectorAll("th:not([scope])").length,
  untabbable: [...document.querySelectorAll(".scroll")].filter((e) => e.tabIndex !== 0).length,
  width: document.documentElement.scrollWidth, inner: innerWidth,
  loads: performance.getEntriesByType("resource").map((e) => e.name),
};
"""

# The lowest contrast of any text with what is behind it (WCAG 2).
CONTRAST = r"""
const parse = (s) => s.match(/[\d.]+/g).map(Number);
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const page = parse(getComputedStyle(document.body).backgroundColor);
let worst = [99, ""];
for (const e of document.querySelectorAll("body *")) {
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  if (["title", "desc", "script"].includes(e.localName)) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
  let back = page;
  for (let p = e; p && p !== document.body; p = p.parentElement) {
    const [r, g, b, a = 1] = parse(getComputedStyle(p).backgroundColor);
    if (a > 0) { back = [r, g, b].map((v, i) => v * a + page[i] * (1 - a)); break; }
  }
  const [low, high] = [light(parse(svg ? style.fill : style.color).slice(0, 3)), light(back)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 100)];
}
return worst;
"""


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", ["comparison", "single", "odd", "dense"])
def test_browser_finds_nothing_wrong(browser: Any, reports: dict[str, Path], name: str, width: int) -> None:
    show(browser, reports[name], width)
    found = browser.execute_script(AUDIT)
    assert found["inner"] == width and found["width"] <= width
    assert found["unnamed"] == [] and found["repeated"] == [] and found["unscoped"] == 0 and found["untabbable"] == 0
    assert found["headings"] and found["landmarks"] == [1, 1, 1, 1]
    assert [load for load in found["loads"] if not load.startswith("data:image/")] == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["comparison", "dense"])
def test_contrast(browser: Any, reports: dict[str, Path], name: str, scheme: str) -> None:
    show(browser, reports[name], 1280, scheme)
    ratio, element = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, element


def test_tables_show_the_numbers_and_sort(browser: Any, reports: dict[str, Path]) -> None:
    show(browser, reports["comparison"], 1280)
    texts = r"(r) => [...r.cells].map((c) => c.textContent.replaceAll('\u00a0', ' ').trim())"
    cells = f"return [...document.querySelectorAll('#summary tbody tr')].map({texts})"
    rows = browser.execute_script(cells)
    expected = [
        [c.strip() for c in line.split("|")[1:-1]] for line in markdown(summary_table(comparison())).splitlines()[2:]
    ]
    assert [row[1:] for row in rows] == [row[1:] for row in expected]
    matrix = browser.execute_script(
        "return [...document.querySelector('.heat tbody').rows[9].cells].map((c) => c.textContent)"
    )
    first = [run.accuracy[9] for run in comparison()[:3]]
    assert matrix[1:] == [f"{100 * sum(column) / 3:.1f}" for column in zip(*first, strict=True)]

    button = browser.find_element("css selector", "#summary thead th:nth-child(2) button")
    for order in ("descending", "ascending"):
        button.send_keys("\ue007")  # enter
        accuracies = [float(row[1].split()[0]) for row in browser.execute_script(cells)]
        assert accuracies == sorted(accuracies, reverse=order == "descending") and len(accuracies) == 12
        assert browser.execute_script("return document.querySelector('#summary [aria-sort]').ariaSort") == order


def test_measures_show_the_numbers_of_the_table_in_markdown(browser: Any, reports: dict[str, Path]) -> None:
    show(browser, reports["dense"], 1280)
    rows = browser.execute_script("""
    return [...document.querySelectorAll("#measures tbody tr")].map((r) => [...r.cells].map(
      (c) => (c.querySelector("strong") ? "**" : "") + c.innerText.replace(/\\s+/g, " ").trim()))""")
    table = measures_table([*dense("sidetune", "finetune", "ewc"), *seconds()]).splitlines()[2:]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table]
    expected = [
        [task, measure, *(v[:2] * v.startswith("**") + v.strip("*") for v in values)]
        for task, measure, *values in cells
    ]
    assert rows == expected and "±" in rows[0][2] and sum(v.startswith("**") for v in rows[0]) == 1
    star = "return getComputedStyle(document.querySelector('#measures strong'), '::before').content"
    assert "★" in browser.execute_script(star)  # not by weight or colour alone


def test_pictures_open_by_keyboard_without_scripts_and_print(browser: Any, reports: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, reports["dense"], 375)
        first, second = browser.find_elements("css selector", "#pictures details")
        assert first.get_attribute("open") and not second.get_attribute("open")
        picture = second.find_element("css selector", "img")
        assert not picture.is_displayed()
        second.find_element("css selector", "summary").send_keys("\ue007")  # enter
        assert second.get_attribute("open") and picture.is_displayed()
        assert not browser.find_elements("css selector", "th button")  # what scripts make
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    show(browser, reports["dense"], 720)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    seen = "return [...document.images].map((i) => i.checkVisibility() && i.getBoundingClientRect().width > 100)"
    assert browser.execute_script(seen) == [True] * 16
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720


def test_policy_lets_embedded_pictures_in_and_nothing_else(browser: Any, reports: dict[str, Path]) -> None:
    for name, allowed in (("dense", " img-src data:;"), ("comparison", "")):
        policy = f"default-src 'none';{allowed} style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in reports[name].read_text()
    show(browser, reports["dense"], 1280)
    beside = (reports["dense"].parent / "gallery-0" / "input.png").as_uri()
    load = """
    const [uri, done] = arguments;
    const picture = new Image();
    picture.onload = () => done(true);
    picture.onerror = () => done(false);
    picture.src = uri;
    """
    assert browser.execute_async_script(load, browser.execute_script("return document.images[0].src"))
    assert not browser.execute_async_script(load, beside)
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_details_open_by_keyboard_and_in_print(browser: Any, reports: dict[str, Path]) -> None:
    show(browser, reports["comparison"], 375)
    opened = "return [...document.querySelectorAll('#matrices details')].map((d) => d.open)"
    assert browser.execute_script(opened) == [True] * 2 + [False] * 10
    for number, key in ((3, "\ue007"), (4, "\ue00d")):  # enter, space
        browser.find_element("css selector", f"#matrices details:nth-child({number}) summary").send_keys(key)
        assert browser.execute_script(opened)[number - 1]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return [...document.querySelectorAll('details > *')].filter((e) => !e.checkVisibility()).length"
    assert browser.execute_script(hidden) == 0
    metrics = {
        "width": 720,
        "height": 1000,
        "deviceScaleFactor": 1,
        "mobile": False,
    }  # A4 between its margins, CSS pixels
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720


def test_pictures_are_seen_beside_each_other_and_on_a_phone_below(browser: Any, reports: dict[str, Path]) -> None:
    images = """
    document.querySelectorAll("#pictures details").forEach((d) => { d.open = true; });
    return [...document.querySelectorAll("#pictures img")].map(
      (i) => [i.alt, i.naturalWidth, i.getBoundingClientRect().left, i.getBoundingClientRect().top])"""
    for width, beside in ((1280, True), (375, False)):
        show(browser, reports["dense"], width)
        found = browser.execute_script(images)
        assert len(found) == 2 * (2 + 3 * 2) and all(natural > 0 for _, natural, _, _ in found)
        at = {alt: (left, top) for alt, _, left, top in found}
        learned = at["normal, finetune, when learned: mean angle 20.0°"]
        end = at["normal, finetune, at the end: mean angle 45.0°"]
        assert (
            (learned[1] == end[1] and learned[0] < end[0]) if beside else (learned[0] == end[0] and learned[1] < end[1])
        )
