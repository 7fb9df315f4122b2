"""The command line, `sidetuning <command>`: its own commands, and those that other packages add."""

from __future__ import annotations

import errno
import importlib
import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, NamedTuple, TextIO, Union

from sidetuning import __version__
from sidetuning.errors import DataWarning, SideTuningError
from sidetuning.registry import unknown
from sidetuning.terminal import say

# What shells expect of a program that was called wrongly, or was ended by Ctrl-C or by a reader that has ended.
USAGE, INTERRUPTED, UNREAD = 2, 130, 141
# Packages name their commands in this entry-point group; each is called with the arguments that follow its name.
GROUP = "sidetuning.commands"


class Command(NamedTuple):
    """A line of the help text.

    Attributes:
        group: the heading that it stands under.
        summary: what it does, in a phrase.
        example: the arguments of an example.
    """

    group: str
    summary: str
    example: str


DATA, MODELS, BENCH = "Your data", "Models", "Bench"
# Each is `Settings` and `main` of the module of its name in `sidetuning.commands`, imported when it is asked for.
COMMANDS = {
    "train": Command(DATA, "Learn a task from a folder or a table.", "photos/ --base NAME --task pets --out my-model"),
    "evaluate": Command(DATA, "Score a task on data whose answers are known.", "my-model holdout/ --task pets"),
    "predict": Command(DATA, "Ask every task about images or texts.", "my-model cat.jpg dog.jpg"),
    "serve": Command(DATA, "Answer questions over HTTP, with a page to try.", "my-model --port 8000"),
    "list": Command(MODELS, "List the tasks of a model folder.", "my-model"),
    "info": Command(MODELS, "Show the base and the tasks of a model folder.", "my-model --task pets"),
    "rename": Command(MODELS, "Rename a task.", "my-model pets animals"),
    "remove": Command(MODELS, "Remove a task.", "my-model pets"),
    "export": Command(MODELS, "Write a model as ONNX or torch.export graphs.", "my-model --format onnx --out graphs"),
    "push": Command(MODELS, "Upload a model or a task to the Hub.", "my-model you/pets --licence mit"),
    "pull": Command(MODELS, "Download a model or a task from the Hub.", "you/pets --out my-model"),
    "parts": Command(MODELS, "List what models can be made of.", ""),
}
ABOUT = "Give a frozen pretrained network new skills, a small side network at a time."
CONFIG = ("OmitArgPrefixes", "OmitSubcommandPrefixes", "FlagCreatePairsOff")


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can mend is one sentence on standard error and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    guarded(lambda: run(arguments))


def run(arguments: list[str]) -> None:
    """Run the command that the first argument names."""
    first, rest = (arguments[0] if arguments else ""), arguments[1:]
    added = added_commands()
    if first in ("--version", "-V"):
        say(f"sidetuning {__version__}")
    elif first in ("--help", "-h", "help", ""):
        say(help_text(added), error=not first)
        # Whoever names no command is told what there is, and a script that it went wrong.
        sys.exit(0 if first else USAGE)
    elif first in added:
        added[first].load()(rest)
    elif first in COMMANDS or first.startswith("--tyro-"):
        own_command(first, arguments)
    else:
        say(f"sidetuning: {unknown('command', first, [*COMMANDS, *added], verb='known')}", error=True)
        sys.exit(USAGE)


def added_commands() -> dict[str, EntryPoint]:
    """The commands of other installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def help_text(added: dict[str, EntryPoint]) -> str:
    """All commands by group, without importing any."""
    lines = [ABOUT, "", "usage: sidetuning COMMAND [ARGUMENTS]"]
    listed = {**COMMANDS, **{name: Command(BENCH, summary_of(entry), "") for name, entry in added.items()}}
    for group in dict.fromkeys(command.group for command in listed.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:9} {command.summary}" for name, command in listed.items() if command.group == group]
    lines += ["", "sidetuning COMMAND --help    options of a command, with an example"]
    lines += ["sidetuning --version         version of the library"]
    lines += ["sidetuning --tyro-write-completion bash FILE    completion for bash (also zsh, tcsh), to be sourced"]
    return "\n".join(lines)


def summary_of(entry: EntryPoint) -> str:
    """What the package of a command says of itself."""
    return f"{(entry.dist.metadata['Summary'] if entry.dist else '') or 'Commands of another package'}."


def own_command(name: str, arguments: list[str]) -> None:
    """Parse and run one of the library's own commands, or write the completion of all."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the command line needs more packages: pip install 'sidetuning[cli]'") from error
    config = tuple(getattr(tyro.conf, marker) for marker in CONFIG)
    if name not in COMMANDS:
        kinds = tuple(Annotated[module(command).Settings, tyro.conf.subcommand(command)] for command in COMMANDS)
        every: Any = Union[kinds]  # noqa: UP007
        tyro.cli(every, prog="sidetuning", args=arguments, config=config)
        return
    command, settings = module(name), module(name).Settings
    example = f"example: sidetuning {name} {COMMANDS[name].example}".rstrip()
    description = f"{inspect.cleandoc(settings.__doc__ or COMMANDS[name].summary)}\n\n{example}"
    command.main(
        tyro.cli(settings, prog=f"sidetuning {name}", description=description, args=arguments[1:], config=config)
    )


def module(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"sidetuning.commands.{name}")


def guarded(command: Callable[[], None]) -> None:
    """Run a command; print an error's message alone, and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Not every terminal has every character.
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="accelerate")
            warnings.showwarning = show_warning
            command()
    except KeyboardInterrupt as stop:
        code = getattr(stop, "code", INTERRUPTED)
        sys.exit(fail("stopped; what was learned is saved, and the same command resumes from there", code))
    except (SideTuningError, ImportError) as error:
        sys.exit(fail(str(error)))
    except BrokenPipeError:
        # `| head` has seen enough. Python would try to write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(fail("the disk is full; free some space and run the same command again: it resumes from there"))
        sys.exit(fail(str(error)))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print what was left out of data without the line of code that says so, and other warnings as Python does."""
    data = issubclass(category, DataWarning)
    say(
        f"note: {message}" if data else warnings.formatwarning(message, category, filename, lineno).rstrip(), error=True
    )


def fail(message: str, code: int = 1) -> int:
    """Print an error and return the exit code."""
    say(f"sidetuning: {message}", error=True)
    return code


if __name__ == "__main__":
    main()
