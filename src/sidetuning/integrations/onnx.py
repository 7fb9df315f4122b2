"""`load_base("onnx:PATH")`: a network that is only callable, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetuning.base import Base, Input
from sidetuning.errors import ArtifactError, UnknownNameError

# Where tensors lie in an ONNX file (onnx.proto): message -> number of a field -> the message that it holds.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}
TYPES.update({"tensor(int32)": torch.int32, "tensor(uint8)": torch.uint8})


class Session:
    """An ONNX Runtime session that takes and returns torch tensors on the CPU."""

    def __init__(self, path: str | Path, output: str | None = None) -> None:
        # Read when ONNX Runtime is loaded: it would tell its maker about this machine.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("onnx bases need ONNX Runtime: pip install 'sidetuning[onnx]'") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise UnknownNameError(f"{path} does not exist, or is no file; give the path of an ONNX file, onnx:PATH")
        # ONNX Runtime would open them wherever they lie.
        external_files(self.path)
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:
            # The exceptions of onnxruntime share no base class.
            raise UnknownNameError(f"ONNX Runtime cannot load {path} ({error}); export the network again") from error
        outputs = [o.name for o in self.session.get_outputs()]
        if output is not None and output not in outputs:
            raise UnknownNameError(f"{path} has no output '{output}'; it has {', '.join(outputs)}")
        self.output = output or outputs[0]

    def example(self) -> Input:
        """Zeros of the shape that the file declares; dimensions that it leaves open are 1."""
        tensors = {}
        for i in self.session.get_inputs():
            shape = [d if isinstance(d, int) else 1 for d in i.shape]
            tensors[i.name] = torch.zeros(shape, dtype=TYPES.get(i.type, torch.float32))
        return tensors if len(tensors) > 1 else next(iter(tensors.values()))

    def __call__(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        inputs = self.session.get_inputs()
        given: dict[str, Any] = named or {i.name: t for i, t in zip(inputs, tensors, strict=True)}
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        (out,) = self.session.run([self.output], feed)
        return torch.from_numpy(out)

    def fingerprint(self) -> str:
        """sha256 of the file, and of those that hold its large weights."""
        digest = hashlib.sha256(self.path.read_bytes())
        for file in external_files(self.path):
            with file.open("rb") as weights:
                while block := weights.read(2**24):
                    digest.update(block)
        return digest.hexdigest()


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold its tensors, sorted.

    Raises:
        ArtifactError: a file outside the folder, none at all, or no whole ONNX file.
    """
    names: set[str] = set()
    messages = [("model", memoryview(path.read_bytes()))]
    try:
        while messages:
            kind, content = messages.pop()
            found = [(number, value) for number, value in fields(content) if isinstance(value, memoryview)]
            if kind == "entry" and b"location" in [value.tobytes() for number, value in found if number == 1]:
                names.update(bytes(value).decode() for number, value in found if number == 2)
            messages += [(MESSAGES[kind][n], value) for n, value in found if n in MESSAGES.get(kind, ())]
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{path} is no whole ONNX file ({error}); export the network again") from error
    folder, files = path.parent, [path.parent / name for name in sorted(names)]
    # The Hub's cache holds links to files that lie side by side.
    homes = folder.resolve(), path.resolve().parent
    for name, file in zip(sorted(names), files, strict=True):
        if not file.is_file() or not any(file.resolve().is_relative_to(home) for home in homes):
            raise ArtifactError(
                f"{path} has weights in '{name}', which is no file in its folder; put it there, or export again"
            )
    return files


def fields(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a protobuf message: number and value; raises IndexError or ValueError where it is cut short."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte, place = content[place], place + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < len(content):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        length = number() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7)
        if length is None or place + length > len(content):
            raise ValueError("it is cut short or of another format")
        yield key >> 3, content[place : place + length]
        place += length


def load(name: str, *, taps: Sequence[str] = (), output: str | None = None) -> Base:
    """Build the base from the file `name`; `output` names one of its outputs, the first by default.

    Raises:
        UnknownNameError: no such file or output, or `taps`, which a compiled graph does not have.
    """
    if taps:
        raise UnknownNameError("an ONNX base has no taps: export the inner activations as outputs instead")
    session = Session(name, output)
    return Base(session, example=session.example())
