"""Side-tuned policies for stable-baselines3: a features extractor, and base features computed once per step of the environment.

    env = VecBaseFeatures(env, "resnet-doom-curvature")
    PPO("MultiInputPolicy", env, policy_kwargs={"features_extractor_class": SideTunedExtractor})

PPO reads every observation `n_epochs` times; with `VecBaseFeatures` the base sees it once. A saved policy holds the side and not the base.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor, nn

from sidetuning.base import Base, Features
from sidetuning.branch import build_branch
from sidetuning.errors import ArtifactError, DataError, ShapeError, UnknownNameError
from sidetuning.heads import two_layers
from sidetuning.loading import load_base
from sidetuning.registry import unknown
from sidetuning_bench.agents.trajectories import COMPASS, compass_numbers
from sidetuning_bench.methods.trunk import Trunk

Method = Literal["sidetune", "features", "finetune", "scratch"]
Precision = Literal["no", "bf16"]
IMAGE, CODE = "rgb", "base"  # keys of observations: the picture, and what the base made of it


class CodeSpace(spaces.Box):
    """Space of a base's codes. It knows of which base, so that a policy is not run on those of another."""

    def __init__(self, base: Base) -> None:
        super().__init__(-np.inf, np.inf, base.output_shape, np.float32)
        self.fingerprint = base.identity().sha256

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and getattr(other, "fingerprint", self.fingerprint) == self.fingerprint

    def __repr__(self) -> str:
        return f"CodeSpace(base {self.fingerprint[:8]}, {self.shape})"


