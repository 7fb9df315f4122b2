"""Share models and tasks on the Hugging Face Hub: two files a task and a card, no pickle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from sidetuning.artifacts import CONFIG, TENSORS, write_files
from sidetuning.errors import ArtifactError, TaskError, UnknownNameError
from sidetuning.files import held_folder, write_text
from sidetuning.folder import problem_of, saved_tasks, task_folders, task_root
from sidetuning.registry import unknown

CARD = """
# {title}

{about} learned by [side-tuning](https://arxiv.org/abs/1912.13503): a frozen base, and a side, a merge and a head per
task, which fit in the {size:.2f} MB of this repository. The base is not part of it and was not changed.

Base: `{base}` (sha256 `{sha256}`…)

{tasks}
```python
import sidetuning as st

{code}
{ask}
```
"""


def push(
    path: str | Path,
    repo: str,
    *,
    task: str | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    licence: str | None = None,
) -> str:
    """Upload a model folder or a task to the Hub, with a model card made from what the files say.

    Args:
        path: a model folder, or a task's folder.
        repo: "user/name"; made where it does not exist.
        task: the only task of a model folder to upload, by its name.
        private: whether a new repository is private.
        token: by default the one that `hf auth login` left.
        revision: branch to upload to; made where it does not exist.
        subfolder: folder of the repository to upload to.
        licence: licence of the tasks, as the Hub names it ("mit", "cc-by-4.0").

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: no whole task at `path`, one that names a path of this machine, or the Hub refused.
        TaskError: a single task that reads the sides of others.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    inner = checked_subfolder(subfolder)
    single = task is not None or (Path(path) / CONFIG).exists()
    # Only what was checked is sent, wherever a link may point.
    found = saved_tasks(path)
    chosen = {name: saved for name, (_, saved) in found.items() if task in (None, name)}
    if not chosen:
        raise UnknownNameError(unknown("task", str(task), found, verb=f"in {path}"))
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        configs = []
        for name, (config, tensors) in chosen.items():
            if single:
                alone(config)
            configs.append(config)
            write_files(Path(folder) if single else Path(folder, "tasks", name), without_paths(config), tensors)
        size = sum(file.stat().st_size for file in Path(folder).rglob(TENSORS))
        write_text(Path(folder) / "README.md", model_card(configs, repo, size, revision, inner, licence))
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"sidetuning {', '.join(chosen)}",
                revision=revision,
                path_in_repo=inner,
                # What was pushed in the other form would be read first, or hidden.
                delete_patterns=["tasks/*"] if single else [CONFIG, TENSORS],
            )
        except (HfHubHTTPError, OSError) as error:
            raise ArtifactError(
                f"the Hub did not take {repo} ({error}); check the name, the network and `hf auth login`"
            ) from error
    return f"https://huggingface.co/{repo}"


