"""Trajectories of an agent on disk, in Minari's format: written episode by episode, read as tensors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidetuning.errors import DataError
from sidetuning.files import atomic_write

COMPASS = "pointgoal_with_gps_compass"  # as Habitat calls it: distance and angle to the goal
EXPERT = "expert"  # the entry of Minari's infos that holds what the expert would do, where the agent strayed from it on purpose


@dataclass(frozen=True)
class Episode:
    """What happened from a reset to the end; there is one observation more than there are actions.

    Attributes:
        seed: of the reset.
        observations: arrays (n + 1, …) by name.
        actions: that were taken, (n,) int64.
        expert: what the expert would have done, (n,) int64.
        rewards: (n,).
        terminated: whether it ended by itself, and not for want of time.
    """

    seed: int
    observations: Mapping[str, np.ndarray[Any, Any]]
    actions: np.ndarray[Any, Any]
    expert: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]
    terminated: bool


class Writer:
    """Appends episodes to a data set; one that was cut short is gone on with.

    Args:
        folder: of the data set; its name is the data set's, and must end in a version such as "-v0".
        observation_space, action_space: of the environment.
        about: more entries for its metadata, JSON values.
    """

    def __init__(self, folder: str | Path, observation_space: Any, action_space: Any, about: Mapping[str, Any]) -> None:
        import minari
        from minari.dataset.minari_storage import MinariStorage

        path = Path(folder).resolve() / "data"  # Minari loses its way with relative ones
        self._metadata, self._kept = path / "metadata.json", path.parent / "metadata.json"
        if self._kept.exists():
            shutil.copyfile(self._kept, self._metadata)
            self._storage = MinariStorage.read(path)
            return
        shutil.rmtree(path, ignore_errors=True)  # of a process that was killed before its first episode was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        self._storage = MinariStorage.new(
            path,
            observation_space=observation_space,
            action_space=action_space,
            data_format="arrow",
            jpeg_encoding=False,
        )
        self._storage.update_metadata({"dataset_id": Path(folder).name, "minari_version": minari.__version__, **about})
        self._keep()

    def _keep(self) -> None:
        """A copy that is always whole: Minari writes its own in place, and a kill may leave that empty."""
        with atomic_write(self._kept) as temporary:
            shutil.copyfile(self._metadata, temporary)

    def __len__(self) -> int:
        return int(self._storage.total_episodes)

    @property
    def tried(self) -> int:
        """How many episodes were run for those that are here."""
        return int(self._storage.metadata.get("tried", 0))

    def append(self, episode: Episode, tried: int) -> None:
        """Add one, for which so many were run in all; it counts once it is whole."""
        from minari.data_collector.episode_buffer import EpisodeBuffer

        n = len(episode.actions)
        last = np.arange(n) == n - 1
        expert = np.append(episode.expert, episode.expert[-1])[:, None]  # Minari wants one more, and cannot read (n,)
        self._storage.update_episodes([
            EpisodeBuffer(
                id=len(self), seed=episode.seed, observations=dict(episode.observations), actions=episode.actions,
                rewards=episode.rewards, terminations=last & episode.terminated, truncations=last & (not episode.terminated),
                infos={EXPERT: expert},
            )
        ])  # fmt: skip
        self._storage.update_metadata({"tried": tried})
        self._keep()


@dataclass(frozen=True)
class Steps:
    """All steps of some episodes, one after another.

    Attributes:
        rgb: what the agent saw, (n, 3, h, w) uint8.
        extra: other numbers that it perceived, such as a compass, (n, k); k is 0 where there are none.
        actions: what the expert would do, (n,) int64.
        starts: the first step of each episode, and the number of steps, (episodes + 1,).
    """

    rgb: Tensor
    extra: Tensor
    actions: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rgb[index], self.actions[index]

    def of(self, episodes: Sequence[int]) -> Tensor:
        """Numbers of the steps of some episodes."""
        return torch.cat([torch.arange(int(self.starts[e]), int(self.starts[e + 1])) for e in episodes])

    def fingerprint(self) -> str:
        """sha256 of what was seen and done."""
        digest = hashlib.sha256(f"{tuple(self.rgb.shape)}".encode())
        for tensor in (self.rgb, self.extra, self.actions):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def read_steps(folder: str | Path, episodes: int | None = None) -> Steps:
    """Read a data set of trajectories, ours or another of Minari's with pictures (h, w, 3) or (3, h, w) uint8 under `rgb`; of other
    observations a compass alone is read.

    Args:
        folder: the one that holds `data/`.
        episodes: read the first so many alone; None for all.

    Raises:
        DataError: no data set, one without such pictures or with too few episodes, or damaged files.
    """
    try:
        from minari import MinariDataset
    except ModuleNotFoundError as error:
        raise ImportError(f"trajectories need {error.name}; type: pip install 'sidetuning[agents]'") from error
    if episodes is not None and episodes < 1:
        raise DataError(f"read at least one episode, not {episodes}")
    path = Path(folder).resolve() / "data"
    if not path.exists():
        raise DataError(
            f"{folder} holds no trajectories; make them with: sidetuning collect-trajectories --out {folder}"
        )
    try:
        data = MinariDataset(path)
        have = int(data.total_episodes)
        if have < (episodes or 1):
            raise DataError(f"{folder} has {have} episodes, not {episodes or 1}; collect more")
        found = list(data.iterate_episodes(range(have if episodes is None else episodes)))
    except DataError:
        raise
    except Exception as error:  # Minari raises what its formats make it
        raise DataError(
            f"{folder} cannot be read ({type(error).__name__}: {error}); delete the folder, and collect it again"
        ) from error
    if not isinstance(found[0].observations, Mapping) or "rgb" not in found[0].observations:
        raise DataError(f"{folder} has no observations 'rgb'; these are what the base sees")
    first = found[0].observations["rgb"]
    if first.ndim != 4 or first.dtype != np.uint8 or 3 not in (first.shape[1], first.shape[3]):
        raise DataError(
            f"{folder} has pictures {first.shape[1:]} {first.dtype} under 'rgb'; these must be (h, w, 3) or (3, h, w) uint8"
        )
    last = first.shape[3] == 3
    pictures = [torch.from_numpy(e.observations["rgb"][: len(e)]) for e in found]
    rgb = [p.permute(0, 3, 1, 2) if last else p for p in pictures]
    numbers = [extra_of({k: v[: len(e)] for k, v in e.observations.items()}, len(e)) for e in found]
    actions = [np.asarray(e.infos.get(EXPERT, e.actions)).reshape(-1)[: len(e)] for e in found]
    starts = torch.tensor([0, *(len(e) for e in found)]).cumsum(0)
    return Steps(
        torch.cat(rgb).contiguous(), torch.cat(numbers), torch.from_numpy(np.concatenate(actions)).long(), starts
    )


def extra_of(observations: Mapping[str, Any], count: int) -> Tensor:
    """The numbers beside the picture as a policy takes them: (n, 3) of a compass, else (n, 0)."""
    if COMPASS not in observations:
        return torch.zeros(count, 0)
    return compass_numbers(torch.from_numpy(np.asarray(observations[COMPASS], np.float32)).reshape(count, 2))


def compass_numbers(compass: Tensor) -> Tensor:
    """(n, 2) distance and angle -> (n, 3) log(1 + distance), cos and sin: near and far told apart, and no jump behind the agent."""
    distance, angle = compass.T
    return torch.stack([distance.log1p(), angle.cos(), angle.sin()], 1)


def concatenate(frames: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> dict[str, np.ndarray[Any, Any]]:
    """Observations of single steps as arrays (n, …) by name."""
    return {name: np.stack([f[name] for f in frames]) for name in frames[0]}
