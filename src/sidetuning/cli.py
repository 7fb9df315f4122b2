"""The command line: `sidetuning <command>`, made from the dataclasses of the scenarios."""

from __future__ import annotations

import errno
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sidetuning import __version__
from sidetuning.errors import SideTuningError
from sidetuning.scenarios import (
    answer,
    collect,
    compare,
    demo,
    icifar,
    imitation,
    itaskonomy,
    play,
    predict,
    pretrain,
    render_doom,
    report_runs,
    rl,
    squad,
    transfer,
)

SCENARIOS = (
    icifar,
    itaskonomy,
    transfer,
    compare,
    predict,
    pretrain,
    render_doom,
    collect,
    imitation,
    rl,
    play,
    squad,
    answer,
    report_runs,
    demo,
)
INTERRUPTED = 130  # what shells expect of a program ended by Ctrl-C


@dataclass(frozen=True)
class Parts:
    """List the registered bases, sides, merges and heads."""


Command = (
    Annotated[icifar.Settings, tyro.conf.subcommand("icifar")]
    | Annotated[itaskonomy.Settings, tyro.conf.subcommand("itaskonomy")]
    | Annotated[compare.Settings, tyro.conf.subcommand("compare")]
    | Annotated[transfer.Settings, tyro.conf.subcommand("transfer")]
    | Annotated[predict.Settings, tyro.conf.subcommand("predict")]
    | Annotated[pretrain.Settings, tyro.conf.subcommand("pretrain")]
    | Annotated[render_doom.Settings, tyro.conf.subcommand("render-doom")]
    | Annotated[collect.Settings, tyro.conf.subcommand("collect-trajectories")]
    | Annotated[imitation.Settings, tyro.conf.subcommand("imitation")]
    | Annotated[rl.Settings, tyro.conf.subcommand("rl")]
    | Annotated[play.Settings, tyro.conf.subcommand("play")]
    | Annotated[squad.Settings, tyro.conf.subcommand("squad")]
    | Annotated[answer.Settings, tyro.conf.subcommand("answer")]
    | Annotated[report_runs.Settings, tyro.conf.subcommand("report")]
    | Annotated[demo.Settings, tyro.conf.subcommand("demo")]
    | Annotated[Parts, tyro.conf.subcommand("parts")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error that the user can mend is one sentence and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--version"], ["-V"]):
        print(f"sidetuning {__version__}")
        return
    settings: Any = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="sidetuning",
        description="Give a frozen pretrained network new skills, a small side network at a time.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    warnings.filterwarnings("ignore", category=UserWarning, module="accelerate")
    try:
        run(settings)
    except KeyboardInterrupt:
        sys.exit(fail("stopped; what was learned is kept, and the same command goes on from there", INTERRUPTED))
    except SideTuningError as error:
        sys.exit(fail(str(error)))
    except ImportError as error:
        sys.exit(fail(str(error)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(fail("the disk is full; free some space and run the same command again: it goes on from there"))
        sys.exit(fail(str(error)))


def run(settings: Any) -> None:
    """Dispatch on the dataclass that the arguments made."""
    for scenario in SCENARIOS:
        if isinstance(settings, scenario.Settings):
            scenario.main(settings)
            return
    from sidetuning import BASES, HEADS, MERGES, SIDES
    from sidetuning.methods import METHODS

    for registry in (BASES, SIDES, MERGES, HEADS, METHODS):
        print(f"{registry.kind}: {', '.join(registry.names())}")
    print("more bases: timm:NAME, hf:NAME_OR_FOLDER, onnx:PATH")


def fail(message: str, code: int = 1) -> int:
    """Print an error and give the exit code."""
    print(f"sidetuning: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
