"""What learning and answering cost, beside what one would use instead: PEFT, fine-tuning, a probe of scikit-learn.

Three networks: the packaged ResNet-44 at 32 pixels, a ViT-Tiny of timm at 224 and a BERT of MiniLM-L6's size with
windows of 384 tokens; the weights of the last two are random, which changes no cost. Every way runs in a process of its
own, in rounds one after another, on `--threads` threads.

- step: seconds of one training step, and what it holds in memory at its peak beyond what the process held before (a
  copy of the base is part of it); of a closed form and of scikit-learn's probe, which have no steps, the seconds of the
  whole task over its number of batches;
- answers: images or texts answered per second by 1, 10 and 100 tasks, all tasks for each; and where each row of a batch
  is of another task; in one round;
- bytes: what one task stores.

`adapters` asks for an older transformers than PEFT does here, and is not among the ways.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sidetuning as st
from record import Record, public, read, recorded, seconds, write
from sidetuning.cache import cache_tokens, token_loader
from sidetuning.heads import pooled
from sidetuning_bench import grid
from sidetuning_bench.grid import Cell
from sidetuning_bench.methods import METHODS, Recipe, Task
from sidetuning_bench.options import Count
from sidetuning_bench.runs import peak_memory_mb

CLASSES, BATCHES = 10, 5
TASKS = (1, 10, 100)
# Of each network: the batch of a step, that of answers, and the side.
SUBJECTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "resnet44": (64, 16, {"side": "fcn4", "merge": "alpha"}),
    "vit-tiny": (16, 16, {"side": "ladder"}),
    "minilm": (16, 4, {"side": "ladder"}),
}
WAYS = {
    "base alone": "the frozen base, no task",
    "cached": "side, features cached",
    "live": "side, the base in every step",
    "closed form": "closed form, features cached",
    "closed form, live": "closed form, the base in one pass",
    "probe": "scikit-learn's logistic regression on cached features",
    "lora": "LoRA (PEFT), rank 8",
    "ia3": "IA3 (PEFT)",
    "ln": "LN tuning (PEFT)",
    "residual adapters": "residual adapters",
    "finetune": "full fine-tuning",
}


@dataclass(frozen=True)
class Settings:
    """Time and memory of a training step, and answers per second, of several ways."""

    threads: Count = 2
    """Threads of torch."""
    rounds: Count = 3
    """Rounds of all ways."""


@dataclass(frozen=True)
class Asked:
    """One measurement: a way on a network."""

    subject: str
    way: str
    threads: int
    answers: bool


def base_of(subject: str) -> st.Base:
    """A network as a base."""
    with st.seeded(0):
        if subject == "resnet44":
            return st.load_base("resnet44-cifar10", taps=("layer1", "layer2", "layer3"))
        if subject == "vit-tiny":
            return st.load_base(
                "timm:vit_tiny_patch16_224", pretrained=False, taps=("blocks.3", "blocks.7", "blocks.11")
            )
        from transformers import BertConfig, BertModel

        sizes: dict[str, Any] = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
        net = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        taps = [f"encoder.layer.{i}" for i in (1, 3, 5)]
        return st.Base(net, example=texts(1), output="last_hidden_state", taps=taps)


def texts(count: int) -> dict[str, Tensor]:
    """Windows of 384 tokens."""
    ids = torch.randint(1000, 30000, (count, 384), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Rows(Dataset[Any]):
    """Samples of a network's input with random classes."""

    def __init__(self, base: st.Base, subject: str, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, *base.example.shape[1:]) if isinstance(base.example, Tensor) else ()
        self.x: Any = texts(count)
        if shape:
            self.x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.y = torch.arange(count) % CLASSES

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        x = {name: value[i] for name, value in self.x.items()} if isinstance(self.x, dict) else self.x[i]
        return x, self.y[i]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.full(len(self), self.x["input_ids"].shape[1])

    def fingerprint(self) -> str:
        """They are drawn from one seed."""
        return f"random {len(self)}"

    def batch(self, rows: Sequence[int], /) -> dict[str, Tensor]:
        """Some texts."""
        return {name: value[list(rows)] for name, value in self.x.items()}


