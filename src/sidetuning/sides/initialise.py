"""How a side starts (paper, appendix): as built, xavier, low-energy, or with weights from a file (distilled)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ArtifactError, TaskError
from sidetuning.files import check_safetensors
from sidetuning.inputs import original
from sidetuning.sides import Side, run_side
from sidetuning.sides.fit import FitTokens

# Size of a low-energy side's output against the same side as built.
ENERGY = 0.01


class LowEnergy(Side):
    """S'(x) = s S(x) with s = 0.01 at the start, learned: the base dominates until the side has something to say."""

    def __init__(self, side: nn.Module) -> None:
        super().__init__()
        self.side = side
        self.scale = nn.Parameter(torch.tensor(ENERGY))
        own = original(side)
        self.taps, self.tokenwise = (own.taps, own.tokenwise) if isinstance(own, Side) else ((), False)

    def forward(self, inputs: Input, features: Features) -> Tensor:
        return self.scale * run_side(self.side, inputs, features)


def initialise(base: Base, side: nn.Module, name: str, options: Mapping[str, Any], init: str | Path) -> None:
    """Give a side its first weights: "xavier", "silent", "distilled", or those of a safetensors file."""
    if init == "xavier":
        xavier(side)
    elif init == "silent":
        last = [module.project for module in side.modules() if isinstance(module, FitTokens)]
        if not last:
            raise TaskError(f"side '{name}' has no last layer that can start at 0; give init='zero'")
        nn.init.zeros_(last[-1].weight)
        nn.init.zeros_(last[-1].bias)
    elif init == "distilled":
        load_weights(side, distilled_weights(base, name, options), f"side '{name}'")
    elif isinstance(init, Path) or "." in init or "/" in init:
        load_weights(side, init, f"side '{name}'")
    else:
        names = "xavier, low-energy, zero, silent, distilled or the path of a safetensors file"
        raise TaskError(f"init '{init}' is not known; give {names}")


def xavier(side: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear and convolutional layer; norms stay as built."""
    for module in side.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def distilled_weights(base: Base, side: str, options: Mapping[str, Any]) -> Path:
    """The file of the distilled weights that ship for this base and side.

    Raises:
        TaskError: none ship, or none for a side with these options.
    """
    name = base.spec.name if base.spec else "your own base"
    if side not in base.distilled:
        raise TaskError(
            f"no distilled weights ship for side '{side}' of {name}: train some with sidetuning.distill(model, task, "
            "loader), or give init= the path of a safetensors file"
        )
    file, built = base.distilled[side]
    if dict(options) != built:
        raise TaskError(
            f"the distilled side '{side}' of {name} is built with the options {built}, not {dict(options)}; give "
            "these, or start the side otherwise than distilled"
        )
    return file


def load_weights(module: nn.Module, path: str | Path, what: str, spare: Sequence[str] = ()) -> None:
    """Load a safetensors file into `module`; the only other tensors it may hold start with one of `spare`.

    Raises:
        ArtifactError: the file is missing or damaged, or holds other tensors; nothing is loaded then.
    """
    path = Path(path)
    try:
        check_safetensors(path)
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; it should hold the weights of {what}") from error
    except (SafetensorError, OSError) as error:
        mend = "fetch or write it again"
        if path.suffix in (".pt", ".pth", ".bin"):
            mend = "write what torch.load gives of it with safetensors.torch.save_file"
        raise ArtifactError(f"{path} is not a readable safetensors file ({error}); {mend}") from error
    expected = module.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in expected or not k.startswith(tuple(spare))}
    # A counter that nothing here reads, and older files do not have.
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    tensors = {**counters, **tensors}
    problem = mismatch(expected, tensors)
    if problem:
        raise ArtifactError(f"{path} does not fit {what}: {problem}")
    module.load_state_dict(tensors)


def plain(name: str) -> str:
    """A tensor's or a module's name without what `torch.compile` puts into it."""
    return f"{name}.".replace("_orig_mod.", "")[:-1]


def layout(module: nn.Module) -> dict[str, str]:
    """The classes of a module's parts and the shapes of its tensors, by name: what building it again must give."""
    kinds = {plain(name): type(original(part)).__qualname__ for name, part in module.named_modules()}
    tensors = [(name, v) for name, v in module.state_dict().items() if isinstance(v, Tensor) and not is_lazy(v)]
    return {**kinds, **{plain(name): str(tuple(tensor.shape)) for name, tensor in tensors}}


def mismatch(expected: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """What is missing, too many or of another shape in `given`; empty where all fits."""
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        return f"{len(missing)} tensors are missing, the first is {missing[0]}"
    if extra:
        return f"{len(extra)} tensors are too many, the first is {extra[0]}"
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            return f"{name} has the shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
    return ""
