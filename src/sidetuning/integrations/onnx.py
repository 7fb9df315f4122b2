"""`load_base("onnx:PATH")`: a network that is only callable, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetuning.base import Base, Input
from sidetuning.errors import UnknownNameError

TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}
TYPES.update({"tensor(int32)": torch.int32, "tensor(uint8)": torch.uint8})


class Session:
    """An ONNX Runtime session that takes and returns torch tensors on the CPU."""

    def __init__(self, path: str | Path, output: str | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("onnx bases need ONNX Runtime: pip install 'sidetuning[onnx]'") from error
        self.path = Path(path)
        if not self.path.exists():
            raise UnknownNameError(f"{path} does not exist; give the path of an ONNX file, onnx:PATH")
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
        content = self.path.read_bytes()
        digest = hashlib.sha256(content)
        for name in external_files(content):
            digest.update((self.path.parent / name).read_bytes())
        return digest.hexdigest()


def external_files(content: bytes) -> list[str]:
    """Where an ONNX file says that weights lie: its entries "location", as protobuf writes a key and a value."""
    names = set()
    for entry in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]*[\x00-\x7f])", content):
        length = sum((byte & 127) << 7 * i for i, byte in enumerate(entry[1]))
        names.add(content[entry.end() : entry.end() + length].decode())
    return sorted(names)


def load(name: str, *, taps: Sequence[str] = (), output: str | None = None) -> Base:
    """Build the base from the file `name`; `output` names one of its outputs, the first by default.

    Raises:
        UnknownNameError: no such file or output, or `taps`, which a compiled graph does not have.
    """
    if taps:
        raise UnknownNameError("an ONNX base has no taps: export the inner activations as outputs instead")
    session = Session(name, output)
    return Base(session, example=session.example())