class Peer(nn.Module):
    """A copy of the base that is adapted by PEFT, or as a whole, with a linear head."""

    def __init__(self, base: st.Base, way: str, classes: int = CLASSES) -> None:
        super().__init__()
        net, self.base = copy.deepcopy(base.net), (base,)
        assert isinstance(net, nn.Module)
        # Convolutions are faster so, and those of `Base.folded` run so too.
        net = net.to(memory_format=torch.channels_last)
        self.heads = nn.ModuleDict({"0": nn.Linear(base.width, classes)})
        if way == "finetune":
            self.net: Any = net.requires_grad_(True)
            return
        from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model

        kinds = (nn.Linear, nn.Conv2d) if way == "lora" else (nn.Linear,)
        names = [name for name, module in net.named_modules() if isinstance(module, kinds)]
        # Identities of timm are called norms, too.
        norms = [f"{name}$" for name, module in net.named_modules() if isinstance(module, nn.LayerNorm)]
        self.config = {
            "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=names),
            "ia3": lambda: IA3Config(target_modules=names, feedforward_modules=[]),
            "ln": lambda: LNTuningConfig(target_modules="|".join(norms).replace(".", r"\.")),
        }[way]()
        with warnings.catch_warnings():
            # PEFT warns of the layer norms that its LN tuning is for.
            warnings.simplefilter("ignore")
            self.net = get_peft_model(net, self.config, adapter_name="0")

    def add(self, name: str) -> None:
        """Another task."""
        self.net.add_adapter(name, self.config)
        self.heads[name] = copy.deepcopy(self.heads["0"])

    def forward(self, inputs: Any, task: str = "0", adapter_names: list[str] | None = None) -> Tensor:
        base, more = self.base[0], {} if adapter_names is None else {"adapter_names": adapter_names}
        out = self.net(**inputs, **more) if isinstance(inputs, dict) else self.net(inputs, **more)
        code = pooled(base.select(out), base.kind, inputs)
        if adapter_names is None:
            return self.heads[task](code)
        return torch.stack([self.heads[name](row) for name, row in zip(adapter_names, code, strict=True)])

    def stored(self) -> int:
        """Bytes of what was trained."""
        return sum(p.numel() * p.element_size() for p in self.parameters() if p.requires_grad)


