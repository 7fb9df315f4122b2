"""`python -m sidetuning_bench …` is `sidetuning bench …`."""

from __future__ import annotations

import sys

from sidetuning import cli


def main(arguments: list[str] | None = None) -> None:
    """Run one command of the bench."""
    cli.main(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
