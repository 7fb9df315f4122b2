"""`report.html` of a model folder: what each task is worth, and where it is wrong. One file that needs no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidetuning.errors import DataError
from sidetuning.files import read_json, write_json, write_text
from sidetuning.scoring import Scored
from sidetuning.summary import summarise
from sidetuning.tags import SCORE
from sidetuning.transforms import picture
from sidetuning.tuner import SideTuner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mistakes that are shown, the longer edge of their pictures, letters of their texts; classes up to which there is a
# confusion matrix.
MISTAKES, EDGE, LETTERS, CLASSES = 12, 160, 400, 40
# What a task's report is made of, beside its two files.
FILE = "report.json"
MEND = "score the task again: sidetuning evaluate … --report"
ATTEMPT = {"name": str, "loss": float, "score": float, "steps": int, "seconds": float, "parameters": int}
TRAINING = {"data?": str, "measure?": str, "chosen?": str, "seconds?": float, "notes?": [str]}
TRAINING |= {"attempts?": [{**ATTEMPT, "curve": [float]}]}
LOST = {"task": str, "rows": int, "measure": str, "before": float, "after": float}
TRAINING |= {"forgetting?": {"steps": int, "tasks": [LOST]}}
ROW = {"name": str, "rows": int, "precision": float, "recall": float, "f1": float}
MISTAKE = {"place": str, "truth": str, "answer": str, "value": str, "image?": str, "text?": str, "marked?": [str]}
REPORT = {"task": str, "problem": {"classes", "labels", "numbers"}, "split": str, "names": [str], "scores": dict}
REPORT |= {"each?": {"row", "word"}}
REPORT |= {"table": [ROW], "confusion": [[int]], "calibration": [(float, float, int)], "mistakes": [MISTAKE]}
REPORT |= {"parameters": int, "bytes": int, **TRAINING}
# What matplotlib writes and a page does not need: its own style sheet and font, and names that repeat.
NOISE = r"""<style.*?</style>| font-family:[^;"]*;| id="[\w.]+_\d+\""""
# Colours of the page's style sheet.
COLOURS = {"blue": "#0072b2", "orange": "#d55e00", "green": "#009e73", "muted": "#59636e", "text": "#1f2328"}


def describe(
    model: SideTuner, task: str, scored: Scored, split: str, training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the report says of a task, as JSON values.

    Args:
        model, task: the model and the task.
        scored: its answers to rows.
        split: what the rows are called: a split of the data that the task learned from, or the name of other data.
        training: what `AutoResult.record` gave, if the task was learned so.
    """
    training, summary = dict(training or {}), summarise(task, model[task])
    few = scored.problem == "classes" and len(scored.names) <= CLASSES
    notes = [*training.get("notes", []), *(f"left out: {told}" for told in scored.unreadable)]
    return {
        "task": task,
        "problem": scored.problem,
        "each": "word" if scored.texts else "row",
        "split": split,
        "names": scored.names,
        "scores": scored.scores(),
        "table": scored.table() if scored.problem != "numbers" else [],
        "confusion": scored.confusion().tolist() if few else [],
        "calibration": scored.calibration() if scored.problem == "classes" else [],
        "mistakes": [_mistake(scored, row) for row in scored.mistakes(MISTAKES)],
        "parameters": summary.total,
        "bytes": summary.bytes,
        "notes": notes,
        **{key: training.get(key) for key in ("measure", "chosen", "attempts", "seconds", "forgetting")},
    }


def _mistake(scored: Scored, row: int) -> dict[str, Any]:
    """A row that was answered wrongly, with its picture or text."""
    source, names = scored.rows.sources[row], scored.names
    target, answer, value = scored.rows.targets[row], scored.predicted[row], ""
    if scored.problem == "classes":
        truth, said = names[int(target)], names[int(answer)]
        value = f"{float(scored.outputs[row].max()):.0%}"
    elif scored.problem == "labels":
        truth, said = (", ".join(n for n, k in zip(names, ks.tolist()) if k) or "nothing" for ks in (target, answer))
    else:
        truth, said = (", ".join(f"{number:.4g}" for number in numbers.tolist()) for numbers in (target, answer))
    shown: dict[str, Any] = {"place": scored.rows.places[row], "truth": truth, "answer": said, "value": value}
    if scored.texts:
        words, k = source
        before, after = " ".join(words[:k])[-LETTERS // 2 :], " ".join(words[k + 1 :])[: LETTERS // 2]
        return {**shown, "image": None, "text": None, "marked": [before, words[k][:LETTERS], after]}
    if isinstance(source, (str, tuple)):
        text = source if isinstance(source, str) else " ⁄ ".join(source)
        return {**shown, "image": None, "text": text if len(text) <= LETTERS else f"{text[:LETTERS]} …"}
    image = picture(source)
    image.thumbnail((EDGE, EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {**shown, "image": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def add_to_report(
    folder: str | Path,
    model: SideTuner,
    task: str,
    scored: Scored,
    split: str,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write what the report says of a task beside its files, and the report of all tasks of the model folder anew.

    Args:
        folder: the model folder.
        model, task, scored, split, training: as of `describe`.

    Returns:
        The path of the page.
    """
    root = Path(folder)
    write_json(root / "tasks" / task / FILE, describe(model, task, scored, split, training))
    return write_report(root, model)


def write_report(folder: str | Path, model: SideTuner) -> Path:
    """Write `report.html` of a model folder, of all tasks that were scored."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("reports need more packages: pip install 'sidetuning[data]'") from error
    root = Path(folder)
    files = [root / "tasks" / task / FILE for task in model.tasks]
    tasks = [read_json(file, REPORT, MEND) for file in files if file.exists()]
    if not tasks:
        raise DataError(f"no task of {folder} was scored; {MEND}")
    for task in tasks:
        task["headline"] = headline(task)
        task["charts"] = [{**chart, "svg": Markup(chart["svg"])} for chart in charts(task)]
    environment = Environment(
        loader=PackageLoader("sidetuning"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    spec = model.base.spec
    page = environment.get_template("report.html.j2").render(
        title=root.resolve().name,
        base="The base" if spec is None else spec.name,
        base_parameters=model.base.parameter_count(),
        tasks=tasks,
        version=version("sidetuning"),
    )
    write_text(root / "report.html", page)
    return root / "report.html"


def headline(task: Mapping[str, Any]) -> str:
    """The number that says most."""
    scores = task["scores"]
    if SCORE in scores:
        return f"{SCORE} {scores[SCORE]:.1%}"
    return f"error {scores['mae']:.4g}" if task["problem"] == "numbers" else f"{scores['accuracy']:.1%}"


def charts(task: Mapping[str, Any]) -> list[dict[str, str]]:
    """Learning curves and calibration, as far as there are any."""
    found = []
    curves = [attempt for attempt in task.get("attempts") or [] if len(attempt["curve"]) > 1]
    if curves:

        def plot_curves(axes: Axes) -> None:
            for attempt, colour in zip(curves, ("blue", "orange", "green")):
                chosen = attempt["name"] == task["chosen"]
                x = range(1, len(attempt["curve"]) + 1)
                axes.plot(x, attempt["curve"], color=COLOURS[colour], lw=2.5 if chosen else 1.2, label=attempt["name"])
            # Heads in closed form, which have no passes.
            solved = [attempt for attempt in task["attempts"] if not attempt["curve"]]
            for attempt, dashes in zip(solved, ("--", ":")):
                lw = 2.5 if attempt["name"] == task["chosen"] else 1.2
                axes.axhline(attempt["score"], color=COLOURS["muted"], ls=dashes, lw=lw, label=attempt["name"])
            axes.set_xlabel("passes over the training rows")
            axes.set_ylabel(f"{task['measure']} of the validation rows")
            axes.legend(frameon=False, fontsize=8)

        svg = draw(plot_curves, "Learning curves", task["task"])
        found.append({"title": "Learning curves", "svg": svg, "note": ""})
    if task.get("calibration"):

        def plot_calibration(axes: Axes) -> None:
            said, right, rows = zip(*task["calibration"])
            axes.plot([0, 1], [0, 1], color=COLOURS["muted"], ls="--", lw=1)
            axes.scatter(said, right, s=[20 + 200 * n / sum(rows) for n in rows], color=COLOURS["blue"])
            axes.set_xlim(0, 1.03)
            axes.set_ylim(0, 1.03)
            axes.set_xlabel("probability of the answer")
            axes.set_ylabel("share that is right")

        note = "Points on the line say what they know; below it the task is too sure. Larger points are more rows."
        found.append({"title": "Calibration", "svg": draw(plot_calibration, "Calibration", task["task"]), "note": note})
    return found


def draw(plot: Callable[[Axes], None], title: str, task: str) -> str:
    """An SVG with the colours of the page, whose letters stay letters; a page holds those of several tasks."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes names of parts that are unique in a page.
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"{title} {task}", "font.size": 10}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), COLOURS["text"])
    style |= {"text.color": COLOURS["text"]}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        plot(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(NOISE, "", buffer.getvalue(), flags=re.DOTALL)
    body = text.partition("<svg ")[2].partition(">")[2]
    size = re.findall(r'viewBox="([^"]+)"', text)[0]
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg viewBox="{size}" role="img" aria-label="{title}">{body.replace("xlink:", "")}'
