"""A small generator learns three domains one after another: by ladders beside it, by LoRA and by fine-tuning.

`bench/pretrain/pretrain_gpt.py` makes the generator. Texts are those of installed packages (Python, C++, web pages);
every tenth file is held out. All methods take as many steps over the same rows. Each method of each seed, and each cost
of a step, has a process of its own; memory is the peak while training above what the process held before, less the
weights that a method builds. Times are those of the processor, on one thread; generation is timed in turns.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sidetuning as st
from record import Record, public, ratio, read, read_results, run_cells, seconds, write
from sidetuning.cache import cache_tokens
from sidetuning_bench import grid
from sidetuning_bench.grid import Cell
from sidetuning_bench.language.corpora import DOMAINS, tokens
from sidetuning_bench.options import Count
from sidetuning_bench.results import estimate, number_text
from sidetuning_bench.runs import peak_memory_mb

METHODS = {"ladder": 3e-3, "lora": 1e-2, "finetune": 1e-3}
COSTS = ("ladder, cached", "ladder, live", "lora", "finetune")
# Steps whose cost is measured; the first warms up. Rows that are held out of each domain.
STEPS, HELD, ROUNDS = 8, 64, 7
TAPS = ("h.1", "h.3", "h.5")
SIDE: dict[str, Any] = {"side": "ladder", "head": "lm", "side_options": {"width": 96}}


@dataclass(frozen=True)
class Settings:
    """Perplexity of three domains learned in order, and what a step and a written token cost."""

    base: str = "hf:runs/pretrain-gpt"
    """The generator."""
    seeds: Count = 3
    """Number of seeds: initial weights and orders of rows."""
    rows: Count = 256
    """Rows of `length` tokens of each domain."""
    length: Count = 128
    """Tokens of a row."""
    epochs: Count = 2
    """Passes over them."""
    batch: Count = 8
    """Rows of a step."""


@dataclass(frozen=True)
class Job(Settings):
    """One method and seed."""

    method: str = "ladder"
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """Perplexities by domain: before, when each was learned, and at the end."""

    settings: dict[str, Any]
    before: list[float]
    learned: list[float]
    end: list[float]
    packages: dict[str, str]


class Rows:
    """Rows of ids (n, t) as texts of one length."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> NDArray[np.int64]:
        return np.full(len(self.ids), self.ids.shape[1])

    def fingerprint(self) -> str:
        return f"{tuple(self.ids.shape)} {int((self.ids.flatten() * torch.arange(self.ids.numel())).sum())}"

    def batch(self, rows: Any) -> dict[str, Tensor]:
        """Some rows as the base takes them."""
        ids = self.ids[list(rows)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Objective(nn.Module):
    """The mean loss of the next tokens of a model of transformers."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self.net(input_ids=batch[0]["input_ids"], labels=batch[0]["input_ids"]).loss
        return loss


class Ladders:
    """A task per domain beside one base."""

    def __init__(self, base: st.Base, job: Job, cached: bool = True) -> None:
        self.model, self.job, self.cached = st.SideTuner(base.with_taps(TAPS)), job, cached

    def add(self, domain: str) -> nn.Module:
        """Begin with a domain; what is trained."""
        return self.model.add_task(_plain(domain), **SIDE, seed=self.job.seed)

    def data(self, ids: Tensor) -> Any:
        """What batches are read from."""
        rows = Rows(ids)
        if not self.cached:
            return lambda some: (rows.batch(some), rows.ids[some])
        folder = Path(self.job.base.removeprefix("hf:")) / "features"
        return cache_tokens(self.model.base, rows, None, folder, progress=False).__getitems__

    def learn(self, domain: str, loader: Any, steps: int) -> None:
        """Train it."""
        st.fit(
            self.model, _plain(domain), loader, steps=steps, lr=METHODS["ladder"], seed=self.job.seed, progress=False
        )

    def perplexity(self, domain: str, ids: Tensor) -> float:
        """That of the domain's own task."""
        batches = [(Rows(part).batch(range(len(part))), part) for part in ids.split(16)]
        return st.evaluate(self.model, _plain(domain), batches)["perplexity"]


class Whole:
    """A copy of the generator: an adapter per domain, or one net through all."""

    def __init__(self, base: st.Base, job: Job) -> None:
        assert base.lm is not None
        self.job, self.net = job, copy.deepcopy(base.lm.net)

    def add(self, domain: str) -> nn.Module:
        """Begin with a domain; what is trained."""
        if self.job.method == "finetune":
            return self.net.requires_grad_(True)
        from peft import LoraConfig, PeftModel

        layers = ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM")
        with st.seeded(self.job.seed):
            if isinstance(self.net, PeftModel):
                self.net.add_adapter(_plain(domain), config)
                self.net.set_adapter(_plain(domain))
            else:
                self.net = PeftModel(self.net, config, adapter_name=_plain(domain))
        return self.net

    def data(self, ids: Tensor) -> Any:
        """What batches are read from."""
        return lambda some: (Rows(ids).batch(some), ids[some])

    def learn(self, domain: str, loader: Any, steps: int) -> None:
        """Train it."""
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=METHODS[self.job.method], weight_decay=0.0)
        st.train(Objective(self.net), loader, optimizer, steps=steps, clip=1.0, seed=self.job.seed)

    @torch.no_grad()
    def perplexity(self, domain: str, ids: Tensor) -> float:
        """That of the domain's own adapter, or of the one net."""
        if self.job.method == "lora":
            self.net.set_adapter(_plain(domain))
        losses = [float(self.net(input_ids=part, labels=part).loss) * len(part) for part in ids.split(16)]
        return math.exp(sum(losses) / len(ids))


