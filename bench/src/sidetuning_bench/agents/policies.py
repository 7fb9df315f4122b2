"""Agents of finished runs, of imitation and of rl alike, ready to act."""

from __future__ import annotations

import json
from pathlib import Path

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents import cloning
from sidetuning_bench.agents.worlds import Player, map_base
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import with_values

GIVE = "give the folder of one run of imitation or rl"


def load_player(folder: str | Path) -> Player:
    """Load the agent of a finished run.

    Raises:
        SideTuningError: the folder holds no finished run of imitation or rl.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "run.json").read_text())
        scenario, saved = content["scenario"], content["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise SideTuningError(f"{folder} holds no run ({error}); {GIVE}") from error
    if scenario == "imitation-run":
        settings = with_values(cloning.Settings(), saved)
        agent = settings.clone.agent
        base = map_base(agent.base, agent.base_weights, settings.size)
        return cloning.player(settings, load_method(folder / "tasks", base))
    if scenario == "rl-run":
        # stable-baselines3 is needed for agents of rl alone.
        from sidetuning_bench.agents import ppo

        return ppo.player(*ppo.load_policy(folder))
    raise SideTuningError(f"{folder} holds a run of {scenario}; {GIVE}, such as {folder}/sidetune-0")
