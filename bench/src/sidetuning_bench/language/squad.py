"""Question answering (paper, section 4.2): SQuAD v2 on any encoder of transformers, by side-tuning and what it is compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.base import Base
from sidetuning.distill import distill
from sidetuning.errors import DataError, SideTuningError
from sidetuning.files import atomic_write, write_json
from sidetuning.integrations.transformers import load_tokenizer, tokenizer_fingerprint
from sidetuning.loading import load_base
from sidetuning.seeding import seeded
from sidetuning.sides.top import EMBEDDINGS, layers_of
from sidetuning.cache import CachedTokens, cache_tokens, token_loader
from sidetuning.cache.tokens import ByLength
from sidetuning.launch import default_accelerator
from sidetuning.tuner import SideTuner
from sidetuning_bench.language import metric as squad_metric
from sidetuning_bench.language.questions import (
    Prediction,
    Questions,
    Windows,
    fingerprint,
    make_windows,
    n_best,
    read_questions,
)
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.results import number_text
from sidetuning_bench.runs import Run, above_zero, at_least_one, peak_memory_mb

TASK = "squad"
Name = Literal["sidetune", "ladder", "features", "finetune", "scratch", "lora"]
FREE = ("data", "out", "cache", "save_every", "progress")  # of the data a fingerprint is kept instead
CACHED = ("sidetune", "ladder", "features")  # those that never train the base: its features are computed once


@dataclass(frozen=True)
class Settings:
    """Answer questions about paragraphs, and say where there is no answer."""

    data: str = "rajpurkar/squad_v2"
    """A SQuAD folder (train*.json, dev*.json), or a data set on the Hub in the layout of squad_v2."""
    out: str = "runs/squad"
    """Folder of the run; the same command run again goes on where it stopped."""
    base: str = "hf:google-bert/bert-base-uncased"
    """An encoder of transformers: hf:NAME or hf:FOLDER; its tokenizer comes with it."""
    method: Name = "sidetune"
    """sidetune (a side that --side names), ladder (a block per tapped layer), features (the head alone), finetune, scratch, lora."""
    side: str = "match"
    """Of sidetune: match (compares the text with the question), slim (a transformer on the embeddings), convolutional, or top (a copy of
    the base's last --layers layers)."""
    width: int = 96
    """Of the side."""
    layers: int | None = None
    """Of the side; by default 2 of match, 1 of top, 4 of slim and convolutional."""
    rungs: int = 3
    """Of the ladder: how many layers of the base it reads, spread evenly, the embeddings not counted."""
    merge: str = "alpha"
    """How base and side are fused."""
    init: Literal["as-built", "xavier", "low-energy", "zero", "distilled"] = "as-built"
    """How the side starts; distilled: it imitates the base on the training windows first."""
    distill_epochs: float = 1.0
    """Passes of that imitation."""
    rank: int = 8
    """Of lora."""
    epochs: float = 2.0
    """Passes over the training windows."""
    batch: int = 16
    """Windows per step."""
    lr: float | None = None
    """Learning rate at its peak; by default 1e-3 for sides and heads, 2e-4 for lora, 3e-5 for finetune, 1e-4 for scratch."""
    weight_decay: float = 0.01
    """Of matrices; merges, norms and biases have none."""
    length: int = 384
    """Tokens of a window."""
    stride: int = 128
    """Tokens that two windows of a context share."""
    threshold: float = 0.0
    """Where the score of there being no answer exceeds that of the best span by more than this, there is none."""
    n_best: int = 5
    """Write so many answers to each question into nbest_predictions.json."""
    questions: int | None = None
    """Train on so many questions, spread evenly; None for all."""
    test_questions: int | None = None
    """Test on so many questions, spread evenly; None for all."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training."""
    seed: int = 0
    """Of initial weights and of the order of the windows."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    save_every: float = 30.0
    """Seconds between two resume files."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        scores: the official metric on the test questions, in %; see `data.squad_metric.Scores`.
        added: parameters that were trained.
        shared: parameters of the base.
        steps, seconds: of training; the seconds include those of distilling the side, and not the base's features.
        base_seconds: of the base's features of the training windows, whichever run computed them; 0 where none are used.
        seconds_per_1000: of answering 1,000 test questions, base included where it is run.
        memory_mb: the most memory while training above what there was before, in MB; None where the system does not tell, and where
            training went on after a stop.
        problems: what was met in the data, and how often.
    """

    method: str
    seed: int
    scores: dict[str, float]
    questions: int
    test_questions: int
    added: int
    shared: int
    alpha: float | None
    steps: int
    seconds: float
    base_seconds: float
    seconds_per_1000: float
    memory_mb: float | None
    problems: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)


class Reading(Dataset[Any]):
    """Batches of `(inputs, None, labels)` for methods that run a network of their own."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.labels = windows, torch.from_numpy(windows.labels)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], None, Tensor]:
        return self.windows.batch(rows), None, self.labels[list(rows)]


def span_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the first and the last token. Scores (b, t, 2), labels (b, 2)."""
    return (F.cross_entropy(scores[..., 0], labels[:, 0]) + F.cross_entropy(scores[..., 1], labels[:, 1])) / 2


def run(settings: Settings) -> Result:
    """Learn, answer the test questions, and write `result.json`, `predictions.json` and `null_odds.json` (the official formats), and
    `nbest_predictions.json`.

    The predictions are the best spans; where the odds of there being none are above the threshold, no answer is what counts.
    """
    s = settings
    check(s)
    train, test = read_questions(s.data, "train", s.questions), read_questions(s.data, "dev", s.test_questions)
    folder = Run(s.out, "squad", s, free=FREE)
    folder.belongs(data=fingerprint(train, test))
    file = folder.folder / "result.json"
    if file.exists():
        return Result(**json.loads(file.read_text()))
    base = load_base(s.base, taps=taps_of(s))
    tokenizer = load_tokenizer(base, s.length)
    folder.belongs(tokenizer=tokenizer_fingerprint(tokenizer))
    method = build_method(s, base)
    build_method(s, base).add(Task("dry-run", "span"))  # an unknown part is found before the long work
    lessons = [q for q in train.items if q.teaches]
    if not lessons:
        raise DataError(f"no question of {s.data} has its answer in its context; check answer_start and the contexts")
    windows = make_windows(lessons, tokenizer, s.length, s.stride)
    problems = {f"train: {k}": v for k, v in {**train.problems, **windows.problems}.items()}
    if len(lessons) < len(train):
        problems["train: questions whose answers are not in their context, not learned"] = len(train) - len(lessons)
    base.to(default_accelerator().device)
    data = prepare(s, base, windows)
    base_seconds = data.seconds if isinstance(data, CachedTokens) else 0.0
    steps = max(1, round(s.epochs * len(windows) / s.batch))
    recipe = Recipe(
        steps, s.lr or rate_of(s.method), s.weight_decay, 1.0, optimizer=torch.optim.AdamW, scheduler=linear_decay, seed=s.seed,
        precision=s.precision,
    )  # fmt: skip
    imitated = 0.0
    if s.init == "distilled":
        weights, imitated = imitate(s, base, data, windows, folder)
        method = build_method(s, base, weights)
    afresh = not folder.resume(TASK).exists()
    before = peak_memory_mb(anew=True)
    learned = method.learn(
        Task(TASK, "span", span_loss, seed=s.seed), token_loader(data, windows.lengths(), s.batch), recipe,
        resume=folder.resume(TASK), save_every=s.save_every, progress=s.progress,
    )  # fmt: skip
    after = peak_memory_mb()
    above = after - before if afresh and before is not None and after is not None else None
    method.save(folder.tasks())
    result, answers = test_on(s, method, tokenizer, test)
    answered = [(q.id, a) for q, a in zip(test.items, answers, strict=True)]
    write_json(folder.folder / "predictions.json", {i: a[0].text for i, a in answered})
    write_json(folder.folder / "null_odds.json", {i: a[0].null_odds for i, a in answered})
    write_json(folder.folder / "nbest_predictions.json", {i: [p._asdict() for p in a] for i, a in answered})
    final = Result(
        s.method, s.seed, {k: v for k, v in result["scores"].items() if v == v}, len(train), len(test), method.added(TASK), base.parameter_count(),
        method.alpha(TASK), steps, learned.seconds + imitated, base_seconds, result["seconds"] / len(test) * 1000, above,
        {**problems, **result["problems"]}, {k: v for k, v in asdict(s).items() if k not in FREE},
    )  # fmt: skip
    write_json(file, asdict(final))
    folder.done(TASK)
    folder.done("imitation")
    return final


def check(settings: Settings) -> None:
    """Settings that cannot be meant, before anything is read.

    Raises:
        SideTuningError: there is one.
    """
    s = settings
    at_least_one(s, "batch", "length", "questions", "test_questions", "width", "layers", "rungs", "rank", "n_best")
    if s.stride < 0:
        raise SideTuningError(f"--stride must be 0 or more, not {s.stride}")
    above_zero(s, "epochs", "lr", "distill_epochs")
    if s.init != "as-built" and s.method not in ("sidetune", "ladder"):
        raise SideTuningError(f"--init {s.init} is about how a side starts, and {s.method} has none")
    if Path(s.data).is_file():
        raise SideTuningError(f"{s.data} is one file; give the folder with train*.json and dev*.json")
    if not s.base.startswith("hf:"):
        raise SideTuningError(f"texts need an encoder of transformers as base, hf:NAME or hf:FOLDER, not {s.base}")


def taps_of(settings: Settings) -> list[str]:
    """The inner activations that the side reads: the base's embeddings, for match and the ladder some of its layers too; for the top the layer
    below it."""
    s = settings
    if s.method not in ("sidetune", "ladder"):
        return []
    if s.method == "sidetune" and s.side not in ("top", "match"):
        return [EMBEDDINGS]
    _, layers = layers_of(load_base(s.base))
    if s.method == "sidetune" and s.side == "match":
        return [EMBEDDINGS, *dict.fromkeys((layers[(len(layers) - 1) // 2], layers[-2:][0]))]
    wanted, option = (s.rungs, "rungs") if s.method == "ladder" else (depth(s), "layers")
    if not 1 <= wanted <= len(layers):
        raise SideTuningError(f"--{option} {wanted}: the base has {len(layers)} layers")
    if s.method == "sidetune":
        return [[EMBEDDINGS, *layers][-1 - wanted]]
    return [EMBEDDINGS, *(layers[(k + 1) * len(layers) // s.rungs - 1] for k in range(s.rungs))]


def build_method(settings: Settings, base: Base, weights: Path | None = None) -> Method:
    """The method that the settings name, without its task; `weights` are those that its side starts with."""
    s = settings
    if s.method in ("sidetune", "ladder"):
        side, side_options = side_of(s)
        init = str(weights) if weights else s.init if s.init in ("xavier", "low-energy", "zero") else None
        options: dict[str, Any] = {"side": side, "merge": s.merge, "side_options": side_options, "init": init}
    else:
        options = {"rank": s.rank} if s.method == "lora" else {}
    name = {"ladder": "sidetune", "finetune": "independent"}.get(s.method, s.method)
    return METHODS.build(name, base, options=options)


def side_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Name and options of the side."""
    s = settings
    if s.method == "ladder":
        return "ladder", {"width": s.width}
    if s.side == "top":
        return "top", {}
    return s.side, {"width": s.width, "layers": depth(s)}


def depth(settings: Settings) -> int:
    """Layers of the side of sidetune."""
    return settings.layers or {"match": 2, "top": 1}.get(settings.side, 4)


def imitate(settings: Settings, base: Base, data: Any, windows: Windows, folder: Run) -> tuple[Path, float]:
    """Train a side to return the base's own code (the paper's initialisation); the file of its weights, and the seconds."""
    s = settings
    side, options = side_of(s)
    model = SideTuner(base)
    with seeded(s.seed):
        branch = model.add_task("imitation", side=side, side_options=options, head="identity")
    steps = max(1, round(s.distill_epochs * len(windows) / s.batch))
    found = distill(
        model, "imitation", token_loader(data, windows.lengths(), s.batch), steps=steps, loss=code_distance, seed=s.seed,
        resume=folder.resume("imitation"), save_every=s.save_every, progress=s.progress,
    )  # fmt: skip
    file = folder.folder / "side.safetensors"
    assert branch.side is not None
    with atomic_write(file) as temporary:
        save_file(branch.side.state_dict(), temporary)
    return file, found.seconds


def code_distance(side: Tensor, base: Tensor) -> Tensor:
    """Mean square over the real tokens: cached features of padding are 0."""
    real = base.abs().sum(-1) > 0
    return (side - base).square().mean(-1)[real].mean()


def rate_of(method: str) -> float:
    """The learning rate where none is given."""
    return {"lora": 2e-4, "finetune": 3e-5, "scratch": 1e-4}.get(method, 1e-3)


def linear_decay(optimizer: Any, steps: int) -> Any:
    """A warm-up over a tenth of the steps, then down to 0 in a straight line, as BERT is tuned."""
    warm = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, max(0.0, (steps - k) / max(1, steps - warm)))
    )


