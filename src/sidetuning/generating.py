"""Texts that go on as tasks with the head "lm" have learned: transformers' own generation, over merged codes.

The base runs once for all rows of a batch, with one cache of keys and values; each row is merged by its own task.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features
from sidetuning.branch import CUSTOM, Branch
from sidetuning.errors import DataError, TaskError, told
from sidetuning.heads import LanguageHead
from sidetuning.inputs import map_input, original, take_rows, to_device
from sidetuning.predicting import run
from sidetuning.sides import Side
from sidetuning.transforms import TextTransform

if TYPE_CHECKING:
    from transformers import GenerationConfig

Tasks = Sequence[str | None]
# The settings that go by name; and names under which networks are given what they keep of earlier tokens.
NAMED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_beams", "eos_token_id", "pad_token_id")
CACHES = ("cache", "past_key_values", "cache_params")
KEEPS_NONE = "which such a cache does not keep; give a generation_config with use_cache=False, or another cache"


@torch.no_grad()
def generate(
    self: Any,
    source: Any,
    task: str | Tasks | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> Any:
    """Go on with texts, as a task with the head "lm" writes; sampling, beams and caches are transformers' own.

    Args:
        source: a text or a list of texts; a chat, a list of messages {"role": …, "content": …}, or a list of chats; or
            ids (b, t), alone, or in a mapping with their "attention_mask", (b, t) too: padding after a text is moved
            before it, here and in what is returned.
        task: the task; None for the base alone, bit for bit as transformers writes; or one for each text, or several
            for the one text that is given.
        generation_config: transformers' settings of generation; by default those that came with the base.
        max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, eos_token_id, pad_token_id: the commonest of
            them by name; they come before those of `generation_config`.

    Returns:
        Of texts what comes after each: one text for one, a list for a list. Of ids what transformers returns: ids with
        those that were given, or an object where `generation_config` asks for one, as for texts then too.

    Raises:
        TaskError: a base without an output embedding, a task with another head, or not one task per text.
        DataError: a source of another kind, or an empty text.
    """
    names = [] if task is None else [task] if isinstance(task, str) else list(task)
    base: Base
    base, branches = self._moment([name for name in names if name is not None])
    if base.lm is None:
        raise TaskError(
            "this base writes no texts: it has no output embedding; load a causal language model, load_base('hf:…')"
        )
    for name in names:
        if name is not None and not isinstance(branches[name].head, LanguageHead):
            raise TaskError(f"task '{name}' writes no texts: model(x, '{name}') asks it; add one with head='lm'")
    given, one = _given(source, base)
    if len(names) > 1 and len(given["input_ids"]) == 1:
        given, one = {key: value.repeat(len(names), 1) for key, value in given.items()}, False
    if task is not None and not isinstance(task, str) and len(names) != len(given["input_ids"]):
        raise TaskError(f"{len(names)} tasks for {len(given['input_ids'])} texts; name one task, or one for each text")
    values = (max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, eos_token_id, pad_token_id)
    named = {key: value for key, value in zip(NAMED, values, strict=True) if value is not None}
    settings: dict[str, Any] = dict(named)
    if generation_config is not None:
        # Transformers will take one or the other.
        settings = {"generation_config": copy.deepcopy(generation_config)}
        settings["generation_config"].update(**named)
    tasked = any(name is not None for name in names)
    net = base.lm.over(Merged(base, branches, names)) if tasked else base.lm.net
    with told("transformers cannot go on with this ({}); give other settings, or a shorter text"):
        written = net.generate(**given, **settings)
    if not isinstance(written, Tensor) or isinstance(source, (Tensor, Mapping)):
        return written
    new = written[:, given["input_ids"].shape[1] :]
    texts: list[str] = _tokenizer(base).batch_decode(new, skip_special_tokens=True)
    return texts[0] if one and len(texts) == 1 else texts


class Merged:
    """A pass of the base's network in which each row's code is merged by its own task; one object per generation.

    Tasks that read each token alone are given the new tokens. For others the features of earlier tokens are kept beside
    the base's keys and values, in the same cache, so that beams are sorted and cut together.

    Args:
        base, branches: of one moment.
        tasks: one for all rows, or one for each text; a text may have several rows, as of beams.
    """

    def __init__(self, base: Base, branches: Mapping[str, Branch], tasks: Tasks) -> None:
        self.base, self.branches, self.tasks = base, branches, tasks
        named = {name for name in tasks if name is not None}
        named |= {lateral for name in named for lateral in branches[name].config.laterals}
        self.tokenwise = all(tokenwise(branches[name]) for name in named)
        self.groups = _groups(branches, list(tasks), self.tokenwise)
        # Layers of the cache that are the base's.
        self.own: int | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        """As the network is called; what it returns has the merged code for its last hidden state."""
        returned, features = self.base.observe(lambda: self.base.net(*args, **named))  # type: ignore[operator]
        ids = named["input_ids"] if "input_ids" in named else args[0]
        new, kind, inputs = ids.shape[1], returned.last_hidden_state.dtype, {"input_ids": ids}
        if not self.tokenwise:
            inputs["attention_mask"] = _mask(named.get("attention_mask"), ids)
            cache = next((named[key] for key in CACHES if named.get(key) is not None), None)
            if cache is not None:
                inputs, features = self._whole(cache, inputs, features)
            elif named.get("use_cache"):
                raise TaskError(f"this task's side looks back at tokens, {KEEPS_NONE}")
        returned.last_hidden_state = self._merge(inputs, features)[:, -new:].to(kind)
        return returned

    def _whole(self, cache: Any, inputs: dict[str, Tensor], features: Features) -> tuple[dict[str, Tensor], Features]:
        """Inputs and features of all tokens so far, of which the cache holds those of earlier ones."""
        from transformers.cache_utils import DynamicLayer

        news = [*(tensor.unsqueeze(-1) for tensor in inputs.values()), *features.tensors()]
        if self.own is None:
            self.own = len(cache.layers)
            cache.layers += [DynamicLayer() for _ in news]
        kept = []
        for layer, tensor in zip(cache.layers[self.own :], news, strict=True):
            keys = tensor.unsqueeze(1)
            kept.append(layer.update(keys, keys[..., :0])[0].squeeze(1))
        whole = {key: tensor.squeeze(-1) for key, tensor in zip(inputs, kept, strict=False)}
        return whole, Features(kept[len(whole)], dict(zip(features.taps, kept[len(whole) + 1 :], strict=True)))

    def _merge(self, inputs: Mapping[str, Tensor], features: Features) -> Tensor:
        """Each row's code, by its task."""
        if len(self.tasks) == 1 and self.tasks[0] is not None:
            return run([self.tasks[0]], self.branches, inputs, features, decode=False)[self.tasks[0]]
        code, each = features.out.clone(), len(features.out) // len(self.tasks)
        for names, alike in self.groups:
            places = [[i for i, task in enumerate(self.tasks) if task == name] for name in names]
            # (tasks, rows of each)
            rows = torch.tensor([[i * each + k for i in some for k in range(each)] for some in places])
            rows = rows.to(code.device)
            if alike is not None:
                code[rows] = alike(take_rows(inputs, rows), features.rows(rows))
            else:
                some, known = take_rows(inputs, rows[0]), features.rows(rows[0])
                code[rows[0]] = run(names, self.branches, some, known, decode=False)[names[0]]
        return code


