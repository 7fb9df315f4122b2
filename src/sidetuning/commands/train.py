"""`sidetuning train DATA --base NAME --task NAME --out FOLDER`: a task from data of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sidetuning.errors import TaskError
from sidetuning.terminal import say

if TYPE_CHECKING:
    from sidetuning.automatic import AutoResult
    from sidetuning.data import TaskData
    from sidetuning.tuner import SideTuner

# Seconds of a unit of time.
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# Options that say what a row of the data is; they are kept with the task.
COLUMNS = ("image", "text", "label", "problem")


@dataclass(frozen=True)
class Settings:
    """Learn a task from a folder of images or a table of images or texts, and add it to a model."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder with one folder of images per class; CSV, TSV, Parquet or JSON Lines; data set, saved or of the Hub."""
    task: str
    """Name of the new task."""
    out: str
    """Model folder; use the same one for further tasks."""
    base: str | None = None
    """Pretrained network, such as timm:resnet50 or hf:bert-base-uncased; by default that of the model folder."""
    weights: str | None = None
    """Safetensors file of the base's weights, instead of those that its name stands for."""
    precision: str | None = None
    """How the base of a new model runs: fp32 (the default), bf16, int8 or int4; its tasks belong to that precision."""
    image: str | None = None
    """Column of image files."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Column of texts, or of lists of words; given twice, the columns of pairs of texts."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Column of the answers; given more than once, several labels or numbers."""
    problem: str | None = None
    """What answers mean: classes, labels, numbers, or tokens, a class for each word; guessed by default."""
    side: str = "auto"
    """Side network: auto tries those that fit, none solves only a linear head."""
    budget: str = "2m"
    """Time for trying sides, after the base pass: 30s, 2m, 1h."""
    balance: bool = False
    """Give all classes the same weight."""
    mirror: bool = False
    """Learn from mirror images too, at twice the time of the base pass."""
    forgetting: bool = False
    """Fine-tune a copy of the base too, for the time of --budget, and report what the other tasks would have lost."""
    replace: bool = False
    """Replace the task if the model already has one of this name."""
    cache: str | None = None
    """Folder that keeps the base's features; by default they are deleted when the task is learned."""
    seed: int = 0
    """Seed of the splits and of training."""
    quiet: bool = False
    """Print only the result."""


def seconds_of(text: str) -> float:
    """A time such as 90s, 2m or 1h in seconds; a number alone is seconds.

    Raises:
        TaskError: it is none.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        value = float(number) * UNITS[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise TaskError(f"--budget is a time such as 30s, 2m or 1h, not '{text}'")
    return value


def train(settings: Settings) -> AutoResult:
    """Learn the task, and save it with its report's numbers."""
    from sidetuning.automatic import auto
    from sidetuning.data import load as load_data
    from sidetuning.files import held_folder, read_json, write_json
    from sidetuning.report import add_to_report
    from sidetuning.scoring import score

    out, budget = Path(settings.out), seconds_of(settings.budget)
    folder, work = out / "tasks" / settings.task, out / ".work" / settings.task
    tell = (lambda text: None) if settings.quiet else (lambda text: say(text, error=True))
    # What tells that this run began, where there was no such task.
    begun, run = work / "run.json", {"run": str(replace(settings, cache=None, replace=False, quiet=False))}
    resumed = begun.exists() and read_json(begun, {"run": str}, "delete it") == run
    if folder.exists() and not settings.replace and not resumed:
        raise TaskError(
            f"{out} has a task '{settings.task}' already; choose another --task, or give --replace to learn it anew"
        )
    with held_folder(out):
        columns = {key: getattr(settings, key) for key in COLUMNS}
        data = load_data(settings.data, **columns, seed=settings.seed)
        for note in data.notes:
            tell(note)
        model = opened(settings, out)
        if settings.task in model:
            # Its files stay until the new task's replace them.
            model.remove_task(settings.task)
        work.mkdir(parents=True, exist_ok=True)
        begun.unlink(missing_ok=True)
        if resumed or not folder.exists():
            write_json(begun, run)
        how: dict[str, Any] = {key: getattr(settings, key) for key in ("side", "balance", "mirror", "seed")}
        how |= {"cache": settings.cache or work, "budget": budget, "say": tell, "progress": not settings.quiet}
        result = auto(model, settings.task, data, first=lambda found: found.save_task(settings.task, folder), **how)
        split = "test" if "test" in data.splits else "validation"
        model.save_task(settings.task, folder, metrics=result.scores[split])
        lost = forgotten(settings, model, data, tell) if settings.forgetting else None
        record = {**result.record(), "forgetting": lost}
        source = Path(settings.data).expanduser()
        about = {"data": str(source.resolve()) if source.exists() else settings.data, "seed": settings.seed}
        about["columns"] = {**columns, **data.columns, "problem": data.problem}
        write_json(folder / "training.json", {**record, **about})
        scored = score(model, settings.task, data.splits[split], progress=not settings.quiet)
        add_to_report(out, model, settings.task, scored, split, record)
        shutil.rmtree(work)
        if not any(work.parent.iterdir()):
            work.parent.rmdir()
    return result