def prepare(settings: Settings, base: Base, windows: Windows) -> Any:
    """Windows with cached base features where the method uses them."""
    s = settings
    if s.method not in CACHED:
        return Reading(windows)
    labels = torch.from_numpy(windows.labels)
    return cache_tokens(base, windows, labels, Path(s.cache).expanduser(), progress=s.progress)


def test_on(
    settings: Settings, method: Method, tokenizer: Any, test: Questions
) -> tuple[dict[str, Any], list[list[Prediction]]]:
    """Answer questions with nothing cached, and score the answers; the best ones of each."""
    s = settings
    windows = make_windows(test.items, tokenizer, s.length, s.stride)
    started = time.perf_counter()
    answers = n_best(test.items, windows, scores_of(method, windows, progress=s.progress), s.n_best)
    seconds = time.perf_counter() - started
    best = [a[0] for a in answers]
    scores = squad_metric.score(
        [q.golds for q in test.items], [p.text for p in best], [p.null_odds for p in best], s.threshold
    )
    problems = {f"test: {k}": v for k, v in {**test.problems, **windows.problems}.items()}
    return {"scores": scores._asdict(), "seconds": seconds, "problems": problems}, answers


@torch.no_grad()
def scores_of(
    method: Method, windows: Windows, batch: int = 32, progress: bool = False
) -> dict[int, NDArray[np.float32]]:
    """Scores of every window's tokens, (t, 2) each."""
    from tqdm import tqdm

    found = {}
    batches = ByLength(windows.lengths(), batch, shuffle=False)
    for rows in tqdm(batches, desc="answers", unit="batch", disable=not progress, leave=False):
        out = method({k: v.to(method.base.device) for k, v in windows.batch(rows).items()}, TASK).float().cpu().numpy()
        for k, row in enumerate(rows):
            found[row] = out[k, : len(windows.ids[row])]
    return found


def main(settings: Settings) -> None:
    """Run and print the scores."""
    from rich.console import Console
    from rich.table import Table

    result = run(settings)
    table = Table(title=f"SQuAD, {result.method}, seed {result.seed}, {result.test_questions:,} questions")
    for column in ("exact", "F1", "F1 with an answer", "F1 without", "best F1"):
        table.add_column(column, justify="right")
    names = ("exact", "f1", "has_answer", "no_answer", "best_f1")
    table.add_row(*(f"{result.scores[n]:.1f}" if n in result.scores else "–" for n in names))
    console = Console()
    console.print(table)
    for problem, count in result.problems.items():
        console.print(f"{problem}: {count}", highlight=False)
    console.print(
        f"trained {result.added:,} parameters beside the base's {result.shared:,} in {result.seconds:.0f} s, "
        f"{number_text(result.memory_mb, 0)} MB above the start; 1,000 questions take {result.seconds_per_1000:.0f} s.\n"
        f"predictions: {settings.out}/predictions.json; ask it: sidetuning answer {settings.out} --context FILE \"question\"",
        highlight=False,
    )  # fmt: skip
