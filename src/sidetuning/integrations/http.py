"""`load_base("http://host/v1?model=NAME")`: embeddings of texts from a server that speaks OpenAI's `/v1/embeddings`.

Every text is sent once, ever: what came back is kept on disk. A base of texts takes their bytes, (b, n), as `transform`
makes them; sides that read taps have none here, and a head or `solve` on the embeddings is what it is for.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.base import Base
from sidetuning.errors import CacheError, SideTuningError, UnknownNameError
from sidetuning.files import CACHE as CACHE
from sidetuning.files import user_cache
from sidetuning.transforms import TextTransform

# The key that a server asks for. It is never written anywhere.
KEY = "SIDETUNING_API_KEY"
# Texts in one request; seconds that one may take; tries, between which 0.5, 1, 2, … seconds pass, 30 at most.
BATCH, TIMEOUT, TRIES, LONGEST_PAUSE = 32, 60.0, 12, 30.0
# Bytes of a text that are read.
MOST_BYTES = 2**15
# Bytes are shifted, so that 1, with which a base is probed, is a letter; 0 is padding.
SHIFT = ord("a")
# What tells a model from another one, asked anew whenever a base is built.
PROBES = ("The quick brown fox jumps over the lazy dog.", "3.14159 is less than 22/7.", "¿Dónde está la biblioteca?")
# Relative difference that a server's rounding explains.
DRIFT = 5e-3


def load_http(rest: str) -> Base:
    """The base behind "http://…"."""
    return _load(f"http:{rest}")


def load_https(rest: str) -> Base:
    """The base behind "https://…"."""
    return _load(f"https:{rest}")


def _load(address: str) -> Base:
    net, example = Embeddings(address), encode(PROBES[:1], MOST_BYTES)
    return Base(net, example=example, transform=TextTransform(MOST_BYTES, ("text",), lambda: _tokenise))


class Embeddings:
    """A server's embeddings of texts. Shape: bytes (b, n) -> (b, d).

    Args:
        address: "http://host:port/v1?model=NAME"; the name may be left out where the server has one model.

    Raises:
        UnknownNameError: an address that is none, or a model that the server does not have.
        SideTuningError: the server cannot be reached, refuses, or gives other embeddings than it did before.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        options = parse_qs(parts.query, keep_blank_values=True)
        strange = options.keys() - {"model"} or len(options.get("model", [])) > 1 or "@" in parts.netloc
        if not parts.hostname or parts.fragment or strange:
            raise UnknownNameError(f"{address} is no address of a server; write http://host:port/v1?model=NAME")
        self.url = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        self.model = options["model"][0] if "model" in options else self._only_model()
        name = hashlib.sha256(f"{self.url} {self.model}".encode()).hexdigest()[:16]
        self.file = user_cache("http") / f"{name}.sqlite"
        self._lock = threading.Lock()
        self._check_drift()

    def __call__(self, text: Tensor) -> Tensor:
        texts = [decode(row) for row in text.tolist()]
        with self._lock:
            known = self._read(texts)
            new = [text for text in dict.fromkeys(texts) if text not in known]
            for first in range(0, len(new), BATCH - 1):
                # Each answer is kept before the next request, where a text that is known came back as it was.
                some = new[first : first + BATCH - 1]
                *rows, probe = self._ask([*some, PROBES[0]])
                self._compare(self.probe, probe)
                known |= dict(zip(some, self._keep(some, rows), strict=True))
        return torch.from_numpy(np.stack([known[text] for text in texts])).to(text.device)

    def fingerprint(self) -> str:
        """The model's name; how it answers is compared by the base's probe."""
        return hashlib.sha256(self.model.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _only_model(self) -> str:
        names = [str(entry.get("id")) for entry in self._send("GET", "models", None).get("data", [])]
        if len(names) != 1:
            raise UnknownNameError(f"{self.url} has the models {', '.join(names)}; name one, {self.url}?model=NAME")
        return names[0]

    def _check_drift(self) -> None:
        """Ask for some texts anew; SideTuningError where the answers are not those that were kept."""
        fresh, kept = self._ask(PROBES), self._read(PROBES)
        for text, row in zip(PROBES, fresh, strict=True):
            self._compare(kept.get(text, row), row)
        if not kept:
            # The first answers stay: many small drifts are a large one.
            self._keep(PROBES, fresh)
        self.probe = kept.get(PROBES[0], fresh[0])

    def _compare(self, before: NDArray[np.float32], row: NDArray[np.float32]) -> None:
        """Raise SideTuningError where a text is embedded otherwise than before."""
        if before.shape != row.shape or np.linalg.norm(before - row) > DRIFT * np.linalg.norm(before):
            raise SideTuningError(
                f"{self.url} answers otherwise than before for the model '{self.model}': it is another model now; "
                f"tasks that were learned on it would be wrong. Name the old one, or delete {self.file} to start over"
            )

    def _ask(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings (n, d) of texts, from the server."""
        given = self._send("POST", "embeddings", {"model": self.model, "input": list(texts)})
        try:
            rows = sorted(given["data"], key=lambda entry: int(entry["index"]))
            found = np.array([entry["embedding"] for entry in rows], np.float32)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SideTuningError(f"{self.url}/embeddings answers in another form than OpenAI's ({error})") from error
        if found.ndim != 2 or len(found) != len(texts) or not found.size or not np.isfinite(found).all():
            raise SideTuningError(
                f"{self.url}/embeddings gives {found.shape} for {len(texts)} texts, or numbers that are none; look at "
                "the server"
            )
        return found

    def _send(self, method: str, path: str, content: Any) -> Any:
        """Ask, and ask again after a pause where the server is busy, or away."""
        import httpx

        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            # Whoever refuses it would print it.
            raise SideTuningError(f"{KEY} has letters that no key has, such as a line break; set it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem, pause = "", 0.5
        for _ in range(TRIES):
            wait = pause
            try:
                # Redirects are not followed: the key is for this server.
                answer = httpx.request(method, f"{self.url}/{path}", json=content, headers=headers, timeout=TIMEOUT)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            except httpx.InvalidURL as error:
                raise UnknownNameError(f"{self.url} is no address of a server ({error})") from error
            else:
                if answer.status_code == 200:
                    try:
                        return answer.json()
                    except ValueError as error:
                        raise SideTuningError(f"{self.url}/{path} answers no JSON ({error}); is it /v1?") from error
                problem = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code not in (408, 409, 425, 429) and answer.status_code < 500:
                    mend = f"set {KEY} to its key" if answer.status_code in (401, 403) else "look at the address"
                    raise SideTuningError(f"{self.url}/{path} refuses ({problem}); {mend}")
                asked = answer.headers.get("retry-after", "")
                wait = max(pause, float(asked)) if asked.isdigit() else pause
            time.sleep(min(wait, LONGEST_PAUSE))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise SideTuningError(
            f"{self.url}/{path} cannot be reached ({problem}); what came before is kept, so try again later"
        )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The file of what is kept; it is written when the block ends well."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS rows (text BLOB PRIMARY KEY, row BLOB, sum BLOB)")
                yield connection
        except sqlite3.OperationalError as error:
            raise CacheError(f"{self.file} cannot be written ({error}); free the disk, or set {CACHE}") from error
        except sqlite3.DatabaseError as error:
            raise CacheError(f"{self.file} is damaged ({error}); delete it, and texts are sent again") from error

    def _read(self, texts: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """What is kept of texts; a row that was changed counts as not there."""
        found = {}
        with self._open() as connection:
            for text in dict.fromkeys(texts):
                name = _digest(text.encode())
                row = connection.execute("SELECT row, sum FROM rows WHERE text = ?", (name,)).fetchone()
                if row is not None and _digest(name + row[0]) == row[1]:
                    found[text] = np.frombuffer(row[0], np.float32)
        return found

    def _keep(self, texts: Sequence[str], rows: Iterable[NDArray[np.float32]]) -> Iterable[NDArray[np.float32]]:
        known = [(_digest(text.encode()), row.tobytes()) for text, row in zip(texts, rows, strict=True)]
        signed = [(name, row, _digest(name + row)) for name, row in known]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", signed)
        return rows


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def encode(texts: Sequence[str], most: int) -> dict[str, Tensor]:
    """Texts as shifted bytes, `most` at most, {"text": (b, bytes of the longest)}; padded with 0."""
    rows = [[(byte - SHIFT) % 256 + 1 for byte in text.encode()[:most]] for text in texts]
    longest = max(map(len, rows), default=0)
    return {"text": torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)}


def decode(row: Sequence[int]) -> str:
    """The text of a row of shifted bytes; what was cut within a character is left out."""
    return bytes((number - 1 + SHIFT) % 256 for number in row if number).decode(errors="ignore")


def _tokenise(texts: Sequence[str], second: Sequence[str] | None = None, *, max_length: int, **_: Any) -> Any:
    """Stands for a tokenizer of transformers; two texts of a pair are lines of one."""
    return encode(texts if second is None else [f"{a}\n{b}" for a, b in zip(texts, second, strict=True)], max_length)
