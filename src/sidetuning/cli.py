"""The command line, `sidetuning <command>`: its own commands, and those that other packages add."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, TextIO

from sidetuning import __version__
from sidetuning.errors import DataWarning, SideTuningError
from sidetuning.terminal import say

# What shells expect of a program ended by Ctrl-C.
INTERRUPTED = 130
# Packages name their commands in this entry-point group; each is called with the arguments that follow its name.
GROUP = "sidetuning.commands"


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can mend is one sentence on standard error and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--version"], ["-V"]):
        say(f"sidetuning {__version__}")
        return
    added = added_commands()
    if arguments and arguments[0] in added:
        guarded(lambda: added[arguments[0]].load()(arguments[1:]))
    else:
        guarded(lambda: own_command(arguments, added))


def added_commands() -> dict[str, EntryPoint]:
    """The commands of other installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def own_command(arguments: list[str], added: dict[str, EntryPoint]) -> None:
    """Parse and run one of the library's own commands."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the command line needs more packages: pip install 'sidetuning[cli]'") from error
    from sidetuning.commands import parts, predict

    command = (
        Annotated[predict.Settings, tyro.conf.subcommand("predict")]
        | Annotated[parts.Settings, tyro.conf.subcommand("parts")]
    )
    more = f" More commands: {', '.join(f'sidetuning {name}' for name in sorted(added))}." if added else ""
    settings: Any = tyro.cli(
        command,  # type: ignore[arg-type]
        prog="sidetuning",
        description="Give a frozen pretrained network new skills, a small side network at a time." + more,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    sys.modules[type(settings).__module__].main(settings)


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
        # Python would try to write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(fail("the program that was to read this output has ended; start both again"))
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