class VecBaseFeatures(VecEnvWrapper):
    """Adds the base's code of the picture to every observation, under "base".

    Args:
        venv: environments whose observations are dictionaries with "rgb", (h, w, 3) or (3, h, w) uint8.
        base: a base, or its name.

    Attributes:
        passes: pictures that the base has seen.

    Raises:
        TypeError: not vectorised environments.
        ShapeError: their observations have no picture that the base takes, or have a "base" already.
    """

    def __init__(self, venv: VecEnv, base: str | Base) -> None:
        if not isinstance(venv, VecEnv):
            raise TypeError(f"VecBaseFeatures wraps a VecEnv, such as DummyVecEnv([…]), not {type(venv).__name__}")
        space = _image_space(venv.observation_space)
        if CODE in venv.observation_space.spaces:  # type: ignore[attr-defined]
            raise ShapeError(f"the observations have '{CODE}' already; wrap these environments once, or rename it")
        built = load_base(base) if isinstance(base, str) else base
        self.channels_last = space.shape[0] != _channels(built)
        built = _fitted(built, space.shape[2:] + space.shape[:2] if self.channels_last else space.shape)
        self.base, self.passes = built.folded(), 0
        spaces_of = dict(venv.observation_space.spaces)  # type: ignore[attr-defined]
        super().__init__(venv, observation_space=spaces.Dict({**spaces_of, CODE: CodeSpace(built)}))

    def reset(self) -> Any:
        return self._with_code(self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        last = [info["terminal_observation"] for info in infos if "terminal_observation" in info]
        if last:  # from these PPO bootstraps where an episode was cut off
            codes = self._encode(np.stack([o[IMAGE] for o in last]))
            for observation, code in zip(last, codes, strict=True):
                observation[CODE] = code
        return self._with_code(observations), rewards, dones, infos

    def _with_code(self, observations: Any) -> Any:
        return {**observations, CODE: self._encode(observations[IMAGE])}

    @torch.no_grad()
    def _encode(self, pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(n, …) uint8 -> (n, …) float32"""
        x = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.base.device)
        self.passes += len(x)
        return self.base(x.permute(0, 3, 1, 2) if self.channels_last else x).out.cpu().numpy()


class SideTunedExtractor(BaseFeaturesExtractor):
    """From an observation to features for the policy: its picture's by one of four methods, and beside them those of all other numbers
    in it, such as a compass, which two layers make as wide.

    Args:
        observation_space: a dictionary with "rgb"; with "base" (see `VecBaseFeatures`) the base is not run here, but for observations that
            come without it. Other entries are numbers, without a second dimension; a compass as Habitat's is (2,), distance and angle.
        base: a base's name, or a function that builds it: what is saved with a policy must build it again.
        method: "sidetune"; "features", the base alone; "finetune", a tuned copy of the base; "scratch", the side alone from
            random weights.
        side, side_options, merge, init: as `SideTuner.add_task`; without options the distilled fcn5 has a quarter of its width, as the one
            that ships.
        hidden: width of the features; with other numbers, twice that.
        precision: "bf16" runs what "finetune" and "scratch" train under bfloat16 autocast, when acting and when learning alike; its
            output is float32.

    Orthogonal initialisation, which stable-baselines3 applies to all layers of a policy, passes the extractor by: it would
    undo the distilled side and the pretrained copy. A tuned copy starts with its batch norms merged into its convolutions; those that
    cannot be merged keep their running statistics.

    Raises:
        UnknownNameError: no such base, method, side, merge or precision.
        ShapeError: observations without a picture, or with entries that are neither picture nor numbers; a base for other pictures.
        ArtifactError: the observations hold codes of another base.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        base: str | Callable[[], Base] = "resnet-doom-curvature",
        method: Method = "sidetune",
        side: str | nn.Module = "fcn5",
        side_options: Mapping[str, Any] | None = None,
        merge: str = "alpha",
        init: str | None = "distilled",
        hidden: int = 128,
        precision: Precision = "no",
    ) -> None:
        space = _image_space(observation_space)
        for what, given, known in (("method", method, get_args(Method)), ("precision", precision, get_args(Precision))):
            if given not in known:
                raise UnknownNameError(unknown(what, given, known, verb="one of the extractor's"))
        if isinstance(base, Base):
            raise TypeError(
                "base= takes a name or a function that builds the base: it would be saved with every policy"
            )
        numbers = _numbers(observation_space)
        super().__init__(observation_space, 2 * hidden if numbers else hidden)
        built = _fitted(load_base(base) if isinstance(base, str) else base(), space.shape)
        fingerprint = built.identity().sha256
        code_space = observation_space.spaces.get(CODE)
        if code_space is not None:
            if getattr(code_space, "fingerprint", fingerprint) != fingerprint or code_space.shape != built.output_shape:
                raise ArtifactError(
                    f"the observations hold codes {code_space.shape} of another base than the extractor's, whose are {built.output_shape}: "
                    "give VecBaseFeatures and the extractor the same base"
                )
            if built.tap_shapes and method == "sidetune":
                raise ShapeError(
                    "a base with taps cannot be cached by VecBaseFeatures, which keeps its code alone: leave that out"
                )
        if side_options is None and side == "fcn5" and init == "distilled" and method in ("sidetune", "scratch"):
            _, side_options = built.distilled[side]
        side = copy.deepcopy(side)  # a module of the user's: of this policy alone
        self.base, self.precision, self.numbers = built, precision, tuple(numbers)
        encodes = method in ("sidetune", "features") and code_space is None
        self.encoder = built.folded() if encodes else None  # as VecBaseFeatures runs it
        self.branch: nn.Module | None = None
        self.trunk: nn.Module | None = None  # makes a code alone, without a pass of the base
        if method == "sidetune":
            self.branch = build_branch(
                built, side=side, head="identity", merge=merge, init=init, side_options=side_options
            )
        elif method == "scratch":
            self.trunk = build_branch(
                built, side=side, head="identity", merge="side-only", side_options=side_options
            ).side
        elif method == "finetune":
            self.trunk = Trunk(built.folded())  # its batch norms would not move: the copy has none
        width = math.prod(built.output_shape)
        self.code = nn.Sequential(nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU())
        self.given = two_layers(sum(numbers.values()), hidden) if numbers else None
        self.register_buffer("base_fingerprint", torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_check_base)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        image = observations[IMAGE]
        if float(image.amax()) > 1:  # stable-baselines3 scales pictures, unless it is told not to
            raise DataError("pictures must come scaled to 0 … 1: leave the policy's normalize_images as it is, True")
        x = self.base.prepare(image)
        if self.trunk is not None:
            with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                code = self.trunk(x).float()
        else:
            if CODE in observations:
                features = Features(observations[CODE])
            else:
                if self.encoder is None:  # learned from cached codes, and now there are none
                    self.encoder = self.base.folded()
                features = self.encoder.encode(x)
            code = features.out if self.branch is None else self.branch(x, features)
        out = self.code(code)
        if self.given is None:
            return out
        told = {name: observations[name] for name in self.numbers}
        heard = [compass_numbers(v) if name == COMPASS else v.flatten(1) for name, v in told.items()]
        return torch.cat([out, self.given(torch.cat(heard, 1))], 1)

    def apply(self, fn: Callable[[nn.Module], None]) -> SideTunedExtractor:
        """Does nothing: see above."""
        return self

    def train(self, mode: bool = True) -> SideTunedExtractor:
        """Batch norms stay in evaluation mode: with the statistics of small batches PPO's ratios would not start at 1."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def _check_base(extractor: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}base_fingerprint")
    if saved is not None and not torch.equal(saved.cpu(), extractor.get_buffer("base_fingerprint").cpu()):
        raise ArtifactError("this policy was trained on another base; build the extractor with the base that it had")


def _image_space(space: Any) -> spaces.Box:
    """The space of the pictures."""
    if not isinstance(space, spaces.Dict) or IMAGE not in space.spaces:
        raise ShapeError(f"observations must be a dictionary with pictures under '{IMAGE}', not {space}")
    image = space.spaces[IMAGE]
    if not isinstance(image, spaces.Box) or len(image.shape) != 3 or image.dtype != np.uint8:
        raise ShapeError(f"pictures under '{IMAGE}' must be (h, w, 3) or (3, h, w) uint8, not {image}")
    return image


def _channels(base: Base) -> int:
    """Of the pictures that a base takes."""
    return int(getattr(base.example, "shape", (0, 0, 0))[-3])


def _fitted(base: Base, shape: tuple[int, ...]) -> Base:
    """The base for pictures (c, h, w)."""
    example = base.example
    if not isinstance(example, Tensor) or shape[0] != _channels(base):
        raise ShapeError(f"the base does not take such pictures: {shape} with the channels first")
    if tuple(example.shape[1:]) == shape:
        return base
    return base.with_example(torch.zeros(1, *shape, dtype=torch.uint8, device=base.device))


def _numbers(space: spaces.Dict) -> dict[str, int]:
    """How many numbers each other entry of an observation comes to."""
    found = {}
    for name, entry in space.spaces.items():
        if name in (IMAGE, CODE):
            continue
        if len(entry.shape or ()) > 1:
            raise ShapeError(
                f"'{name}' {entry.shape} is neither the picture under '{IMAGE}' nor plain numbers (n,); leave it out of the observations"
            )
        if name == COMPASS and entry.shape != (2,):
            raise ShapeError(f"'{COMPASS}' must be (2,), distance and angle, not {entry.shape}")
        found[name] = 3 if name == COMPASS else get_flattened_obs_dim(entry)
    return found