def forgotten(
    settings: Settings, model: SideTuner, data: TaskData, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """What forgetting would have been, measured on the rows that chose the other tasks, or None where it cannot be."""
    from sidetuning.errors import SideTuningError
    from sidetuning.forgetting import rows_again, would_forget

    others = {}
    for name in model.tasks:
        if name != settings.task:
            try:
                others[name] = rows_again(Path(settings.out) / "tasks" / name, model[name].labels)
            except SideTuningError as error:
                tell(f"{name} is left out of what forgetting would have been: {error}")
    if not others:
        tell("the model has no other task whose data can be read, so what forgetting would have been is not known")
        return None
    try:
        seconds = seconds_of(settings.budget)
        return would_forget(model, data, others, seconds=seconds, seed=settings.seed, progress=not settings.quiet)
    except SideTuningError as error:
        tell(str(error))
        return None


def opened(settings: Settings, out: Path) -> SideTuner:
    """The model of a folder, or a new one on the base that is named.

    Raises:
        TaskError: no base, or another one than the folder's.
    """
    from sidetuning.launch import on_device
    from sidetuning.loading import load, load_base
    from sidetuning.tuner import SideTuner

    if not any(out.glob("tasks/*/side.json")):
        if settings.base is None:
            raise TaskError(f"{out} is a new model: name its base, such as --base timm:resnet50 or --base hf:NAME")
        options: dict[str, Any] = {} if settings.weights is None else {"weights": settings.weights}
        return on_device(SideTuner(load_base(settings.base, precision=settings.precision or "fp32", **options)))
    model = on_device(load(out))
    spec = model.base.spec
    if settings.precision not in (None, model.base.engine.precision):
        raise TaskError(f"{out} is built on a base in {model.base.engine.precision}; leave --precision out")
    if settings.base is not None and spec is not None and _place(spec.name) != _place(settings.base):
        told = f"{out} is built on {spec.name}, not {settings.base}"
        raise TaskError(f"{told}; leave --base out, or choose another --out")
    weights = None if spec is None else spec.options.get("weights")
    if settings.weights is not None and (weights is None or _place(str(weights)) != _place(settings.weights)):
        raise TaskError(f"{out} is built on other weights ({weights or 'those of its base'}); leave --weights out")
    return model


def _place(name: str) -> str:
    """A base's name, or a file's, by its whole path where it is on this machine: "hf:/home/me/net"."""
    scheme, between, rest = name.rpartition(":")
    path = Path(rest).expanduser()
    return f"{scheme}{between}{path.resolve()}" if path.exists() else name


def main(settings: Settings) -> None:
    """Learn, and print what came of it."""
    result = train(settings)
    split = "test" if "test" in result.scores else "validation"
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.scores[split].items() if name != "samples")
    say(f"{settings.task}: {numbers} on {result.rows[split]} {split} rows, in {result.seconds:.0f} s")
    say(f"kept: {result.chosen}, which has the lowest loss on the validation rows")
    if split == "validation":
        say("these rows chose the side, so expect a little less on new ones; sidetuning evaluate scores a test set")
    report = Path(settings.out) / "report.html"
    say(f"saved in {settings.out}; look at {report}, or ask: sidetuning predict {settings.out} …")
