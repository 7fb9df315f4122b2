"""Data sets by path or by name on the Hub."""

from __future__ import annotations

from pathlib import Path

from sidetuning.errors import DataError


def local_folder(source: str | Path, example: str) -> Path:
    """The path where it exists, else a cached snapshot of the Hub's data set of that name: its parquet files.

    Raises:
        DataError: neither; `example` is named as one that exists on the Hub.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DataError(f"{name} does not exist; give the folder of a data set or a Hub name such as {example}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # no network, no such data set, no access: all mean that there is no data
        raise DataError(
            f"{name} is no folder here and could not be read from the Hub ({type(error).__name__}); "
            "check the name and the network, or give the path of a local copy"
        ) from error
