"""The report: its words and numbers, its pictures, and its independence of any network."""

from __future__ import annotations

import base64
import random
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from report_parts import HOSTILE, comparison, dense, gallery, page, result, seconds
from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench.report import SIDE
from sidetuning_bench.results import RunResult, markdown, summary_table


def test_page_is_complete_small_and_reproducible(tmp_path: Path) -> None:
    html = page(comparison(methods=6), tmp_path)
    assert html.startswith("<!doctype html>")
    assert len(html.encode()) < 200_000
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|\bsrc=|<link", html)
    assert page(comparison(methods=6), tmp_path) == html
    assert html.count("<svg class=") == 2 + 6 and html.count('aria-labelledby="curve') == 6
    assert not re.search(r"#[0-9a-f]{6}", html[html.index("<body>") :]), "a colour does not follow the page's"


@pytest.mark.parametrize("field", ["method", "variant", "tasks", "settings", "title"])
def test_hostile_texts_stay_text(tmp_path: Path, field: str) -> None:
    options: dict[str, Any] = {"title": HOSTILE} if field == "title" else {}
    own: dict[str, Any] = {"tasks": [HOSTILE, "dogs"], "settings": {HOSTILE: {HOSTILE: HOSTILE}}}
    own |= {"method": HOSTILE, "variant": HOSTILE}
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
    none: dict[str, Any] = {"alphas": [None, None]}
    assert 'id="alpha"' not in page([result(**none)], tmp_path)
    html = page(
        [result(**none), result("mixed", alphas=[None, 0.75]), result("mixed", seed=1, alphas=[None, 0.25])], tmp_path
    )
    cells = html.split('id="alpha"')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)<", cells) == ["–", "0.50"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extreme_results_make_a_page(tmp_path: Path, value: float) -> None:
    one: dict[str, Any] = {"tasks": ["only"], "accuracy": [[value]], "alphas": [None], "parameters": [0]}
    one |= {"seconds": [0.0], "base_seconds": 0.0}
    html = page([result(**one), result("m" * 300, **one, variant="v" * 300)], tmp_path)
    assert "nan" not in html.replace("–", "") and "0 drawn at 1" in html


def test_large_results_make_a_small_page(tmp_path: Path) -> None:
    assert len(page(comparison(methods=10, seeds=1, tasks=25), tmp_path).encode()) < 500_000


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
