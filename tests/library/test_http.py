"""A base behind HTTP: each text is sent once, ever; a server that is away, busy, damaged or another one is met."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sidetuning as st
from conftest import in_threads
from sidetuning.integrations import http

WORDS = ["good", "bad", "fine", "poor", "great", "awful", "nice", "sad"]
TEXTS = [f"{word} number {i} ✓" for i in range(20) for word in WORDS]
LABELS = torch.tensor([i % 2 for i in range(len(TEXTS))])


class Server(ThreadingHTTPServer):
    """Embeds texts by their first word; what it was asked is counted."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.seen: Counter[str] = Counter()
        # Status codes to answer with first, and what changes the answers.
        self.failures: list[int] = []
        self.drift, self.key, self.broken = 0.0, "", False
        self.headers: list[str] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1?model=tiny"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        server = self.server
        content = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.headers.append(self.headers.get("authorization", ""))
        if server.failures:
            self.answer(server.failures.pop(0), {"error": "busy"})
        elif server.key and self.headers.get("authorization") != f"Bearer {server.key}":
            self.answer(401, {"error": "no key"})
        elif content["model"] != "tiny":
            self.answer(404, {"error": "no such model"})
        else:
            server.seen.update(content["input"])
            rows = [{"index": i, "embedding": embed(text, server.drift)} for i, text in enumerate(content["input"])]
            self.answer(200, {"data": rows[:1] if server.broken else rows[::-1]})

    def answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def embed(text: str, drift: float = 0.0) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(text.split(" ")[0].encode()).digest()[:4], "little")
    values = np.random.default_rng(seed).standard_normal(8) + drift
    return [float(value) for value in values]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(http.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


def loader(base: st.Base, size: int = 16) -> list[dict[str, Any]]:
    assert base.transform is not None
    starts = range(0, len(TEXTS), size)
    return [{**base.transform.batch(TEXTS[i : i + size]), "labels": LABELS[i : i + size]} for i in starts]


def test_ten_tasks_are_learned_and_each_text_is_sent_once(server: Server, tmp_path: Path) -> None:
    base = st.load_base(server.address)
    assert base.kind == "vector" and base.width == 8
    model = st.SideTuner(base)
    for i in range(10):
        model.add_task(f"t{i}", side=None, merge="base-only", head=2, seed=i)
        st.solve(model, f"t{i}", loader(base), progress=False)
        st.fit(model, f"t{i}", loader(base), epochs=2, progress=False)
    assert st.evaluate(model, "t3", loader(base))["accuracy"] == 1.0
    assert all(server.seen[text] == 1 for text in TEXTS)
    answers = model.predict(["great news", "awful news"], tasks=["t3"], top=1)["t3"]
    assert [answer[0].label for answer in answers] == ["0", "1"]
    model.save(tmp_path / "model")
    # Nothing but the probe is sent again.
    again = st.load(tmp_path / "model", base=st.load_base(server.address))
    x = http.encode(TEXTS[:9], 100)
    assert torch.equal(again(x, "t3"), model(x, "t3"))
    assert all(server.seen[text] == 1 for text in TEXTS)
    with pytest.raises(st.ArtifactError, match="if you trust it, pass"):
        st.load(tmp_path / "model")


@pytest.mark.slow
def test_a_server_that_dies_again_and_again_loses_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    base = st.load_base(server.address)
    port, deaths = server.server_port, 0
    running = [server]

    def back(_: float) -> None:
        if running[0].fileno() < 0:
            running[0] = Server(port)
            running[0].seen = server.seen

    monkeypatch.setattr(time, "sleep", back)
    monkeypatch.setattr(http, "BATCH", 4)
    expected = torch.tensor([embed(text) for text in TEXTS])
    for i in range(0, len(TEXTS), 8):
        running[0].shutdown()
        running[0].server_close()
        deaths += 1
        found = base(base.transform.batch(TEXTS[i : i + 8])).out  # type: ignore[union-attr]
        torch.testing.assert_close(found, expected[i : i + 8])
    assert deaths == 20 and all(server.seen[text] == 1 for text in TEXTS)
    running[0].shutdown()
    running[0].server_close()


def test_a_busy_server_is_asked_again_and_one_that_stays_away_is_told(server: Server) -> None:
    server.failures = [429, 503, 500]
    base = st.load_base(server.address)
    server.failures = [503] * 100
    with pytest.raises(st.SideTuningError, match=r"cannot be reached .*503.* is kept, so try again later"):
        base(http.encode(["new"], 10))
    server.failures = []
    assert base(http.encode(["new"], 10)).out.shape == (1, 8)


def test_another_model_is_refused(server: Server, tmp_path: Path) -> None:
    base = st.load_base(server.address)
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=2)
    model.save_task("t", tmp_path / "t")
    server.drift = 0.1
    with pytest.raises(st.SideTuningError, match="it is another model now"):
        st.load_base(server.address)
    # A base that lives on keeps nothing of it, and still answers from what it has.
    x = http.encode(TEXTS[:2], 100)
    with pytest.raises(st.SideTuningError, match="it is another model now"):
        base(x)
    server.drift = 0.0
    torch.testing.assert_close(base(x).out, torch.tensor([embed(text) for text in TEXTS[:2]]))
    server.drift = 0.1
    # Where nothing is kept, the task itself tells.
    base.net.file.unlink()  # type: ignore[attr-defined]
    with pytest.raises(st.ArtifactError, match="another base"):
        st.SideTuner(st.load_base(server.address)).load_task(tmp_path / "t")


