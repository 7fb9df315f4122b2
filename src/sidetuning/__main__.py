"""`python -m sidetuning …` is `sidetuning …`."""

from __future__ import annotations

from sidetuning.cli import main

if __name__ == "__main__":
    main()
