"""Question answering (paper, section 4.2): SQuAD v2 on any encoder of transformers, by side-tuning and others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import sidetuning as st
from sidetuning.cache import CachedTokens, cache_tokens, token_loader
from sidetuning.errors import DataError, SideTuningError
from sidetuning.files import atomic_write, write_json
from sidetuning.launch import default_accelerator
from sidetuning.terminal import say
from sidetuning_bench import options
from sidetuning_bench.language import metric
from sidetuning_bench.language.methods import CACHED, METHODS, RATES, BranchOptions
from sidetuning_bench.language.questions import Questions, Windows, fingerprint, make_windows, n_best, read_questions
from sidetuning_bench.language.tokenizer import load_tokenizer, tokenizer_fingerprint
from sidetuning_bench.language.top import layers_of
from sidetuning_bench.methods import Method, Recipe, Task
from sidetuning_bench.options import Count, MethodOptions, Natural, Positive, RunOptions, Training
from sidetuning_bench.report_runs import FAMILIES, Family, scaled
from sidetuning_bench.results import number_text
from sidetuning_bench.runs import Run, peak_memory_mb, read_result, write_result

TASK = "squad"


@dataclass(frozen=True)
class Settings:
    """Answer questions about paragraphs, and say where there is no answer."""

    data: str = "rajpurkar/squad_v2"
    """A SQuAD folder (train*.json, dev*.json), or a data set on the Hub in the layout of squad_v2."""
    base: str = "hf:google-bert/bert-base-uncased"
    """An encoder of transformers: hf:NAME or hf:FOLDER; its tokenizer comes with it."""
    epochs: Positive = 2.0
    """Passes over the training windows."""
    length: Count = 384
    """Tokens of a window."""
    stride: Natural = 128
    """Tokens that two successive windows of a context share."""
    threshold: float = 0.0
    """There is no answer where its score exceeds that of the best span by more than this."""
    n_best: Count = 5
    """Number of answers to each question in nbest_predictions.json."""
    questions: Count | None = None
    """Number of training questions, spread evenly; None for all."""
    test_questions: Count | None = None
    """Number of test questions, spread evenly; None for all."""
    answerable: bool = False
    """Leave out the questions without an answer, as SQuAD v1.1 has none; then each is answered."""
    method: Annotated[MethodOptions, options.choice(METHODS)] = METHODS["sidetune"]
    training: Training = field(default=Training(batch=16, weight_decay=0.01))
    run: RunOptions = field(default=RunOptions(out="runs/squad", save_every=30.0))


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        scores: the official metric on the test questions, in %; see `metric.Scores`.
        added, shared: parameters that were trained, and those of the base.
        alpha: weight of the base in the merge; None where there is none.
        steps, seconds: of training; the seconds include distilling the side, and not the base's features.
        base_seconds: time of the base's features of the training windows, whichever run computed them.
        seconds_per_1000: time of answering 1,000 test questions, base included.
        memory_mb: peak while training above what there was before, in MB; None where it is not known.
        problems: what was met in the data, with its count.
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


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings from flat names, as run.json and results have them; what the method does not read is left out."""
    default = replace(Settings(), method=METHODS[values["method"]])
    read = set(options.flat(default)) & set(values) - {"method"}
    return options.with_values(default, {name: values[name] for name in read})


