"""On Ray: replicas answer as one server does, and what is spread over two nodes ends as it does in one process."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import sidetuning as st
from conftest import mlp_base

# Ray itself warns, and leaves sockets to the end of the process.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ray = pytest.importorskip("ray")
httpx = pytest.importorskip("httpx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sidetuning.integrations.ray import RayWorkers, application

generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 12, generator=generator)
Y = (X @ torch.randn(12, 3, generator=generator)).argmax(1)
LINEAR: dict[str, Any] = {"side": None, "merge": "base-only", "head": 3}
SIDE: dict[str, Any] = {"side": "mlp", "merge": "alpha", "head": 3}
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 150 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine; this process is connected to them."""
    from ray.cluster_utils import Cluster

    found = Cluster()
    try:
        for _ in range(2):
            found.add_node(**NODE)
        # Workers find this module, too.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        ray.init(address=found.address, log_to_driver=False, runtime_env=environment)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[st.Base, st.CachedFeatures, st.CachedFeatures]:
    base, path = mlp_base(), tmp_path_factory.mktemp("cache")
    halves = [TensorDataset(X[rows], Y[rows]) for rows in (slice(200), slice(200, 300))]
    first, second = (st.cache_features(base, half, path, progress=False) for half in halves)
    return base, first, second


def equal(a: st.SideTuner, b: st.SideTuner) -> bool:
    states = [{name: model[name].state_dict() for name in model.tasks} for model in (a, b)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name][key]) for name, state in states[0].items() for key, value in state.items()
    )


class Slow(nn.Module):
    """A side that takes its time, and leaves a line for each pass."""

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__()
        self.layer, self.file, self.seconds = nn.Linear(12, 16), str(file), seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with Path(self.file).open("a") as file:
                file.write(f"{ray.get_runtime_context().get_node_id()}\n")
            time.sleep(self.seconds)
        return self.layer(x)


