"""`sidetuning train` without options, beside a linear probe, LoRA and full fine-tuning in the same time.

Three sets: ten classes of CIFAR-100 with 50 photographs each, twenty with 250, and questions of twenty articles of
SQuAD with 40 each, by their article. Ours is `st.auto` with its defaults and `--budget`; the processor time that it
took, base pass included, is what LoRA (PEFT, rank 8) and fine-tuning get. Both learn in as many steps as fit, with a
warm-up and a linear decay, at the best of their rates by the validation rows of ours; each rate gets the whole time.
The probe is scikit-learn's, its strength by cross-validation, on the base's code of training and validation rows.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sidetuning as st
from kinds import write_photographs
from peers import Peer
from record import Record, public, read_all, recorded, write
from sidetuning.data.rows import Rows
from sidetuning.heads import pooled
from sidetuning.terminal import say
from sidetuning_bench import icifar
from sidetuning_bench.language import squad
from sidetuning_bench.options import Count

SETS = {
    "ten kinds of photographs": ("photographs", 10, 50),
    "twenty kinds of photographs": ("photographs", 20, 250),
    "questions by article": ("texts", 20, 40),
}
RATES = {"lora": (1e-3, 3e-3, 1e-2), "finetune": (3e-4, 1e-3, 3e-3)}
WAYS = ("train", "probe", "lora", "finetune")
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """Learning from one's own data in four ways."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    texts: str = squad.Settings.data
    """A SQuAD folder, with train*.json."""
    text_base: str = "hf:sentence-transformers/all-MiniLM-L6-v2"
    """The base of texts; recorded by the last part of its name."""
    budget: float = 30.0
    """Seconds that candidates share."""
    seeds: Count = 3
    """Seeds."""


