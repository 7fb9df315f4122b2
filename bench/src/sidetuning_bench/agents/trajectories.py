"""Trajectories of an agent on disk, in Minari's format: written episode by episode, read as tensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidetuning.errors import ArtifactError, DataError
from sidetuning.files import check_signed, read_bytes, read_json, signed, write_json

# Habitat's name of the distance and angle to the goal.
COMPASS = "pointgoal_with_gps_compass"
# The entry of Minari's infos that holds the expert's action where the agent strayed from it on purpose.
EXPERT = "expert"
MEND = "delete the folder, and collect it again"
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Episode:
    """An episode from its reset to its end, with one observation more than actions.

    Attributes:
        seed: seed of the reset.
        observations: arrays (n + 1, …) by name.
        actions: actions taken, (n,) int64.
        expert: actions that the expert would have taken, (n,) int64.
        rewards: rewards, (n,).
        terminated: whether it ended by itself, and not for lack of time.
    """

    seed: int
    observations: Arrays
    actions: np.ndarray[Any, Any]
    expert: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]
    terminated: bool


class Writer:
    """Appends episodes to a data set, also to one whose writing was interrupted.

    Args:
        folder: folder of the data set; its name is the data set's, and must end in a version such as "-v0".
        observation_space, action_space: spaces of the environment.
        about: more entries for its metadata, JSON values.
    """

    def __init__(self, folder: str | Path, observation_space: Any, action_space: Any, about: Mapping[str, Any]) -> None:
        import minari
        from minari.dataset.minari_storage import MinariStorage

        # Minari cannot find its files by a relative path.
        path = Path(folder).resolve() / "data"
        self._metadata, self._copy = path / "metadata.json", path.parent / "metadata.json"
        if self._copy.exists():
            shutil.copyfile(self._copy, self._metadata)
            self._storage = MinariStorage.read(path)
            # An episode that a kill cut short.
            for left in path.iterdir():
                if left.is_dir() and left.name.isdigit() and int(left.name) >= len(self):
                    shutil.rmtree(left)
            return
        # A process that was killed before its first episode was whole may have left a part.
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        spaces = {"observation_space": observation_space, "action_space": action_space}
        self._storage = MinariStorage.new(path, **spaces, data_format="arrow", jpeg_encoding=False)
        self._storage.update_metadata({"dataset_id": Path(folder).name, "minari_version": minari.__version__, **about})
        self._keep()

    def _keep(self) -> None:
        """Copy the metadata: Minari writes its own in place, and a kill may leave that empty."""
        write_json(self._copy, signed(json.loads(self._metadata.read_text(encoding="utf-8"))))

    def __len__(self) -> int:
        return int(self._storage.total_episodes)

    @property
    def tried(self) -> int:
        """Number of episodes that were run for those that are here."""
        return int(self._storage.metadata.get("tried", 0))

    def append(self, episode: Episode, tried: int) -> None:
        """Add an episode, which counts once it is whole; `tried` episodes were run so far."""
        from minari.data_collector.episode_buffer import EpisodeBuffer

        n = len(episode.actions)
        last = np.arange(n) == n - 1
        buffer = EpisodeBuffer(
            id=len(self),
            seed=episode.seed,
            observations=dict(episode.observations),
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=last & episode.terminated,
            truncations=last & (not episode.terminated),
            # Minari wants an entry for the last observation too, and cannot read (n,).
            infos={EXPERT: np.append(episode.expert, episode.expert[-1])[:, None]},
        )
        self._storage.update_episodes([buffer])
        number = buffer.id
        sums = {**self._storage.metadata.get("sums", {}), str(number): _sha256(self._metadata.parent / str(number))}
        self._storage.update_metadata({"tried": tried, "sums": sums})
        self._keep()


@dataclass(frozen=True)
class Steps:
    """All steps of some episodes, one after another.

    Attributes:
        rgb: pictures that the agent saw, (n, 3, h, w) uint8.
        extra: other numbers that it perceived, such as a compass, (n, k); k is 0 where there are none.
        actions: actions that the expert would take, (n,) int64.
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
        """sha256 of pictures, numbers and actions."""
        digest = hashlib.sha256(f"{tuple(self.rgb.shape)}".encode())
        for tensor in (self.rgb, self.extra, self.actions):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def read_steps(folder: str | Path) -> Steps:
    """Read a data set of trajectories, ours or another of Minari's.

    Pictures are (h, w, 3) or (3, h, w) uint8 under "rgb"; of other observations a compass alone is read.

    Args:
        folder: folder that holds `data/`.

    Raises:
        DataError: no data set, one without such pictures or without episodes, or damaged files.
    """
    found = _read(Path(folder))
    if not isinstance(found[0].observations, Mapping) or "rgb" not in found[0].observations:
        raise DataError(f"{folder} has no observations 'rgb'; these are what the base sees")
    first = found[0].observations["rgb"]
    if first.ndim != 4 or first.dtype != np.uint8 or 3 not in (first.shape[1], first.shape[3]):
        what = f"pictures {first.shape[1:]} {first.dtype} under 'rgb'"
        raise DataError(f"{folder} has {what}; these must be (h, w, 3) or (3, h, w) uint8")
    rgb = torch.cat([torch.from_numpy(e.observations["rgb"][: len(e)]) for e in found])
    rgb = (rgb.permute(0, 3, 1, 2) if first.shape[3] == 3 else rgb).contiguous()
    extra = [extra_of({name: v[: len(e)] for name, v in e.observations.items()}, len(e)) for e in found]
    actions = [np.asarray(e.infos.get(EXPERT, e.actions)).reshape(-1)[: len(e)] for e in found]
    starts = torch.tensor([0, *(len(e) for e in found)]).cumsum(0)
    return Steps(rgb, torch.cat(extra), torch.from_numpy(np.concatenate(actions)).long(), starts)