def _plain(domain: str) -> str:
    return domain.replace("+", "p")


def method_of(base: st.Base, job: Job) -> Any:
    """The method of a job, by the first word of its name."""
    name, _, how = job.method.partition(", ")
    return Ladders(base, job, how != "live") if name == "ladder" else Whole(base, job)


def data_of(base: st.Base, job: Job, domain: str) -> tuple[Tensor, Tensor]:
    """Rows of a domain to learn from, and rows that are held out."""
    transform: Any = base.transform
    texts, tokenizer = DOMAINS[domain](), transform.tokenizer()
    parts = [t for k, t in enumerate(texts) if k % 10], texts[::10]
    learn, held = (tokens(tokenizer, part, job.length, 0) for part in parts)
    return learn[: job.rows], held[:HELD]


def learn(job: Job) -> dict[str, Any]:
    """Learn the domains in order."""
    base = st.load_base(job.base)
    method, data = method_of(base, job), {domain: data_of(base, job, domain) for domain in DOMAINS}
    before = [Whole(base, replace(job, method="finetune")).perplexity(d, held) for d, (_, held) in data.items()]
    found = []
    for domain, (ids, held) in data.items():
        method.add(domain)
        read_rows = method.data(ids)
        numbers: Any = range(len(ids))
        loader: Any = DataLoader(numbers, job.batch, shuffle=True, collate_fn=read_rows)
        method.learn(domain, loader, job.epochs * len(loader))
        found.append(method.perplexity(domain, held))
    end = [method.perplexity(domain, held) for domain, (_, held) in data.items()]
    packages = {name: version(name) for name in ("peft", "tokenizers", "transformers")}
    return {"before": before, "learned": found, "end": end, "packages": packages}


def cost(job: Job) -> dict[str, float]:
    """Seconds of the processor for a step, and memory in MB."""
    torch.set_num_threads(1)
    base = st.load_base(job.base)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, (STEPS * job.batch, job.length), generator=generator)
    before = peak_memory_mb(anew=True)
    method = method_of(base, job)
    weights = sum(p.numel() * p.element_size() for p in method.add("all").parameters())
    rows, times = method.data(ids), list[float]()

    def timed(some: list[int]) -> Any:
        times.append(time.process_time())
        return rows(some)

    numbers: Any = range(len(ids))
    loader: Any = DataLoader(numbers, job.batch, collate_fn=timed)
    method.learn("all", loader, STEPS)
    after = peak_memory_mb()
    assert before is not None and after is not None
    return {
        "seconds": statistics.median(np.diff(times[1:]).tolist()),
        "memory_mb": after - before - weights / 2**20,
    }