def pull(
    repo: str,
    *,
    task: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Download a model or a task from the Hub (once; then from the Hub's cache) and return its folder, for `load`.

    Args:
        repo: "user/name".
        task: the only task of a model to download, by its name.
        revision: branch, tag or commit.
        token: access token of the Hub, for private repositories.
        subfolder: folder of the repository that holds it.

    Raises:
        ArtifactError: no such repository, no task in it, or no network.
        TaskError: a single task that reads the sides of others.
    """
    from huggingface_hub import snapshot_download

    inner = checked_subfolder(subfolder)
    # A repository of one task has it at the top.
    places = ["", *([f"tasks/{task}/"] if task else ["tasks/*/"])]
    files = [f"{inner}/{name}" if inner else name for place in places for name in (place + CONFIG, place + TENSORS)]
    files.append(f"{inner}/README.md" if inner else "README.md")
    try:
        folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=files)) / (inner or "")
    except Exception as error:
        # The Hub client's errors are of many kinds, and all mean that there is no file.
        raise ArtifactError(
            f"{repo} could not be read from the Hub ({type(error).__name__}: {error}); check name and network"
        ) from error
    if not (folder / CONFIG).exists() and not task_folders(folder):
        asked = f"{repo}/{inner}" if inner else repo
        raise ArtifactError(f"{asked} holds no task of sidetuning; check subfolder and revision")
    found = saved_tasks(folder)
    if task is None:
        return folder
    if task not in found:
        raise UnknownNameError(unknown("task", task, found, verb=f"in {repo}"))
    chosen, (config, _) = found[task]
    alone(config)
    return chosen


def checked_subfolder(subfolder: str | None) -> str | None:
    """A folder of a repository, without slashes at its ends."""
    parts = (subfolder or "").strip("/").split("/")
    if subfolder is not None and any(part in ("", ".", "..") or set(part) & set("*?[\\") for part in parts):
        raise ArtifactError(f"'{subfolder}' is no folder of a repository; give a name such as models/pets")
    return None if subfolder is None else "/".join(parts)


def alone(config: dict[str, Any]) -> None:
    """Raise TaskError where a task cannot be used without others."""
    if laterals := config["parts"].get("laterals"):
        raise TaskError(
            f"task '{config['task']}' reads the side of {', '.join(laterals)} and is of no use alone; take the whole "
            "model folder"
        )


def copy_tasks(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tasks at `source` into a model folder; returns their names.

    Raises:
        ArtifactError: the folder holds tasks of another base, or another process works in it.
        TaskError: it holds a task of the same name.
    """
    new, target = saved_tasks(source), Path(target)
    if (target / CONFIG).exists():
        raise ArtifactError(f"{target} is the folder of one task; give a model folder, or a new one")
    with held_folder(target):
        here = saved_tasks(target) if task_folders(target) else {}
        if taken := [name for name in new if name in here]:
            raise TaskError(
                f"task '{taken[0]}' exists already in {target}; rename or remove it, or give another folder"
            )
        bases = {config["base"]["sha256"] for _, (config, _) in [*here.values(), *new.values()]}
        if len(bases) > 1:
            raise ArtifactError(f"the tasks of {target} have another base than {', '.join(new)}; give another folder")
        root = task_root(target) if here else target / "tasks"
        for name, (_, (config, tensors)) in new.items():
            write_files(root / name, config, tensors)
    return list(new)


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


def model_card(
    configs: Sequence[dict[str, Any]],
    repo: str,
    size: int,
    revision: str | None = None,
    subfolder: str | None = None,
    licence: str | None = None,
) -> str:
    """The card: YAML that the Hub reads, then what the tasks are made of and how to load them.

    Args:
        configs: the texts of the tasks.
        repo: "user/name".
        size: bytes of the tensors.
        revision, subfolder, licence: those of `push`.
    """
    from huggingface_hub import ModelCardData

    base = configs[0]["base"]
    spec = base.get("spec") or {"name": "", "options": {}}
    public = without_paths(configs[0])["base"].get("spec")
    names = [config["task"] for config in configs]
    data = ModelCardData(
        library_name="sidetuning",
        tags=["side-tuning"],
        base_model=on_the_hub(public["name"]) if public else None,
        license=licence,
        pipeline_tag=PIPELINES.get((reads(configs[0]), problem_of(configs[0]))),
        metrics=sorted({key for config in configs for key in config.get("metrics") or {}}) or None,
    )
    given = {"revision": revision, "subfolder": subfolder}
    options = "".join(f", {key}={value!r}" for key, value in given.items() if value is not None)
    code = f'model = st.load(st.pull("{repo}"{options}))'
    if not public:
        code = f'{own_base(spec)}\nmodel = st.load(st.pull("{repo}"{options}), base=base)'
    return f"---\n{data.to_yaml()}\n---\n" + CARD.format(
        title=", ".join(names),
        about="A task" if len(names) == 1 else f"{len(names)} tasks",
        size=size / 1e6,
        base=public["name"] if public else "a base of your own",
        sha256=base["sha256"][:12],
        tasks="\n".join(map(task_table, configs)),
        code=code,
        ask=asking(configs[0]),
    )


# What the Hub calls a model, by what it reads and what its targets mean.
PIPELINES = {
    ("image", "classes"): "image-classification",
    ("image", "labels"): "image-classification",
    ("text", "classes"): "text-classification",
    ("text", "labels"): "text-classification",
    ("text", "tokens"): "token-classification",
    ("text", "next"): "text-generation",
}


def reads(config: Mapping[str, Any]) -> str:
    """What a task is asked with: "image", "text" or "" for tensors."""
    return str((config.get("transform") or {}).get("kind", ""))


def asking(config: Mapping[str, Any]) -> str:
    """The line of code that asks a task."""
    source = {"image": '"photo.jpg"', "text": '"a text"'}.get(reads(config))
    task = config["task"]
    if problem_of(config) == "next":
        return f'text = model.generate("a text", "{task}", max_new_tokens=40)'
    return f'y = model(x, "{task}")' if source is None else f'answers = model.predict({source})["{task}"]'


def on_the_hub(name: str) -> str | None:
    """The repository that holds a base, where its name tells."""
    scheme, _, model = name.partition(":")
    if scheme == "timm" and ":" not in model:
        # Without a tag, which weights they are depends on the version of timm.
        return f"timm/{model}" if "." in model else None
    return model if scheme == "hf" else None


def own_base(spec: Mapping[str, Any]) -> str:
    """The line of code that builds a base whose files are not published."""
    scheme, _, name = spec["name"].partition(":")
    options = {key: value for key, value in spec["options"].items() if not paths_in(value) and key != "weights"}
    shown = "".join(f", {key}={value!r}" for key, value in options.items() if key != "example" and value is not None)
    if "weights" in spec["options"] and not paths_in([name]):
        return f'base = st.load_base("{spec["name"]}", weights="weights.safetensors"{shown})  # the file of its weights'
    if scheme in ("hf", "onnx"):
        file = "folder-of-the-model" if scheme == "hf" else "model.onnx"
        return f'base = st.load_base("{scheme}:{file}"{shown})  # the path of the base'
    return "base = st.Base(network, example=x)  # the network that the tasks were trained on"


def task_table(config: Mapping[str, Any]) -> str:
    """The section of a task: its parts, metrics and labels."""
    parts, labels = config["parts"], config.get("labels")
    rows = {kind: f"`{parts[kind][0]}`" for kind in ("side", "merge", "head") if parts.get(kind)}
    rows |= {"reads the side of": ", ".join(parts["laterals"])} if parts.get("laterals") else {}
    metrics = (config.get("metrics") or {}).items()
    rows |= {key: f"{value:.4g}" if isinstance(value, (int, float)) else str(value) for key, value in metrics}
    if labels:
        shown = ", ".join(label.replace("|", "\\|").replace("\n", " ") for label in labels[:100])
        rows["labels"] = shown + (f" and {len(labels) - 100} more" if len(labels) > 100 else "")
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return f"## {config['task']}\n\n| | |\n|---|---|\n{lines}"
