"""Walking in Doom: grids, environments with Habitat's conventions, the expert, and that no engine outlives anybody."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sidetuning.errors import ArtifactError, DataError, SideTuningError, UnknownNameError

pytest.importorskip("vizdoom")
pytest.importorskip("scipy")

from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from test_doom import instances, left, linux, spawn

from sidetuning_bench.agents.outcomes import Outcome, Scores, difference_text, mean_text, scores, wilson
from sidetuning_bench.agents.trajectories import COMPASS
from sidetuning_bench.agents.worlds import SPLITS, at_random, by_compass, drawing, episodes, make_world
from sidetuning_bench.doom import grid as doom_grid
from sidetuning_bench.doom import nav
from sidetuning_bench.doom.engine import EngineError
from sidetuning_bench.doom.frames import TEST, TRAIN, VAL
from sidetuning_bench.doom.nav import (
    FORWARD,
    LEFT,
    MAPS,
    RIGHT,
    STOP,
    WINDING,
    DoomExplore,
    DoomPointNav,
    DoomWalk,
    mark,
)

Build = Callable[..., Any]


def box(x1: int, y1: int, x2: int, y2: int, floor: int = 0, ceiling: int = 128, doors: str = "") -> Any:
    """A sector as the engine tells of it: four lines, those named in `doors` not blocking."""
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    lines = [
        SimpleNamespace(x1=a[0], y1=a[1], x2=b[0], y2=b[1], is_blocking=side not in doors)
        for side, a, b in zip("swne"[:1] + "enw", corners, corners[1:] + corners[:1])
    ]
    return SimpleNamespace(lines=lines, floor_height=floor, ceiling_height=ceiling)


def corner_rooms(step: int = 0, room: int = 128) -> list[Any]:
    """An L: a room, a second one east of it, a third one north of the second, open to each other."""
    first = box(0, 0, 256, 256, doors="e")
    second = box(256, 0, 512, 256, floor=step, ceiling=step + room, doors="n")
    third = box(256, 256, 512, 512, floor=step, ceiling=step + room)
    # One line for both sides, as in a map.
    second.lines[3] = SimpleNamespace(**vars(first.lines[1]))
    third.lines[0] = SimpleNamespace(**vars(second.lines[2]))
    return [first, second, third]


def test_distances_go_around_corners() -> None:
    grid = doom_grid.build(corner_rooms(), [], cell=8)
    ways = grid.to(384, 480)
    # A player's middle stays 20 units from the edge at (256, 256).
    corner = np.array([256 + 20, 256 - 20]) / 1.0
    for x, y in ((40, 40), (40, 216), (128, 128)):
        exact = np.hypot(*(corner - (x, y))) + np.hypot(*(np.array([384, 480]) - corner))
        assert ways.distance(x, y) == pytest.approx(exact, rel=0.04), (x, y)
    # In sight: a straight line.
    assert ways.distance(384, 300) == pytest.approx(180, rel=0.03)
    assert ways.distance(384, 480) == 0 and grid.to(384, 480, limit=100).distance(40, 40) == np.inf
    way = [(40.0, 40.0)]
    while way[-1] != (384, 480):
        way.append(ways.waypoint(*way[-1]))
        assert grid.straight(*way[-2], *way[-1]) and len(way) < 30
    length = sum(np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(way))
    assert ways.distance(40, 40) * 0.95 < length < ways.distance(40, 40) * 1.2


@pytest.mark.parametrize(
    ("sectors", "reachable"),
    [
        (corner_rooms(), True),
        (corner_rooms(step=24), True),
        (corner_rooms(step=25), False),
        (corner_rooms(room=56), True),
        (corner_rooms(room=55), False),
    ],
)
def test_high_steps_and_low_ceilings_stop_a_walk(sectors: list[Any], reachable: bool) -> None:
    grid = doom_grid.build(sectors, [], cell=8)
    assert (grid.at(128, 128) >= 0 and grid.at(384, 384) >= 0) == reachable


def test_things_stand_in_the_way_and_the_void_is_no_floor() -> None:
    post = SimpleNamespace(category="Decoration", position_x=384, position_y=384)
    item = SimpleNamespace(category="Item", position_x=128, position_y=128)
    grid = doom_grid.build(corner_rooms(), [post, item], cell=8)
    columns, rows = ((np.array([384, 384]) - grid.low) // 8).astype(int)
    assert grid.number[columns, rows] < 0 <= grid.at(128, 128)
    assert not grid.straight(384, 300, 384, 480) and grid.straight(128, 40, 128, 216)
    # Beside the L.
    outside = ((np.array([128, 384]) - grid.low) // 8).astype(int)
    assert grid.number[tuple(outside)] < 0
    with pytest.raises(DataError, match="nobody can walk to"):
        grid.to(-300, -300)


def test_grids_are_kept_and_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    grid = doom_grid.build(corner_rooms(), [], cell=8)
    file = tmp_path / "a" / doom_grid.file_name("L", 8)
    doom_grid.save(grid, file)
    again = doom_grid.load(file)
    assert again is not None
    assert (again.number == grid.number).all() and (again.clearance == grid.clearance).all() and again.cell == 8
    file.write_bytes(file.read_bytes()[:100])
    assert doom_grid.load(file) is None and doom_grid.load(tmp_path / "none") is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def walk(cache: Path) -> Iterator[Build]:
    """Builds environments, and ends them."""
    made: list[DoomWalk] = []

    def build(kind: type[DoomWalk], *args: Any, **options: Any) -> Any:
        made.append(kind(*args, **{"cache": cache, **options}))
        return made[-1]

    yield build
    for env in made:
        env.close()


def test_splits_share_no_map() -> None:
    assert not {*TRAIN} & {*VAL, *TEST} and not {*VAL} & {*TEST} and MAPS["test"] == TEST


@pytest.mark.filterwarnings("ignore:.*The environment is being initialised with render_mode.*")
@pytest.mark.parametrize("kind", [DoomPointNav, DoomExplore])
def test_gymnasium_finds_nothing_wrong(walk: Build, kind: type[DoomWalk]) -> None:
    check_env(walk(kind, "map01"), skip_render_check=True)


def test_compass_and_actions_are_habitats(walk: Build) -> None:
    assert nav.COMPASS == COMPASS
    env = walk(DoomPointNav, "map01")
    seen, _info = env.reset(seed=3)
    assert seen["rgb"].shape == (64, 64, 3) and seen["rgb"].dtype == np.uint8 and seen["rgb"].std() > 5
    distance, angle = seen[COMPASS]
    world, goal = env.world, env.episode.goal
    assert distance == pytest.approx(np.hypot(goal[0] - world.x, goal[1] - world.y) / 32, abs=1e-3)
    # Anticlockwise, so positive to the left.
    ahead = np.radians(world.yaw) + angle
    assert (np.cos(ahead), np.sin(ahead)) == pytest.approx(
        ((goal[0] - world.x) / 32 / distance, (goal[1] - world.y) / 32 / distance), abs=1e-3
    )
    yaw = world.yaw
    after = env.step(LEFT)[0][COMPASS][1]
    assert (world.yaw - yaw) % 360 == pytest.approx(15, abs=0.1)
    assert (angle - after) % (2 * np.pi) == pytest.approx(np.radians(15), abs=0.01)
    env.step(RIGHT)
    assert (world.yaw - yaw + 180) % 360 == pytest.approx(180, abs=0.1)
    x, y = world.x, world.y
    for _ in range(2):
        env.step(FORWARD)
    heading = np.degrees(np.arctan2(world.y - y, world.x - x))
    moved = np.hypot(world.x - x, world.y - y)
    # Walls are slid along.
    assert moved == 0 or abs((heading - yaw + 180) % 360 - 180) < 60
    with pytest.raises(SideTuningError, match="none of 0 … 3"):
        env.step(4)


def test_rewards_and_measures(walk: Build) -> None:
    env = walk(DoomPointNav, "map01")
    for seed in range(5):
        _, info = env.reset(seed=seed)
        start = before = info["distance_to_goal"]
        assert 5 <= start <= 25 and info["success"] == 0
        total, walked, done = 0.0, 0.0, False
        while not done:
            x, y = env.world.x, env.world.y
            action = env.expert()
            _, reward, ended, cut, info = env.step(action)
            walked += np.hypot(env.world.x - x, env.world.y - y) / 32
            expected = -0.01 + before - info["distance_to_goal"] + 10 * info["success"]
            assert reward == pytest.approx(expected)
            before, total, done = info["distance_to_goal"], total + reward, ended or cut
        assert action == STOP and ended and info["is_success"] and info["distance_to_goal"] <= 1.5
        assert info["spl"] == pytest.approx(start / max(start, walked)) and info["spl"] > 0.7
        assert total == pytest.approx(10 + start - info["distance_to_goal"] - 0.01 * env.steps)
    env.reset(seed=0)
    # Far from the goal.
    _, reward, ended, cut, info = env.step(STOP)
    assert ended and not cut and info["success"] == info["spl"] == 0 and reward == pytest.approx(-0.01)
    short = walk(DoomPointNav, "map01", max_steps=3)
    short.reset(seed=0)
    assert [short.step(LEFT)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


@pytest.mark.slow
def test_the_expert_arrives(walk: Build) -> None:
    for split in ("train", "test"):
        env = walk(DoomPointNav, split)
        successes = []
        for k in range(50):
            env.reset(seed=k)
            done = False
            while not done:
                *_, ended, cut, info = env.step(env.expert())
                done = ended or cut
            successes.append(info["success"])
        assert np.mean(successes) >= 0.98, split


def test_ways_wind(walk: Build) -> None:
    env = walk(DoomPointNav, "map01", winding=1.5)
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        # The player stands a little off the cell's centre.
        assert env.shortest >= 1.49 * observation[COMPASS][0]
    with pytest.raises(SideTuningError, match=r"map27 has no ways .* that wind 1\.5-fold"):
        walk(DoomPointNav, "map27", winding=1.5).reset(seed=0)


@pytest.mark.slow
def test_every_level_of_pointnav_has_winding_ways() -> None:
    for split in SPLITS:
        world = make_world("doom-pointnav", split, 64)
        try:
            assert world.winding == WINDING
            for name in world.maps:
                world.maps = (name,)
                observation, _ = world.reset(seed=0)
                assert world.shortest > (WINDING - 0.1) * observation[COMPASS][0], name
        finally:
            world.close()


def test_the_same_seeds_give_the_same_steps_and_pictures(cache: Path) -> None:
    def play() -> list[Any]:
        env = DoomPointNav("train", cache=cache)
        seen: list[Any] = []
        for seed in (5, 6, 5):
            observation, _ = env.reset(seed=seed)
            episode, rng = env.episode, np.random.default_rng(0)
            for _ in range(20):
                observation, reward, *_ = env.step(int(rng.integers(1, 4)))
                seen.append((reward, env.world.x, env.world.yaw, observation["rgb"].tobytes()))
            seen.append(episode)
        env.close()
        return seen

    first, second = play(), play()
    assert first == second
    # The episode depends on the seed alone.
    assert first[20] == first[62] != first[41]


def test_home_without_a_compass(walk: Build) -> None:
    env = walk(DoomPointNav, "home", compass=False)
    assert set(env.observation_space.spaces) == {"rgb"}
    for seed in range(5):
        env.reset(seed=seed)
        done = False
        while not done:
            *_, ended, cut, info = env.step(FORWARD if env.expert() == STOP else env.expert())
            done = ended or cut
        assert ended and info["success"] == 1
    env.reset(seed=1)
    # Does nothing.
    assert env.step(STOP)[2] is False
    with pytest.raises(SideTuningError, match="without a compass"):
        walk(DoomPointNav, "map01", compass=False)


def test_exploration_pays_for_what_is_seen_first(walk: Build) -> None:
    seen = np.zeros((20, 20), bool)
    clearance = np.full((40, 40), 64.0, np.float32)
    clearance[:, :2] = clearance[:, -2:] = clearance[:2] = clearance[-2:] = 0
    args, east = (clearance, np.zeros(2), 16.0), (320.0, 320.0, 0.0, 200.0)
    new = mark(seen, *args, east, 32.0)
    # Nothing behind an agent that looks east from the middle.
    assert new == seen.sum() and not seen[:9].any()
    fan = sum(abs(j - 9.5) <= i - 9.5 and np.hypot(i - 9.5, j - 9.5) < 6.25 for i in range(10, 20) for j in range(20))
    # Squares at the edge of the fan count where a ray grazes them.
    assert abs(new - fan) <= 14
    assert mark(seen, *args, east, 32.0) == 0 and mark(seen, *args, (320.0, 320.0, np.pi / 2, 200.0), 32.0) > 0
    blocked = clearance.copy()
    # A wall right ahead.
    blocked[24] = 0
    behind = np.zeros((20, 20), bool)
    mark(behind, blocked, *args[1:], east, 32.0)
    assert behind.any() and not behind[13:].any()

    # A line that no cell's centre is near: nobody sees through it from anywhere.
    for x in range(300, 340, 3):
        oblique = clearance.copy()
        doom_grid.keep_away(oblique, np.zeros(2), 16.0, np.array([[x, 0.0, x + 200.0, 640.0]]), 0.0)
        behind = np.zeros((20, 20), bool)
        mark(behind, oblique, np.zeros(2), 16.0, (280.0, 320.0, 0.0, 300.0), 32.0)
        far = np.array([[32 * i >= x + 200 * (32 * j + 32) / 640 for j in range(20)] for i in range(20)])
        assert behind.sum() > 3 and not (behind & far).any()
    against = clearance.copy()
    # Who stands where an obstacle is near sees what is ahead all the same.
    against[20] = 0
    ahead = np.zeros((20, 20), bool)
    assert mark(ahead, against, *args[1:], east, 32.0) > 10

    env = walk(DoomExplore, "map01", max_steps=30)
    _, info = env.reset(seed=0)
    count = info["seen"]
    for k in range(30):
        _, reward, ended, cut, info = env.step(LEFT if k % 3 else FORWARD)
        assert reward == pytest.approx(0.1 * (info["seen"] - count)) and not ended
        count = info["seen"]
    assert cut and count > 30


def test_unknown_names_are_said() -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        DoomPointNav("map1")
    with pytest.raises(UnknownNameError, match="doom-pointnav"):
        make_world("doom-pointnaw", "train", 64)
    with pytest.raises(UnknownNameError, match="test"):
        make_world("doom-pointnav", "tset", 64)
    with pytest.raises(ImportError, match="habitat-lab"):
        make_world("habitat:pointnav.yaml", "train", 64)


def test_what_an_environment_cannot_be_is_said() -> None:
    with pytest.raises(SideTuningError, match="at least one"):
        DoomPointNav([])
    with pytest.raises(SideTuningError, match="max_steps must be 1 or more, not 0"):
        DoomExplore("map01", max_steps=0)
    with pytest.raises(SideTuningError, match="reset the environment first"):
        DoomPointNav("map01").step(FORWARD)


@pytest.mark.parametrize("shape", [(16, 24, 3), (3, 16, 24)])
def test_pictures_of_another_data_set_may_have_their_channels_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from sidetuning_bench.agents.trajectories import Episode, Writer, read_steps

    def written(name: str, kind: Any) -> Any:
        seen = np.random.default_rng(0).integers(0, 255, (4, *shape)).astype(kind)
        space = spaces.Dict({"rgb": spaces.Box(0, 255, shape, kind)})
        writer = Writer(tmp_path / name, space, spaces.Discrete(4), {})
        writer.append(Episode(0, {"rgb": seen}, np.array([1, 2, 1]), np.array([1, 2, 3]), np.zeros(3), True), 1)
        return seen

    seen, steps = written("bytes-v0", np.uint8), read_steps(tmp_path / "bytes-v0")
    assert np.array_equal(steps.rgb.numpy(), seen[:3].transpose(0, 3, 1, 2) if shape[2] == 3 else seen[:3])
    assert steps.actions.tolist() == [1, 2, 3] and steps.extra.shape == (3, 0)
    written("floats-v0", np.float32)
    with pytest.raises(DataError, match="uint8"):
        read_steps(tmp_path / "floats-v0")
    Writer(tmp_path / "empty-v0", spaces.Dict({"rgb": spaces.Box(0, 255, shape, np.uint8)}), spaces.Discrete(4), {})
    with pytest.raises(DataError, match="has no episodes"):
        read_steps(tmp_path / "empty-v0")
    next((tmp_path / "bytes-v0").glob("data/*/*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="delete the folder"):
        read_steps(tmp_path / "bytes-v0")


def test_wilson_intervals() -> None:
    # Newcombe 1998, by hand.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 100)[0] == 0 and wilson(0, 100)[1] == pytest.approx(0.037, abs=1e-3)


def test_spl_of_a_clone_that_never_arrives_has_an_interval() -> None:
    found = Scores(**scores([Outcome(0.0, 0.0, -0.5, 40)] * 100))
    assert found.spl == 0 and found.intervals["spl"] == pytest.approx((0, 0.037), abs=1e-3)


def test_tables_have_the_intervals_of_a_methods_mean() -> None:
    """The mean of seeds that fail in other episodes is surer than each; of those that fail in the same, it is not."""

    def run(*successes: int) -> Scores:
        return Scores(**scores([Outcome(float(s), None, 2.0 * s, 10) for s in successes]))

    def ends(text: str) -> list[float]:
        return [float(end) for end in text.partition("[")[2].rstrip("]").split(", ")]

    half, other = run(*[1, 0] * 50), run(*[0, 1] * 50)
    # Wilson's.
    assert mean_text([half], "success", 100) == "50.0 [40.4, 59.6]"
    low, high = ends(mean_text([half, half], "success", 100))
    # 50 ± 1.96 * 5.
    assert 38 < low < 42 and 58 < high < 62
    # Nothing but the data.
    assert mean_text([half, half], "success", 100) == mean_text([half, half], "success", 100)
    assert mean_text([half, other], "success", 100) == "50.0 [50.0, 50.0]" != mean_text([half, half], "success", 100)
    assert mean_text([half], "spl") == mean_text([], "success") == "–"
    # A bootstrap of these has no width.
    always, never = run(*[1] * 100), run(*[0] * 100)
    assert mean_text([always] * 3, "success", 100) == mean_text([always], "success", 100) == "100.0 [96.3, 100.0]"
    assert mean_text([never] * 3, "success", 100) == "0.0 [0.0, 3.7]"

    # In five of a hundred episodes; unpaired, 5 ± 14 points.
    better = run(*[1, 0] * 45, *[1, 1] * 5)
    low, high = ends(difference_text([better, better], [half], "success", 100))
    assert 0 < low < 3 and 8 < high < 11 and difference_text([better], [half], "success", 100).startswith("5.0 [")
    assert difference_text([half], [half, half], "reward") == "0.0 [0.0, 0.0]"
    assert difference_text([better, half], [half, half], "success", 100).startswith(
        "2.5 ± 2.5 ["
        # 5 and 0 of the pairs.
    )
    # No pairs.
    assert difference_text([better, half, half], [half, half], "success", 100).startswith("1.7 [")
    assert difference_text([half], [], "success") == difference_text([half], [half], "spl") == "–"


def test_moves_are_drawn_and_a_stop_is_taken_where_it_is_the_likeliest() -> None:
    def taken(stops: bool, *probabilities: float) -> set[int]:
        world, policy = SimpleNamespace(stops=stops), lambda _: torch.tensor(probabilities)
        act = drawing(world, policy, 0)
        assert [act({}) for _ in range(50)] == [again({}) for again in [drawing(world, policy, 0)] for _ in range(50)]
        return {act({}) for _ in range(200)}

    assert taken(True, 0.3, 0.4, 0.3, 0.0) == {1, 2} and taken(True, 0.4, 0.3, 0.3, 0.0) == {0}
    assert taken(False, 0.3, 0.4, 0.3, 0.0) == taken(False, 0.4, 0.3, 0.3, 0.0) == {0, 1, 2}
    act = drawing(SimpleNamespace(stops=True), lambda _: torch.tensor([0.1, 0.6, 0.3, 0.0]), 0)
    share = np.mean([act({}) == 1 for _ in range(2000)])
    # 0.6² to 0.3²; 0.67 would be drawn without sharpening.
    assert abs(share - 0.8) < 0.04


def test_baselines_move_at_random_and_by_the_compass(walk: Build) -> None:
    env, home = walk(DoomPointNav, "map01"), walk(DoomPointNav, "home", compass=False)
    assert env.stops and not home.stops
    for world, actions in ((env, {1, 2, 3}), (home, {0, 1, 2, 3})):
        act = at_random(world)
        assert {act({}) for _ in range(100)} == actions

    def follow(distance: float, degrees: float, **more: Any) -> int:
        return by_compass(env, **more)({COMPASS: np.array([distance, np.radians(degrees)], np.float32)})

    assert [follow(9, a, wander=0) for a in (7, -7, 9, -9, 179)] == [FORWARD, FORWARD, LEFT, RIGHT, LEFT]
    assert follow(1.19, 90) == STOP != follow(1.21, 90)
    act = by_compass(env)
    strayed = np.mean([act({COMPASS: np.array([9, 0], np.float32)}) != FORWARD for _ in range(2000)])
    assert strayed == pytest.approx(0.15 * 2 / 3, abs=0.03)
    first, again = ([*episodes(env, by_compass(env), 3, 7)] for _ in range(2))
    assert first == again and np.mean([o.reward for o in first]) > np.mean(
        [o.reward for o in episodes(env, at_random(env), 3, 7)]
    )


@linux
@pytest.mark.parametrize("end", ["close", "forget", "kill"])
def test_no_engine_outlives_its_agents(end: str, tmp_path: Path, cache: Path) -> None:
    """Three environments; they are closed, left to the end of the program, or killed."""
    last = {"close": "[e.close() for e in envs]", "forget": "pass", "kill": "os.kill(os.getpid(), signal.SIGKILL)"}[end]
    code = (
        "import os, signal\nfrom sidetuning_bench.doom.nav import DoomPointNav\n"
        f"envs = [DoomPointNav('map01', cache={str(cache)!r}) for _ in range(3)]\n"
        "for k, env in enumerate(envs):\n    env.reset(seed=k)\n    env.step(1)\n"
        f"print('ready', flush=True)\ninput()\n{last}\n"
    )
    process = spawn("-c", code, folder=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    names = instances(tmp_path)
    assert len(names) == 3
    _out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == (-signal.SIGKILL if end == "kill" else 0), err
    assert left(tmp_path, names) == []
    assert err == ""


@linux
@pytest.mark.slow
def test_collecting_goes_on_after_a_kill_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("minari")
    from sidetuning_bench.agents.trajectories import read_steps

    own = tmp_path / "own"
    own.mkdir()

    def collect(out: str, *more: str) -> subprocess.Popen[str]:
        command = ("-m", "sidetuning_bench", "collect-trajectories", "--out", str(tmp_path / out))
        return spawn(*command, "--episodes", "40", "--workers", "2", "--no-progress", *more, folder=own)

    process = collect("broken-v0")
    until, names = time.monotonic() + 60, set()
    while len(list((tmp_path / "broken-v0").glob("data/*/*.arrow"))) < 5 and time.monotonic() < until:
        names |= instances(own)
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert names and left(own, names) == []
    for out in ("broken-v0", "whole-v0"):
        process = collect(out)
        _out_text, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    first, second = read_steps(tmp_path / "broken-v0"), read_steps(tmp_path / "whole-v0")
    assert len(first.starts) == 41 and len(first) == first.starts[-1] == len(first.rgb)
    assert (first.actions == second.actions).all() and (first.extra - second.extra).abs().max() < 1e-5
    assert first.extra.shape == (len(first), 3) and set(first.actions.tolist()) == {0, 1, 2, 3}
    assert (first.actions == STOP).sum() >= 40 and first.actions[first.starts[1:] - 1].eq(STOP).all()
    assert (first.of([1, 0])[: int(first.starts[2] - first.starts[1])] == int(first.starts[1])).sum() == 1

    import minari

    # As anybody reads it.
    data = minari.MinariDataset(tmp_path / "whole-v0" / "data")
    episode = next(iter(data.iterate_episodes()))
    assert episode.observations["rgb"].shape == (len(episode) + 1, 64, 64, 3) and episode.terminations[-1]
    strayed = np.mean(episode.actions != episode.infos["expert"][: len(episode), 0])
    assert strayed < 0.5 and data.total_episodes == 40
    with pytest.raises(DataError, match="collect-trajectories"):
        read_steps(tmp_path / "nothing-v0")
    process = collect("whole-v0", "--stray", "0.5")
    _out_text, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stray" in err and "Traceback" not in err


@linux
def test_an_engine_that_dies_under_an_agent_raises_a_sentence(walk: Build) -> None:
    env = walk(DoomPointNav, "map01")
    env.reset(seed=0)
    for file in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = file.read_text()
            if f"PPid:\t{os.getpid()}\n" in text and "Name:\tvizdoom\n" in text:
                os.kill(int(file.parent.name), signal.SIGKILL)
    with pytest.raises(EngineError, match="Doom engine on map01 failed"):
        for _ in range(3):
            env.step(FORWARD)


@pytest.mark.parametrize("left", ["", "{", None])
def test_an_episode_that_a_kill_cut_short_is_written_anew(left: str | None, tmp_path: Path) -> None:
    from sidetuning_bench.agents.trajectories import Episode, Writer, read_steps

    space = spaces.Dict({"rgb": spaces.Box(0, 255, (8, 8, 3), np.uint8)})

    def append(value: int, tried: int) -> None:
        seen = np.full((4, 8, 8, 3), value, np.uint8)
        episode = Episode(value, {"rgb": seen}, np.zeros(3, int), np.zeros(3, int), np.zeros(3), True)
        Writer(tmp_path / "x-v0", space, spaces.Discrete(4), {}).append(episode, tried)

    append(1, 1)
    (part := tmp_path / "x-v0/data/1").mkdir()
    if left is not None:
        (part / "metadata.json").write_text(left)
    append(2, 2)
    assert read_steps(tmp_path / "x-v0").rgb[::3, 0, 0, 0].tolist() == [1, 2]


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    from sidetuning.files import held_folder
    from sidetuning_bench.agents import cloning, collect, curves, ppo
    from sidetuning_bench.dense import render_doom

    out = str(tmp_path / "x-v0")
    works: list[Callable[[], Any]] = [
        lambda: collect.run(collect.Settings(out=out, progress=False)),
        lambda: cloning.run(cloning.Settings(out=out)),
        lambda: ppo.run(curves.Settings(out=out)),
        lambda: render_doom.run(render_doom.Settings(out=out, progress=False)),
    ]
    with held_folder(out):
        for work in works:
            with pytest.raises(ArtifactError, match="another process works in"):
                work()
    assert list(Path(out).iterdir()) == []
