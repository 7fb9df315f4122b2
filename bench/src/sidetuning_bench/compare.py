"""`sidetuning bench compare icifar|itaskonomy`: methods, or variants of one, on the same data at the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import tyro

from sidetuning.base import Base
from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.files import write_text
from sidetuning.loading import load_base
from sidetuning.registry import unknown
from sidetuning_bench import grid, icifar
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.dense.itaskonomy import FrameOptions
from sidetuning_bench.dense.tasks import ORDER
from sidetuning_bench.grid import Cell, cell_name
from sidetuning_bench.methods import METHODS, Task
from sidetuning_bench.options import Count, GridOptions, Once, Positive, Share, SideOptions, check, with_values
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult, gaps_table, markdown, measures_table, summary_table
from sidetuning_bench.runs import Run, dated

Given = icifar.Settings | itaskonomy.Settings
G = TypeVar("G", bound=Given)
# A cell's variant, its method, and what else its settings change, by flat name.
Variant = tuple[str, str, dict[str, Any]]
# Settings that may differ when a grid resumes.
FREE = ("data", "out", "cache", "progress", "seeds", "methods", "shares")
MERGES = ("base-only", "side-only", "sum", "product", "fixed", "alpha", "film", "mlp", "mlp2", "res-mlp", "concat")
Grid = Literal["methods", "merge", "init", "side", "order", "dense", "base", "data", "boosting"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
DENSE_GRIDS = ("methods", "merge", "init", "side", "order", "dense", "base")
DENSE = ", dense"
# The variant in which every task is learned first, of methods where only a run of its own tells that.
ALONE = "alone"
FIRST = {"finetune": ("independent", ""), "ewc": ("independent", ""), "psp": ("psp", ALONE), "pnn": ("pnn", ALONE)}
MAIN = ("sidetune", "features", "independent", "finetune")
ALL = (*MAIN, "solve", "ewc", "psp", "pnn", "scratch", "residual-adapter", "lora", "piggyback", "boosting")


@dataclass(frozen=True)
class OnIcifar:
    """Compare on iCIFAR: ten tasks of ten classes."""

    scenario: ClassVar[Any] = icifar
    data: str = icifar.Settings.data
    """A folder with train*.parquet and test*.parquet in the Hub's layout, or a data set on the Hub."""
    samples: Count = 20_000
    """Training images per task, repetitions included."""
    shares: Annotated[tuple[Share, ...], Once] = (0.01, 0.1, 1.0)
    """Shares of the training data that the grid "data" compares."""

    def settings(self, tasks: int | None) -> icifar.Settings:
        """The settings of a run on this data."""
        return icifar.Settings(data=self.data, samples=self.samples, tasks=tasks or icifar.Settings.tasks)


@dataclass(frozen=True)
class OnITaskonomy:
    """Compare on iTaskonomy: twelve dense tasks."""

    scenario: ClassVar[Any] = itaskonomy
    source: FrameOptions = field(default=FrameOptions())
    frames: Count | None = None
    """Number of training frames; None for all."""
    epochs: Positive = 3.0
    """Passes over the training frames, per task."""

    def settings(self, tasks: int | None) -> itaskonomy.Settings:
        """The settings of a run on this data."""
        return itaskonomy.Settings(source=self.source, tasks=ORDER[:tasks], frames=self.frames, epochs=self.epochs)


@dataclass(frozen=True)
class Shared:
    """What all runs of a grid share."""

    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    init: str | None = "distilled"
    """How sides start, unless the grid compares starts."""
    merge: str | None = None
    """How sides and base are fused, unless the grid compares merges; by default as in the scenario."""
    lr: Positive | None = None
    """Learning rate of all methods; by default the scenario's for each."""
    batch: Count | None = None
    """Images or frames per step; by default the scenario's."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of methods that train whole networks, and of decoders; fast where the processor knows it."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""

    def applied(self, plain: G, values: dict[str, Any]) -> G:
        """A scenario's settings with these, and then `values`, by flat name; the method is among them."""
        given: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        if isinstance(values["method"], SideOptions):
            given["init"] = self.init
        else:
            given = {name: value for name, value in given.items() if name not in ("init", "merge")}
        whole = with_values(plain, {**given, "progress": False, **values})
        return (
            with_values(whole, {"lr": itaskonomy.rate_of(whole)}) if isinstance(whole, itaskonomy.Settings) else whole
        )


