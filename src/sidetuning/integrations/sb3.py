"""Side-tuned policies for stable-baselines3: a features extractor, and a wrapper that runs the base once per step.

    env = VecBaseFeatures(env, "timm:resnet18")
    extractor = {"features_extractor_class": SideTunedExtractor, "features_extractor_kwargs": {"base": "timm:resnet18"}}
    PPO("MultiInputPolicy", env, policy_kwargs=extractor)

PPO reads every observation `n_epochs` times; with the wrapper the base sees it once. A saved policy holds no base.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space_channels_first
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.branch import build_branch
from sidetuning.errors import ArtifactError, DataError, ShapeError, UnknownNameError
from sidetuning.identity import Identity
from sidetuning.loading import load_base
from sidetuning.registry import unknown

# Keys of observations: the picture, and the base's code of it.
IMAGE, CODE = "rgb", "base"


class CodeSpace(spaces.Box):
    """Space of a base's codes. Spaces of different bases differ, so a policy never reads the codes of another base."""

    # What the fingerprint may be: version 0.1.0 took the sha256 of the weights. Its spaces are without this attribute.
    known: tuple[str, ...] = ()
    # What else the base is: equal weights may compute other codes.
    identity: Identity | None = None

    def __init__(self, base: Base) -> None:
        super().__init__(-np.inf, np.inf, base.output_shape, np.float32)
        self.identity = base.identity()
        self.fingerprint = self.identity.digest()
        self.known = (self.fingerprint, self.identity.sha256)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CodeSpace):
            return super().__eq__(other)
        if self.identity is not None and other.identity is not None:
            same = self.identity.difference(other.identity.record()) is None
        else:
            same = self.fingerprint in (other.fingerprint, *other.known) or other.fingerprint in self.known
        return same and super().__eq__(other)

    def __repr__(self) -> str:
        return f"CodeSpace(base {self.fingerprint[:8]}, {self.shape})"


