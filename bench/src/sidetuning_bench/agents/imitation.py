"""Imitation (paper, section 4.3): behaviour cloning of a navigating expert, from few and many trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from sidetuning.errors import DataError, SideTuningError
from sidetuning.files import write_text
from sidetuning_bench import grid
from sidetuning_bench.agents import cloning, worlds
from sidetuning_bench.agents.cloning import CloneOptions, Result
from sidetuning_bench.agents.outcomes import MEASURES, difference_text, mean_text, scores
from sidetuning_bench.agents.play import film_all
from sidetuning_bench.agents.trajectories import COMPASS, Steps, read_steps
from sidetuning_bench.charts import COLOURS, Chart, Line, Point, write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.grid import Cell
from sidetuning_bench.methods import Task
from sidetuning_bench.options import FREE, Count, GridOptions, Names, Once, check, with_values
from sidetuning_bench.report_runs import FAMILIES, Family, scaled
from sidetuning_bench.runs import Run, absolute, read_result, write_result

# Rows that learn nothing; "compass" only where the environment has one.
BASELINES = {
    "expert": "knows the shortest way",
    "compass": "does not see: it turns towards the goal and goes ahead",
    "random": "moves at random and never stops",
}
NOTE = (
    "Mean ± standard error over seeds and, in brackets, the 95 % interval of the mean over the episodes (bootstrap; of "
    "one run Wilson's, of its reward 1.96 standard errors)."
)
DIFFERENCES = (
    "Differences are paired: in the same episodes, ± standard error over seeds, and the 95 % bootstrap interval over "
    "episodes."
)


@dataclass(frozen=True)
class Settings:
    """Clone a navigating expert with several methods, from few and many trajectories."""

    methods: Names = ("sidetune", "features", "finetune", "scratch")
    """Methods; finetune tunes a copy of the base, scratch trains one from random weights."""
    trajectories: Annotated[tuple[Count, ...], Once] = (5, 20, 100, 500)
    """Numbers of trajectories to learn from; each seed draws others."""
    clone: CloneOptions = field(default=CloneOptions())
    run: GridOptions = field(default=GridOptions(out="runs/imitation"))


def cells(settings: Settings, size: int) -> Iterator[Cell[cloning.Settings]]:
    """The runs, seed by seed, with pictures of a size."""
    options = with_values(settings.clone, {"base_weights": absolute(settings.clone.agent.base_weights)})
    for seed in range(settings.run.seeds):
        for count in settings.trajectories:
            for method in settings.methods:
                name = f"{method}-{count}-{seed}"
                folder = Path(settings.run.out) / name
                yield Cell(name, folder, cloning.Settings(method, count, seed, size, str(folder), options))


finished = partial(grid.result_of, scenario="imitation-run", read=partial(read_result, Result))


def run(settings: Settings) -> list[Result]:
    """Run the cells that have no result yet, and the baselines, and write `table.md` and `report.html`."""
    steps, data = prepared(settings)
    size, out = steps.rgb.shape[-1], Path(settings.run.out)
    folder = Run(out, "imitation", settings, free=(*FREE, "seeds", "methods", "trajectories"))
    folder.belongs(data=data["fingerprint"])
    results = [baseline(settings, name, size) for name in baselines(steps)]
    for _, result in grid.run(cells(settings, size), cloning.run, finished, progress=settings.run.progress):
        results.append(result)
        write_text(out / "table.md", table(results, settings.trajectories))
    films = film_all({method: out / f"{method}-{max(settings.trajectories)}-0" for method in settings.methods}, out)
    shown = charts(results, settings.trajectories)
    write_charts(shown, out / "report.html", title="Imitation", lead=lead(settings), films=films)
    return results


def prepared(settings: Settings) -> tuple[Steps, dict[str, Any]]:
    """Check that all runs can be made; returns the trajectories, and what is known about them.

    Raises:
        SideTuningError: an impossible setting, too few trajectories, or another environment than theirs.
    """
    check(settings)
    options, most = settings.clone, max(settings.trajectories)
    # The expert is drawn beside them.
    if len(settings.methods) + 1 > COLOURS:
        raise SideTuningError(f"--methods: at most {COLOURS - 1} fit into one comparison")
    steps = read_steps(options.data)
    if options.shift >= (size := steps.rgb.shape[-1]):
        raise SideTuningError(f"--shift must be below the {size} pixels of the pictures, not {options.shift}")
    data = cloning.about(options.data, steps)
    count, kept = data["episodes"], cloning.held_out(data["episodes"])
    if most + kept > count:
        raise DataError(
            f"{options.data} has {count} trajectories, of which {kept} are held out, and so not {most} to learn from; "
            "collect more"
        )
    for given in {cell.settings.method: cell.settings for cell in cells(settings, size)}.values():
        cloning.build_method(given).add(Task("dry-run", "identity"))
    check_world(options, steps, data)
    return steps, data


def check_world(options: CloneOptions, steps: Steps, about: Mapping[str, Any]) -> None:
    """Check that the test environment is the one of the trajectories, in other scenes, and has an expert."""
    data, env, split = options.data, options.agent.env, options.agent.test_split
    # Data sets of other collectors say nothing of their environment.
    if about.get("env", env) != env and not env.startswith("habitat:"):
        raise DataError(f"{data} was collected in {about['env']}; give --env {about['env']}")
    if about.get("split") == split and env != "doom-home":
        raise DataError(f"{data} was collected in the scenes of '{split}'; give another --test-split")
    with closing(worlds.make_world(env, split, steps.rgb.shape[-1])) as world:
        worlds.check_expert(world, env)
        compass = COMPASS in world.observation_space.spaces
    if compass != (steps.extra.shape[1] > 0):
        was, now = ("without", "one") if compass else ("with", "none")
        raise DataError(f"{data} was collected {was} a compass, and {env} has {now}: give the --env of its collection")


def baselines(steps: Steps) -> list[str]:
    """The BASELINES that the environment of such steps has."""
    return [name for name in BASELINES if name != "compass" or steps.extra.shape[1]]


def baseline(settings: Settings, name: str, size: int) -> Result:
    """The result of one of BASELINES: read where it is there, else tested."""
    file, agent = Path(settings.run.out) / f"{name}.json", settings.clone.agent
    given = {"env": agent.env, "test_split": agent.test_split, "test_episodes": agent.test_episodes, "size": size}
    if file.exists():
        saved: Result = read_result(Result, file)
        if saved.settings == given:
            return saved
    with closing(worlds.make_world(agent.env, agent.test_split, size)) as world:
        outcomes = list(worlds.episodes(world, acts(name, world), agent.test_episodes, worlds.TEST_SEED))
    result = Result(method=name, trajectories=0, seed=0, settings=given, **scores(outcomes))
    write_result(file, result)
    return result


def acts(name: str, world: Any) -> worlds.Act:
    """How one of BASELINES acts."""
    if name == "expert":
        return lambda _: world.expert()
    return worlds.by_compass(world) if name == "compass" else worlds.at_random(world)


def lead(settings: Settings) -> str:
    """First sentences of the report."""
    agent = settings.clone.agent
    spl = f"SPL: success weighted by how short the way was. {agent.test_episodes} episodes that no trajectory shows"
    if agent.env == "doom-home":
        return f"An agent learns by imitation to find the armour of my_way_home. {worlds.HOME} {spl}."
    return (
        "An agent learns by imitation to walk to a point that its compass shows. Success: it stops near the point. "
        f"{spl}, in other scenes ({agent.test_split})."
    )


def runs_of(results: Sequence[Result], method: str, count: int) -> list[Result]:
    """A method's results with this number of trajectories, one per seed."""
    return [r for r in results if r.method == method and r.trajectories in (count, 0)]


