"""Every family of timm and transformers, tried: load, train, save, load again, cache, fold, and four threads.

Each cell is checked by numbers. It is "right", or "refused" by one sentence of the library, or "wrong", or "traceback".
Weights are random, and batch norms have seen other data than they were made for, so that nothing is right by chance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sidetuning as st
from record import RESULTS, Record, write
from sidetuning.cache import cache_tokens
from zoo_models import TIMM, TRANSFORMERS, network_of

CELLS = ("load", "taps", "add", "fit", "save", "again", "forward_all", "cache", "fold", "threads")
# Modules that taps are put on: blocks, whose names end with a number.
BLOCK = re.compile(r"(^|\.)(blocks|layers?|stages?|h|block|features|encoder|trunk)[._]?\d+$")
SEED, BATCH = 0, 2
# Seconds for one model of a process; then it is stopped.
PATIENCE = 300


@dataclass(frozen=True)
class Settings:
    """Every family of timm and transformers, tried on the library's main calls."""

    only: str = ""
    """Try the models whose names contain this, and record nothing."""
    batch: int = 16
    """Models per process."""
    processes: int = 2
    """Processes at a time, of one thread each."""


class Trial:
    """One model, and what became of each cell.

    Args:
        name: "timm:…" or "hf:…".
        folder: where its weights, tasks and cache go.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.cells: dict[str, str] = {}
        self.size = ""

    def attempt(self, cell: str, function: Callable[[], str | None]) -> bool:
        """Run one cell; `function` returns what is wrong. Whether it was right."""
        try:
            wrong = function()
            self.cells[cell] = f"wrong: {wrong}" if wrong else "right"
        except st.SideTuningError as error:
            self.cells[cell] = f"refused: {error}"
        except Exception as error:
            self.cells[cell] = f"traceback: {type(error).__name__}: {str(error)[:300]}"
        return self.cells[cell] == "right"

    def run(self) -> None:
        """All cells but "again", which is another process's."""
        torch.manual_seed(SEED)
        if not self.attempt("load", self.load):
            return
        self.attempt("taps", self.taps)
        self.model = st.SideTuner(self.base)
        self.attempt("add", self.add)
        # Where the ladder was refused, the other tasks go on.
        if not len(self.model):
            return
        for cell in ("forward_all", "fit", "threads", "fold", "cache", "save"):
            self.attempt(cell, getattr(self, cell))

    def load(self) -> str | None:
        """The base gives what the network gives."""
        net, address, weights = network_of(self.name, self.folder)
        self.base = st.load_base(address, weights=weights)
        self.tapped: list[str] = []
        self.text = not isinstance(self.base.example, Tensor)
        if not self.text:
            self._shrink()
        self.x = self.inputs(BATCH, 1)
        self.y = torch.arange(BATCH) % 3
        with torch.no_grad():
            expected = net(self.x)
        found = self.base(self.x).out
        return None if _close(found, expected, 1e-6) else _distance(found, expected)

    def _shrink(self) -> None:
        """Images of 64 pixels where the network takes them: everything is faster."""
        example = self.base.example
        assert isinstance(example, Tensor)
        if example.ndim == 4 and min(example.shape[-2:]) > 64:
            # Some networks have one size.
            with contextlib.suppress(Exception):
                self.base = self.base.with_example(torch.zeros(1, example.shape[1], 64, 64))
        self.size = "x".join(str(n) for n in self.base.example.shape[1:])  # type: ignore[union-attr]

    def inputs(self, batch: int, seed: int) -> Any:
        """Whole images, or token ids with padding."""
        generator = torch.Generator().manual_seed(seed)
        example = self.base.example
        if isinstance(example, Tensor):
            if not example.is_floating_point():
                return torch.randint(0, 50, (batch, *example.shape[1:]), generator=generator)
            return torch.randint(0, 256, (batch, *example.shape[1:]), generator=generator, dtype=torch.uint8)
        ids = torch.randint(3, 50, (batch, 8), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    def taps(self) -> str | None:
        """Each tap is read with its channels first: those of its dimensions that no other image size changes."""
        names = [name for name, _ in self.base.net.named_modules() if BLOCK.search(name)]  # type: ignore[attr-defined]
        depth = min((name.count(".") for name in names), default=0)
        names = [name for name in names if name.count(".") == depth]
        refused: st.SideTuningError | None = None
        for name in dict.fromkeys((names[len(names) // 2 :] + names[:1])[:2] + names[-1:]):
            try:
                tapped = self.base.with_taps([name])
            except st.SideTuningError as error:
                refused = error
                continue
            self.tapped.append(name)
            shape = tapped.tap_shapes[name]
            known = self._channels(name) if len(shape) == 3 else None
            if known is not None and shape[0] != known:
                return f"{name} has {known} channels and is read as {shape}"
        if refused is not None and not self.tapped:
            raise refused
        # A ladder climbs maps, or sequences of one length.
        shapes = {name: self.base.with_taps([name]).tap_shapes[name] for name in self.tapped}
        forms = {name: len(shape) if len(shape) == 3 else shape[:-1] for name, shape in shapes.items()}
        self.tapped = [name for name in self.tapped if forms[name] == forms[self.tapped[-1]]]
        return None

    def _channels(self, name: str) -> int | None:
        """The channels of a tap, found by images of two sizes; None where the network takes only one."""
        shapes: list[torch.Size] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            shapes.append((output[0] if isinstance(output, (tuple, list)) else output).shape)

        handle = self.base.net.get_submodule(name).register_forward_hook(keep)  # type: ignore[attr-defined]
        x = self.inputs(1, 0).float() / 255
        try:
            with torch.no_grad():
                self.base.net(x)
                self.base.net(nn.functional.pad(x, (0, x.shape[-1], 0, 2 * x.shape[-2])))
        except Exception:
            return self._told(name)
        finally:
            handle.remove()
        same = [a for a, b in zip(shapes[0][1:], shapes[1][1:], strict=True) if a == b]
        return same[0] if len(same) == 1 else self._told(name)

    def _told(self, name: str) -> int | None:
        """The channels of a tap as timm tells them, or the width of a network that has one."""
        told = getattr(self.base.net, "feature_info", None)
        known = [each["num_chs"] for each in told or () if isinstance(each, dict) and each.get("module") == name]
        return known[0] if known else None

    def add(self) -> str | None:
        """Three tasks; the first does not move by a bit."""
        example = self.base.example
        video = isinstance(example, Tensor) and example.ndim == 5
        side = "transformer" if self.text else "mlp" if video else "fcn3"
        self.model.add_task("plain", side=side, head=3, seed=1)
        before = self.model(self.x, "plain")
        self.model.add_task("copy", side="copy", head=3, merge="sum", seed=2)
        if self.tapped:
            self.model.add_task("ladder", side="ladder", head=3, taps=self.tapped, seed=3)
        outputs = {task: self.model(self.x, task) for task in self.model}
        bad = [task for task, out in outputs.items() if out.shape != (BATCH, 3) or not out.isfinite().all()]
        if bad:
            return f"{bad[0]} gives {outputs[bad[0]]}"
        return None if torch.equal(before, outputs["plain"]) else "a task moved when others were added"

    def forward_all(self) -> str | None:
        """One pass gives bitwise what each task alone gives."""
        each = {task: self.model(self.x, task) for task in self.model}
        wrong = [task for task, out in self.model.forward_all(self.x).items() if not torch.equal(out, each[task])]
        return f"{wrong[0]} is another" if wrong else None

    def fit(self) -> str | None:
        """Two steps change a task, and neither the base nor the other tasks by a bit."""
        base = _bytes(self.base.net)
        for task in self.model:
            before = {name: _bytes(self.model[name]) for name in self.model}
            st.fit(self.model, task, [(self.x, self.y)], steps=2, progress=False)
            moved = [name for name in self.model if _bytes(self.model[name]) != before[name]]
            if moved != [task]:
                return f"training {task} moved {moved}"
        return None if _bytes(self.base.net) == base else "the base moved"

    def threads(self) -> str | None:
        """Four threads get their own answers."""
        batches = [self.inputs(1, seed) for seed in range(4)]
        # A copy reads nothing of the base's.
        tasks = [task for task in self.model if task != "copy"]
        expected = [self.model.forward_all(x, tasks=tasks) for x in batches]
        wrong: list[str] = []

        def serve(i: int) -> None:
            for task, out in self.model.forward_all(batches[i], tasks=tasks).items():
                if not torch.equal(out, expected[i][task]):
                    wrong.append(f"{task}: {_distance(out, expected[i][task])}")

        workers = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return wrong[0] if wrong else None

    def fold(self) -> str | None:
        """The folded base gives what the base gives, up to rounding."""
        folded, plain = self.model.base.folded()(self.x), self.model.base(self.x)
        pairs = {"out": (folded.out, plain.out), **{tap: (folded.taps[tap], plain.taps[tap]) for tap in plain.taps}}
        wrong = [f"{name}: {_distance(*pair)}" for name, pair in pairs.items() if not _close(*pair)]
        return wrong[0] if wrong else None

    def cache(self) -> str | None:
        """Tasks on cached features give what they give on live ones, up to rounding."""
        base = self.model.base
        if self.text:
            texts = Ids(self.x)
            cached: Any = cache_tokens(
                base, texts, self.y, self.folder / "cache", dtype="float32", batch_size=2, progress=False
            )
            x, features, _ = cached.__getitems__(range(BATCH))
        else:
            data = TensorDataset(self.x, self.y)
            cached = st.cache_features(base, data, self.folder / "cache", batch_size=2, progress=False)
            x, features, _ = cached.__getitems__(range(BATCH))
        for task in self.model:
            live, stored = self.model(self.x, task), self.model(x, task, features=features)
            if not _close(stored, live, 1e-3):
                return f"{task}: {_distance(stored, live)}"
        return None

    def save(self) -> str | None:
        """Tasks and their answers, for another process."""
        for task in self.model:
            self.model.save_task(task, self.folder / "tasks" / task)
        save_file(self.model.forward_all(self.x), self.folder / "answers.safetensors")
        return None

    def again(self) -> str | None:
        """In another process the folder gives bitwise the same answers."""
        expected = load_file(self.folder / "answers.safetensors")
        model = st.load(self.folder)
        self.base, self.text = model.base, not isinstance(model.base.example, Tensor)
        x = self.inputs(BATCH, 1)
        found = {task: model(x, task) for task in model}
        if found.keys() != expected.keys():
            return f"there are {sorted(found)}, not {sorted(expected)}"
        wrong = [f"{task}: {_distance(found[task], expected[task])}" for task in found]
        return next((text for task, text in zip(found, wrong, strict=True) if not _same(found, expected, task)), None)


class Ids:
    """Texts as `cache_tokens` takes them."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return self.mask.sum(1).numpy()  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Of all tokens."""
        return str(self.ids.tolist())

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some texts, padded to the longest."""
        longest = int(self.lengths()[list(rows)].max())
        return {"input_ids": self.ids[list(rows), :longest], "attention_mask": self.mask[list(rows), :longest]}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], task: str) -> bool:
    return torch.equal(found[task], expected[task])


def _bytes(module: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _distance(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"{tuple(a.shape)} for {tuple(b.shape)}"
    return f"{float((a - b).norm() / b.norm()):.2g} away"


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm() + 1e-6)


def work(mode: str, root: Path, names: Sequence[str]) -> None:
    """What a process does: "make" the models, or load them "again". Each model's cells are a file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in names:
        trial = Trial(name, root / name.replace(":", "-"))
        trial.folder.mkdir(parents=True, exist_ok=True)
        file = trial.folder / "cells.json"
        if mode == "make":
            file.write_text(json.dumps({"cells": {"load": "traceback: the process died"}, "size": ""}))
            trial.run()
        else:
            done = json.loads(file.read_text())
            trial.cells, trial.size = done["cells"], done["size"]
            if trial.cells.get("save") != "right":
                continue
            trial.attempt("again", trial.again)
        file.write_text(json.dumps({"cells": trial.cells, "size": trial.size}))


def try_models(names: Sequence[str], root: Path) -> dict[str, dict[str, Any]]:
    """The cells of some models, each made in one process and loaded in another. A process that dies is noticed."""
    for mode in ("make", "again"):
        left = list(names)
        while left:
            before = {name: _read(root, name) for name in left}
            command = [sys.executable, __file__, mode, str(root), *left]
            with contextlib.suppress(subprocess.TimeoutExpired):
                patience = PATIENCE * len(left)
                done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
                if done.returncode == 0:
                    break
            # The model at which it died is the last that was begun.
            begun = [name for name in left if _read(root, name) != before[name]]
            dead = left.index(begun[-1]) if begun else 0
            left = left[dead + 1 :]
    found = {name: _read(root, name) or {} for name in names}
    # The weights of all models together would fill a disk.
    shutil.rmtree(root, ignore_errors=True)
    return found


def _read(root: Path, name: str) -> dict[str, Any] | None:
    file = root / name.replace(":", "-") / "cells.json"
    return json.loads(file.read_text()) if file.exists() else None


def run(given: Settings) -> None:
    """Try what has no row yet, and write all rows after each batch."""
    names = [f"timm:{name}" for name in TIMM] + [f"hf:{name}" for name in TRANSFORMERS]
    file = RESULTS / "zoo.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() and not given.only else {}
    left = [name for name in names if given.only in name and name not in rows]
    # Small and large ones in turn: a sweep that was stopped has seen some of each.
    left.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    batches = [left[first : first + given.batch] for first in range(0, len(left), given.batch)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.processes) as pool:
        places = [Path(folder, str(number)) for number in range(len(batches))]
        try:
            for found in pool.map(try_models, batches, places):
                rows.update(found)
                for name, row in found.items():
                    cells: dict[str, str] = dict(row["cells"])
                    faults = {cell: text for cell, text in cells.items() if text != "right"}
                    print(name, faults or "right", flush=True)
                if not given.only:
                    write("zoo", {"seed": SEED, "rows": {name: rows[name] for name in names if name in rows}})
        finally:
            # Whoever stops it does not wait for those that were not begun.
            pool.shutdown(cancel_futures=True)


def table(given: Settings) -> str:
    """Counts per cell, in Markdown."""
    file = RESULTS / "zoo.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    lines = [
        "| Cell | right | refused | not reached | wrong | traceback |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in CELLS:
        counts = Counter(row["cells"].get(cell, "not reached").split(":")[0] for row in rows.values())
        numbers = [counts[kind] for kind in ("right", "refused", "not reached", "wrong", "traceback")]
        lines.append(f"| {cell} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


ZOO = Record(Settings(), run, table)

if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
