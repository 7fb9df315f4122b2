"""Small bases, data and paths that the tests share."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sidetuning as st
from text_parts import number_questions, write_encoder

# Outputs of the original authors' code; a larger folder of theirs is optional.
GOLDEN = Path(__file__).parent / "data/golden.safetensors"
FAKE_HABITAT = Path(__file__).parent / "bench" / "fake_habitat"
SHARED = Path(__file__).parents[2] / "shared"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


def conv_net() -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *second)


def network(base: st.Base) -> nn.Module:
    """The network of a base that is a module."""
    assert isinstance(base.net, nn.Module)
    return base.net


def side_of(branch: st.Branch) -> nn.Module:
    """The side of a branch that has one."""
    assert branch.side is not None
    return branch.side


def side_output(branch: st.Branch, inputs: st.Input, features: st.Features) -> Tensor:
    """What the side of a branch makes of a prepared input."""
    output = branch.side_output(inputs, features)
    assert output is not None
    return output


def conv_base(taps: tuple[str, ...] = ()) -> st.Base:
    """Images (b, 3, 32, 32) -> (b, 16)."""
    with st.seeded(1):
        return st.Base(conv_net(), example=torch.zeros(1, 3, 32, 32), taps=taps, mean=[0.5] * 3, std=[0.2] * 3)


def map_base(taps: tuple[str, ...] = ()) -> st.Base:
    """Images (b, 3, 32, 32) -> (b, 16, 8, 8)."""
    with st.seeded(1):
        return st.Base(conv_net()[:5], example=torch.zeros(1, 3, 32, 32), taps=taps)


class TinyBert(nn.Module):
    """Token ids and a mask -> (b, t, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)


def sequence_base(taps: tuple[str, ...] = ()) -> st.Base:
    example = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with st.seeded(1):
        return st.Base(TinyBert(), example=example, taps=taps)


def mlp_base(taps: tuple[str, ...] = ()) -> st.Base:
    """Vectors (b, 12) -> (b, 16)."""
    with st.seeded(1):
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16))
        return st.Base(net, example=torch.zeros(1, 12), taps=taps)


BASES = {"conv": conv_base, "map": map_base, "sequence": sequence_base, "mlp": mlp_base}
TAPS = {"conv": ("2", "4"), "map": ("2", "4"), "sequence": ("embedding", "layer"), "mlp": ("0", "1")}


def inputs(kind: str, batch: int = 4, seed: int = 0) -> st.Input:
    generator = torch.Generator().manual_seed(seed)
    if kind == "sequence":
        mask = torch.ones(batch, 6, dtype=torch.long)
        mask[0, 4:] = 0
        return {"input_ids": torch.randint(0, 50, (batch, 6), generator=generator), "attention_mask": mask}
    shape = (batch, 12) if kind == "mlp" else (batch, 3, 32, 32)
    return torch.rand(shape, generator=generator)


def write_parquet(folder: Path, split: str, images: np.ndarray, labels: list[int]) -> None:
    """A split in the Hub's layout."""
    cells = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"img": cells, "fine_label": labels})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def in_threads(work: Callable[[int], object], count: int = 4) -> None:
    """Call `work(i)` in `count` threads at once, and wait for all."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="session")
def tiny_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 classes, 12 training and 4 test images each: noise around a colour per class."""
    folder = tmp_path_factory.mktemp("tiny-cifar")
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 215, (20, 1, 1, 3))
    for split, n in (("train", 12), ("test", 4)):
        labels = [c for c in range(20) for _ in range(n)]
        images = (colours[labels] + rng.normal(0, 20, (len(labels), 32, 32, 3))).clip(0, 255).astype(np.uint8)
        write_parquet(folder, split, images, labels)
    return folder


@pytest.fixture
def habitat(fake_habitat: None, tmp_path: Path) -> str:
    """Name of an environment of the stand-in for Habitat."""
    (tmp_path / "nav.yaml").write_text("")
    return f"habitat:{tmp_path / 'nav.yaml'}"


@pytest.fixture
def fake_habitat(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the stand-in for Habitat where it is imported from, for one test."""
    monkeypatch.syspath_prepend(str(FAKE_HABITAT))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "habitat"]:
        del sys.modules[name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a file system of a size such as "256k", really full when it is; a second call resizes it.

    Needs to be root.
    """
    folder = tmp_path / "disk"
    folder.mkdir()

    def disk(size: str) -> Path:
        option = f"size={size}" if not folder.is_mount() else f"remount,size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield disk
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("the reference material is not here")
    return SHARED


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a tokenizer of its own, as a folder of transformers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    write_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def text_base(encoder: Path) -> st.Base:
    """A base of texts, with its tokenizer."""
    return st.load_base(f"hf:{encoder}")


@pytest.fixture(scope="session")
def questions_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 questions to train on and 60 to test on, in SQuAD's layout."""
    folder = tmp_path_factory.mktemp("squad")
    number_questions(folder / "train.json", 240, 0)
    number_questions(folder / "dev.json", 60, 1)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window; tests that need it are skipped where it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium or chromedriver is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads add in another order than the one that was used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
