"""The report: its numbers, its independence of any network, and how it behaves in a browser, wide and on a phone."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench import commands
from sidetuning_bench.report import SIDE, write_report
from sidetuning_bench.report_runs import FAMILIES, report
from sidetuning_bench.results import RunResult, gaps_table, markdown, measures_table, summary_table

HOSTILE = '<img src=x onerror="alert(1)">|</script><b>'


def result(method: str = "sidetune", **changes: Any) -> RunResult:
    """Two tasks; nothing is forgotten."""
    settings = {"lr": 0.001, "versions": {"torch": "2.4"}}
    values: dict[str, Any] = {"method": method, "variant": "", "seed": 0, "settings": settings}
    values |= {"tasks": ["cats", "dogs"], "accuracy": [[0.8], [0.8, 0.6]], "alone": None, "alphas": [0.5, 0.25]}
    values |= {"parameters": [100, 300], "shared_parameters": 5000}
    values |= {"seconds": [2.0, 4.0], "base_seconds": 10.0, "peak_memory_mb": 256.0}
    return RunResult(**{**values, **changes})


def comparison(methods: int = 12, seeds: int = 3, tasks: int = 10) -> list[RunResult]:
    """As `compare` makes them: half of the methods forget, one in three has alphas, some miss measures."""
    draw = random.Random(0)
    names = [f"classes-{10 * k}-{10 * k + 9}" for k in range(tasks)]
    results = []
    for m in range(methods):
        for seed in range(seeds):
            start = [0.85 - 0.01 * m + draw.uniform(-0.03, 0.03) for _ in names]
            loss = 0.03 * (m % 2)
            rows = [[max(0.1, start[j] - loss * (i - j)) for j in range(i + 1)] for i in range(tasks)]
            changes = {"variant": f"merge={m % 2}", "seed": seed, "tasks": names, "accuracy": rows}
            changes |= {"alone": start if m % 3 else None, "alphas": [None if m % 3 else draw.random() for _ in names]}
            changes |= {"parameters": [10 ** (2 + m % 5)] * tasks, "shared_parameters": 669_400}
            changes |= {"seconds": [draw.uniform(5, 50) for _ in names], "base_seconds": 30.0 * (m % 2 == 0)}
            changes |= {"peak_memory_mb": draw.uniform(200, 2000) if m % 4 else None}
            changes |= {"settings": {"lr": 1e-3, "seed": seed, "versions": {"torch": "2.4"}}}
            run = result(f"method-{m // 2}", **changes)
            results.append(run)
    return results


def dense(*methods: str) -> list[RunResult]:
    """Two dense tasks; every method but the first one forgets the first task."""
    measures = ["mean angle, °", "mean error, m"]
    runs = []
    for i, method in enumerate(methods):
        accuracy = [[0.7], [0.7 - 0.3 * (i > 0), 0.6]]
        values = [[20.0], [20.0 + 25 * (i > 0), 3.25 - i]]
        parameters = [100 * (i + 1)] * 2
        own = {"tasks": ["normal", "depth"], "measures": measures.copy(), "values": values}
        runs.append(result(method, accuracy=accuracy, parameters=parameters, **own))
    return runs


def seconds() -> list[RunResult]:
    """Of `dense`, a second seed of the first method."""
    return [replace(r, seed=1, values=[[21.0], [21.0, 3.45]]) for r in dense("sidetune")]


def gallery(folder: Path, shade: int) -> Path:
    """Strips of four squares."""
    folder.mkdir(parents=True)
    names = [f"{task}.{moment}" for task in ("normal", "depth") for moment in ("truth", "learned", "end")]
    for i, name in enumerate(["input", *names]):
        Image.linear_gradient("L").resize((512, 128)).point(lambda v, i=i: (v + 30 * i * (i > 0) * shade) % 256).save(
            folder / f"{name}.png"
        )
    return folder


# ---- numbers


def test_summary_by_hand() -> None:
    forgets = {"accuracy": [[0.9], [0.5, 0.7]], "alone": [0.9, 0.85], "peak_memory_mb": None, "alphas": [None, None]}
    table = summary_table(
        [
            # final accuracies: 0.8 and 0.6, then 0.5 and 0.7
            result(),
            result("finetune", **forgets),
            result(seed=1, accuracy=[[0.6], [0.6, 0.4]], base_seconds=0.5, peak_memory_mb=300.0),
            result("finetune", seed=2, **forgets),
        ]
    )
    assert [*zip(table["Method"], table["Seeds"], strict=True)] == [("sidetune", 2), ("finetune", 2)]
    ours, other = table.to_dict("records")
    # 0.7 and 0.5: deviation 0.1 · √2, over √2
    assert ours["Accuracy, %"] == pytest.approx((60, 10))
    # the last task cannot forget
    assert ours["Forgetting, points"] == (0, 0) and other["Forgetting, points"] == pytest.approx((40, 0))
    # the second error doubles
    assert ours["Rigidity, log ratio"] is None
    assert other["Rigidity, log ratio"] == pytest.approx((0.693147, 0), abs=1e-6)
    # of seed 0 alone, which both have: first and second, once each
    assert ours["Rank, average"] == (1.5, 0) and other["Rank, average"] == (1.5, 0)
    numbers = (
        "Parameters, per task",
        "Parameters, shared",
        "Training, s per task",
        "Base, s, once",
        "Memory, peak, MB",
    )
    assert [ours[name] for name in numbers] == [200, 5000, 3, 10, 300]
    assert math.isnan(other["Memory, peak, MB"])


def test_dense_rigidity_is_of_the_errors_that_were_scored() -> None:
    """Scores f / (f + e) of 1/2 and 2/3 are errors of f and f / 2: learned in the sequence it is twice as large."""
    (run,) = dense("psp")
    table = summary_table([replace(run, accuracy=[[0.7], [0.7, 1 / 2]], alone=[0.7, 2 / 3])])
    assert table["Rigidity, log ratio"][0] == pytest.approx((0.693147, 0), abs=1e-6)


def test_rank_among_those_that_add_little() -> None:
    """Rows by accuracy: a large one, then one that adds a tenth of the 5,000 shared, then one that adds less."""
    table = summary_table(
        [
            result("large", accuracy=[[0.9], [0.9, 0.9]], parameters=[100, 501]),
            result("tenth", accuracy=[[0.8], [0.8, 0.8]], parameters=[500, 500]),
            result("small", accuracy=[[0.7], [0.7, 0.7]], parameters=[1, 1]),
        ]
    )
    assert list(table["Rank, average"]) == [(1, 0), (2, 0), (3, 0)]
    assert list(table["Rank, of small"]) == [None, (1, 0), (2, 0)]
    assert "Rank, of small" in markdown(table)
    assert "Rank, of small" not in markdown(summary_table([result(), result("b")]))


def test_a_task_that_other_work_held_up_does_not_move_its_time() -> None:
    table = summary_table([result(seconds=[2.0, 700.0]), result(seed=1, seconds=[2.0, 2.5])])
    assert list(table["Training, s per task"]) == [2.25]


def test_variants_are_rows_of_their_own_and_ranks_need_company() -> None:
    assert "Rank, average" not in summary_table([result()])
    table = summary_table([result(variant="merge=alpha"), result(variant="merge=sum")])
    assert list(table["Method"]) == ["sidetune · merge=alpha", "sidetune · merge=sum"]
    assert list(table["Rank, average"]) == [(1.5, 0)] * 2
    # no seed in common
    assert "Rank, average" not in summary_table([result(), result("ewc", seed=1)])


def test_markdown() -> None:
    table = markdown(
        summary_table([result(peak_memory_mb=None), result(seed=1, accuracy=[[0.6], [0.6, 0.4]], peak_memory_mb=None)])
    )
    head, line, row = table.splitlines()
    assert "Accuracy, %" in head and "Rank" not in head and "Memory" not in head and "Rigidity" not in head
    assert row.startswith("| sidetune | 60.0 ± 10.0 | 0.0 | 200 | 5,000 | 3.0 | 10.0 | 2 |")
    assert head.count("|") == line.count("|") == row.count("|")
    escaped = markdown(summary_table([result("a|b\n<i>")])).splitlines()
    assert len(escaped) == 3 and escaped[2].startswith("| a\\|b &lt;i> |")


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(SideTuningError, match="no results"):
        write_report([], tmp_path / "r.html", title="none")
    with pytest.raises(SideTuningError, match="ewc learned cats, cows and sidetune learned cats, dogs"):
        summary_table([result(), result("ewc", tasks=["cats", "cows"])])
    with pytest.raises(SideTuningError, match="two results of seed 0"):
        summary_table([result(), result()])
    assert not list(tmp_path.iterdir())


# ---- files


def test_result_survives_its_file(tmp_path: Path) -> None:
    run = result(alone=[0.8, 0.6], alphas=[None, 0.5])
    run.save(tmp_path / "result.json")
    assert RunResult.load(tmp_path / "result.json") == run
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.pop("alphas"), "missing 1 required positional argument: 'alphas'"),
        (lambda c: c.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda c: c.update(tasks=["cats"]), "'accuracy' has 2 entries for 1 tasks"),
        (lambda c: c.update(tasks="ab"), "'tasks' is 'ab'"),
        (lambda c: c["accuracy"][1].pop(), "row 1 of 'accuracy' has 1 numbers, not 2"),
        (lambda c: c["accuracy"][1].__setitem__(0, float("nan")), "an accuracy is nan"),
        (lambda c: c["accuracy"][1].__setitem__(0, 80.0), "an accuracy is 80.0"),
        (lambda c: c["accuracy"][1].__setitem__(0, "0.8"), "is damaged"),
        (lambda c: c.update(seconds=[1.0, -1.0]), "negative"),
        (lambda c: c.update(seed="0"), "'seed' is '0'"),
        (lambda c: c.update(method=3), "'method' is 3"),
        (lambda c: c.update(tasks=[], accuracy=[], alphas=[], parameters=[], seconds=[]), "there are no tasks"),
    ],
)
def test_damaged_results_say_so(tmp_path: Path, damage: Any, words: str) -> None:
    content = asdict(result())
    damage(content)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        RunResult.load(file)
    assert words in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"method": "side', "\udcff"])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"result\.json"):
        RunResult.load(file)
    with pytest.raises(ArtifactError, match="does not exist"):
        RunResult.load(tmp_path / "other.json")


# ---- the page


def page(results: list[RunResult], folder: Path, **options: Any) -> str:
    return write_report(results, folder / "report.html", title=options.pop("title", "Report"), **options).read_text()


def test_page_is_complete_small_and_reproducible(reports: dict[str, Path], tmp_path: Path) -> None:
    html = reports["comparison"].read_text()
    assert html.startswith("<!doctype html>")
    assert len(html.encode()) < 400_000
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|\bsrc=|<link", html)
    assert page(comparison(), tmp_path, title="comparison" * 20, notes=["n" * 300]) == html
    assert html.count("<svg class=") == 2 + 12 and html.count('aria-labelledby="curve') == 12
    assert not re.search(r"#[0-9a-f]{6}", html[html.index("<body>") :]), "a colour does not follow the page's"


@pytest.mark.parametrize("field", ["method", "variant", "tasks", "settings", "title", "notes"])
def test_hostile_texts_stay_text(tmp_path: Path, field: str) -> None:
    options = {"title": HOSTILE} if field == "title" else {"notes": [HOSTILE]} if field == "notes" else {}
    own = {"tasks": [HOSTILE, "dogs"], "settings": {HOSTILE: {HOSTILE: HOSTILE}}, "method": HOSTILE, "variant": HOSTILE}
    changes = {field: own[field]} if field in own else {}
    html = page([replace(result(), **changes), replace(result(), seed=1, **changes)], tmp_path, **options)
    html += page([replace(result(), **changes), result("ewc", tasks=changes.get("tasks", ["cats", "dogs"]))], tmp_path)
    assert "&lt;img src=x onerror=" in html
    assert "<img" not in html and "<b>" not in html and html.count("</script>") == 2


def test_single_run_in_words(tmp_path: Path) -> None:
    html = page([result()], tmp_path)
    text = " ".join(re.sub(r"<[^>]+>", "", html.split('class="lead">')[1].split("</p>")[0]).split())
    assert text == (
        "sidetune learned 2 tasks one after another, with seed 0. At the end it is right on 70.0 % of the test "
        "examples, on average over the tasks, and it forgot nothing: every earlier task is as accurate as when it was "
        "learned. A task adds 200 parameters to the 5,000 that all tasks share, and trains in 3.0 s, after 10.0 s for "
        "the features of the base, once."
    )
    assert 'id="parameters"' not in html and "±" not in html and "over seeds" not in html
    lost = page([result(accuracy=[[0.8], [0.7, 0.6]])], tmp_path)
    assert "lost 10.0 points" in lost and "10.0 points forgotten" in lost
    assert "gained 10.0 points" in page([result(accuracy=[[0.8], [0.9, 0.6]])], tmp_path)


def test_comparison_in_words(tmp_path: Path) -> None:
    html = page([result(), result("finetune", accuracy=[[0.9], [0.5, 0.7]])], tmp_path)
    text = " ".join(re.sub(r"<[^>]+>", "", html.split('class="lead">')[1].split("</p>")[0]).split())
    assert "2 methods learned 2 tasks one after another, with 1 seed." in text
    assert (
        "At the end sidetune is the most accurate, with 70.0 % on average over all tasks, before finetune with 60.0 %."
        in text
    )
    assert "sidetune forgets nothing at all; finetune forgets most: an earlier task loses 40.0 points" in text


def test_alphas_only_where_there_are_some(tmp_path: Path) -> None:
    none = {"alphas": [None, None]}
    assert 'id="alpha"' not in page([result(**none)], tmp_path)
    html = page(
        [result(**none), result("mixed", alphas=[None, 0.75]), result("mixed", seed=1, alphas=[None, 0.25])], tmp_path
    )
    cells = html.split('id="alpha"')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)<", cells) == ["–", "0.50"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extreme_results_make_a_page(tmp_path: Path, value: float) -> None:
    one = {
        "tasks": ["only"],
        "accuracy": [[value]],
        "alphas": [None],
        "parameters": [0],
        "seconds": [0.0],
        "base_seconds": 0.0,
    }
    html = page([result(**one), result("m" * 300, **one, variant="v" * 300)], tmp_path)
    assert "nan" not in html.replace("–", "") and "0 drawn at 1" in html


def test_large_results_make_a_small_page(tmp_path: Path) -> None:
    assert len(page(comparison(methods=20, seeds=1, tasks=25), tmp_path).encode()) < 1_000_000


# ---- in a browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium or chromedriver is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    odd = [
        result(HOSTILE * 4, variant="x" * 200, tasks=["t" * 120, HOSTILE]),
        result("ewc", tasks=["t" * 120, HOSTILE]),
    ]
    of = {"comparison": comparison(), "single": [result()], "odd": odd}
    made = {k: write_report(v, folder / f"{k}.html", title=k * 20, notes=["n" * 300]) for k, v in of.items()}
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


# ---- dense tasks


def test_tasks_in_their_own_measures() -> None:
    table = measures_table(dense("sidetune", "finetune"))
    assert table.splitlines()[0] == "| Task | Measure | sidetune | finetune |"
    assert (
        "| normal | mean angle, ° ↓ | **20.0** | 45.0 |" in table
        and "| depth | mean error, m ↓ | 3.25 | **2.25** |" in table
    )
    higher = [replace(r, measures=["mean IoU", "F1"]) for r in dense("sidetune", "finetune")]
    assert "**45.0**" in measures_table(higher) and "↓" not in measures_table(higher)
    other = replace(dense("sidetune")[0], method="ewc", measures=["F1", "F1"])
    with pytest.raises(SideTuningError, match="normal is measured by"):
        measures_table([*dense("sidetune"), other])


def test_the_summary_says_of_which_seeds_its_ranks_are() -> None:
    ours, other = result("sidetune"), result("ewc")
    both = [ours, replace(ours, seed=1), other, replace(other, seed=1)]
    assert "Ranks" not in markdown(summary_table(both))
    table = markdown(summary_table([*both, replace(other, method="pnn", parameters=[9000, 9000])]))
    assert table.endswith("|\n\nRanks are of seed 0, which all of them have.\n")  # small ones have both seeds


def test_gaps_to_another_method_are_paired_and_have_the_sign_of_better() -> None:
    ours, other = dense("sidetune", "finetune")
    table = gaps_table([replace(ours, method="independent"), other])
    assert table.splitlines()[2:] == ["| normal | −125.0 |", "| depth | 30.8 |"]  # 20 to 45°; 3.25 to 2.25 m
    higher = [replace(r, measures=["mean IoU", "F1"]) for r in (replace(ours, method="independent"), other)]
    assert "| normal | 125.0 |" in gaps_table(higher)
    unpaired = replace(other, seed=7)
    assert gaps_table([ours, other]) == gaps_table([replace(ours, method="independent"), unpaired]) == ""
    assert gaps_table([replace(ours, method="independent"), other, unpaired]) == table


def test_scores_are_called_scores(tmp_path: Path) -> None:
    def words(results: list[RunResult]) -> str:
        return re.sub(r"<(style|script).*?</\1>", "", page(results, tmp_path), flags=re.DOTALL)

    text = words(dense("sidetune", "finetune"))
    assert "Score" in text and "Accuracy" not in text and "accuracy" not in text
    assert markdown(summary_table(dense("sidetune"))).startswith("| Method | Score, % |")
    assert "Score" not in words([result()]) and "Accuracy" in words([result()])


def test_missing_and_damaged_pictures(tmp_path: Path) -> None:
    runs, folder = dense("sidetune"), gallery(tmp_path / "gallery", 1)
    whole = page(runs, tmp_path, galleries=[folder])
    assert whole.count("data:image/") == 8 and page(runs, tmp_path, galleries=[folder]) == whole
    (folder / "normal.end.png").unlink()
    assert page(runs, tmp_path, galleries=[folder]).count("data:image/") == 7
    assert "data:image/" not in page(runs, tmp_path, galleries=[None])
    assert "data:image/" not in page(runs, tmp_path, galleries=[tmp_path / "nowhere"])
    (folder / "normal.learned.png").write_bytes(b"no picture")
    with pytest.raises(ArtifactError, match=r"normal\.learned\.png is not a picture"):
        page(runs, tmp_path, galleries=[folder])
    with pytest.raises(SideTuningError, match="2 galleries for 1 results"):
        page(runs, tmp_path, galleries=[None, None])


def pictures_of(html: str) -> dict[str, str]:
    """The embedded pictures by their alternative texts."""
    return {alt: uri for uri, alt in re.findall(r'<img src="([^"]*)"[^>]* alt="([^"]*)"', html)}


def decoded(uri: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_pictures_are_of_the_lowest_seed_that_has_some(tmp_path: Path) -> None:
    runs = [*seconds(), *dense("sidetune"), *dense("sidetune", "ewc")[1:]]
    galleries = [gallery(tmp_path / str(shade), shade) for shade in range(3)]
    names = "normal, sidetune, at the end: mean angle {}"
    both = pictures_of(page(runs, tmp_path, galleries=galleries))
    assert names.format("20.0°") in both and names.format("21.0°") not in both
    second = pictures_of(page(runs, tmp_path, galleries=[galleries[0], None, galleries[2]]))
    assert names.format("21.0°") in second and names.format("20.0°") not in second
    assert len(both) == len(second) == 2 * (2 + 2 * 2)


def test_what_became_of_a_task_in_words(tmp_path: Path) -> None:
    runs = dense("sidetune", "finetune")
    runs.append(replace(runs[1], method="gains", values=[[20.0], [15.0, 1.0]]))
    runs.append(replace(runs[1], method="same to the eye", values=[[20.0], [20.0001, 1.0]]))
    html = page(runs, tmp_path, galleries=[gallery(tmp_path / str(i), i) for i in range(4)])
    said = [" ".join(re.sub("<[^>]+>", " ", p).split()) for p in re.findall(r'class="method">.*?<p>(.*?)</p>', html)]
    assert said == [
        "mean angle 20.0° → 20.0° unchanged",
        "mean angle 20.0° → 45.0° worse",
        "mean angle 20.0° → 15.0° better",
        "mean angle 20.0° → 20.0°",
        "mean error 3.25 m → 3.25 m learned last",
        "mean error 2.25 m → 2.25 m learned last",
        "mean error 1.00 m → 1.00 m learned last",
        "mean error 1.00 m → 1.00 m learned last",
    ]
    # Now higher is better.
    runs = [replace(run, measures=["mean IoU", "mean error, m"]) for run in runs]
    html = page(runs, tmp_path, galleries=[tmp_path / str(i) for i in range(4)])
    assert re.findall(r'class="verdict">(.*?)<', html)[:3] == ["unchanged", "better", "worse"]


def test_pictures_are_small_and_true(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "gallery", 1)
    draw = random.Random(0)
    noise = Image.frombytes("RGB", (40, 10), draw.randbytes(40 * 10 * 3)).resize((1024, 256))  # as a photo, for PNG
    noise.save(folder / "normal.learned.png")
    flat = Image.new("RGB", (512, 128), (220, 40, 40))
    flat.paste((40, 160, 60), (37, 19, 300, 90))
    flat.save(folder / "normal.end.png")
    six = Image.new("RGB", (6 * 64, 64))
    for i in range(6):
        six.paste((40 * i, 0, 0), (64 * i, 0, 64 * i + 64, 64))
    six.save(folder / "normal.truth.png")
    found = pictures_of(page(dense("sidetune"), tmp_path, galleries=[folder]))
    photo, drawing = (found[f"normal, sidetune, {when}: mean angle 20.0°"] for when in ("when learned", "at the end"))
    assert (
        photo.startswith("data:image/jpeg;") and decoded(photo).size == (4 * SIDE, SIDE) and len(photo) < 18_000
    )  # 12 x 8 x 2 are under 4 MB
    assert drawing.startswith("data:image/png;") and decoded(drawing).tobytes() == flat.tobytes()
    laid_out = decoded(found["normal: the truth"])  # two lines of three
    assert laid_out.size == (3 * 64, 2 * 64)
    reds = [laid_out.getpixel((64 * (i % 3) + 32, 64 * (i // 3) + 32))[0] for i in range(6)]  # type: ignore[index]
    assert reds == pytest.approx([40 * i for i in range(6)], abs=3)


def test_pictures_of_other_frames_are_left_out_and_named(tmp_path: Path) -> None:
    runs, folders = dense("sidetune", "finetune"), [gallery(tmp_path / str(i), i) for i in range(2)]
    assert "other frames" not in page(runs, tmp_path, galleries=folders)
    Image.new("RGB", (512, 128)).save(folders[1] / "input.png")
    html = page(runs, tmp_path, galleries=folders)
    assert "Not shown, because the pictures are of other frames: finetune." in html
    assert len(pictures_of(html)) == 2 * (2 + 2)


def test_names_of_tasks_lead_out_of_no_folder(tmp_path: Path) -> None:
    names = ["../secret", HOSTILE]
    folder = gallery(tmp_path / "gallery", 1)
    for moment in ("truth", "learned", "end"):
        Image.new("RGB", (512, 128)).save(tmp_path / f"secret.{moment}.png")
    run = replace(dense("sidetune")[0], tasks=names, measures=["mean error", HOSTILE])
    html = page([run], tmp_path, galleries=[folder])
    assert "<img" not in html and "img-src" not in html and "data:" not in html
    assert "&lt;img src=x onerror=" in html and html.count("</script>") == 1


# ---- finished runs of any scenario


RECORDS = Path(__file__).parents[2] / "bench/records/results"
ADDED = ("command", "machine", "threads", "versions", "date", "protocol")


def finished(folder: Path, scenario: str, *names: str) -> list[Path]:
    """Folders as a scenario leaves them, of recorded results."""
    folders = []
    for name in names:
        content = json.loads((RECORDS / f"{name}.json").read_text())
        run = folder / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"scenario": scenario, "settings": content["settings"]}))
        result = {"memory_mb": None} if scenario == "squad" else {}
        result |= {key: value for key, value in content.items() if key not in ADDED}
        (run / "result.json").write_text(json.dumps(result))
        folders.append(run)
    return folders


def table_of(html: str) -> list[list[str]]:
    """The texts of the first table's rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", html.split("</table>")[0], re.DOTALL)
    return [[" ".join(re.sub("<[^>]+>", " ", c).split()) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]


def test_every_scenario_has_a_family() -> None:
    assert commands.report_runs.FAMILIES is FAMILIES
    assert set(FAMILIES) == {"icifar", "itaskonomy", "imitation-run", "rl-run", "squad"}


def test_curves_of_finished_agents(tmp_path: Path) -> None:
    names = [f"rl-doom-home-{method}-{seed}" for method in ("features", "sidetune") for seed in range(2)]
    finished(tmp_path / "rl", "rl-run", *names)
    with pytest.raises(SideTuningError, match="holds no run"):
        report([tmp_path / "rl"])
    # The folder of a comparison stands for its runs.
    (tmp_path / "rl/run.json").write_text(json.dumps({"scenario": "rl", "settings": {}}))
    html = report([tmp_path / "rl"]).read_text()
    head, features, sidetune = table_of(html)
    assert head == ["Method", "Success %", "SPL %", "Reward", "Parameters trained", "Steps per second", "Seeds"]
    assert (features[0], features[4], features[6]) == ("features", "83,525", "2") and "±" in features[1]
    assert sidetune[:2] == ["sidetune", "100.0"]
    assert (
        html.count('<svg class="wide-chart"') == 2 and 'class="band-1"' in html and "steps of the environments" in html
    )


def test_scores_of_finished_clones_over_trajectories(tmp_path: Path) -> None:
    names = [f"imitation-sidetune-{count}-{seed}" for count in (5, 20, 100) for seed in range(2)]
    html = report(finished(tmp_path, "imitation-run", *names), tmp_path / "page.html").read_text()
    rows = table_of(html)
    assert [row[0] for row in rows[1:]] == [f"sidetune trajectories={count}" for count in (5, 20, 100)]
    assert "<h1>Imitation: 6 runs</h1>" in html and 'class="line-0"' in html and 'class="line-1"' not in html


def test_scores_of_finished_readers(tmp_path: Path) -> None:
    names = [*(f"squad-epochs-sidetune-match-{seed}" for seed in range(3)), "squad-epochs-sidetune-slim-0"]
    html = report(finished(tmp_path, "squad", *names), tmp_path / "page.html").read_text()
    rows = table_of(html)
    assert rows[0][:3] == ["Method", "F1 %", "Exact %"] and rows[0][-1] == "Seeds" and "<svg" not in html
    assert [(row[0].split()[0], row[-1]) for row in rows[1:]] == [("sidetune", "3"), ("sidetune", "1")]
    assert "side=match" in rows[1][0] and rows[1][1] == "43.6 ± 0.8"


def test_runs_that_fit_on_no_page(tmp_path: Path) -> None:
    (first,) = finished(tmp_path, "rl-run", "rl-doom-home-features-0")
    (other,) = finished(tmp_path, "squad", "squad-epochs-sidetune-slim-0")
    shutil.copytree(first, again := tmp_path / "again")
    for folders, message in (
        ([first, other], "another scenario than the others"),
        ([first, again], "two results of seed 0"),
        ([tmp_path / "nowhere"], "holds no run"),
        ([], "at least one run"),
    ):
        with pytest.raises(SideTuningError, match=message):
            report(folders, tmp_path / "page.html")
    (again / "result.json").unlink()
    with pytest.raises(SideTuningError, match="is not finished"):
        report([again])
    run = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**run, "scenario": "walking"}))
    with pytest.raises(SideTuningError, match="a run of walking; pages are of icifar"):
        report([again])
    assert not (tmp_path / "page.html").exists()