def learn_peer(peer: Peer, base: st.Base, rows: Rows, batch: int) -> float:
    """Seconds of a step of a bare loop; the first step warms up."""
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)
    times, started = [], time.perf_counter()
    for x, y in DataLoader(rows, batch):
        loss = nn.functional.cross_entropy(peer(base.prepare(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Reading a batch is part of a step, as it is of ours.
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
    return statistics.median(times[1:])


def learn_ours(way: str, base: st.Base, rows: Rows, subject: str, folder: str) -> dict[str, float]:
    """Seconds of a step of ours, of scikit-learn's probe, and of residual adapters."""
    batch, _, side = SUBJECTS[subject]
    loader: Any = DataLoader(rows, batch)
    if way in ("cached", "closed form", "probe") and isinstance(rows.x, dict):
        loader = token_loader(cache_tokens(base, rows, rows.y, folder, progress=False), rows.lengths(), batch)
    elif way in ("cached", "closed form", "probe"):
        cached = st.cache_features(base, rows, folder, progress=False)
        loader = st.loader_over(cached, batch_size=batch, shuffle=False)
    before = at_rest()
    if way == "residual adapters":
        method = METHODS["residual-adapter"](base)
        recipe = Recipe(BATCHES, optimizer=torch.optim.AdamW)
        # Warms up, as the first call does of ours.
        method.learn(Task("warm", CLASSES), loader, recipe, progress=False)
        spent = method.learn(Task("0", CLASSES), loader, recipe, progress=False).seconds
        stored = 4 * method.added("0")
    elif way == "probe":
        from sklearn.linear_model import LogisticRegression

        codes = torch.cat([pooled(features.out, base.kind, base.prepare(x)) for x, features, _ in loader]).float()
        spent = seconds(lambda: LogisticRegression(max_iter=300).fit(codes.numpy(), rows.y.numpy()))
        stored = 8 * CLASSES * (base.width + 1)
    else:
        model = st.SideTuner(base)
        closed = way.startswith("closed")
        parts: dict[str, Any] = {"side": None, "merge": "base-only"} if closed else side
        model.add_task("0", head=CLASSES, seed=0, **parts)
        learn = st.solve if closed else st.fit
        more: dict[str, Any] = {} if closed else {"steps": BATCHES, "optimizer": torch.optim.AdamW}
        learn(model, "0", loader, progress=False, **more)
        spent = seconds(lambda: learn(model, "0", loader, progress=False, **more))
        model.save_task("0", f"{folder}/task")
        stored = sum(file.stat().st_size for file in Path(folder, "task").iterdir())
    memory = (peak_memory_mb() or 0.0) - before
    return {"seconds": spent / BATCHES, "memory_mb": memory, "bytes": stored}


def at_rest() -> float:
    """What the process holds, in MB, when freed memory has gone back to the system: a step must ask for all of its."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return peak_memory_mb(anew=True) or 0.0


def measure(asked: Asked) -> dict[str, Any]:
    """A way's step, memory and bytes, and its answers per second."""
    torch.set_num_threads(asked.threads)
    base, (batch, few, _) = base_of(asked.subject), SUBJECTS[asked.subject]
    rows = Rows(base, asked.subject, BATCHES * batch)
    x, _ = next(iter(DataLoader(rows, batch)))
    some, _ = next(iter(DataLoader(rows, few)))
    if asked.way == "base alone":
        before = at_rest()
        base(x)
        spent = statistics.median(seconds(lambda: base(x)) for _ in range(BATCHES))
        return {"seconds": spent, "memory_mb": (peak_memory_mb() or 0.0) - before, "bytes": 0}
    if asked.way not in ("lora", "ia3", "ln", "finetune"):
        with tempfile.TemporaryDirectory() as folder:
            found = learn_ours(asked.way, base, rows, asked.subject, folder)
        return {**found, **ours_answering(base, asked, some, few)}
    before = at_rest()
    peer = Peer(base, asked.way)
    found = {"seconds": learn_peer(peer, base, rows, batch)}
    found |= {"memory_mb": (peak_memory_mb() or 0.0) - before, "bytes": peer.stored()}
    return {**found, **(peer_answering(peer, base.prepare(some), asked.way, few) if asked.answers else {})}


def rate(answer: Callable[[], Any], batch: int, tasks: int) -> float:
    """Inputs per second, the median of three after a first one; a hundred passes are timed once."""
    if tasks == TASKS[-1]:
        return batch / seconds(answer)
    return batch / statistics.median([seconds(answer) for _ in range(4)][1:])


@torch.no_grad()
def ours_answering(base: st.Base, asked: Asked, x: Any, batch: int) -> dict[str, Any]:
    """Answers per second of sides, or of linear heads."""
    if asked.way not in ("cached", "closed form") or not asked.answers:
        return {}
    model = st.SideTuner(base)
    side: dict[str, Any] = SUBJECTS[asked.subject][2] if asked.way == "cached" else {"side": None, "merge": "base-only"}
    for i in range(TASKS[-1]):
        model.add_task(f"t{i}", head=CLASSES, seed=i, **side)
    names = model.tasks
    found = {str(n): rate(partial(model.forward_all, x, tasks=names[:n]), batch, n) for n in TASKS}
    mixed = [names[i % len(names)] for i in range(batch)]
    return {"answers": found, "mixed": rate(lambda: model(x, tasks=mixed), batch, 1)}


@torch.no_grad()
def peer_answering(peer: Peer, inputs: Any, way: str, batch: int) -> dict[str, Any]:
    """Answers per second of adapters, a pass for each task; of copies of a network the same."""
    peer.eval()
    names = [str(i) for i in range(TASKS[-1])]
    for name in names[1:] if way != "finetune" else ():
        peer.add(name)

    def all_of(count: int) -> None:
        for name in names[:count]:
            if way != "finetune":
                peer.net.set_adapter(name)
            peer(inputs, name if way != "finetune" else "0")

    found = {str(count): rate(partial(all_of, count), batch, count) for count in TASKS}
    if way != "lora":
        return {"answers": found}
    mixed = [names[i % len(names)] for i in range(batch)]
    return {"answers": found, "mixed": rate(lambda: peer(inputs, adapter_names=mixed), batch, 1)}


def ways_of(subject: str) -> list[str]:
    """The ways that there are for a network: residual adapters need convolutions, the others of PEFT linear layers."""
    without = ("ia3", "ln") if subject == "resnet44" else ("residual adapters",)
    return [way for way in WAYS if way not in without]


def run(given: Settings) -> None:
    """Measure the networks that have no result."""
    for subject in SUBJECTS:
        if recorded(f"peers-{subject}", public(given)):
            continue
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways_of(subject)}
        for k in range(given.rounds):
            # Answers of 100 tasks take long, and are asked once.
            cells = [Cell(way, Path(), Asked(subject, way, given.threads, not k)) for way in found]
            for cell, row in grid.run(cells, measure, lambda cell: None):
                found[cell.name].append(row)
        content = {"batch": SUBJECTS[subject][0], "tasks": list(TASKS), "threads": given.threads, "ways": found}
        write(f"peers-{subject}", content, given)


def table(given: Settings) -> str:
    """A table for each network: medians over the rounds."""
    parts = []
    for subject in SUBJECTS:
        content = read(f"peers-{subject}")
        ways: dict[str, list[dict[str, Any]]] = content["ways"]
        lora = statistics.median(row["seconds"] for row in ways["lora"])
        head = ["a step, ms", "of LoRA", "memory, MB", "a task, kB", *(f"{n} tasks, /s" for n in TASKS), "mixed, /s"]
        lines = [f"**{subject}**, batches of {content['batch']}:", "", f"| | {' | '.join(head)} |"]
        lines.append("| --- |" + " ---: |" * len(head))
        for way, rows in ways.items():
            step = statistics.median(row["seconds"] for row in rows)
            cells = [f"{1000 * step:,.1f}", f"{step / lora:.1%}"]
            cells.append(f"{statistics.median(row['memory_mb'] for row in rows):,.0f}")
            cells.append(f"{rows[0]['bytes'] / 1000:,.0f}" if rows[0]["bytes"] else "")
            for count in map(str, TASKS):
                rates = [row["answers"][count] for row in rows if "answers" in row]
                cells.append(f"{statistics.median(rates):,.1f}" if rates else "")
            mixed = [row["mixed"] for row in rows if "mixed" in row]
            cells.append(f"{statistics.median(mixed):,.1f}" if mixed else "")
            lines.append(f"| {WAYS[way]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


PEERS = Record(Settings(), run, table)
