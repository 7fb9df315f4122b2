"""Side-tuned policies for stable-baselines3: a features extractor, and base features computed once per step of the environment.

    env = VecBaseFeatures(env, load_base("resnet-doom-curvature").with_example(...))
    PPO("MultiInputPolicy", env, policy_kwargs={"features_extractor_class": SideTunedExtractor})

PPO reads every observation `n_epochs` times; with `VecBaseFeatures` the base sees it once. A saved policy holds the side and not the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor, nn

from sidetuning.base import Base, Features, load_base
from sidetuning.branch import build_branch
from sidetuning.data.trajectories import COMPASS, compass_numbers
from sidetuning.errors import ArtifactError, ShapeError, UnknownNameError
from sidetuning.heads import two_layers
from sidetuning.methods.trunk import Trunk
from sidetuning.registry import unknown
from sidetuning.sides.initialise import DISTILLED

Method = Literal["sidetune", "features", "finetune", "scratch"]
IMAGE, CODE = "rgb", "base"  # keys of observations: the picture, and what the base made of it


class VecBaseFeatures(VecEnvWrapper):
    """Adds the base's code of the picture to every observation, under "base".

    Args:
        venv: environments whose observations are dictionaries with "rgb", (h, w, 3) or (3, h, w) uint8.
        base: a base for such pictures.

    Attributes:
        passes: pictures that the base has seen.
    """

    def __init__(self, venv: VecEnv, base: Base) -> None:
        space = _image_space(venv.observation_space)
        self.base, self.passes = base.folded(), 0
        self.channels_last = space.shape[0] != 3
        size = space.shape[:2] if self.channels_last else space.shape[1:]
        example = base.example
        if not isinstance(example, Tensor) or tuple(example.shape[-2:]) != tuple(size):
            raise ShapeError(f"the base is for another input than pictures {tuple(size)}; give base.with_example(…)")
        code = spaces.Box(-np.inf, np.inf, base.output_shape, np.float32)
        spaces_of = dict(venv.observation_space.spaces)  # type: ignore[attr-defined]
        super().__init__(venv, observation_space=spaces.Dict({**spaces_of, CODE: code}))

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
    """From an observation's picture to features for the policy, by one of four methods; a compass is appended, made as wide as the code's.

    Args:
        observation_space: a dictionary with "rgb"; with "base" (see `VecBaseFeatures`) the base is not run here.
        base: a base's name, or a function that builds it: what is saved with a policy must build it again.
        method: "sidetune"; "features", the base alone; "finetune", a tuned copy of the base; "scratch", the side alone from
            random weights.
        side, side_options, merge, init: as `SideTuner.add_task`; without options the distilled fcn5 has a quarter of its width, as the one
            that ships.
        hidden: width of the features; with a compass, twice that.
        precision: "bf16" runs what "finetune" and "scratch" train under bfloat16 autocast, when acting and when learning alike; its
            output is float32.

    Orthogonal initialisation, which stable-baselines3 applies to all layers of a policy, passes the extractor by: it would
    undo the distilled side and the pretrained copy. A tuned copy starts with its batch norms merged into its convolutions; those that
    cannot be merged keep their running statistics.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        base: str | Callable[[], Base] = "resnet-doom-curvature",
        method: Method = "sidetune",
        side: str = "fcn5",
        side_options: Mapping[str, Any] | None = None,
        merge: str = "alpha",
        init: str | None = "distilled",
        hidden: int = 128,
        precision: Literal["no", "bf16"] = "no",
    ) -> None:
        if method not in get_args(Method):
            raise UnknownNameError(unknown("method", method, get_args(Method), verb="one of the extractor's"))
        has_compass = COMPASS in observation_space.spaces
        super().__init__(observation_space, 2 * hidden if has_compass else hidden)
        space = _image_space(observation_space)
        built = load_base(base) if isinstance(base, str) else base()
        example = torch.zeros(1, *space.shape, dtype=torch.uint8)
        if tuple(space.shape[-2:]) != tuple(getattr(built.example, "shape", (0, 0))[-2:]):
            built = built.with_example(example)
        if side_options is None and side == "fcn5" and init == "distilled" and method in ("sidetune", "scratch"):
            _, side_options = DISTILLED["resnet-doom-curvature", side]
        self.base, self.precision = built, precision
        needed = method in ("sidetune", "features")
        self.given = needed and CODE in observation_space.spaces
        self.encoder = built.folded() if needed and not self.given else built  # folded, as VecBaseFeatures runs it
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
        self.compass = two_layers(3, hidden) if has_compass else None
        digest = torch.tensor(list(bytes.fromhex(built.fingerprint())), dtype=torch.uint8)
        self.register_buffer("base_fingerprint", digest)
        self.register_load_state_dict_pre_hook(_check_base)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        x = self.base.prepare(observations[IMAGE])
        if self.trunk is not None:
            with torch.autocast(observations[IMAGE].device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                code = self.trunk(x).float()
        else:
            features = Features(observations[CODE]) if self.given else self.encoder.encode(x)
            code = features.out if self.branch is None else self.branch(x, features)
        out = self.code(code)
        if self.compass is None:
            return out
        return torch.cat([out, self.compass(compass_numbers(observations[COMPASS]))], 1)

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
    assert isinstance(image, spaces.Box)
    return image