def test_what_is_kept_is_not_believed_where_it_was_changed(server: Server) -> None:
    base = st.load_base(server.address)
    x = http.encode(TEXTS[:4], 100)
    before = base(x).out
    with base.net._open() as connection:  # type: ignore[attr-defined]
        connection.execute("UPDATE rows SET row = zeroblob(32)")
    assert torch.equal(base(x).out, before) and server.seen[TEXTS[0]] == 2
    base.net.file.write_bytes(b"nothing" * 1000)  # type: ignore[attr-defined]
    with pytest.raises(st.CacheError, match=r"is damaged .* delete it"):
        base(x)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.key = "secret-key"
    with pytest.raises(st.SideTuningError, match=f"refuses .*401.*set {http.KEY}"):
        st.load_base(server.address)
    for wrong in ("secret\nword", "schlüssel"):
        monkeypatch.setenv(http.KEY, wrong)
        with pytest.raises(st.SideTuningError, match="set it again") as raised:
            st.load_base(server.address)
        assert wrong[-4:] not in str(raised.value)
    # Files end with a line break.
    monkeypatch.setenv(http.KEY, "secret-key\n")
    model = st.SideTuner(st.load_base(server.address))
    model.add_task("t", side=None, merge="base-only", head=2)
    model.save(tmp_path / "model")
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 3 and not any(b"secret-key" in content for content in files)


def test_mistakes(server: Server) -> None:
    host = server.address.partition("?")[0]
    assert st.load_base(host).net.model == "tiny"  # type: ignore[attr-defined]
    blank = ("http://:word@host/v1", f"{host}?modle=", f"{host}?model=tiny&model=other")
    for address in ("http://", "http://user:word@host/v1", f"{host}?modle=tiny", *blank):
        with pytest.raises(st.UnknownNameError, match="is no address of a server"):
            st.load_base(address)
    with pytest.raises(st.SideTuningError, match=r"refuses \(404.*look at the address"):
        st.load_base(f"{host}?model=other")
    with pytest.raises(st.UnknownNameError, match="does not read taps="):
        st.load_base(server.address, taps=["x"])
    server.broken = True
    with pytest.raises(st.SideTuningError, match="for 3 texts"):
        st.load_base(f"{host}?model=tiny")
    text = "ä" * 20
    assert http.decode(http.encode([text], 11)["text"][0].tolist()) == "ä" * 5


def test_threads_send_a_text_once(server: Server) -> None:
    base = st.load_base(server.address)
    x = http.encode(TEXTS[:32], 100)
    expected, wrong = torch.tensor([embed(text) for text in TEXTS[:32]]), list[int]()

    def ask(i: int) -> None:
        if not torch.allclose(base(x).out, expected):
            wrong.append(i)

    in_threads(ask, 6)
    assert not wrong and all(server.seen[text] == 1 for text in TEXTS[:32])


def test_the_code_of_the_page_runs(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/black-box.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert "http://localhost:8000/v1?model=all-minilm-l6" in block
    scope: dict[str, Any] = {"st": st, "torch": torch}
    exec(block.replace("http://localhost:8000/v1?model=all-minilm-l6", server.address), scope)
    assert server.seen["What a day."] == server.seen["Oh no."] == 1
    assert scope["model"](scope["batch"], "mood").argmax(1).tolist() == [1, 0]
