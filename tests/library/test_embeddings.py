"""A base served as embeddings: what OpenAI's clients and `load_base("http://…")` get is what the base gives."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sidetuning as st
from conftest import conv_base, in_threads
from sidetuning.cli import main
from sidetuning.errors import TaskError
from sidetuning.heads import pooled
from sidetuning.integrations import http

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from sidetuning.serving.app import Limits
from sidetuning.serving.embeddings import EmbeddingService

TEXTS = ["one two three", "four", "five six"]


def expected(base: st.Base, texts: list[str]) -> torch.Tensor:
    """Each text alone."""
    rows = []
    assert base.transform is not None
    for text in texts:
        inputs = base.prepare(base.transform.batch([text]))
        rows.append(pooled(base.encode(inputs).out, base.kind, inputs)[0])
    return torch.stack(rows)


@pytest.fixture
def web(text_base: st.Base) -> Iterator[TestClient]:
    with TestClient(EmbeddingService(text_base, "tiny", Limits(max_inputs=3, max_body=5000), quiet=True).app) as found:
        yield found


def asked(web: TestClient, given: Any, **more: Any) -> Any:
    return web.post("/v1/embeddings", json={"model": "tiny", "input": given, **more})


def test_embeddings_are_those_of_the_base_alone_in_both_forms_and_from_threads(
    web: TestClient, text_base: st.Base
) -> None:
    truth = expected(text_base, TEXTS).numpy()
    found = asked(web, TEXTS).json()
    assert found["model"] == "tiny" and [row["index"] for row in found["data"]] == [0, 1, 2]
    np.testing.assert_allclose([row["embedding"] for row in found["data"]], truth, atol=1e-5)
    coded = asked(web, TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), truth[0], atol=1e-5)

    right: list[bool] = []

    def ask(i: int) -> None:
        row = asked(web, TEXTS[i % 3]).json()["data"][0]["embedding"]
        right.append(np.allclose(row, truth[i % 3], atol=1e-5))

    in_threads(ask, 12)
    assert right == [True] * 12
    assert web.get("/v1/models").json()["data"][0]["id"] == "tiny" and web.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"model": "tin", "input": "a"}, 404, "no model 'tin' here; the only one is 'tiny'"),
        ({"model": "tiny", "input": ["a"] * 4}, 422, "has 4 texts, and 3 are allowed"),
        ({"model": "tiny", "input": []}, 422, "input"),
        ({"model": "tiny", "input": "a", "dimensions": 8}, 422, "dimensions"),
        ({"model": "tiny", "input": [1, 2]}, 422, "input"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    web: TestClient, given: dict[str, Any], status: int, said: str
) -> None:
    reply = web.post("/v1/embeddings", json=given)
    assert reply.status_code == status and said in reply.json()["error"]["message"]


def test_bodies_and_clients_are_guarded_and_images_are_refused(web: TestClient, text_base: st.Base) -> None:
    assert asked(web, "a" * 6000).status_code == 413
    with TestClient(EmbeddingService(text_base, "tiny", token="secret", quiet=True).app) as locked:
        assert asked(locked, "a").status_code == 401
        given = {"model": "tiny", "input": "a"}
        assert locked.post("/v1/embeddings", json=given, headers={"authorization": "Bearer secret"}).status_code == 200
    with pytest.raises(TaskError, match="reads images"):
        EmbeddingService(conv_base(), "toy")


def test_a_task_on_the_server_is_the_task_on_the_base_itself(
    text_base: st.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    monkeypatch.setenv(http.CACHE, str(tmp_path / "kept"))
    monkeypatch.setenv(http.KEY, "secret")
    listener = socket.create_server(("127.0.0.1", 0))
    service = EmbeddingService(text_base, "tiny", token="secret", quiet=True)
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        remote = st.load_base(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        texts = [f"{word} {i}" for i in range(20) for word in ("one", "two")]
        assert remote.transform is not None
        found = remote(remote.transform.batch(texts))
        torch.testing.assert_close(found.out, expected(text_base, texts), atol=1e-5, rtol=1e-4)
    finally:
        server.should_exit = True
        thread.join()


def test_options_that_embeddings_do_not_read_are_refused(
    encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", f"hf:{encoder}", "--base-only", "--watch", "3"])
    assert ended.value.code == 1 and "--base-only does not read --watch" in capsys.readouterr().err
