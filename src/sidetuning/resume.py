"""The state of a training run on disk, checked before it is believed.

The file is a safetensors file whose header holds the rest as JSON, with a checksum over all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from sidetuning.content import content_sha256, structure_sha256, tensor_bytes
from sidetuning.errors import TrainingError
from sidetuning.files import atomic_write, read_safetensors, safetensors_header
from sidetuning.inputs import PLAIN
from sidetuning.reach import EMPTY, code_bytes, globals_of, names_in
from sidetuning.seeding import Generators, seeded
from sidetuning.sides.initialise import mismatch

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass
class Position:
    """Where a run is, and what it is a run of: everything but the weights, the optimiser and the generators.

    Times are in seconds. `stopped` says that a callback ended it. Older files do not hold the last ten values.
    """

    seed: int
    steps: int
    label: str = ""
    optimizer: str = ""
    seconds: float = 0.0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    clip: str = ""
    batches: str = ""
    data: str = ""
    stopped: bool = False
    settings: str = ""
    kept: str = ""
    features: str = ""
    network: str = ""
    loss_sha256: str = ""
    schedule_sha256: str = ""


# What must be the same for a run to go on, and how it is called.
SAME = {
    "label": "the state",
    "optimizer": "the state",
    "clip": "a run with the gradient's largest norm",
    "batches": "a run with batches",
    "data": "a run on data with the hash",
    "features": "a run on features with the hash",
    "settings": "a run with the settings",
    "kept": "a run that keeps",
    "network": "a run on a base, parts and laterals with the hash",
    "loss_sha256": "a run with the loss",
    "schedule_sha256": "a run with the schedule",
}


# Settings of an optimiser that have a text of their own.
TOLD = ("params", "lr", "initial_lr")
# What a schedule holds of where it is.
MOVING = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "optimizer", "_step_count", "_last_lr"}


def description(
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    clip: float | None,
    loss: Any,
    loader: Iterable[Any],
    precision: str = "no",
) -> dict[str, str]:
    """What a run is a run of, as texts."""
    rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in optimizer.param_groups)
    how = f"{type(optimizer).__name__} at {rates}" + (f" with {type(scheduler).__name__}" if scheduler else "")
    decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
    texts = {"optimizer": how + (f", weight decay {decay:g}" if decay else ""), "clip": str(clip)}
    groups = [{k: v for k, v in group.items() if k not in TOLD} for group in optimizer.param_groups]
    texts["settings"] = _settled([*groups, f"precision {precision}"])
    texts["loss_sha256"], texts["schedule_sha256"] = _told(loss), _told(scheduler)
    sampler = getattr(loader, "batch_sampler", None)
    rows = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    data = getattr(loader, "dataset", loader)
    texts["batches"] = f"{rows} rows" if rows else ""
    texts["data"] = _samples_sha256(data)
    if (gives := getattr(loader, "gives", None) or getattr(loader, "collate_fn", None)) and _are_numbers(data):
        # Its samples are numbers of rows, which its function reads.
        texts["features"] = _samples_sha256(data, gives)
    return texts


def _are_numbers(data: Any) -> bool:
    return isinstance(data, range) or (isinstance(data, list) and all(isinstance(row, int) for row in data[:8]))


def _told(value: Any) -> str:
    """The name and the hash of a loss or a schedule."""
    inner = value.func if isinstance(value, partial) else value
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{name} {content_sha256(_still(value, set()))[:16]}"


def _still(value: Any, met: set[int]) -> Any:
    """What a loss or a schedule is, without what training moves: weights, and what a function writes itself."""
    value, read = None if id(value) in met else value, dict[str, Any]()
    if isinstance(value, MethodType):
        value, read = value.__func__, {"self": value.__self__}
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    if isinstance(value, LRScheduler):
        value = {key: inner for key, inner in vars(value).items() if key not in MOVING}
    if isinstance(value, nn.Module):
        held = [tensor for tensor in (*value.parameters(), *value.buffers()) if not tensor.requires_grad]
        return [structure_sha256(value, [value]), held]
    if isinstance(value, FunctionType):
        met.add(id(value))
        code, cells = value.__code__, dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        free = cells.keys() - names_in(code, "STORE_DEREF")
        read |= {key: cells[key].cell_contents for key in free if cells[key] != EMPTY} | globals_of(value)
        read = {key: _named(inner, names_in(code)) for key, inner in read.items() if not _learns(inner)}
        return [code_bytes(code), _still([value.__defaults__, value.__kwdefaults__, read], met)]
    if isinstance(value, (list, tuple)):
        return [_still(inner, met) for inner in value]
    return {key: _still(inner, met) for key, inner in value.items()} if isinstance(value, dict) else value


def _named(value: Any, names: Collection[str]) -> Any:
    """Of an object, such as a log or arguments, what a function names; other values as they are."""
    if callable(value) or isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return value
    return {key: inner for key, inner in vars(value).items() if key in names and not _learns(inner)}


def _learns(value: Any) -> bool:
    """Whether a value is a model that learns, and that another process draws anew."""
    return isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters())


def _settled(value: Any) -> str:
    """A setting as a text that is the same in every process."""
    if isinstance(value, dict):
        return str({str(key): _settled(inner) for key, inner in sorted(value.items(), key=str)})
    return str([_settled(inner) for inner in value]) if isinstance(value, (list, tuple)) else str(value)


def _samples_sha256(data: Any, read: Any = None) -> str:
    """sha256 over how many samples there are and eight of them, as `read` gives them where they are numbers of rows.

    Empty where they cannot be asked for by number.
    """
    try:
        count = len(data)
        digest = hashlib.sha256(str(count).encode())
        for i in sorted({round(k * (count - 1) / 7) for k in range(8)}) if count else ():
            many, reads = getattr(data, "__getitems__", None), []
            for _ in range(2):
                with seeded(0):
                    one = hashlib.sha256()
                    _add(one, read([data[i]]) if read is not None else many([i]) if many is not None else data[i])
                    reads.append(one.digest())
            if reads[0] != reads[1]:
                return ""
            digest.update(reads[0])
    except Exception:
        # A data set of somebody's own may fail in any way, and is read again in training.
        return ""
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor).numpy().data)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    elif isinstance(value, PLAIN):
        digest.update(repr(value).encode())


class State:
    """Everything that the rest of a run depends on; read from `path` where an interrupted call left it.

    Raises:
        TrainingError: the file cannot be read, or holds the state of another run; nothing is changed then.
    """

    def __init__(
        self,
        path: Path | None,
        position: Position,
        objective: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.path, self.position, self.objective = path, position, objective
        self.optimizer, self.scheduler = optimizer, scheduler
        # The states of the generators where the run was interrupted, until they are set.
        self._generators: dict[str, Any] | None = None
        if path is not None and _is_there(path):
            self._restore(path)

    def save(self) -> None:
        """Write it to `path`, if there is one."""
        if self.path is None:
            return
        content = {
            "position": asdict(self.position),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": _generators(),
        }
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(_pack(content))

    def _restore(self, path: Path) -> None:
        mend = "give another resume file, or delete this one to start over"
        try:
            # Version 0.1.0 wrote them with torch.save.
            old = zipfile.is_zipfile(path) if path.is_file() else False
            content = _unzip(path) if old else _unpack(read_safetensors(path))
            found, own = content["position"], self.position
            weights = {re.sub("^branch[.]", "part.", key): value for key, value in content["objective"].items()}
            at = (found["seed"], found["steps"])
        except Exception as error:
            raise TrainingError(f"{path} cannot be read as a resume file ({error}); delete it to start over") from error
        if at != (own.seed, own.steps):
            raise TrainingError(
                f"{path} belongs to a run of {at[1]} steps with seed {at[0]}, this one has "
                f"{own.steps} steps and seed {own.seed}; {mend}"
            )
        for name, what in SAME.items():
            before, now = found.get(name, ""), getattr(own, name)
            if before != now and (name in ("label", "optimizer") or (before and now)):
                raise TrainingError(f"{path} holds {what} of {before or 'something else'}, not of {now}; {mend}")
        if problem := mismatch(self.objective.state_dict(), weights):
            raise TrainingError(f"{path} holds the weights of another network ({problem}); {mend}")
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise TrainingError(f"{path} holds the state of other parameters ({error}); {mend}") from error
        self.objective.load_state_dict(weights)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        texts = {name: getattr(own, name) for name in SAME}
        vars(own).update({**found, **texts})
        self._generators = content["rng"]

    def set_generators(self) -> None:
        """Draw on where the interrupted call stopped; nothing where there was none."""
        states, self._generators = self._generators, None
        if states is None:
            return
        numpy, (version, numbers, gauss) = states["numpy"], states["python"]
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        saved = Generators()
        saved.python, saved.numpy = (version, tuple(numbers), gauss), {**numpy, "state": {**numpy["state"], "key": key}}
        saved.torch, saved.cuda = states["torch"], states["cuda"]
        saved.set()


def _is_there(path: Path) -> bool:
    """Whether something is there, even if it cannot be opened: a link to itself, say."""
    try:
        path.stat()
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return True


def _generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators."""
    numpy = (states := vars(Generators()))["numpy"]["state"]
    numpy["key"] = torch.from_numpy(numpy["key"].astype(np.int64))
    return states


def _pack(content: Any) -> bytes:
    """Nested lists and dictionaries with tensors in them, as one safetensors file."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"entries": [[plain(key), plain(inner)] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value

    text = json.dumps(plain(content), default=int)
    return save(tensors, metadata={"sidetuning": text, "sha256": _sha256(text, tensors)})


def _unzip(path: Path) -> Any:
    """What torch.save wrote; torch does not compare the checksums of the archive."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} has another checksum")
    return torch.load(path, weights_only=True, map_location="cpu")


def _unpack(data: bytes) -> Any:
    header = safetensors_header(data)
    tensors, text = parse(data), header["sidetuning"]
    if header["sha256"] != _sha256(text, tensors):
        raise ValueError("its checksum is not that of its content")

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        return tensors[value["tensor"]] if "tensor" in value else {whole(k): whole(v) for k, v in value["entries"]}

    return whole(json.loads(text))


def _sha256(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(text.encode() + save(tensors)).hexdigest()
