"""The server's page in a browser: a dropped photograph, a text, a token, on a phone and in the dark."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidetuning as st
from conftest import conv_base

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from sidetuning.serving.app import Service  # noqa: E402
from sidetuning.serving.served import Served  # noqa: E402

# A photograph is dropped on the page as a browser does it.
DROP = """
const data = new DataTransfer();
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
data.items.add(new File([bytes], "photo.png", { type: "image/png" }));
const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.getElementById("drop").dispatchEvent(drop);
"""


@contextmanager
def running(served: Served, token: str | None = None) -> Iterator[str]:
    """A server in a thread; its address."""
    service = Service(served, token=token, watch=0.05, quiet=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(service.app, port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def show(browser: Any, address: str, width: int, scheme: str) -> None:
    """Open a page in a window of that width."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)


def text_with(browser: Any, part: str) -> str:
    """The page's text, as soon as it has this part."""
    for _ in range(200):
        text = str(browser.execute_script("return document.body.innerText"))
        if part in text:
            return text
        time.sleep(0.05)
    raise AssertionError(f"{part!r} is not in {text!r}")


def errors(browser: Any) -> list[str]:
    """What the console complained about, such as a breach of the page's policy."""
    messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # Browsers ask for an icon, and log each status that is none of success.
    return [message for message in messages if "favicon" not in message and "401" not in message]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_a_photograph_is_dropped_and_every_task_answers(browser: Any, width: int, scheme: str, tmp_path: Path) -> None:
    model = st.SideTuner(conv_base())
    label = "<img src=x onerror=alert(1)> " + "w" * 80
    model.add_task("kind", side="fcn4", head=2, labels=["cat", label], seed=0)
    model.add_task("years", side=None, merge="base-only", head=1, labels=["years"], problem="numbers", seed=1)
    model.save(tmp_path / "model")
    picture = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(picture)
    expected = model.predict(picture)
    with running(Served(tmp_path / "model", base=conv_base())) as address:
        show(browser, address, width, scheme)
        text_with(browser, "2 tasks: kind, years")
        # Bytes in base64, which is what the page itself sends.
        browser.execute_script(DROP, base64.b64encode(picture.read_bytes()).decode())
        text = text_with(browser, "sides ")
        assert "base " in text and " ms" in text and label in text
        assert f"{100 * expected['kind'][0].value:.1f} %" in text
        assert f"{expected['years'][0].value:.5g}"[:4] in text
        # Nothing is wider than the window, and nothing of a label was obeyed.
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not browser.execute_script("return document.querySelectorAll('#answers img').length")
        loads = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert all(name.startswith((address, "blob:", "data:")) for name in loads)
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        assert errors(browser) == []


@pytest.mark.slow
def test_a_text_is_asked_after_the_token_was_given(browser: Any, encoder: Path, tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base(f"hf:{encoder}"))
    model.add_task("mood", side="mlp", head=2, labels=["good", "bad"], seed=0)
    model.save(tmp_path / "model")
    with running(Served(tmp_path / "model"), token="secret") as address:
        show(browser, address, 1200, "light")
        text_with(browser, "send the server's token")
        browser.find_element("id", "token").send_keys("secret")
        browser.find_element("css selector", "#login button").click()
        text_with(browser, "1 task: mood")
        browser.find_element("id", "text").send_keys("one two three")
        browser.find_element("css selector", "#ask button").click()
        text = text_with(browser, "1 side ")
        answer = model.predict("one two three")["mood"][0]
        assert answer.label in text and f"{100 * answer.value:.1f} %" in text
        assert errors(browser) == []
