"""Share tasks on the Hugging Face Hub: two files and a card, no pickle."""

from __future__ import annotations

import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any

from sidetuning.artifacts import CONFIG, TENSORS, read_task, write_files
from sidetuning.errors import ArtifactError
from sidetuning.files import write_text

CARD = """
# {task}

A task learned by [side-tuning](https://arxiv.org/abs/1912.13503): a frozen base, and a side, a merge and a head that
fit in the {size:.2f} MB of this repository. The base is not part of it and was not changed.

| | |
|---|---|
| base | `{base}` (sha256 `{sha256}`…) |
| side | `{side}` |
| merge | `{merge}` |
| head | `{head}` |
{metrics}
```python
import sidetuning as st

model = st.load(st.pull("{repo}"))
y = model(x, "{task}")
```
"""


def push(path: str | Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the task saved at `path` to the Hub, with a model card made from its `side.json`.

    Args:
        path: a task's folder.
        repo: "user/name"; made where it does not exist.
        private: whether a new repository is private.
        token: by default the one that `hf auth login` left.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: no whole task at `path`, one that names a path of this machine, or the Hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Only what was checked is sent, wherever a link may point.
    config, tensors = read_task(path)
    config = without_paths(config)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, config, tensors)
        size = (Path(folder) / TENSORS).stat().st_size
        write_text(Path(folder) / "README.md", model_card(config, repo, size))
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"sidetuning task {config['task']}")
        except (HfHubHTTPError, OSError) as error:
            raise ArtifactError(
                f"the Hub did not take {repo} ({error}); check the name, the network and `hf auth login`"
            ) from error
    return f"https://huggingface.co/{repo}"


def pull(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a task from the Hub (once; then from the Hub's cache) and return its folder, for `load` and `load_task`.

    Args:
        repo: "user/name".
        revision: branch, tag or commit.
        token: access token of the Hub, for private repositories.

    Raises:
        ArtifactError: no such repository, no task in it, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG, TENSORS, "README.md"]
        folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=files))
    except Exception as error:
        # The Hub client's errors are of many kinds, and all mean that there is no file.
        raise ArtifactError(
            f"{repo} could not be read from the Hub ({type(error).__name__}: {error}); check name and network"
        ) from error
    read_task(folder)
    return folder


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """`side.json` for others, for whom a base that was read from files of this machine is a base of one's own.

    Raises:
        ArtifactError: a path of this machine elsewhere, such as in an option of a part.
    """
    spec = config["base"].get("spec") or {"name": "", "options": {}}
    scheme, _, name = spec["name"].partition(":")
    # A name on the Hub has one slash at most; what an ONNX base names is always a file.
    local = scheme == "onnx" or name.count("/") > 1 or bool(name and Path(name).exists()) or paths_in([name, spec])
    config = {**config, "base": {**config["base"], "spec": None}} if local else config
    # A label is any text.
    if paths := paths_in({key: value for key, value in config.items() if key != "labels"}):
        raise ArtifactError(f"the task names {paths[0]}, a path of this machine, which is not published; leave it out")
    return config


def paths_in(value: Any) -> list[str]:
    """All texts in a value of JSON that are absolute paths, of any system, or lead out of a folder."""
    if isinstance(value, (dict, list, tuple)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return [path for item in inner for path in paths_in(item)]
    text = value if isinstance(value, str) else ""
    absolute = Path(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return [text] if absolute or text.startswith(("~/", "./", "../", "file:")) else []


def model_card(config: dict[str, Any], repo: str, size: int) -> str:
    """The card: YAML that the Hub reads, then what the task is made of and how to load it."""
    from huggingface_hub import ModelCardData

    base, parts = config["base"], config["parts"]
    name = base["spec"]["name"] if base.get("spec") else "a base of your own"
    on_hub = name.removeprefix("hf:") if name.startswith("hf:") else None
    data = ModelCardData(library_name="sidetuning", tags=["side-tuning"], base_model=on_hub)
    shown = {kind: "none" if parts.get(kind) is None else parts[kind][0] for kind in ("side", "merge", "head")}
    shown |= {"task": config["task"], "base": name, "sha256": base["sha256"][:12], "repo": repo}
    shown["metrics"] = "".join(f"| {key} | {value:.4g} |\n" for key, value in config.get("metrics", {}).items())
    body = CARD.format(size=size / 1e6, **shown)
    return f"---\n{data.to_yaml()}\n---\n{body}"
