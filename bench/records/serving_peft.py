"""The server of PEFT in the record `serving`: our HTTP stack, LoRA adapters, a pass for each task of a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import torch
import tyro
import uvicorn
from torch import nn

import sidetuning as st
from sidetuning.predicting import answers
from sidetuning.serving import served
from sidetuning.serving.app import Limits, Service
from sidetuning.tuner import SideTuner


@dataclass(frozen=True)
class Arguments:
    """Serve LoRA adapters of PEFT."""

    weights: Annotated[str, tyro.conf.Positional]
    """The base's weights."""
    tasks: int = 1
    """How many adapters."""
    port: int = 8000
    """Port to listen at."""


class Adapters(served.Served):
    """Tasks that answer by LoRA: their branches only tell labels and problem."""

    def __init__(self, base: st.Base, count: int) -> None:
        model = SideTuner(base)
        for i in range(count):
            model.add_task(f"task-{i}", side=None, merge="base-only", head=10, seed=i)
        branches: dict[str, Any] = {task: model[task] for task in model.tasks}
        versions = dict.fromkeys(branches, "")
        self.moment = served.Moment(model.base, MappingProxyType(branches), MappingProxyType(versions))
        self.error = None

    def close(self) -> None:
        """Nothing is watched."""


class PeftService(Service):
    """A batch is answered task by task: an adapter changes every layer, so that tasks share no pass."""

    def __init__(self, model: Adapters, net: Any, heads: nn.ModuleDict) -> None:
        self.net, self.heads = net, heads
        super().__init__(model, Limits(timeout=600, max_waiting=100_000), watch=0, quiet=True)

    @torch.no_grad()
    def _run(self, queries: Sequence[served.Query]) -> list[served.Reply]:
        replies = [served.Reply({}, len(queries), 0.0) for _ in queries]
        base = queries[0].moment.base
        x: Any = base.prepare(torch.stack([query.sample for query in queries]))
        asked: dict[str, list[int]] = {}
        for row, query in enumerate(queries):
            for task in query.tasks:
                asked.setdefault(task, []).append(row)
        for task, rows in asked.items():
            start = time.perf_counter()
            self.net.set_adapter(task)
            output = self.heads[task](self.net(x[rows]))
            for row, values in zip(rows, output, strict=True):
                branch, top = queries[row].moment.branches[task], queries[row].top
                replies[row].answers[task] = answers(branch, values, top=top)
                replies[row].side_seconds[task] = time.perf_counter() - start
        return replies


def main(given: Arguments) -> None:
    """Serve."""
    from peft import LoraConfig, get_peft_model

    base = st.load_base("timm:vit_tiny_patch16_224", weights=given.weights)
    service_model = Adapters(base, given.tasks)
    lora = LoraConfig(r=8, target_modules=["qkv"])
    network: Any = base.net
    net: Any = get_peft_model(network, lora, adapter_name="task-0")
    for i in range(1, given.tasks):
        net.add_adapter(f"task-{i}", lora)
    heads = nn.ModuleDict({f"task-{i}": nn.Linear(base.width, 10) for i in range(given.tasks)})
    service = PeftService(service_model, net.eval(), heads)
    uvicorn.Server(uvicorn.Config(service.app, port=given.port, log_config=None, access_log=False)).run()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
