"""The state of a training run on disk, checked before it is believed; and stopping where nothing is lost.

The file is a safetensors file whose header holds the rest as JSON, with a checksum over all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor, nn

from sidetuning.errors import TrainingError
from sidetuning.files import atomic_write, read_safetensors, safetensors_header
from sidetuning.identity import code_bytes, tensor_bytes
from sidetuning.inputs import PLAIN
from sidetuning.seeding import Generators, seeded
from sidetuning.sides.initialise import mismatch

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


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
    schedule: str = ""
    clip: str = ""
    loss: str = ""
    batches: str = ""
    data: str = ""
    stopped: bool = False
    settings: str = ""
    kept: str = ""
    features: str = ""
    code: str = ""


# What must be the same for a run to go on, and how it is called.
SAME = {
    "label": "the state",
    "optimizer": "the state",
    "schedule": "a run with the schedule",
    "clip": "a run with the gradient's largest norm",
    "loss": "a run with the loss",
    "batches": "a run with batches",
    "data": "a run on data with the hash",
    "features": "a run on features with the hash",
    "code": "a run whose loss has the code",
    "settings": "a run with the settings",
    "kept": "a run that keeps",
}


# Settings of an optimiser that have a text of their own.
TOLD = ("params", "lr", "initial_lr")


def description(
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    clip: float | None,
    loss: Any,
    loader: Iterable[Any] | None,
    precision: str = "no",
) -> dict[str, str]:
    """What a run is a run of, as texts; of a loader only where one is given."""
    rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in optimizer.param_groups)
    how = f"{type(optimizer).__name__} at {rates}" + (f" with {type(scheduler).__name__}" if scheduler else "")
    decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
    texts = {"optimizer": how + (f", weight decay {decay:g}" if decay else ""), "clip": str(clip), "loss": _named(loss)}
    texts["code"] = _code(loss)
    groups = [{k: v for k, v in group.items() if k not in TOLD} for group in optimizer.param_groups]
    texts["settings"] = _settled([*groups, f"precision {precision}"])
    if scheduler is not None:
        moving = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")
        given = {k: v for k, v in vars(scheduler).items() if k[0] != "_" and k not in moving}
        fixed = [f"{k} {_settled(v)}" for k, v in sorted(given.items()) if isinstance(v, (*PLAIN, list, dict))]
        texts["schedule"] = f"{type(scheduler).__name__} {', '.join(fixed)}"
    if loader is not None:
        rows = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        data = getattr(loader, "dataset", loader)
        texts["batches"] = f"{rows} rows" if rows else ""
        texts["data"] = _samples_sha256(data)
        if (gives := getattr(loader, "gives", None) or getattr(loader, "collate_fn", None)) and _are_numbers(data):
            # Its samples are numbers of rows, which its function reads.
            texts["features"] = _samples_sha256(_Read(gives, data))
    return texts


def _are_numbers(data: Any) -> bool:
    return isinstance(data, range) or (isinstance(data, list) and all(isinstance(row, int) for row in data[:8]))


class _Read:
    """Rows as a function reads them, one by one, of their numbers."""

    def __init__(self, read: Any, rows: Any) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.read([self.rows[i]])


def _code(loss: Any) -> str:
    """A hash of a loss's code; what it closes over may count its calls."""
    while isinstance(loss, partial):
        loss = loss.func
    function = getattr(type(loss), "forward", None) if isinstance(loss, nn.Module) else getattr(loss, "__func__", loss)
    code = getattr(function, "__code__", None)
    return "" if code is None else hashlib.sha256(code_bytes(code)).hexdigest()[:12]


def _named(loss: Any) -> str:
    """The name of a loss, and its code; what it closes over may count its calls."""
    if isinstance(loss, partial):
        return f"{_named(loss.func)} {_settled(loss.args)} {_settled(loss.keywords)}"
    if isinstance(loss, nn.Module):
        plain = {key: value for key, value in vars(loss).items() if isinstance(value, PLAIN) and key != "training"}
        return f"{type(loss).__qualname__} {_settled(plain)} {_settled(dict(loss.named_buffers()))}"
    code = getattr(loss, "__code__", None)
    name = f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
    return name if code is None else f"{name} {hashlib.sha256(code.co_code).hexdigest()[:12]}"


def _settled(value: Any) -> str:
    """A setting as a text that is the same in every process."""
    if isinstance(value, dict):
        return str({str(key): _settled(inner) for key, inner in sorted(value.items(), key=str)})
    if isinstance(value, (list, tuple)):
        return str([_settled(inner) for inner in value])
    if isinstance(value, Tensor):
        return str(value.tolist())
    return str(value) if isinstance(value, PLAIN) else _named(value)


def _samples_sha256(data: Any) -> str:
    """sha256 over how many samples there are and eight of them; empty where they cannot be asked for by number."""
    try:
        count = len(data)
        digest = hashlib.sha256(str(count).encode())
        for i in sorted({round(k * (count - 1) / 7) for k in range(8)}) if count else ():
            many, reads = getattr(data, "__getitems__", None), []
            for _ in range(2):
                with seeded(0):
                    one = hashlib.sha256()
                    _add(one, many([i]) if many is not None else data[i])
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
    states = vars(Generators())
    numpy = states["numpy"]["state"]
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

    text = json.dumps(plain(content))
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


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved its state.

    Attributes:
        code: exit code of a program that this ends.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Stop:
    """Takes Ctrl-C and SIGTERM, so that training can stop between two steps; a second one acts at once.

    Only where there is a file to save to, and in the main thread, which alone may.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, resumable: bool) -> None:
        self.active = resumable and threading.current_thread() is threading.main_thread()
        # The signal that came, or 0.
        self.wanted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if self.active:
            self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self.wanted:
            raise Stopped(number)
        self.wanted = number

    def obey(self, wanted: int) -> None:
        """Stop for the signal `wanted`, if it is one."""
        if wanted:
            raise Stopped(wanted)