@dataclass(frozen=True)
class Settings:
    """Compare methods on one scenario, cell by cell; the same command resumes."""

    on: (
        Annotated[OnIcifar, tyro.conf.subcommand("icifar")]
        | Annotated[OnITaskonomy, tyro.conf.subcommand("itaskonomy")]
    )
    grid: Grid = "methods"
    """What varies: the method, or for an ablation of side-tuning its merge, initialisation (init), side, the order of
    tasks, dense laterals, what is merged (base, side, or both), the share of the data, or boosting and bigger sides."""
    methods: tuple[str, ...] = ()
    """Methods of the grids methods, order and data; by default those that the grid is about."""
    ewc_coefficient: Positive | None = None
    """Coefficient of the penalty of ewc; by default the scenario's."""
    tasks: Count | None = None
    """Number of tasks to learn; by default all."""
    shared: Shared = Shared()
    run: GridOptions = field(default=GridOptions(out="runs/compare"))


def cells(settings: Settings) -> Iterator[Cell[Given]]:
    """The runs of the grid, seed by seed, so that an interrupted grid has whole seeds."""
    if isinstance(settings.on, OnITaskonomy) and settings.grid not in DENSE_GRIDS:
        raise SideTuningError(f"--grid {settings.grid} is one of icifar's; itaskonomy has {', '.join(DENSE_GRIDS)}")
    if settings.methods and settings.grid not in ("methods", "order", "data"):
        raise SideTuningError(f"--grid {settings.grid} is about side-tuning alone; leave --methods out")
    if settings.ewc_coefficient is not None and "ewc" not in {method for _, method, _ in variants(settings)}:
        raise SideTuningError("--ewc-coefficient is of ewc, which is not among the methods here; leave it out")
    if settings.grid == "init" and settings.shared.init in ("xavier", "low-energy", "zero"):
        raise SideTuningError("--grid init tries all starts; leave --init out, or give a file of distilled weights")
    plain: Given = settings.on.settings(settings.tasks)
    for seed in range(settings.run.seeds):
        for variant, method, changes in variants(settings):
            name = cell_name(method, variant, seed)
            folder = Path(settings.run.out) / name
            values = {"method": settings.on.scenario.METHODS[method], "seed": seed, "out": str(folder), **changes}
            if method == "ewc" and settings.ewc_coefficient is not None:
                values["coefficient"] = settings.ewc_coefficient
            # Mixed precision is slower for what trains a side or a head on cached features of small images.
            if isinstance(plain, icifar.Settings) and METHODS[method].uses_features:  # type: ignore[attr-defined]
                values["precision"] = "no"
            given = settings.shared.applied(plain, values)
            yield Cell(name, folder, given, variant, given.tasks if isinstance(given.tasks, int) else len(given.tasks))


def variants(settings: Settings) -> Iterator[Variant]:
    """What varies in the grid, but for the seeds."""
    dense = isinstance(settings.on, OnITaskonomy)
    match settings.grid:
        case "methods":
            for method in settings.methods or [name for name in ALL if name in settings.on.scenario.METHODS]:
                yield "", method, {}
                if method == "sidetune" and dense:
                    yield "recipe=best", method, {"recipe": "best", **itaskonomy.BEST}
                if FIRST.get(method) == (method, ALONE) and not dense:
                    yield ALONE, method, {"alone": True}
        case "merge":
            for merge in MERGES:
                yield f"merge={merge}", "sidetune", {"merge": merge}
        case "init":
            for init in ("distilled", "low-energy", "zero", "xavier"):
                yield f"init={init}", "sidetune", {"init": settings.shared.init if init == "distilled" else init}
            # A copy of the base, slimmed to a quarter of its width, as the side.
            yield "init=copy", "sidetune", {"side": "copy", "side_width": 0.25, "init": None}
        case "side":
            # All from random weights, since distilled ones are packaged for fcn4 alone.
            for side in ("fcn4", "fcn5", "fcn8"):
                yield f"side={side}", "sidetune", {"side": side, "init": "xavier"}
            for width in (0.25, 0.5):
                yield f"side=copy, width={width}", "sidetune", {"side": "copy", "side_width": width, "init": "xavier"}
        case "order":
            for method, order in product(settings.methods or ("sidetune", "finetune"), (None, 1, 2)):
                yield f"order={'label' if order is None else f'random {order}'}", method, {"order": order}
        case "dense":
            for merge, laterals in product(("alpha", "mlp2"), (False, True)):
                yield f"merge={merge}{DENSE if laterals else ''}", "sidetune", {"merge": merge, "dense": laterals}
        case "base":
            for name, merge in (("base alone", "base-only"), ("side alone", "side-only"), ("base and side", "mlp2")):
                yield name, "sidetune", {"merge": merge}
        case "data":
            # The number of steps stays: who overfits?
            assert isinstance(settings.on, OnIcifar)
            for method, share in product(settings.methods or MAIN, settings.on.shares):
                yield f"data={100 * share:g}%", method, {"share": share}
        case "boosting":
            # Small sides one after another, against one with as many parameters as two and three stages (within 3 %).
            for stages in (1, 2, 3):
                yield f"stages={stages}", "boosting", {"stages": stages, "init": "xavier"}
            for width in (1.875, 2.625):
                yield f"side=fcn4, width={width}", "sidetune", {"side_width": width, "init": "xavier"}