class VecBaseFeatures(VecEnvWrapper):
    """Adds the base's code of the picture to every observation, under "base".

    Args:
        venv: environments whose observations are dictionaries with "rgb", (h, w, c) or (c, h, w) uint8.
        base: a base, or its name.

    Attributes:
        passes: number of pictures that the base has seen.
    """

    def __init__(self, venv: VecEnv, base: str | Base) -> None:
        if not isinstance(venv, VecEnv):
            raise TypeError(f"VecBaseFeatures wraps a VecEnv, such as DummyVecEnv([…]), not {type(venv).__name__}")
        picture, seen = _picture(venv.observation_space), venv.observation_space.spaces  # type: ignore[attr-defined]
        if CODE in seen:
            raise ShapeError(f"the observations have '{CODE}' already; wrap these environments once, or rename it")
        self.channels_last = not is_image_space_channels_first(picture)
        shape = picture.shape[2:] + picture.shape[:2] if self.channels_last else picture.shape
        fitted = _fitted(base, shape)
        self.base, self.passes = fitted.folded(), 0
        super().__init__(venv, observation_space=spaces.Dict({**seen, CODE: CodeSpace(fitted)}))

    def reset(self) -> Any:
        return self._with_code(self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        # PPO bootstraps from the last observation of an episode that was cut off.
        if last := [info["terminal_observation"] for info in infos if "terminal_observation" in info]:
            codes = self._with_code({IMAGE: np.stack([observation[IMAGE] for observation in last])})[CODE]
            for observation, code in zip(last, codes, strict=True):
                observation[CODE] = code
        return self._with_code(observations), rewards, dones, infos

    @torch.no_grad()
    def _with_code(self, observations: Any) -> Any:
        pictures = torch.from_numpy(np.ascontiguousarray(observations[IMAGE])).to(self.base.device)
        self.passes += len(pictures)
        code = self.base(pictures.permute(0, 3, 1, 2) if self.channels_last else pictures).out
        return {**observations, CODE: code.cpu().numpy()}


class SideTunedExtractor(BaseFeaturesExtractor):
    """Features for a policy: the side-tuned code of the picture, and beside it the other numbers of an observation.

    Two layers make other numbers, such as a speed, as wide as the picture's features.

    Args:
        observation_space: a dictionary with "rgb" and, from `VecBaseFeatures`, "base"; other entries are numbers (n,).
        base: a base's name, or a function that builds it: a saved policy must be able to build it again.
        method: "sidetune", or "features" for the base alone.
        side, side_options, merge, init: as in `SideTuner.add_task`; "distilled" brings the options of its side.
        hidden: width of the features; the output is twice as wide where there are other numbers.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("sidetune", "features")

    def __init__(
        self,
        observation_space: spaces.Dict,
        base: str | Callable[[], Base],
        method: str = "sidetune",
        side: str | nn.Module = "fcn5",
        side_options: Mapping[str, Any] | None = None,
        merge: str = "alpha",
        init: str | None = None,
        hidden: int = 128,
    ) -> None:
        shape = _picture(observation_space).shape
        if method not in self.METHODS:
            raise UnknownNameError(unknown("method", method, self.METHODS, verb="one of the extractor's"))
        if isinstance(base, Base):
            raise TypeError("base= takes a name or a function that builds the base, which is saved with every policy")
        others = {name: space for name, space in observation_space.spaces.items() if name not in (IMAGE, CODE)}
        width = sum(self._width(name, space) for name, space in others.items())
        super().__init__(observation_space, 2 * hidden if width else hidden)
        self.base = _fitted(base if isinstance(base, str) else base(), shape)
        self.numbers, own, found = tuple(others), CodeSpace(self.base), observation_space.spaces.get(CODE)
        if found not in (None, own):
            raise ArtifactError(f"{found} is of another base than {own}: give wrapper and extractor the same base")
        if side_options is None and init == "distilled" and side in self.base.distilled:
            side_options = self.base.distilled[str(side)][1]
        # A module of the user's is copied: each policy trains its own.
        parts = {"side": copy.deepcopy(side), "side_options": side_options, "merge": merge, "init": init}
        self.add_networks(method, parts)
        inputs = math.prod(self.base.output_shape)
        self.code = nn.Sequential(nn.Flatten(), nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.ReLU())
        layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()) if width else ()
        self.given = nn.Sequential(*layers) if layers else None
        self.register_buffer("base_fingerprint", torch.tensor(list(bytes.fromhex(own.fingerprint)), dtype=torch.uint8))
        assert own.identity is not None
        record = json.dumps(own.identity.record()).encode()
        self.register_buffer("base_identity", torch.tensor(list(record), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_check_base)

    def add_networks(self, method: str, parts: Mapping[str, Any]) -> None:
        """Build the networks that turn a picture into a code; `parts` are arguments of `build_branch`."""
        cached = CODE in self._observation_space.spaces  # type: ignore[attr-defined]
        self.encoder = None if cached else self.base.folded()
        self.branch = build_branch(self.base, head="identity", **parts) if method == "sidetune" else None
        if cached and self.branch is not None and self.branch.taps:
            raise ShapeError("the side reads taps of the base, which VecBaseFeatures does not keep: leave that out")

    def encode(self, inputs: Input, code: Tensor | None) -> Tensor:
        """The merged code of prepared pictures (b, c, h, w); `code` is the base's, where the observations hold it."""
        if code is not None:
            features = Features(code)
        else:
            # A policy that learned from cached codes acts without them, too.
            self.encoder = self.encoder or self.base.folded()
            features = self.encoder.encode(inputs)
        return features.out if self.branch is None else self.branch(inputs, features)

    def encode_numbers(self, name: str, values: Tensor) -> Tensor:
        """How the policy sees the entry `name` of the observations, (b, …) -> (b, n); subclasses may choose others."""
        return values.flatten(1)

    def _width(self, name: str, space: Any) -> int:
        if len(space.shape or ()) > 1:
            raise ShapeError(f"'{name}' {space.shape} is neither the picture '{IMAGE}' nor numbers (n,); leave it out")
        return self.encode_numbers(name, torch.zeros(1, get_flattened_obs_dim(space))).shape[1]

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        if float(observations[IMAGE].amax()) > 1:
            raise DataError("pictures must come scaled to 0 … 1: leave the policy's normalize_images as it is, True")
        features = self.code(self.encode(self.base.prepare(observations[IMAGE]), observations.get(CODE)))
        if self.given is None:
            return features
        numbers = [self.encode_numbers(name, observations[name]) for name in self.numbers]
        return torch.cat([features, self.given(torch.cat(numbers, 1))], 1)

    def apply(self, fn: Callable[[nn.Module], None]) -> SideTunedExtractor:
        """Do nothing: stable-baselines3 calls this to initialise all layers, and would overwrite pretrained weights."""
        return self

    def train(self, mode: bool = True) -> SideTunedExtractor:
        """Stay in evaluation mode: dropout and the statistics of small batches would move PPO's ratios away from 1."""
        return super().train(False)


def _check_base(extractor: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights that were learned on another base."""
    if (key := f"{prefix}base_fingerprint") in state:
        own = CodeSpace(extractor.base)
        assert own.identity is not None
        # Version 0.1.0 wrote the fingerprint alone.
        whole = state.get(f"{prefix}base_identity")
        try:
            record = None if whole is None else json.loads(bytes(whole.tolist()))
            difference = None if record is None else own.identity.difference(record)
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"this policy is damaged: the identity of its base is none ({error})") from error
        if difference or (record is None and bytes(state[key].tolist()).hex() not in own.known):
            raise ArtifactError("this policy was trained on another base; build the extractor with the base it had")
        state |= {key: extractor.base_fingerprint, f"{prefix}base_identity": extractor.base_identity}


def _picture(space: Any) -> spaces.Box:
    """The space of the pictures in observations."""
    picture = space.spaces.get(IMAGE) if isinstance(space, spaces.Dict) else None
    if not isinstance(picture, spaces.Box) or len(picture.shape) != 3 or picture.dtype != np.uint8:
        raise ShapeError(f"observations need pictures under '{IMAGE}', (h, w, c) or (c, h, w) uint8; there is {space}")
    return picture


def _fitted(base: str | Base, shape: tuple[int, ...]) -> Base:
    """The base for pictures (c, h, w)."""
    base = load_base(base) if isinstance(base, str) else base
    if not isinstance(base.example, Tensor) or base.example.ndim != 4 or base.example.shape[1] != shape[0]:
        raise ShapeError(f"the base does not take such pictures: {shape} with the channels first")
    return base.with_example(torch.zeros(1, *shape, dtype=torch.uint8, device=base.device))