def _read(folder: Path) -> list[Any]:
    """The episodes, as Minari gives them."""
    try:
        from minari import MinariDataset
    except ModuleNotFoundError as error:
        raise ImportError(f"trajectories need {error.name}; type: pip install 'sidetuning-bench[agents]'") from error
    path = folder.resolve() / "data"
    if not path.exists():
        raise DataError(f"{folder} holds no trajectories; sidetuning bench collect-trajectories makes them")
    try:
        sums = _check(folder)
        data = MinariDataset(path)
        chosen = range(int(data.total_episodes))
        if changed := [k for k in chosen if sums.get(str(k), "") not in ("", _sha256(path / str(k)))]:
            raise DataError(f"episode {changed[0]} of {folder} was changed; {MEND}")
        found = list(data.iterate_episodes(chosen))
    except (DataError, ArtifactError):
        raise
    # Minari's formats raise all kinds of errors.
    except Exception as error:
        raise DataError(f"{folder} cannot be read ({type(error).__name__}: {error}); {MEND}") from error
    if not found:
        raise DataError(f"{folder} has no episodes; collect some")
    return found


def _check(folder: Path) -> dict[str, str]:
    """The checksums of the episodes that were collected by us, whose metadata must be what was written."""
    file, copy = folder / "data" / "metadata.json", folder / "metadata.json"
    content = read_json(file, {"sums?": dict}, MEND)
    if copy.exists():
        kept = check_signed(read_json(copy, {"sums?": dict}, MEND), str(copy), MEND, needed=False)
        content.pop("sha256", None)
        if "sums" in kept and kept != content:
            raise DataError(f"{file} is not what was written, or collecting was interrupted; collect again, or {MEND}")
    return content.get("sums") or {}


def _sha256(folder: Path) -> str:
    """sha256 over the files of an episode."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(f"{file.name}\n".encode() + read_bytes(file))
    return digest.hexdigest()


def extra_of(observations: Mapping[str, Any], count: int) -> Tensor:
    """The numbers beside the picture as a policy takes them: (n, 3) of a compass, else (n, 0)."""
    if COMPASS not in observations:
        return torch.zeros(count, 0)
    return compass_numbers(torch.from_numpy(np.asarray(observations[COMPASS], np.float32)).reshape(count, 2))


def compass_numbers(compass: Tensor) -> Tensor:
    """(n, 2) distance and angle -> (n, 3) log(1 + distance), cos and sin: no jump where the goal lies behind."""
    distance, angle = compass.T
    return torch.stack([distance.log1p(), angle.cos(), angle.sin()], 1)
