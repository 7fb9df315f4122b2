"""The worlds of agents: how far agents that learn nothing come in PointNav, and how fast PPO is."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

from record import Record, read, write
from sidetuning_bench.agents import curves, imitation, worlds
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.options import Count, with_values


@dataclass(frozen=True)
class Episodes:
    """Success of the expert, the compass and chance, where any way will do, and where ways wind."""

    count: Count = 100
    """Number of episodes of each."""
    split: str = "test"
    """Split of the levels."""


@dataclass(frozen=True)
class Speed:
    """Steps per second and base passes of PPO, with the base's features computed once and in every pass."""

    steps: Count = 4096
    """Steps of each run."""
    passes: tuple[Count, ...] = (4, 10)
    """Passes over each rollout: those of rl, and stable-baselines3's default."""
    rounds: Count = 3
    """Number of rounds, interleaved."""


def run_episodes(given: Episodes) -> None:
    """Record the success and SPL of each."""
    from sidetuning_bench.doom.nav import WINDING, DoomPointNav, pointnav

    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, made in (("any", DoomPointNav(given.split)), (f"winding {WINDING}", pointnav(given.split, 64))):
        found[name] = {}
        with closing(made) as world:
            for agent in imitation.BASELINES:
                act = imitation.acts(agent, world)
                outcomes = list(worlds.episodes(world, act, given.count, worlds.TEST_SEED))
                success, spl = fmean(o.success or 0.0 for o in outcomes), fmean(o.spl or 0.0 for o in outcomes)
                found[name][agent] = {"success": success, "spl": spl}
    about = {"split": given.split, "episodes": given.count, "seed": worlds.TEST_SEED}
    write("pointnav-episodes", {**about, "found": found})


def run_speed(given: Speed) -> None:
    """Record the rounds, per number of passes."""
    from sidetuning_bench.agents import ppo

    ppo.use_threads(None)
    found: dict[str, Any] = {}
    for passes in given.passes:
        rounds: dict[str, list[dict[str, float]]] = {"once": [], "every pass": []}
        for _ in range(given.rounds):
            for name, rows in rounds.items():
                rows.append(measure(given.steps, passes, cached=name == "once"))
        once, every = ({k: fmean(row[k] for row in rows) for k in rows[0]} for rows in rounds.values())
        found[str(passes)] = {
            **rounds,
            "steps per second, once / every pass": once["steps_per_second"] / every["steps_per_second"],
            "base passes, every pass / once": every["base_passes"] / once["base_passes"],
        }
    write("rl-speed", {"steps": given.steps, "passes": found})


def measure(steps: int, passes: int, cached: bool) -> dict[str, float]:
    """Steps per second, and pictures that the base saw, in one run of PPO."""
    from sidetuning_bench.agents import ppo

    settings = with_values(curves.Settings(), {"steps": steps, "passes": passes, "cached": cached})
    seen = 0

    def count(_module: Any, _inputs: Any, out: Any) -> None:
        nonlocal seen
        seen += len(out)

    with closing(ppo.training_env(settings)) as env:
        agent = ppo.build(settings, env)
        extractor: Any = agent.policy.features_extractor
        base = env.base if cached else extractor.encoder  # type: ignore[attr-defined]
        hook = base.net.register_forward_hook(count)
        # Starts the engines, on every level some of their time.
        agent.learn(settings.ppo.rollout * settings.ppo.envs)
        seen, before, started = 0, agent.num_timesteps, perf_counter()
        agent.learn(steps, reset_num_timesteps=False)
        seconds = perf_counter() - started
        hook.remove()
    return {"steps_per_second": (agent.num_timesteps - before) / seconds, "base_passes": seen}


def speed_table(given: Speed) -> str:
    """Numbers of passes as rows; what the base costs once, and in every pass."""
    speed, pictures = (
        "Steps per second, base once | in every pass | ratio",
        "Pictures, base once | in every pass | ratio",
    )
    text = f"| Passes over each rollout | {speed} | {pictures} |\n|{' ---: |' * 7}\n"
    for passes, rounds in read("rl-speed")["passes"].items():
        ways = [rounds["once"], rounds["every pass"]]
        speeds = [mean_and_error([row["steps_per_second"] for row in rows]) for rows in ways]
        seen = [fmean(row["base_passes"] for row in rows) for rows in ways]
        faster, fewer = rounds["steps per second, once / every pass"], rounds["base passes, every pass / once"]
        cells = [passes, *(f"{mean:.0f} ± {error:.0f}" for mean, error in speeds), f"{faster:.1f}"]
        text += f"| {' | '.join([*cells, *(f'{n:,.0f}' for n in seen), f'{fewer:.1f}'])} |\n"
    return text


EPISODES = Record(Episodes(), run_episodes)
RL_SPEED = Record(Speed(), run_speed, speed_table)