def _groups(branches: Mapping[str, Branch], tasks: Tasks, tokenwise: bool) -> list[tuple[list[str], Any]]:
    """The tasks, those together that are built alike and have as many rows, with what runs them all at once."""
    found: dict[Any, list[str]] = {}
    for name in dict.fromkeys(name for name in tasks if name is not None):
        branch = branches[name]
        config = branch.config
        together = tokenwise and not config.laterals and config.side is not None and config.side[0] != CUSTOM
        built = repr((config.side, config.merge, config.prenorm, config.init, branch.taps, branch.built))
        found.setdefault((built, tasks.count(name)) if together else name, []).append(name)
    return [(names, _alike([branches[name] for name in names]) if len(names) > 1 else None) for names in found.values()]


def _alike(branches: Sequence[Branch]) -> Any:
    """Runs tasks that are built alike as one: their weights are stacked, so that ten cost little more than one."""
    states = [branch.state_dict(prefix="branch.") for branch in branches]
    weights = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    code = partial(torch.func.functional_call, _Code(branches[0]))
    return partial(torch.func.vmap(lambda state, *given: code(state, given)), weights)


class _Code(nn.Module):
    """What the head of a task would read."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, inputs: Mapping[str, Tensor], features: Features) -> Tensor:
        return self.branch.code(features, self.branch.side_output(inputs, features), ())


def tokenwise(branch: Branch) -> bool:
    """Whether its code of a token reads what the base gave for that token alone."""
    side = original(branch.side)
    return branch.config.merge[0] != CUSTOM and (side is None or (isinstance(side, Side) and side.tokenwise))


def _mask(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Which of the new tokens (b, t) are no padding, of a mask of all tokens so far."""
    if mask is not None and mask.ndim != 2:
        raise TaskError(f"this task's side looks back at tokens, {KEEPS_NONE}")
    return torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]


def _tokenizer(base: Base) -> Any:
    transform = base.transform
    if not isinstance(transform, TextTransform):
        raise TaskError("this base has no tokenizer; give ids (b, t)")
    return transform.tokenizer()


def _given(source: Any, base: Base) -> tuple[dict[str, Tensor], bool]:
    """What transformers is given, on the base's device, and whether it is one text."""
    one = False
    if isinstance(source, (Tensor, Mapping)):
        found = {"input_ids": source} if isinstance(source, Tensor) else dict(source)
        ids = found.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] == 0:
            raise DataError("a text to go on with is ids (b, t), with one token at least, or a str; give one of these")
        if strange := found.keys() - {"input_ids", "attention_mask"}:
            raise DataError(f"generation reads input_ids and attention_mask, not '{min(strange)}'; leave it out")
    else:
        # A chat is a list of messages.
        chat = isinstance(source, (list, tuple)) and all(isinstance(item, Mapping) for item in source)
        one = isinstance(source, str) or chat
        texts = [source] if one else list(source) if isinstance(source, (list, tuple)) else []
        how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if texts and all(isinstance(text, str) for text in texts):
            found = _tokenizer(base)(texts, **how)
        elif texts and all(isinstance(text, (list, tuple)) and text and isinstance(text[0], Mapping) for text in texts):
            template = _tokenizer(base).apply_chat_template
            with told("the tokenizer makes no text of this chat ({}); give messages of a role and a content, or texts"):
                found = template(texts, add_generation_prompt=True, return_dict=True, **how)
        else:
            raise DataError(f"a text to go on with is a str, a chat, a list of such, or ids (b, t), not {source!r:.60}")
        found = {key: found[key] for key in ("input_ids", "attention_mask")}
    given, mask = to_device(found, base.device), found.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == found["input_ids"].shape:
        if not bool(mask.any(1).all()):
            raise DataError("a text without a token cannot be gone on with; give one that begins")
        # Transformers goes on after the last place, be it padding: padding goes before the text, as the tokens stand.
        order = (mask != 0).int().argsort(dim=1, stable=True).to(base.device)
        given = map_input(given, lambda values: values.gather(1, order))
    return given, one  # type: ignore[return-value]