def test_a_sweep_ends_as_in_one_process(cluster: Any, data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    shift = 1
    wanted = [
        st.Candidate("fast", SIDE, {"lr": 1e-2, "epochs": 2}),
        st.Candidate("other", SIDE, {"lr": 1e-2, "epochs": 2}, seed=3),
        st.Candidate("weak", LINEAR, solve=True, strength=1e-4),
        st.Candidate("strong", LINEAR, solve=True, strength=10.0),
        st.Candidate("both", LINEAR, {"lr": 1e-3, "steps": 3}, solve=True, strength=0.1),
        # Functions without a name are sent too.
        st.Candidate("own", LINEAR, {"loss": lambda output, target: nn.functional.cross_entropy(output, target)}),
        st.Candidate("customer", LINEAR, solve=True, indices=range(0, 200, 3), relabel=lambda y: (y + shift) % 3),
        st.Candidate("wild", LINEAR, {"loss": lambda output, target: output.sum() * torch.nan}),
    ]
    given: dict[str, Any] = {"validation": held, "batch_size": 32, "progress": False}
    here = st.sweep(base, cached, wanted, **given)
    out = tmp_path / "sweep"
    there = st.sweep(base, cached, wanted, out=out, workers=RayWorkers(), **given)
    assert [(t.name, t.scores, t.error) for t in there.trials] == [(t.name, t.scores, t.error) for t in here.trials]
    assert equal(here.model, there.model) and "Lower the learning rate" in str(there.trials[-1].error)
    # What has ended is not learned again, on workers or here.
    for workers in (RayWorkers(), None):
        again = st.sweep(base, cached, wanted, out=out, workers=workers, **given)
        assert [t.seconds for t in again.trials] == [t.seconds for t in there.trials]


def test_a_node_that_dies_loses_nothing_that_had_ended(cluster: Any, data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    wanted = []
    for i in range(6):
        torch.manual_seed(i)
        side = Slow(tmp_path / f"c{i}.log", 0.15)
        wanted.append(st.Candidate(f"c{i}", {**SIDE, "side": side}, {"epochs": 2, "lr": 1e-2, "save_every": 0.0}))
    given: dict[str, Any] = {"validation": held, "batch_size": 10, "progress": False}
    out, workers = tmp_path / "sweep", RayWorkers()
    third = cluster.add_node(**NODE)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(st.sweep, base, cached, wanted, out=out, workers=workers, **given)
        until(lambda: future.done() or any(third.node_id in text(tmp_path / f"c{i}.log") for i in range(6)))
        time.sleep(1)
        cluster.remove_node(third, allow_graceful=False)
        result = future.result(300)
    passes = {f"c{i}": text(tmp_path / f"c{i}.log").splitlines() for i in range(6)}
    moved = [name for name, lines in passes.items() if len(set(lines)) > 1]
    assert moved
    # Two epochs of twenty batches; where a node died, it went on at its last state, a step or two before.
    assert all(40 <= len(lines) <= (42 if name in moved else 40) for name, lines in passes.items())
    assert all(trial.error is None for trial in result.trials)
    for candidate in wanted:
        candidate.task["side"].seconds = 0.0
    alone = st.sweep(base, cached, wanted, **given)
    assert [t.scores for t in alone.trials] == [t.scores for t in result.trials] and equal(alone.model, result.model)


def test_a_sweep_stops_at_its_budget_and_goes_on(cluster: Any, data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    torch.manual_seed(0)
    slow = {**SIDE, "side": Slow(tmp_path / "log", 0.3)}
    wanted = [
        st.Candidate("solved", LINEAR, solve=True),
        st.Candidate("slow", slow, {"epochs": 3, "lr": 1e-2, "save_every": 0.0}),
    ]
    given: dict[str, Any] = {"validation": held, "batch_size": 10, "out": tmp_path / "sweep", "progress": False}
    cut = st.sweep(base, cached, wanted, workers=RayWorkers(), budget=8.0, **given)
    assert cut.best.name == "solved" and cut.trials[1].error == "not ended within the budget"
    whole = st.sweep(base, cached, wanted, workers=RayWorkers(), **given)
    assert all(t.error is None for t in whole.trials) and len(text(tmp_path / "log").splitlines()) <= 62


def test_what_cannot_be_spread_is_refused_in_a_sentence(cluster: Any, data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    one, given = st.Candidate("c", LINEAR, solve=True), {"validation": held, "progress": False}
    with pytest.raises(st.TaskError, match="workers= needs out="):
        st.sweep(base, cached, [one], workers=RayWorkers(), **given)
    lock = threading.Lock()
    held_lock = st.Candidate("locked", LINEAR, {"loss": lambda output, target: (lock, output.sum())[1]})
    with pytest.raises(st.TaskError, match="'locked' cannot be sent to workers"):
        st.sweep(base, cached, [one, held_lock], out=tmp_path / "a", workers=RayWorkers(), **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        st.sweep(
            base, cached, [st.Candidate("t", LINEAR, {"epoch": 1})], out=tmp_path / "b", workers=RayWorkers(), **given
        )
    dead = st.Candidate("dead", LINEAR, {"loss": lambda output, target: os._exit(1)})
    with pytest.raises(st.SideTuningError, match="'dead' ended its worker, and that of each retry"):
        st.sweep(base, cached, [dead, one], out=tmp_path / "c", workers=RayWorkers(retries=1), **given)
    # The others have ended.
    assert (tmp_path / "c/c/candidate.json").exists()


def test_files_that_a_worker_does_not_find_are_named(cluster: Any, data: Any, tmp_path: Path) -> None:
    base, cached, held = data
    gone = st.CachedFeatures(cached.folder)
    gone.folder = tmp_path / "elsewhere"
    gone._store = dataclasses.replace(gone._store, folder=gone.folder)
    one = st.Candidate("c", LINEAR, solve=True)
    with pytest.raises(
        st.DataError, match=r"the worker on .* lacks what this process has \(.*elsewhere/\w+'\); keep files"
    ):
        st.sweep(base, gone, [one], validation=held, out=tmp_path / "a", workers=RayWorkers(), progress=False)


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def until(found: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [png(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[st.SideTuner, Path]:
    path = tmp_path_factory.mktemp("model")
    made = st.SideTuner(st.load_base("resnet44-cifar10"))
    made.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    made.add_task("tags", side=None, merge="base-only", head=3, problem="labels", seed=1)
    made.save(path)
    return made, path


@pytest.fixture(scope="module")
def served(cluster: Any, model: tuple[st.SideTuner, Path]) -> Iterator[Any]:
    """Two replicas, one to a node, behind a token; the address, and a client that knows the token."""
    from ray import serve

    from sidetuning.serving.app import Limits

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"port": port})
    limits = Limits(max_body=200_000, max_inputs=3)
    # One to a node, and no core for each: candidates need them.
    options = {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}
    made = application(model[1], replicas=2, limits=limits, token="secret", watch=0.1, options=options)
    serve.run(made, name="pets", route_prefix="/")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.headers["authorization"] = "Bearer secret"
            yield client
    finally:
        serve.shutdown()


def ask(client: Any, file: bytes, **more: Any) -> Any:
    return client.post("/predict", json={"inputs": [{"image": base64.b64encode(file).decode()}], **more})


def replicas(client: Any) -> set[str]:
    return set(re.findall(r'sidetuning_tasks\{replica="(\w+)"\} ', client.get("/metrics").text))


def close(found: Any, expected: Any) -> bool:
    return [f["label"] for f in found] == [a.label for a in expected] and all(
        f["value"] == pytest.approx(a.value, abs=1e-5) for f, a in zip(found, expected, strict=True)
    )


def test_replicas_answer_as_one_server(served: Any, model: tuple[st.SideTuner, Path]) -> None:
    expected = model[0].predict(FILES)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: ask(served, FILES[i % 3]), range(60)))
    assert {reply.status_code for reply in replies} == {200}
    for i, reply in enumerate(replies):
        assert all(close(reply.json()["answers"][0][task], expected[task][i % 3]) for task in expected)
    # More than one waited while the base ran, and they shared its next pass.
    assert max(reply.json()["rows"] for reply in replies) > 1
    numbers = served.get("/metrics").text
    counts = re.findall(r'sidetuning_inputs_total\{replica="(\w+)",task="kind"\} (\S+)', numbers)
    assert len({replica for replica, _ in counts}) == 2 and sum(float(count) for _, count in counts) == 60
    assert numbers.count("# TYPE sidetuning_inputs_total counter") == 1
    assert served.get("/readyz").json() == {"ready": True, "tasks": 2, "waiting": 0, "error": None}
    assert "drop" in served.get("/").text and served.get("/openapi.json").json()["info"]["title"] == "sidetuning"


def test_the_token_and_the_limits_hold(served: Any) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}):
        for path in ("/tasks", "/metrics"):
            assert served.get(path, headers=headers).status_code == 401
        assert served.get("/healthz", headers=headers).status_code == 200
    assert ask(served, b"0" * 200_000).status_code == 413
    assert "task 'kinds' is not served; did you mean 'kind'" in ask(served, FILES[0], tasks=["kinds"]).json()["detail"]
    assert "cannot be decoded" in ask(served, b"no image").json()["detail"]


def test_it_answers_below_a_prefix_too(served: Any, model: tuple[st.SideTuner, Path]) -> None:
    from ray import serve

    made = application(model[1], token="other", options={"ray_actor_options": {"num_cpus": 0}})
    serve.run(made, name="below", route_prefix="/below")
    try:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert served.get(f"/below{path}").status_code == 200, path
        assert served.get("/below/tasks").status_code == 401
        headers = {"authorization": "Bearer other"}
        assert served.get("/below/tasks", headers=headers).status_code == 200
        numbers = served.get("/below/metrics", headers=headers)
        assert 'path="/tasks",replica=' in numbers.text and 'path="other"' not in numbers.text
        # The first is that of our log, and Ray adds its own.
        assert len(numbers.headers.get_list("x-request-id")[0]) == 12
    finally:
        serve.delete("below")


def test_tasks_come_and_go_while_replicas_answer(served: Any, model: tuple[st.SideTuner, Path]) -> None:
    made, path = st.load(model[1]), model[1]
    made.add_task("new", side=None, merge="base-only", head=2, labels=["a", "b"], seed=5)
    stop, wrong, counts = threading.Event(), list[Any](), list[int]()

    def keep_asking() -> None:
        while not stop.is_set():
            reply = ask(served, FILES[0])
            counts.append(reply.status_code)
            for task, version in reply.json()["versions"].items():
                answers.setdefault((task, version), reply.json()["answers"][0][task])
                if not same(answers[task, version], reply.json()["answers"][0][task]):
                    wrong.append((task, version))

    answers: dict[tuple[str, str], Any] = {}
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        try:
            made.save(path)
            until(lambda: tasks(served) == {"kind", "tags", "new"})
            expected = {"new": made.predict(FILES[0])["new"]}
            reply = ask(served, FILES[0], tasks=["new"]).json()
            assert close(reply["answers"][0]["new"], expected["new"])
            # Replaced by other weights of the same name.
            made.remove_task("new")
            made.add_task("new", side=None, merge="base-only", head=2, labels=["c", "d"], seed=6)
            made.save(path)
            until(lambda: all(labels(served, "new") == ["c", "d"] for _ in range(6)))
            assert close(ask(served, FILES[0]).json()["answers"][0]["new"], made.predict(FILES[0])["new"])
            made.remove_task("new")
            made.save(path)
            until(lambda: all(tasks(served) == {"kind", "tags"} for _ in range(6)))
            assert ask(served, FILES[0], tasks=["new"]).status_code == 404
        finally:
            stop.set()
        for each in asking:
            each.result(60)
    assert not wrong and set(counts) == {200} and len({version for task, version in answers if task == "new"}) == 2


def same(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x["label"] == y["label"] and x["value"] == pytest.approx(y["value"], abs=1e-5) for x, y in pairs)


def tasks(client: Any) -> set[str]:
    return {task["task"] for task in client.get("/tasks").json()}


def labels(client: Any, name: str) -> Any:
    return next((task["labels"] for task in client.get("/tasks").json() if task["task"] == name), None)


def test_a_replica_that_is_killed_is_replaced(served: Any, model: tuple[st.SideTuner, Path]) -> None:
    expected, before = model[0].predict(FILES), replicas(served)
    statuses, stop = list[int](), threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            reply = ask(served, FILES[0])
            statuses.append(reply.status_code)
            if reply.status_code == 200:
                answers = reply.json()["answers"][0]
                assert all(close(answers[task], expected[task][0]) for task in expected)

    assert len(before) == 2
    actors = [each for each in ray.util.list_named_actors(all_namespaces=True) if "REPLICA" in each["name"]]
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            until(lambda: len(statuses) > 20)
            ray.kill(ray.get_actor(**actors[0]))
            until(lambda: len(replicas(served)) == 2 and replicas(served) != before)
        finally:
            stop.set()
        for each in asking:
            each.result(120)
    # Of four clients, those whose requests it had.
    assert sum(status != 200 for status in statuses) <= 4 and statuses[-1] == 200


def test_what_cannot_be_served_is_refused_in_a_sentence(model: tuple[st.SideTuner, Path], tmp_path: Path) -> None:
    with pytest.raises(st.ArtifactError, match="holds no saved task"):
        application(tmp_path)
    with pytest.raises(st.UnknownNameError, match=r"engine 'onnx'.*onnxruntime"):
        application(model[1], engine="onnx")
    with pytest.raises(st.TaskError, match=r"Ray Serve takes no such replicas= or options= \(.*num_replica'"):
        application(model[1], options={"num_replica": 2})
    with pytest.raises(st.TaskError, match="Ray Serve takes no such replicas="):
        application(model[1], replicas=-1)


def test_the_code_of_the_page_runs(
    cluster: Any, data: Any, model: tuple[st.SideTuner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    served: list[str] = []
    monkeypatch.setattr(serve, "run", lambda app, name: served.append(name))
    page = (Path(__file__).parents[2] / "docs/how-to/machines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    scope: dict[str, Any] = dict(zip(("base", "train", "validation"), data))
    scope["candidates"] = [st.Candidate("linear", LINEAR, solve=True)]
    # This process is connected already, and each node has one core.
    changes = {'address="auto"': "ignore_reinit_error=True", "num_cpus=2": "num_cpus=1"}
    changes |= {"/shared/sweep": str(tmp_path / "sweep"), "/shared/my-model": str(model[1])}
    for block in blocks:
        for before, after in changes.items():
            block = block.replace(before, after)
        exec(compile(block, "machines.md", "exec"), scope)
    assert scope["result"].best.name == "linear" and served == ["pets"]
