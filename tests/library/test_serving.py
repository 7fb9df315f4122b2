"""The server over HTTP: answers, limits, the token, numbers, logs and its end, also in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sidetuning as st
from conftest import conv_base
from sidetuning.cli import main
from sidetuning.commands.serve import listening
from sidetuning.transforms import TextTransform, WordTransform

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from fastapi.testclient import TestClient  # noqa: E402

from sidetuning.serving.app import Limits, Service, shown  # noqa: E402
from sidetuning.serving.guards import Guard  # noqa: E402
from sidetuning.serving.served import Served  # noqa: E402

PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8))


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [png(picture) for picture in PICTURES]


def question(*files: bytes, **more: Any) -> dict[str, Any]:
    """A question in JSON."""
    return {"inputs": [{"image": base64.b64encode(file).decode()} for file in files], **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[st.SideTuner, Path]:
    path = tmp_path_factory.mktemp("model")
    made = st.SideTuner(conv_base())
    made.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    made.add_task("tags", side=None, merge="base-only", head=3, problem="labels", seed=1)
    made.add_task("years", side=None, merge="base-only", head=1, problem="numbers", seed=2)
    made.save(path)
    return made, path


def client(path: Path, token: str | None = None, **limits: Any) -> TestClient:
    """A client of a server in this process."""
    service = Service(Served(path, base=conv_base()), Limits(**limits), token=token, watch=0.02)
    return TestClient(service.app)


@pytest.fixture(scope="module")
def web(model: tuple[st.SideTuner, Path]) -> Iterator[TestClient]:
    with client(model[1], max_body=200_000, max_pixels=5000, max_inputs=3) as found:
        yield found


def close(found: Any, expected: Any) -> bool:
    return [f["label"] for f in found] == [a.label for a in expected] and all(
        f["value"] == pytest.approx(a.value, abs=1e-5) for f, a in zip(found, expected, strict=True)
    )


def test_json_and_multipart_give_what_predict_gives(model: tuple[st.SideTuner, Path], web: TestClient) -> None:
    expected = model[0].predict(FILES)
    files = [("files", (f"{i}.png", file)) for i, file in enumerate(FILES)]
    for reply in (
        web.post("/predict", json=question(*FILES)),
        web.post("/predict/files", files=files),
        web.post(
            "/predict",
            json={"inputs": [{"image": f"data:image/png;base64,{base64.b64encode(f).decode()}"} for f in FILES]},
        ),
    ):
        assert reply.status_code == 200, reply.text
        content = reply.json()
        assert all(close(content["answers"][i][task], expected[task][i]) for i in range(3) for task in expected)
        assert content["rows"] == 3 and set(content["seconds"]["sides"]) == set(expected)
    some = web.post("/predict/files", files=files[:1], data={"tasks": ["tags", "kind"], "top": "1"}).json()
    assert list(some["answers"][0]) == ["tags", "kind"] and len(some["answers"][0]["tags"]) == 1


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (question(FILES[0], tasks=["kinds"]), 404, "task 'kinds' is not served; did you mean 'kind'"),
    (question(FILES[0], tasks=[]), 422, "name at least one task"),
    (question(*FILES, FILES[0]), 422, "has 4 inputs, and 3 are allowed"),
    (question(png(np.zeros((80, 80, 3), np.uint8))), 422, "6,400 pixels, and 5,000 are allowed"),
    (question(b"no image"), 422, "cannot be decoded"),
    ({"inputs": [{"image": "§"}]}, 422, "not base64"),
    ({"inputs": [{"text": "hello"}]}, 422, "reads images, not a text"),
    ({"inputs": [{"text": "a", "image": "b"}]}, 422, "one of image, text, pair and words"),
    ({"inputs": []}, 422, "inputs: List should have at least 1 item"),
    (question(FILES[0], top=0), 422, "top"),
    (question(FILES[0], taks=["kind"]), 422, "taks: Extra inputs are not permitted"),
    (question(b"0" * 200_000), 413, "more than 200000 bytes"),
]


@pytest.mark.parametrize(("given", "status", "detail"), REFUSED)
def test_what_cannot_be_answered_is_one_sentence(given: Any, status: int, detail: str, web: TestClient) -> None:
    reply = web.post("/predict", json=given)
    assert reply.status_code == status and detail in reply.json()["detail"] and reply.headers["x-request-id"]


def test_names_that_nobody_reads_are_refused(web: TestClient) -> None:
    file = {"files": ("a.png", FILES[0])}
    for reply in (
        web.post("/predict/files", files=file, data={"task": "tags"}),
        web.post("/predict/files?tasks=tags", files=file),
        web.post("/predict?top=1", json=question(FILES[0])),
    ):
        assert reply.status_code == 422 and "is not read" in reply.json()["detail"]


def test_a_map_has_null_where_it_has_no_number() -> None:
    values = torch.tensor([[[1.0, float("nan")], [float("inf"), -2.0]]])
    assert shown(values) == {"shape": [1, 2, 2], "values": [[[1.0, None], [None, -2.0]]]}


def test_a_token_that_no_header_holds_is_refused_at_the_start(model: tuple[st.SideTuner, Path]) -> None:
    for token in ("schlüssel", "", "a\n"):
        with pytest.raises(st.TaskError, match="use printable ASCII"):
            client(model[1], token=token)


def test_no_more_bodies_than_may_wait_are_read_and_health_is_told_all_the_same() -> None:
    sent: list[Any] = []
    ended: list[dict[str, Any]] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        guard = Guard(never, None, 9, 1, ended.append)

        def ask(method: str) -> Any:
            scope: Any = {"type": "http", "method": method, "path": "/x", "headers": []}
            return guard(scope, never, send)  # type: ignore[arg-type]

        waits = asyncio.create_task(ask("POST"))
        await asyncio.sleep(0)
        await ask("POST")
        await ask("GET")
        waits.cancel()
        await asyncio.wait([waits])

    asyncio.run(run())
    assert [message["status"] for message in sent if "status" in message] == [503, 200]
    assert (b"retry-after", b"1") in sent[0]["headers"] and b"ask again in a moment" in sent[1]["body"]
    assert [notes["status"] for notes in ended] == [503, 200, 500]


def test_a_body_without_a_length_is_counted_while_it_comes(web: TestClient) -> None:
    reply = web.post("/predict", content=iter([b'{"inputs": ["', *[b"a" * 50_000] * 5]))
    assert reply.status_code == 413 and "more than 200000 bytes" in reply.json()["detail"]
    form = {"content-type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    reply = web.post("/predict/files", content=iter([start, *[b"a" * 50_000] * 5]), headers=form)
    assert reply.status_code == 413
    half = web.post("/predict", content=b'{"inputs": [', headers={"content-type": "application/json"})
    assert half.status_code == 422 and "JSON" in half.json()["detail"]


def test_the_token_is_asked_for_everything_but_health_and_the_page(model: tuple[st.SideTuner, Path]) -> None:
    with client(model[1], token="secret") as web:
        for path in ("/tasks", "/metrics", "/predict"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                reply = web.get(path, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert [web.get(path).status_code for path in ("/", "/healthz", "/readyz", "/openapi.json")] == [200] * 4
        assert web.get("/tasks", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_prefix_of_a_proxy_changes_nothing(model: tuple[st.SideTuner, Path]) -> None:
    service = Service(Served(model[1], base=conv_base()), token="secret", watch=0)
    with TestClient(service.app, root_path="/below", headers={"authorization": "Bearer secret"}) as web:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert web.get(f"/below{path}", headers={"authorization": ""}).status_code == 200, path
        for path in ("/below/tasks", "/below", "/below/below/healthz", "/healthz/"):
            assert web.get(path, headers={"authorization": ""}).status_code == 401, path
        assert web.get("/below/tasks").status_code == 200
        numbers = web.get("/below/metrics").text
        assert 'path="/tasks",status="200"' in numbers and "below" not in numbers


def test_tasks_numbers_and_state_are_told(web: TestClient) -> None:
    web.post("/predict", json=question(FILES[0], tasks=["kind"]))
    tasks = {task["task"]: task for task in web.get("/tasks").json()}
    assert tasks["kind"]["labels"] == ["cat", "dog"] and tasks["years"]["problem"] == "numbers"
    assert {task["reads"] for task in tasks.values()} == {"image"}
    web.get("/nowhere/at/all")
    text = web.get("/metrics").text
    assert re.search(r'sidetuning_inputs_total\{task="kind"\} \d', text) and "sidetuning_tasks 3.0" in text
    assert 'path="other",status="404"' in text and "nowhere" not in text
    assert web.get("/readyz").json() == {"ready": True, "tasks": 3, "waiting": 0, "error": None}


def test_the_page_may_run_its_own_script_and_ask_this_server_alone(web: TestClient) -> None:
    reply = web.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
    assert not re.search(r'(?:src|href)="|https?://|style="|onclick', reply.text)


def test_too_many_and_too_slow_requests_are_told_so(
    model: tuple[st.SideTuner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free, encode = threading.Event(), st.Base.encode

    def slow(self: st.Base, inputs: Any) -> st.Features:
        assert free.wait(20)
        return encode(self, inputs)

    with client(model[1], max_waiting=1, timeout=0.5) as web:
        monkeypatch.setattr(st.Base, "encode", slow)
        with ThreadPoolExecutor(4) as pool:
            replies = [pool.submit(web.post, "/predict", json=question(FILES[0], tasks=["kind"])) for _ in range(4)]
            found = [reply.result() for reply in replies]
        free.set()
        assert {reply.status_code for reply in found} == {503, 504}
        late = next(reply for reply in found if reply.status_code == 504)
        busy = next(reply for reply in found if reply.status_code == 503)
        assert "no answer within 0.5 seconds" in late.json()["detail"]
        assert "wait already" in busy.json()["detail"] and busy.headers["retry-after"] == "1"
        # The server goes on.
        assert web.post("/predict", json=question(FILES[0], tasks=["kind"])).status_code == 200


def test_texts_and_pairs_of_texts_are_answered(encoder: Path, tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base(f"hf:{encoder}"))
    model.add_task("mood", side="mlp", head=2, labels=["good", "bad"], seed=0)
    model.save(tmp_path)
    texts = ["one two three", "four", ("one two", "three four five")]
    service = Service(Served(tmp_path), watch=0)
    given = [{"pair": text} if isinstance(text, tuple) else {"text": text} for text in texts]
    with TestClient(service.app) as web:
        found = web.post("/predict", json={"inputs": given}).json()["answers"]
        assert web.post("/predict", json={"inputs": [{"text": ""}]}).status_code == 200
        reply = web.post("/predict", json=question(FILES[0]))
        assert reply.status_code == 422 and "reads texts, not an image" in reply.json()["detail"]
    assert all(close(answer["mood"], model.predict(text)["mood"]) for answer, text in zip(found, texts, strict=True))


def test_words_are_answered_each_and_are_no_whole_texts(encoder: Path, tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base(f"hf:{encoder}"))
    names = ["O", "B-LOC"]
    options: dict[str, Any] = {"head": "tokens", "head_options": {"outputs": 2}, "labels": names}
    model.add_task("ner", side=None, merge="base-only", seed=0, **options)
    own = model.base.transform
    assert isinstance(own, TextTransform)
    model["ner"].transform = WordTransform(own.max_length, own.names, own.tokenizer)
    model.add_task("mood", side="mlp", head=2, labels=["good", "bad"], seed=0)
    model.save(tmp_path)
    words, text = ["old", "tower", "\0"], "the red river, made by it."
    with TestClient(Service(Served(tmp_path), watch=0).app) as web:
        inputs: list[dict[str, Any]] = [{"words": words}, {"text": text}]
        first, second = web.post("/predict", json={"inputs": inputs, "tasks": ["ner"]}).json()["answers"]
        expected = model.predict([words, text], ["ner"])["ner"]
        for found, wanted in zip((first["ner"], second["ner"]), expected, strict=True):
            assert [part["word"] for part in found] == [part.word for part in wanted]
            assert all(close(part["answers"], each.answers) for part, each in zip(found, wanted, strict=True))
        assert first["ner"][2]["answers"] == [] and len(second["ner"]) == 8
        both = web.post("/predict", json={"inputs": [{"text": text}], "top": 1}).json()["answers"][0]
        assert len(both["mood"]) == 1 and [len(part["answers"]) for part in both["ner"]] == [1] * 8
        wrong = {"words": ({"words": words}, None), "a pair": ({"pair": ["a", "b"]}, ["ner"])}
        for what, (given, tasks) in wrong.items():
            reply = web.post("/predict", json={"inputs": [given], "tasks": tasks})
            assert reply.status_code == 422 and f"is not asked with {what}" in reply.json()["detail"]
        assert web.post("/predict", json={"inputs": [{"words": []}], "tasks": ["ner"]}).status_code == 422


def test_options_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [("--max-batch", "0"), ("--timeout", "0"), ("--wait", "-1"), ("--wait", "nan"), ("--timeout", "inf")]
    for option, value in (*wrong, ("--watch", "nan"), ("--max-body", "inf"), ("--max-pixels", "nan")):
        with pytest.raises(SystemExit, match="1"):
            main(["serve", str(tmp_path), f"{option}={value}"])
        assert f"{option} is " in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1, port {port} .*choose another"):
            listening("127.0.0.1", port)
    with pytest.raises(OSError, match="--port is from 0 to 65535, not 70000"):
        listening("127.0.0.1", 70_000)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_a_process_that_is_told_to_stop_answers_what_is_under_way(tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    model.save(tmp_path / "model")
    expected = model.predict(FILES[0])["kind"]
    port = free_port()
    command = [sys.executable, "-m", "sidetuning", "serve", str(tmp_path / "model"), f"--port={port}"]
    log = (tmp_path / "log").open("w+", encoding="utf-8")
    process = subprocess.Popen(command, stderr=log, env={**os.environ, "SIDETUNING_TOKEN": "s"})
    address, headers = f"http://127.0.0.1:{port}", {"authorization": "Bearer s"}
    statuses: list[int] = []
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{address}/readyz").json()["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.1)

        def ask() -> None:
            try:
                while True:
                    reply = httpx.post(f"{address}/predict", json=question(FILES[0]), headers=headers, timeout=30)
                    statuses.append(reply.status_code)
                    assert close(reply.json()["answers"][0]["kind"], expected)
            except httpx.ConnectError:
                # It listens no more; whatever it had taken was answered.
                return

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            for each in asking:
                each.result(30)
        assert process.wait(30) == 0 and set(statuses) == {200}
    finally:
        process.kill()
        process.wait()
        log.close()
    errors = (tmp_path / "log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines if line["event"] != "request"] == ["listening", "serving", "stopped"]
    assert lines[0]["address"] == address
    logged = [line for line in lines if line.get("path") == "/predict"]
    assert len(logged) == len(statuses) and all(line["status"] == 200 and line["rows"] >= 1 for line in logged)
    assert errors.endswith("Stopped.\n")