def writing(given: Settings) -> dict[str, Any]:
    """What tasks cost while texts are written: ten prompts of 32 tokens, and 32 tokens after each."""
    base = st.load_base(given.base)
    model = Ladders(base, Job(given.base)).model
    names = [f"t{k}" for k in range(10)]
    for k, name in enumerate(names):
        model.add_task(name, **SIDE, seed=k)
    ids = torch.randint(2000, (10, 32), generator=torch.Generator().manual_seed(0))
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write_by(tasks: Any) -> Callable[[], Any]:
        return lambda: model.generate(x, tasks, max_new_tokens=32, do_sample=False)

    code, guards = torch.randn(10, base.width), torch.randn(100, base.width)
    token = statistics.median(seconds(write_by(None), time.process_time) / 32 for _ in range(ROUNDS))
    product = seconds(lambda: [code @ guards.T for _ in range(1000)], time.process_time) / 1000
    return {
        "ten tasks, over one": ratio(write_by(names), write_by("t0"), ROUNDS, time.process_time),
        "one task, over the base alone": ratio(write_by("t0"), write_by(None), ROUNDS, time.process_time),
        "a hundred guards, over a token": [1 + product / token] * 3,
    }


def run(given: Settings) -> None:
    """Measure what has no result yet."""
    torch.set_num_threads(1)
    values = {name: getattr(given, name) for name in ("base", "rows", "length", "epochs", "batch")}
    cells = [
        Cell(f"generators-{method}-{seed}", Path(), Job(**values, method=method, seed=seed))
        for seed in range(given.seeds)
        for method in METHODS
    ]
    run_cells(
        cells,
        learn,
        lambda cell: None,
        lambda cell: cell.name,
        lambda cell, found: {"settings": public(cell.settings), **found},
        ("seeds",),
    )
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in COSTS}
    # The first round fills the cache.
    for k in range(4):
        jobs = [Cell(name, Path(), Job(**values, method=name)) for name in COSTS]
        for cell, row in grid.run(jobs, cost, lambda cell: None):
            costs[cell.name] += [row] if k else []
    medians = {name: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for name, rows in costs.items()}
    write("generators-cost", {"costs": medians, "writing": writing(given), "settings": public(given), "seeds": [0]})


def table(given: Settings) -> str:
    """Perplexities, costs of a step, and of writing."""
    heads = [f"{domain}{when}" for when in (", learned", ", at the end") for domain in DOMAINS]
    text = f"| Method | {' | '.join(heads)} | Forgotten |\n| --- |{' ---: |' * (len(heads) + 1)}\n"
    for method in METHODS:
        runs = read_results(Learned, f"generators-{method}-*.json")
        rows = [[*run.learned, *run.end] for run in runs]
        # How much larger the perplexity of the first two is at the end than it was.
        lost = [math.exp(statistics.mean(math.log(run.end[k] / run.learned[k]) for k in range(2))) - 1 for run in runs]
        cells = [number_text(estimate([row[k] for row in rows])) for k in range(len(heads))]
        text += f"| {method} | {' | '.join(cells)} | {statistics.mean(lost):.0%} |\n"
    base = " | ".join(f"{value:.1f}" for value in runs[0].before)
    text += f"| base alone | {base} | {base} | |\n"
    found = read("generators-cost")
    lora = found["costs"]["lora"]
    text += "\n| Step | ms | of lora | memory, MB | of lora |\n| --- |" + " ---: |" * 4 + "\n"
    for name, row in found["costs"].items():
        shares = [f"{row[key] / lora[key]:.0%}" for key in ("seconds", "memory_mb")]
        text += f"| {name} | {1000 * row['seconds']:.0f} | {shares[0]} | {row['memory_mb']:.0f} | {shares[1]} |\n"
    text += "\n| Writing | times | least | most |\n| --- | ---: | ---: | ---: |\n"
    for name, numbers in found["writing"].items():
        text += f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} |\n"
    return text


GENERATORS = Record(Settings(), run, table)
