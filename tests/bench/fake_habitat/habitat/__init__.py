"""A stand-in for habitat-lab with the interface that the adapter uses: one corridor, walked in steps of a quarter of a metre."""

from pathlib import Path


def get_config(path, overrides=()):
    if not Path(path).exists():
        raise FileNotFoundError(path)
    return {"path": path, "overrides": list(overrides)}