def table(results: Sequence[Result], counts: Sequence[int]) -> str:
    """Success in %, SPL in % and reward in Markdown, then differences: a row per method, a column per number."""
    methods = rows_of(results)
    text = ""
    for name, title, scale in MEASURES:
        rows = [[mean_text(runs_of(results, m, n), name, scale) for n in counts] for m in methods]
        text += markdown(title, counts, methods, rows) + "\n"
    text += " ".join([NOTE, *(f"{name} {what}." for name, what in BASELINES.items() if name in methods)]) + "\n"
    if "sidetune" in methods:
        others = [method for method in methods if method != "sidetune"]
        for name, title, scale in MEASURES[:2]:
            pairs = [[[runs_of(results, x, n) for x in (m, "sidetune")] for n in counts] for m in others]
            rows = [[difference_text(ours, theirs, name, scale) for ours, theirs in row] for row in pairs]
            title = f"{title.partition(',')[0]} less that of sidetune, points"
            text += "\n" + markdown(title, counts, others, rows)
        text += f"\n{DIFFERENCES}\n"
    return text + (f"\n{worlds.HOME}\n" if results and results[0].settings["env"] == "doom-home" else "")


def markdown(title: str, counts: Sequence[int], names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a column per number of trajectories."""
    lines = [[title, *(f"{n:,} trajectories" for n in counts)], ["---", *["---:"] * len(counts)]]
    lines += [[name, *row] for name, row in zip(names, rows, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(results: Sequence[Result]) -> list[str]:
    """Names of all rows, those that learned first."""
    return sorted(dict.fromkeys(r.method for r in results), key=lambda method: method in BASELINES)


def charts(results: Sequence[Result], counts: Sequence[int]) -> list[Chart]:
    """Success and SPL over the number of trajectories, with the expert, and the compass where a colour is left."""
    made = []
    for name, title, scale in MEASURES[:2]:
        lines = []
        for method in [m for m in rows_of(results) if m != "random"][:COLOURS]:
            runs = {n: [getattr(r, name) for r in runs_of(results, method, n)] for n in counts}
            values = {n: [scale * v for v in found if v is not None] for n, found in runs.items()}
            lines.append(Line(method, [Point(n, *mean_and_error(v), len(v)) for n, v in values.items() if v]))
        # An environment may lack a measure.
        if any(line.points for line in lines):
            what = title.partition(",")[0]
            made.append(Chart(what, "trajectories", title, lines, log_x=True, note="Higher is better."))
    return made


FAMILIES["imitation-run"] = Family(
    "Imitation",
    partial(read_result, Result),
    {title: scaled(name, scale) for name, title, scale in MEASURES} | {"Parameters trained": scaled("added")},
    lambda results: charts(results, sorted({result.trajectories for result in results})),
    axis="trajectories",
)


def main(settings: Settings) -> None:
    """Run and print the tables."""
    grid.print_tables(table(run(settings), settings.trajectories), settings.run.out)
