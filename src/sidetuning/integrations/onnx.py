"""`load_base("onnx:PATH")`: a network that is only callable, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidetuning.base import Base, Input
from sidetuning.errors import ArtifactError, ShapeError, UnknownNameError
from sidetuning.probe import MASKS
from sidetuning.registry import unknown

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
# What ONNX Runtime calls the types of tensors that torch and numpy both have.
TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(bool)": torch.bool,
}
# Length of an example of tokens, where a file leaves it open.
TOKENS = 8
Shape = tuple[int | str | None, ...]


class Session:
    """An ONNX Runtime session that takes and returns torch tensors, with images and maps channels first.

    Floats are turned into the type that the file asks for, and codes in half precision into float32. Images of a file
    that takes uint8 are uint8, or floats in [0, 1]. A file of a fixed batch size is run as often as it takes, on zeros
    where rows are missing.

    Args:
        path: the file.
        output: the output to use, the first by default.
        nhwc: names of the inputs and outputs that are (b, h, w, c) in the file.

    Raises:
        UnknownNameError: no such file, output or name.
        ShapeError: inputs of a type that torch does not have, or of several fixed batch sizes.
    """

    def __init__(self, path: str | Path, output: str | None = None, nhwc: Sequence[str] = ()) -> None:
        self.path, self.output, self.nhwc = Path(path), output, frozenset(nhwc)
        self._open()

    def _open(self) -> None:
        # Read when ONNX Runtime is loaded: it would tell its maker about this machine.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("onnx bases need ONNX Runtime: pip install 'sidetuning[onnx]'") from error
        if not self.path.is_file():
            raise UnknownNameError(
                f"{self.path} does not exist, or is no file; give the path of an ONNX file, onnx:PATH"
            )
        # ONNX Runtime would open them wherever they lie.
        external_files(self.path)
        try:
            options = onnxruntime.SessionOptions()
            # Errors are raised, and need not be printed too.
            options.log_severity_level = 4
            self.session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # The exceptions of onnxruntime share no base class.
            raise UnknownNameError(
                f"ONNX Runtime cannot load {self.path} ({error}); export the network again"
            ) from error
        outputs = {out.name: _sizes(out.shape) for out in self.session.get_outputs()}
        if self.output is not None and self.output not in outputs:
            raise UnknownNameError(f"{self.path} has no output '{self.output}'; it has {', '.join(outputs)}")
        self.output = self.output or next(iter(outputs))
        self.types = {i.name: i.type for i in self.session.get_inputs()}
        self.shapes = {i.name: _sizes(i.shape) for i in self.session.get_inputs()}
        if not self.shapes:
            raise ShapeError(f"{self.path} takes no input; a base needs one")
        for name, kind in self.types.items():
            if kind not in TYPES:
                raise ShapeError(f"{self.path} takes '{name}' as {kind}, which torch lacks; export it otherwise")
        known = {**self.shapes, **outputs}
        for name in self.nhwc:
            if name not in known:
                raise UnknownNameError(unknown("nhwc", name, known, verb="an input or output of the file"))
            if len(known[name]) != 4:
                raise ShapeError(f"'{name}' of {self.path} is {_text(known[name])}, not (b, h, w, c): leave nhwc= out")
        batches = {shape[0] for shape in self.shapes.values() if shape}
        sizes = {size for size in batches if isinstance(size, int)}
        if sizes == batches and len(sizes) > 1:
            raise ShapeError(f"{self} takes inputs of several batch sizes; export it with an open first dimension")
        # None where it is open.
        self.batch = sizes.pop() if sizes and sizes == batches else None

    def __getstate__(self) -> dict[str, Any]:
        # ONNX Runtime's own object cannot be pickled.
        return {**{key: value for key, value in vars(self).items() if key != "session"}, "sha256": self.fingerprint()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = state.pop("sha256")
        self.__dict__.update(state)
        self._open()
        if self.fingerprint() != known:
            raise UnknownNameError(f"{self.path} is not the file that this model was saved with; put that one there")

    def __deepcopy__(self, memo: Any) -> Session:
        # It holds no state.
        return self

    def __str__(self) -> str:
        given = ", ".join(f"{name} {self.types[name]} {_text(shape)}" for name, shape in self.shapes.items())
        return f"{self.path}, which takes {given},"

    def example(self) -> Input:
        """An input of the shapes that the file declares; token ids that may be of any length have a few.

        Raises:
            ShapeError: sizes that the file leaves open, or images that seem to be channels last.
        """
        tensors = {}
        for name, shape in self.shapes.items():
            kind, sizes = TYPES[self.types[name]], [1, *shape[1:]] if shape else []
            if len(sizes) == 2 and not kind.is_floating_point:
                sizes = [size if isinstance(size, int) else TOKENS for size in sizes]
            if name in self.nhwc:
                sizes = [sizes[i] for i in (0, 3, 1, 2)]
            open_sizes = [size for size in sizes if not isinstance(size, int)]
            if open_sizes:
                wanted = ", ".join(str(size) if isinstance(size, int) else "…" for size in sizes)
                given = f"torch.zeros({wanted})"
                given = given if len(self.shapes) == 1 else f"{{'{name}': {given}, …}}"
                raise ShapeError(
                    f"{self} leaves sizes open: give an input of the size that you will use, example={given}"
                )
            if len(sizes) == 4 and sizes[3] in (1, 3, 4) and sizes[1] not in (1, 3, 4):
                raise ShapeError(
                    f"{self} seems to have images with the channels last: say nhwc=['{name}'], or give an input with "
                    "the channels first, example="
                )
            # Sides see inputs in float32, whatever the file computes in.
            kind = torch.float32 if kind.is_floating_point else kind
            fill = torch.ones if name in MASKS[:2] else torch.zeros
            tensors[name] = fill([size for size in sizes if isinstance(size, int)], dtype=kind)
        return tensors if len(tensors) > 1 else next(iter(tensors.values()))

    def __call__(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        given = self._named(tensors, named)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
            raise ShapeError("ONNX Runtime gives no gradient of the input: detach it, or use a base that is a module")
        first = next(iter(given.values()))
        feed = {name: self._cast(name, tensor.detach()).cpu() for name, tensor in given.items()}
        out = self._run(feed) if self.batch is None else self._run_split(feed, self.batch)
        if self.output in self.nhwc:
            out = out.permute(0, 3, 1, 2)
        if not out.is_floating_point():
            raise ShapeError(
                f"the output '{self.output}' of {self.path} is {out.dtype}; pick one of floats with output="
            )
        return out.float().to(first.device)

    def _named(self, tensors: Sequence[Tensor], named: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is given, by the names of the file's inputs."""
        for name in named:
            if name not in self.shapes:
                raise UnknownNameError(unknown("input", name, self.shapes, verb=f"taken by {self.path}"))
        free = [name for name in self.shapes if name not in named]
        if len(free) != len(tensors):
            missing = f"'{free[len(tensors)]}' is missing" if len(free) > len(tensors) else "that is too much"
            raise ShapeError(f"{self} was given {len(tensors) + len(named)} of them: {missing}")
        given = {**dict(zip(free, tensors, strict=True)), **named}
        if wrong := [name for name, value in given.items() if not isinstance(value, Tensor)]:
            raise ShapeError(f"the input '{wrong[0]}' is a {type(given[wrong[0]]).__name__}; give a tensor")
        return {name: given[name] for name in self.shapes}

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the file's layout and of its type; only what keeps the value is done."""
        kind = TYPES[self.types[name]]
        if name in self.nhwc:
            if tensor.ndim != 4:
                raise ShapeError(f"the input '{name}' is {tuple(tensor.shape)}; give images (b, c, h, w)")
            tensor = tensor.permute(0, 2, 3, 1)
        if kind == torch.uint8 and tensor.is_floating_point():
            low, high = (float(v) for v in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
            if not 0 <= low <= high <= 1:
                raise ShapeError(
                    f"{self} was given floats from {low:.3g} to {high:.3g}; give uint8, or floats in [0, 1]"
                )
            tensor = (tensor * 255).round().to(kind)
        both = tensor.dtype.is_floating_point, kind.is_floating_point
        whole = not any((*both, tensor.dtype == torch.bool, kind == torch.bool))
        # All values of a batch fit in most cases; what does not must not wrap.
        if all(both) or (whole and bool((tensor.to(kind) == tensor).all())):
            given, tensor = tensor, tensor.to(kind)
            if all(both) and tensor is not given and not bool((tensor.isfinite() | ~given.isfinite()).all()):
                raise ShapeError(f"{self} was given '{name}' with numbers beyond {torch.finfo(kind).max:g}; scale them")
        if tensor.dtype != kind:
            raise ShapeError(f"{self} was given '{name}' as {tensor.dtype}; give {kind}")
        return tensor

    def _run_split(self, feed: Mapping[str, Tensor], size: int) -> Tensor:
        """Run a file that takes `size` rows at a time."""
        rows = {len(tensor) for tensor in feed.values() if tensor.ndim}
        if len(rows) > 1:
            raise ShapeError(f"{self} was given inputs of {sorted(rows)} rows; give as many of each")
        count = rows.pop()
        outs = []
        for first in range(0, max(count, 1), size):
            part = {name: tensor[first : first + size] if tensor.ndim else tensor for name, tensor in feed.items()}
            missing = size - min(count - first, size)
            full = {k: torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) if t.ndim else t for k, t in part.items()}
            out = self._run(full)
            if out.ndim == 0 or len(out) != size:
                raise ShapeError(f"{self} returns {tuple(out.shape)} for {size} rows; the batch must come first")
            outs.append(out)
        return torch.cat(outs)[:count]

    def _run(self, feed: Mapping[str, Tensor]) -> Tensor:
        try:
            (out,) = self.session.run([self.output], {name: t.contiguous().numpy() for name, t in feed.items()})
        except Exception as error:
            # The exceptions of onnxruntime share no base class.
            given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in feed.items())
            raise ShapeError(f"{self} cannot run on {given} ({str(error).splitlines()[0]})") from error
        if not isinstance(out, np.ndarray):
            raise ShapeError(f"the output '{self.output}' of {self.path} is no tensor; pick another one with output=")
        return torch.from_numpy(out)

    def fingerprint(self) -> str:
        """sha256 of the file, of those that hold its large weights, and of the layout."""
        digest = hashlib.sha256(self.path.read_bytes())
        digest.update(" ".join(sorted(self.nhwc)).encode())
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


def _sizes(shape: Sequence[Any]) -> Shape:
    """A declared shape; sizes that are open are names, or None."""
    return tuple(None if isinstance(size, int) and size < 1 else size for size in shape)


def _text(shape: Shape) -> str:
    """A declared shape, with the names of open sizes."""
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def load(
    name: str,
    *,
    taps: Sequence[str] = (),
    output: str | None = None,
    example: Input | None = None,
    nhwc: Sequence[str] = (),
) -> Base:
    """Build the base.

    Args:
        name: path of the file.
        taps: refused: a compiled graph has none.
        output: one of its outputs, the first by default.
        example: an input, for files that leave sizes open.
        nhwc: names of the inputs and outputs that are (b, h, w, c) in the file. The base has them channels first.

    Raises:
        UnknownNameError: no such file, output or name, or `taps`.
        ShapeError: sizes that must be given, or inputs and outputs that a base cannot have.
    """
    if taps:
        raise UnknownNameError("an ONNX base has no taps: export the inner activations as outputs instead")
    session = Session(name, output, nhwc)
    return Base(session, example=session.example() if example is None else example)