def run(settings: Settings) -> Result:
    """Learn, answer the test questions, and write the result and the predictions.

    `predictions.json` and `null_odds.json` have the official formats: the best span of each question, and how much
    higher no answer scores. Where that is above the threshold, there is no answer. `nbest_predictions.json` has more.
    """
    check_settings(settings)
    train = read_questions(settings.data, "train", settings.questions, settings.answerable)
    test = read_questions(settings.data, "dev", settings.test_questions, settings.answerable)
    folder = Run(settings.run.out, "squad", settings)
    folder.belongs(data=fingerprint(train, test))
    file = folder.folder / "result.json"
    if file.exists():
        return read_result(Result, file)
    base = st.load_base(settings.base, taps=taps_of(settings))
    tokenizer = load_tokenizer(base, settings.length)
    folder.belongs(tokenizer=tokenizer_fingerprint(tokenizer))
    # An unknown part is found before the long work.
    settings.method.build(base, settings.run.seed).add(Task("dry-run", "span"))
    windows, problems = lessons(settings, train, tokenizer)
    base.to(default_accelerator().device)
    method, costs = learn(settings, base, windows, folder)
    method.save(folder.tasks())
    started = time.perf_counter()
    asked = make_windows(test.items, tokenizer, settings.length, settings.stride)
    answers = n_best(test.items, asked, scores_of(method, asked, settings.run.progress), settings.n_best)
    seconds = time.perf_counter() - started
    by_id = {question.id: spans for question, spans in zip(test.items, answers, strict=True)}
    write_json(folder.folder / "predictions.json", {name: spans[0].text for name, spans in by_id.items()})
    write_json(folder.folder / "null_odds.json", {name: spans[0].null_odds for name, spans in by_id.items()})
    best = {name: [span._asdict() for span in spans] for name, spans in by_id.items()}
    write_json(folder.folder / "nbest_predictions.json", best)
    given, odds = [spans[0].text for spans in answers], [spans[0].null_odds for spans in answers]
    threshold = float("inf") if settings.answerable else settings.threshold
    scores = metric.score([question.golds for question in test.items], given, odds, threshold)._asdict()
    result = Result(
        method=settings.method.name,
        seed=settings.run.seed,
        # NaN, where there are no such questions, is left out.
        scores={name: value for name, value in scores.items() if value == value},
        questions=len(train),
        test_questions=len(test),
        added=method.added(TASK),
        shared=base.parameter_count(),
        alpha=method.alpha(TASK),
        seconds_per_1000=seconds / len(test) * 1000,
        problems={**problems, **{f"test: {k}": n for k, n in {**test.problems, **asked.problems}.items()}},
        settings={name: value for name, value in options.flat(settings).items() if name not in options.FREE},
        **costs,
    )
    write_result(file, result)
    folder.done(TASK)
    folder.done("imitation")
    return result


def check_settings(settings: Settings) -> None:
    """Check the settings before anything is read.

    Raises:
        SideTuningError: one cannot be meant.
    """
    options.check(settings)
    if Path(settings.data).is_file():
        raise SideTuningError(f"{settings.data} is one file; give the folder with train*.json and dev*.json")
    if not settings.base.startswith("hf:"):
        raise SideTuningError(
            f"texts need an encoder of transformers as base, hf:NAME or hf:FOLDER, not {settings.base}"
        )


def taps_of(settings: Settings) -> list[str]:
    """The inner activations of the base that the method reads."""
    method = settings.method
    return method.taps(layers_of(st.load_base(settings.base))[1]) if isinstance(method, BranchOptions) else []


def lessons(settings: Settings, train: Questions, tokenizer: Any) -> tuple[Windows, dict[str, int]]:
    """The training windows, and what was met in the data."""
    known = [question for question in train.items if question.teaches]
    if not known:
        raise DataError(f"no question of {settings.data} has its answer in its context; check answer_start")
    windows = make_windows(known, tokenizer, settings.length, settings.stride)
    problems = {f"train: {name}": count for name, count in {**train.problems, **windows.problems}.items()}
    if len(known) < len(train):
        problems["train: questions whose answers are not in their context, not learned"] = len(train) - len(known)
    return windows, problems


def prepare(settings: Settings, base: st.Base, windows: Windows) -> Any:
    """Windows, with cached base features where the method never trains the base."""
    if settings.method.name not in CACHED:
        return windows
    folder = Path(settings.run.cache).expanduser()
    return cache_tokens(base, windows, torch.from_numpy(windows.labels), folder, progress=settings.run.progress)


def learn(settings: Settings, base: st.Base, windows: Windows, folder: Run) -> tuple[Method, dict[str, Any]]:
    """Train the method; with it, what training cost."""
    chosen, run, training = settings.method, settings.run, settings.training
    data = prepare(settings, base, windows)
    imitated = 0.0
    if isinstance(chosen, BranchOptions) and chosen.init == "distilled":
        file, imitated = imitate(settings, chosen, base, data, windows, folder)
        chosen = options.with_values(chosen, {"init": str(file)})
    method = chosen.build(base, run.seed)
    usual = RATES.get(chosen.network()[0] if isinstance(chosen, BranchOptions) else chosen.name, 1e-3)
    lr, optimizer = training.lr or usual, torch.optim.AdamW
    steps = max(1, round(settings.epochs * len(windows) / training.batch))
    recipe = Recipe(steps, lr, training.weight_decay, 1.0, optimizer, linear_decay, run.seed, training.precision)
    file = folder.resume(TASK)
    resumed, before = file.exists(), peak_memory_mb(anew=True)
    task, loader = Task(TASK, "span", span_loss, seed=run.seed), token_loader(data, windows.lengths(), training.batch)
    learned = method.learn(task, loader, recipe, resume=file, save_every=run.save_every, progress=run.progress)
    after = peak_memory_mb()
    return method, {
        "steps": steps,
        "seconds": learned.seconds + imitated,
        "base_seconds": data.seconds if isinstance(data, CachedTokens) else 0.0,
        "memory_mb": None if resumed or before is None or after is None else after - before,
    }