def make_texts(folder: Path, source: str, classes: int, count: int) -> Path:
    """A folder of tables: questions, and the number of their article; as many to test as to train."""
    contexts: dict[str, list[str]] = {}
    for file in sorted(Path(source).glob("train*.json")):
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
            asked = [q["question"].strip() for part in article["paragraphs"] for q in part["qas"]]
            contexts[article["title"]] = list(dict.fromkeys(asked))
    if not contexts:
        sys.exit(
            f"{source} holds no train*.json of SQuAD, whose articles are the classes; give its folder with --texts"
        )
    chosen = [asked for asked in contexts.values() if len(asked) >= 2 * count][:classes]
    folder.mkdir(parents=True)
    for split, part in (("train", 0), ("test", 1)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as table:
            rows = csv.writer(table)
            rows.writerow(["text", "label"])
            for label, asked in enumerate(chosen):
                # Spread over the article, so that both splits ask about all of it.
                some = asked[:: max(1, len(asked) // (2 * count))][: 2 * count]
                rows.writerows([text, f"article-{label:02}"] for text in some[part::2])
    return folder


def batches(base: st.Base, rows: Rows, size: int, steps: int | None, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Prepared batches: so many random ones, or all rows once."""
    assert base.transform is not None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows.sources), generator=generator) if steps else torch.arange(len(rows.sources))
    for k in range(steps or -(-len(order) // size)):
        while steps and (k + 1) * size > len(order):
            order = torch.cat([order, torch.randperm(len(rows.sources), generator=generator)])
        some = order[k * size : (k + 1) * size].tolist()
        yield base.prepare(base.transform.batch([rows.sources[i] for i in some])), rows.targets[some]


@torch.no_grad()
def accuracy(peer: Peer, base: st.Base, rows: Rows) -> float:
    """The share of rows that are answered rightly."""
    peer.eval()
    right = [peer(x).argmax(1) == y for x, y in batches(base, rows, 64, None, 0)]
    return float(torch.cat(right).double().mean())


def learned(base: st.Base, way: str, data: Any, lr: float, seconds: float, seed: int) -> tuple[Peer, int]:
    """A peer that learned for so long, and its steps."""
    with st.seeded(seed):
        peer = Peer(base, way, len(data.names))
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    # PEFT's tasks share the batch norms, which stay as they are; a network of its own trains them.
    peer.train(way == "finetune")
    started, done = time.process_time(), 0
    for k, (x, y) in enumerate(batches(base, data.splits["train"], BATCH, 100_000, seed)):
        spent = (time.process_time() - started) / seconds
        if spent >= 1:
            break
        # A warm-up over a tenth of the time, then down in a straight line.
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * spent + 0.01, (1 - spent) / 0.9)
        loss = nn.functional.cross_entropy(peer(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        done = k + 1
    return peer, done


def probed(base: st.Base, data: Any, seed: int) -> float:
    """The test accuracy of scikit-learn's probe."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    codes: dict[str, tuple[Any, Any]] = {}
    for name, splits in (("train", ("train", "validation")), ("test", ("test",))):
        rows = itertools.chain(*(batches(base, data.splits[split], 64, None, 0) for split in splits))
        found = [(pooled(base.encode(x).out, base.kind, x), y) for x, y in rows]
        codes[name] = torch.cat([code for code, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()
    # Decades of strengths; the folds are stratified.
    strengths = [10.0**power for power in range(-4, 3)]
    how: dict[str, Any] = {
        "scoring": "accuracy",
        "use_legacy_attributes": False,
        "l1_ratios": (0,),
        "random_state": seed,
    }
    probe = LogisticRegressionCV(Cs=strengths, cv=3, max_iter=300, **how)
    return float(make_pipeline(StandardScaler(), probe).fit(*codes["train"]).score(*codes["test"]))


def measure(name: str, source: Path, base: st.Base, given: Settings, seed: int) -> dict[str, Any]:
    """The accuracies of all ways on one set, and what they cost."""
    data = st.data.load(str(source), seed=seed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        model = st.SideTuner(base)
        result = st.auto(model, "task", data, cache=cache, budget=given.budget, seed=seed, progress=False)
    seconds = time.process_time() - started
    found: dict[str, Any] = {"train": {"accuracy": result.scores["test"]["accuracy"], "kept": result.chosen}}
    found["probe"] = {"accuracy": probed(base, data, seed)}
    for way in ("lora", "finetune"):
        tried = [learned(base, way, data, lr, seconds, seed) for lr in RATES[way]]
        scores = [accuracy(peer, base, data.splits["validation"]) for peer, _ in tried]
        best = scores.index(max(scores))
        peer, steps = tried[best]
        about = {"lr": RATES[way][best], "steps": steps, "validation": scores}
        found[way] = {"accuracy": accuracy(peer, base, data.splits["test"]), **about}
    say(f"{name}, seed {seed}: " + ", ".join(f"{way} {100 * row['accuracy']:.1f} %" for way, row in found.items()))
    return {"set": name, "seed": seed, "seconds": seconds, "budget": given.budget, "ways": found}


def result_name(name: str, seed: int | str) -> str:
    """The name of a result."""
    return f"own-data-{name.replace(' ', '-')}-{seed}"


def run(given: Settings) -> None:
    """Measure the sets and seeds that have no result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, classes, count) in SETS.items():
            todo = [s for s in range(given.seeds) if not recorded(result_name(name, s), public(given), ("seeds",))]
            if not todo:
                continue
            place = Path(folder) / name.replace(" ", "-")
            if kind == "texts":
                source, base = make_texts(place, given.texts, classes, count), st.load_base(given.text_base)
            else:
                counts = {"train": count, "test": 100}
                source = write_photographs(place, given.data, range(classes), counts)
                base = st.load_base("resnet44-cifar10")
            for seed in todo:
                write(result_name(name, seed), measure(name, source, base, given, seed), given)


def table(given: Settings) -> str:
    """Accuracies, means over the seeds that are recorded and their standard errors."""
    lines = [
        "| | " + " | ".join(f"{way}, %" for way in WAYS) + " | processor s | seeds |",
        "| --- |" + " ---: |" * (len(WAYS) + 2),
    ]
    for name in SETS:
        found = read_all(f"{result_name(name, '*')}.json")
        cells = []
        for way in WAYS:
            values = torch.tensor([100 * one["ways"][way]["accuracy"] for one in found], dtype=torch.float64)
            error = float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{float(values.mean()):.1f}" + (f" ± {error:.1f}" if len(values) > 1 else ""))
        seconds = sum(one["seconds"] for one in found) / len(found)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} | {len(found)} |")
    return "\n".join(lines)


OWN_DATA = Record(Settings(), run, table)