def run(settings: Settings) -> list[RunResult]:
    """Run the cells that have no result yet, each in a process of its own, and write table and report.

    Returns:
        The results of all cells; `add_alone` makes rows for a table of them.

    Raises:
        SideTuningError: a cell failed; the others' results stay.
    """
    for method in settings.methods:
        if method not in settings.on.scenario.METHODS:
            raise UnknownNameError(unknown("method", method, settings.on.scenario.METHODS, verb="compared here"))
    if isinstance(settings.on, OnITaskonomy):
        settings = dated(settings, settings.run.out)
    check(settings)
    if problem := Once.problem(settings.methods or ALL):
        raise SideTuningError(f"--methods {problem}")
    scenario = settings.on.scenario
    todo = list(cells(settings))
    base = dry_run(todo)
    folder = Run(settings.run.out, f"compare {scenario_of(todo[0].settings)}", settings, free=FREE)
    folder.belongs(data=scenario.fingerprint_of(todo[0].settings), base=base.identity().sha256)
    results: list[RunResult] = []
    galleries: list[Path] = []
    for cell, result in grid.run(todo, scenario.run, finished, unit="task", progress=settings.run.progress):
        results.append(replace(result, variant=cell.variant))
        galleries += [] if cell.variant == ALONE else [cell.folder / "gallery"]
        if galleries:
            finish(settings, results, galleries)
    return results


def dry_run(todo: Sequence[Cell[Given]]) -> Base:
    """Build the parts of every kind of cell before hours of work, so that a missing part is an error now.

    Returns:
        The base, without taps.
    """
    first = todo[0].settings
    tapped = cache(partial(load_base, first.base, weights=first.base_weights))
    for method in dict.fromkeys(cell.settings.method for cell in todo):
        method.build(tapped(taps=method.tapped), seed=0).add(Task("dry-run", "identity"))
    return tapped(taps=())


def scenario_of(settings: Given) -> str:
    """The name of the module of some settings, which their runs record as their scenario."""
    return type(settings).__module__.rpartition(".")[2]


def finished(cell: Cell[Given]) -> RunResult | None:
    """The result of a cell, where it is done; a run with other settings is refused."""
    return grid.result_of(cell, scenario_of(cell.settings), RunResult.load)


def finish(settings: Settings, results: Sequence[RunResult], galleries: Sequence[Path] = ()) -> None:
    """Write `table.md` and `report.html` of the results so far, with the pictures of dense tasks."""
    with_first, out = add_alone(results), Path(settings.run.out)
    write_text(out / "table.md", tables(with_first))
    write_report(with_first, out / "report.html", title=title(settings), galleries=galleries)


def tables(results: Sequence[RunResult]) -> str:
    """All tables of a comparison, in Markdown."""
    table = markdown(summary_table(results))
    return table if results[0].measures is None else f"{table}\n{measures_table(results)}\n{gaps_table(results)}"


def title(settings: Settings) -> str:
    """Title of the report."""
    name = "iCIFAR" if isinstance(settings.on, OnIcifar) else "iTaskonomy"
    return f"{name}: {'methods compared' if settings.grid == 'methods' else settings.grid}"


def add_alone(results: Sequence[RunResult]) -> list[RunResult]:
    """Fill in how well each task is learned first, and leave out the runs that tell nothing else.

    For methods whose tasks do not touch that is what it got in the sequence. The first task of fine-tuning and EWC is
    a fine-tuned copy of the base, so theirs is the run of `independent` with the same seed; that of PSP and PNN is in
    runs with every task "alone"; that of dense laterals is the run without them. None where there is no such run.
    """
    runs = {(r.method, r.variant, r.seed): r for r in results}
    filled = []
    for result in (r for r in results if r.variant != ALONE):
        first: RunResult | None = result
        if result.method in FIRST:
            method, variant = FIRST[result.method]
            first = runs.get((method, variant or result.variant, result.seed))
        elif result.settings.get("dense"):
            first = runs.get((result.method, result.variant.removesuffix(DENSE), result.seed))
        alone = None if first is None else [first.matrix.learned[first.tasks.index(t)] for t in result.tasks]
        filled.append(replace(result, alone=alone))
    return filled


def main(settings: Settings) -> None:
    """Run the grid and print its table."""
    grid.print_tables(markdown(summary_table(add_alone(run(settings)))), settings.run.out)