def imitate(
    settings: Settings, chosen: BranchOptions, base: st.Base, data: Any, windows: Windows, folder: Run
) -> tuple[Path, float]:
    """Train a side to return the base's own code (the paper's initialisation): the file of its weights, and seconds."""
    side, side_options = chosen.network()
    model, run, batch = st.SideTuner(base), settings.run, settings.training.batch
    with st.seeded(run.seed):
        branch = model.add_task("imitation", side=side, side_options=side_options, head="identity")
    given: dict[str, Any] = {"seed": run.seed, "save_every": run.save_every, "progress": run.progress}
    steps = max(1, round(chosen.distill_epochs * len(windows) / batch))
    loader, resume = token_loader(data, windows.lengths(), batch), folder.resume("imitation")
    found = st.distill(model, "imitation", loader, steps=steps, loss=code_distance, resume=resume, **given)
    file = folder.folder / "side.safetensors"
    assert branch.side is not None
    with atomic_write(file) as temporary:
        save_file(branch.side.state_dict(), temporary)
    return file, found.seconds


def span_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the first and the last token. Scores (b, t, 2), labels (b, 2)."""
    return (F.cross_entropy(scores[..., 0], labels[:, 0]) + F.cross_entropy(scores[..., 1], labels[:, 1])) / 2


def code_distance(side: Tensor, base: Tensor) -> Tensor:
    """Mean square over the real tokens: cached features of padding are 0."""
    real = base.abs().sum(-1) > 0
    return (side - base).square().mean(-1)[real].mean()


def linear_decay(optimizer: Any, steps: int) -> Any:
    """A warm-up over a tenth of the steps, then down to 0 in a straight line, as BERT is tuned."""
    warm = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, max(0.0, (steps - k) / max(1, steps - warm)))
    )


@torch.no_grad()
def scores_of(method: Method, windows: Windows, progress: bool = False) -> dict[int, NDArray[np.float32]]:
    """Scores of every window's tokens, (t, 2) each; nothing is cached."""
    from tqdm import tqdm

    found, order = {}, np.argsort(windows.lengths(), kind="stable").tolist()
    batches = [order[i : i + 32] for i in range(0, len(order), 32)]
    for rows in tqdm(batches, desc="answers", unit="batch", disable=not progress, leave=False):
        out = method({k: v.to(method.base.device) for k, v in windows.batch(rows).items()}, TASK).float().cpu().numpy()
        found.update({row: out[k, : len(windows.ids[row])] for k, row in enumerate(rows)})
    return found


FAMILIES["squad"] = Family(
    "SQuAD v2",
    partial(read_result, Result),
    {
        "F1, %": lambda result: result.scores.get("f1"),
        "Exact, %": lambda result: result.scores.get("exact"),
        "F1 with an answer, %": lambda result: result.scores.get("has_answer"),
        "F1 without, %": lambda result: result.scores.get("no_answer"),
        "Best F1, %": lambda result: result.scores.get("best_f1"),
        "Area, %": lambda result: result.scores.get("area"),
        "Parameters trained": scaled("added"),
        "Training, s": scaled("seconds"),
        "1,000 answers, s": scaled("seconds_per_1000"),
    },
)


def main(settings: Settings) -> None:
    """Run and print the result."""
    result, out = run(settings), settings.run.out
    say(f"SQuAD, {result.method}, seed {result.seed}, {result.test_questions:,} questions")
    for column, read in FAMILIES["squad"].columns.items():
        say(f"{column}: {number_text(read(result))}")
    for problem, count in result.problems.items():
        say(f"{problem}: {count}")
    say(f'predictions: {out}/predictions.json; ask it: sidetuning bench answer {out} --context FILE "question"')
