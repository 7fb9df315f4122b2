"""One process of several: caches a ViT's features, trains a copy of it, and tells what each took.

`processes.py` starts it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st


def main(model_name: str, images: int, batch: int, steps: int, number: int) -> None:
    """Print one line of JSON from the main process."""
    state = PartialState(cpu=True)
    with st.seeded(0):
        base = st.load_base(f"timm:{model_name}", pretrained=False)
    shape = (images, *base.example.shape[1:])
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.arange(images) % 10)
    # All processes write into one folder, as on a disk that hosts share.
    folder = Path(tempfile.gettempdir(), f"shared-batches-{number}")
    # Whatever is slow only once is not timed.
    base(x[:1])
    state.wait_for_everyone()
    started = time.perf_counter()
    cached = st.cache_features(base, data, folder, batch_size=batch, progress=False)
    state.wait_for_everyone()
    caching = time.perf_counter() - started
    features = float(cached.__getitems__(range(images))[1].out.double().abs().sum())

    model = st.SideTuner(base)
    model.add_task("t", side="copy", head=10, seed=0)
    loader = DataLoader(data, batch)
    st.fit(model, "t", loader, steps=1, optimizer=torch.optim.SGD, progress=False)
    state.wait_for_everyone()
    result = st.fit(model, "t", loader, steps=steps, optimizer=torch.optim.SGD, progress=False)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder)
        weights = sum(float(value.double().abs().sum()) for value in model["t"].state_dict().values())
        about = {"processes": state.num_processes, "caching": caching, "training": result.seconds}
        about |= {"features": features, "weights": weights, "loss": result.losses[-1]}
        sys.stdout.write(f"RESULT{json.dumps(about)}\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
