"""What is assumed of every base, tried once when it is built: a pure function of each sample, batch first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sidetuning.errors import ShapeError, told
from sidetuning.inputs import Input, map_input, take_rows

# Entries of a mapping that say where there is input, and are no input themselves.
MASKS = ("attention_mask", "mask", "position_ids", "token_type_ids", "bool_masked_pos")
# Relative differences that rounding explains: of float32, and of types with fewer bits.
FINE, COARSE = 1e-3, 5e-2


def probe_input(example: Input) -> Input:
    """Two samples of the example's shapes and types, the same whatever its values are: noise, and ids of 0 and 1."""
    if isinstance(example, Tensor):
        return _like(example)
    return {
        key: value if not isinstance(value, Tensor) else _repeat(value) if key in MASKS else _like(value)
        for key, value in example.items()
    }


def _repeat(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor[:1]]) if tensor.ndim else tensor


def _like(tensor: Tensor) -> Tensor:
    if tensor.ndim == 0 or tensor[:1].numel() == 0:
        return tensor
    generator, shape = torch.Generator().manual_seed(0), (2, *tensor.shape[1:])
    if tensor.is_floating_point() and tensor.ndim <= 2:
        values = torch.randn(shape, generator=generator)
    elif tensor.is_floating_point() or tensor.dtype == torch.uint8:
        # Images, the same in both types.
        values = torch.randint(0, 256, shape, generator=generator)
        values = values / 255 if tensor.is_floating_point() else values
    else:
        values = torch.randint(0, 2, shape, generator=generator)
    return values.to(tensor.device, tensor.dtype)


def shapes_of(example: Input) -> Any:
    """Shapes of an input without the batch, as JSON values: probes of different shapes cannot be compared."""
    if isinstance(example, Tensor):
        return list(example.shape[1:])
    return {key: list(value.shape[1:]) for key, value in sorted(example.items()) if isinstance(value, Tensor)}


def check_base(run: Callable[[Input], Tensor], example: Input) -> bool:
    """Run two samples together, alone and again.

    Args:
        run: gives the code of raw inputs.
        example: one input.

    Returns:
        Whether the network writes into its input.

    Raises:
        ShapeError: the network is not batch first, mixes samples, or gives other outputs for the same input.
    """
    both = probe_input(example)
    before = copy.deepcopy(both)
    try:
        together = run(both)
    except Exception:
        # Some inputs must fit each other, such as boxes.
        both = map_input(example, _repeat)
        before = copy.deepcopy(both)
        with told(
            "the base does not take two samples at once ({}); side-tuning needs batches: export or wrap it with an "
            "open first dimension"
        ):
            together = run(both)
    writes = not _equal(both, before)
    if together.ndim == 0 or len(together) != 2:
        raise ShapeError(
            f"the base returns {tuple(together.shape)} for two samples; the first dimension must be the batch"
        )
    if not _close(together, run(copy.deepcopy(before))):
        raise ShapeError(
            "the base gives other outputs for the same input: it draws random numbers, or keeps a state; side-tuning "
            "needs a function of the input"
        )
    with told(
        "the base does not take one sample alone ({}); side-tuning needs batches of any size: export or wrap it with "
        "an open first dimension"
    ):
        alone = torch.cat([run(take_rows(before, slice(i, i + 1))) for i in range(2)])
    if not _close(together, alone):
        raise ShapeError(
            "the base gives other outputs for a sample when another one is in its batch; side-tuning needs each sample "
            "on its own"
        )
    return writes


def is_causal(run: Callable[[Input], Tensor], example: Input) -> bool:
    """Whether a token's code depends on earlier tokens and on no later one; `run` and `example` as of `influence`."""
    before, after = influence(run, example) or (1.0, 0.0)
    return before <= 1e-3 * after and after > 0


def influence(run: Callable[[Input], Tensor], example: Input) -> tuple[float, float] | None:
    """How far one token moves the codes of earlier ones, and another those of later ones: both may be little.

    Args:
        run: gives the code of raw inputs, (b, t, d).
        example: one input.

    Returns:
        None where it cannot be told: no tokens are read, or the probe is not taken.
    """
    both = probe_input(example)
    key = "" if isinstance(both, Tensor) else next((k for k in ("input_ids", "inputs_embeds", "x") if k in both), "")
    found = both if isinstance(both, Tensor) else both.get(key)
    if not isinstance(found, Tensor) or found.ndim != 2 + found.is_floating_point():
        return None
    # Three tokens at least, and all of them real: padding has no say in anything.
    t, times = found.shape[1], -(-3 // max(1, found.shape[1]))
    both = map_input(both, lambda x: torch.cat([x] * times, 1) if x.ndim > 1 and x.shape[1] == t else x)
    if not isinstance(both, Tensor) and isinstance(mask := both.get("attention_mask"), Tensor):
        both = {**both, "attention_mask": torch.ones_like(mask)}
    tokens = torch.cat([found] * times, 1)

    def code(place: int | None) -> Tensor:
        changed = tokens.clone()
        if place is not None:
            # Ids of a probe are 0 and 1.
            changed[:, place] = 1 - changed[:, place]
        return run(changed if isinstance(both, Tensor) else {**both, key: changed})

    try:
        plain, first, last = code(None), code(0), code(-1)
    except Exception:
        # A network that does not take the probe, as of boxes that must fit each other.
        return None
    if plain.ndim != 3 or plain.shape[1] != tokens.shape[1]:
        return None
    before = (last - plain)[:, :-1].double().abs().nan_to_num().max()
    after = (first - plain)[:, 1:].double().abs().nan_to_num().max()
    return float(before), float(after)


def probe_of(run: Callable[[Input], Tensor], example: Input) -> list[float]:
    """Numbers that tell what a base makes of fixed inputs; none where it does not take them."""
    try:
        return summary_of(run(probe_input(example)))
    except Exception:
        return []


def summary_of(code: Tensor) -> list[float]:
    """Numbers that tell a code (2, …) from others: of each sample mean, spread and six sums with fixed random signs."""
    # What is infinite would hide the other numbers.
    rows = code.detach().cpu().double().flatten(1).nan_to_num(0, 0, 0)
    signs = torch.randint(0, 2, (rows.shape[1], 6), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    numbers = torch.cat(
        [rows.mean(1, True), rows.std(1, keepdim=True, correction=0), rows @ signs / len(signs) ** 0.5], 1
    )
    return [float(f"{value:.6g}") for value in numbers.flatten().tolist()]


def same_summary(one: list[float], other: list[float]) -> bool:
    """Whether two summaries are of one function, up to the rounding of other hardware."""
    if len(one) != len(other):
        return False
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() <= 5e-3 * scale) or bool(scale == 0)


def _equal(x: Input, y: Input) -> bool:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y)
    return all(torch.equal(value, y[key]) for key, value in x.items() if isinstance(value, Tensor))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = FINE if a.dtype in (torch.float32, torch.float64) else COARSE
    a, b = a.double(), b.double()
    finite = a.isfinite() & b.isfinite()
    # What is not finite must be the same.
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = a[finite], b[finite]
    return not len(a) or bool((a - b).abs().max() <= tolerance * a.abs().max() + 1e-8)
