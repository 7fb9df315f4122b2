"""`sidetuning bench <command>`: the scenarios, made from their dataclasses of settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sidetuning.terminal import say
from sidetuning_bench import compare, demo, icifar, report_runs
from sidetuning_bench.agents import collect, imitation, play, rl
from sidetuning_bench.dense import itaskonomy, render_doom, transfer
from sidetuning_bench.language import answer, squad
from sidetuning_bench.methods import METHODS


@dataclass(frozen=True)
class Methods:
    """List the methods that can be compared."""


Command = (
    Annotated[icifar.Settings, tyro.conf.subcommand("icifar")]
    | Annotated[itaskonomy.Settings, tyro.conf.subcommand("itaskonomy")]
    | Annotated[compare.Settings, tyro.conf.subcommand("compare")]
    | Annotated[transfer.Settings, tyro.conf.subcommand("transfer")]
    | Annotated[render_doom.Settings, tyro.conf.subcommand("render-doom")]
    | Annotated[collect.Settings, tyro.conf.subcommand("collect-trajectories")]
    | Annotated[imitation.Settings, tyro.conf.subcommand("imitation")]
    | Annotated[rl.Settings, tyro.conf.subcommand("rl")]
    | Annotated[play.Settings, tyro.conf.subcommand("play")]
    | Annotated[squad.Settings, tyro.conf.subcommand("squad")]
    | Annotated[answer.Settings, tyro.conf.subcommand("answer")]
    | Annotated[report_runs.Settings, tyro.conf.subcommand("report")]
    | Annotated[demo.Settings, tyro.conf.subcommand("demo")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
)


def main(arguments: list[str]) -> None:
    """Parse the arguments and run the scenario that they name."""
    settings: Any = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="sidetuning bench",
        description="Run the side-tuning paper's experiments, and compare methods.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
    )
    if isinstance(settings, Methods):
        say(f"method: {', '.join(METHODS.names())}")
    else:
        sys.modules[type(settings).__module__].main(settings)
