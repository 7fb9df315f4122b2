"""Draws the figures of `docs/results.md` from the results, and prints its table of numbers.

`python bench/records/figures.py` writes `docs/figures/*.svg`; `make figures` does the same. Each figure holds the
numbers that it shows, and tests/bench/test_figures.py compares them with the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from record import read, read_all, read_results
from sidetuning_bench.charts import colours, draw
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.results import RunResult, number_text, summary_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/figures"
# Text stays readable where a phone shows the figure at two thirds of this size.
SIZE = (520, 350)
# Those of report.css for dark pages.
DARK = {
    "page": "#15181b",
    "text": "#e6e8ea",
    "muted": "#a4adb6",
    "rule": "#363c43",
    "blue": "#56b4e9",
    "orange": "#f0803c",
    "gold": "#e69f00",
}
SMALL_COLOURS = {"sidetune": "blue", "finetune": "orange", "ewc": "green", "psp": "pink"}
Numbers = dict[str, Any]


def runs(method: str, scenario: str = "") -> list[RunResult]:
    """The runs of a method in the comparison of methods, a seed each."""
    return read_results(RunResult, f"compare-{scenario}methods-{method}-[0-9].json")


def methods() -> list[str]:
    """The names of all methods that were compared on iCIFAR."""
    return sorted({result["method"] for result in read_all("compare-methods-*-[0-9].json")})


def forgetting() -> Numbers:
    """Accuracy in % on the first task after each of ten, mean over seeds, by method."""
    return {
        method: [round(100 * fmean(r.accuracy[i][0] for r in runs(method)), 1) for i in range(10)]
        for method in SMALL_COLOURS
    }


def trade() -> Numbers:
    """Parameters per task and average accuracy in %, by method."""
    shown = {method: runs(method) for method in methods()}
    shown["sidetune, best recipe"] = read_results(RunResult, "best-[0-9].json")
    return {
        method: [
            round(fmean(p for r in group for p in r.parameters)),
            round(100 * fmean(r.matrix.average for r in group), 1),
        ]
        for method, group in shown.items()
    }


def cost() -> Numbers:
    """Seconds per step and memory of training in MB, of question answering, by method."""
    measured = read("squad-cost")["methods"]
    return {method: [round(m["seconds"], 3), round(m["memory_mb"])] for method, m in measured.items()}


# How far a line's name is moved, in points.
LOWER = {"sidetune": 6, "ewc": -7, "psp": 0}


def plot_forgetting(numbers: Numbers, figure: Figure) -> None:
    """A line per method, named at its end."""
    axes, colour = figure.subplots(), colours()
    for method, values in numbers.items():
        paint = colour[SMALL_COLOURS[method]]
        axes.plot(range(1, 11), values, marker="o", color=paint)
        place = (10, LOWER.get(method, 0))
        axes.annotate(method, (10, values[-1]), place, textcoords="offset points", color=paint, va="center")
    axes.axhline(10, color=colour["muted"], lw=1, ls=":")
    axes.annotate("a guess", (1, 10), (0, 4), textcoords="offset points", color=colour["muted"])
    axes.set(xlim=(0.8, 12), ylim=(0, 95), xticks=range(1, 11), xlabel="tasks learned")
    axes.set_title("Accuracy on the first task, %")


# Where a method's name stands beside its point, in points.
PLACES = {"finetune": (10, 2), "features": (10, 0), "ewc": (10, 11), "scratch": (-10, 0), "boosting": (-2, -17)}
PLACES |= {"lora": (10, -4), "sidetune": (-10, 8), "piggyback": (-10, -2), "sidetune, best recipe": (10, 4)}
PLACES["psp"] = (10, -11)


def plot_trade(numbers: Numbers, figure: Figure) -> None:
    """A point per method; side-tuning stands out."""
    from matplotlib.ticker import EngFormatter, NullLocator

    axes, colour = figure.subplots(), colours()
    for method, (parameters, accuracy) in numbers.items():
        ours = method.startswith("sidetune")
        paint = colour["blue" if ours else "muted"]
        axes.plot(parameters, accuracy, "o", color=paint, markersize=9 if ours else 6)
        place = PLACES.get(method, (10, 0))
        side = "left" if place[0] > 0 else "right"
        if method == "boosting":
            side = "center"
        axes.annotate(
            method, (parameters, accuracy), place, textcoords="offset points", color=paint, ha=side, va="center"
        )
    axes.set(xscale="log", xlim=(350, 6e6), ylim=(15, 95), xlabel="parameters kept per task")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("Average accuracy over ten tasks at the end, %")


def plot_cost(numbers: Numbers, figure: Figure) -> None:
    """Two panels of bars: time and memory, as a share of LoRA's."""
    panels, colour = figure.subplots(1, 2, sharey=True), colours()
    names = list(numbers)[::-1]
    for k, (axes, title) in enumerate(zip(panels, ("Time, % of LoRA's", "Memory, % of LoRA's"))):
        shares = [100 * numbers[name][k] / numbers["lora"][k] for name in names]
        paint = [colour["muted" if name in ("lora", "finetune") else "blue"] for name in names]
        axes.barh(names, shares, color=paint, height=0.62)
        for place, share in enumerate(shares):
            axes.annotate(
                "< 1" if share < 1 else f"{share:.0f}", (share, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_title(title)
        axes.set(xlim=(0, 230), xticks=[0, 100, 200])
        axes.grid(False)


# Name of a figure to its numbers, its drawing, and the finding that it shows.
FIGURES: dict[str, tuple[Callable[[], Numbers], Callable[[Numbers, Figure], None], str]] = {
    "forgetting": (forgetting, plot_forgetting, "Side-tuning forgets nothing; fine-tuning forgets the first task"),
    "trade": (trade, plot_trade, "Side-tuning is the most accurate of the small methods"),
    "cost": (cost, plot_cost, "A step of a side on cached features costs a tenth of LoRA's"),
}


def svg(name: str) -> str:
    """One figure as a file, in light colours, or in dark ones where the reader prefers them."""
    make, plot, finding = FIGURES[name]
    numbers = make()

    def drawing(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        plot(numbers, figure)

    light = "".join(f"--{key}:{value};" for key, value in colours().items())
    dark = "".join(f"--{key}:{value};" for key, value in (colours() | DARK).items())
    style = f"svg{{{light}font-family:system-ui,sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    about = f"<desc>{escape(json.dumps(numbers), quote=False)}</desc>"
    head, _, body = str(draw(drawing, "figure", SIZE, finding)).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{about}<style>{style}</style>{body}\n'


def table() -> str:
    """The ten numbers of `docs/results.md`, with their commands and files."""

    def over(values: Sequence[float], decimals: int = 1) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.{decimals}f} ± {error:.{decimals}f}"

    def row(method: str, column: str, scenario: str = "") -> str:
        return number_text(summary_table(runs(method, scenario)).iloc[0][column])

    def forgot(scenario: str) -> str:
        return "; ".join(row(method, "Forgetting, points", scenario) for method in ("sidetune", "finetune"))

    def answers(method: str) -> str:
        return over([r["scores"]["has_answer"] for r in read_all(f"squad-epochs-{method}-[0-9].json")])

    def walks(method: str) -> str:
        return over([100 * r["success"] for r in read_all(f"rl-doom-pointnav-{method}-[0-9].json")])

    images = "`compare icifar --grid methods`", "compare-methods-*"
    dense = "`compare itaskonomy --units range --grid methods`", "compare-itaskonomy-methods-*"
    best = [100 * r.matrix.average for r in read_results(RunResult, "best-[0-9].json")]
    lora, match = (read("squad-cost")["methods"][method] for method in ("lora", "sidetune, match"))
    campaign = read("campaign")
    rows = [
        ("accuracy of side-tuning over ten tasks of CIFAR-100, %", row("sidetune", "Accuracy, %"), *images),
        ("points forgotten there: side-tuning; one fine-tuned network", forgot(""), *images),
        (
            "accuracy of ten fine-tuned networks, with 15 times the parameters, %",
            row("independent", "Accuracy, %"),
            *images,
        ),
        ("accuracy of side-tuning with `--recipe best`, %", over(best), "`icifar --what best`", "best-*"),
        ("points forgotten of twelve dense tasks: the same two", forgot("itaskonomy-"), *dense),
        (
            "time of a step with cached features instead of a base pass, times faster",
            f"{read('cost')['ratios']['live_over_cached']:.1f}",
            "`step-cost`",
            "cost",
        ),
        (
            "time of a step of question answering, % of LoRA's; memory, %",
            f"{100 * match['seconds'] / lora['seconds']:.0f}; {100 * match['memory_mb'] / lora['memory_mb']:.0f}",
            "`squad-cost`",
            "squad-cost",
        ),
        (
            "F1 on questions with an answer, %: side-tuning; LoRA; fine-tuning",
            "; ".join(map(answers, ("sidetune-match", "lora", "finetune"))),
            "`squad`",
            "squad-epochs-*",
        ),
        (
            "success of PPO in unseen levels, %: side-tuning; fixed features; fine-tuning",
            "; ".join(map(walks, ("sidetune", "features", "finetune"))),
            "`rl --env doom-pointnav`",
            "rl-doom-pointnav-*",
        ),
        (
            "files damaged on purpose; wrong answers from them",
            f"{campaign['mutations']['total']:,}; {len(campaign['mutations']['failed'])}",
            "`campaign`",
            "campaign",
        ),
    ]
    lines = ["| what | measured | record | results |", "| --- | ---: | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {what} | {value} | {command} | `{file}.json` |" for what, value, command, file in rows)]
    )


def main() -> None:
    """Write all figures, and print the table."""
    FOLDER.mkdir(exist_ok=True)
    for name in FIGURES:
        (FOLDER / f"{name}.svg").write_text(svg(name), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
