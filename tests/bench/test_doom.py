"""Frames of Doom: the ray caster on rooms of known size, labels on known surfaces, and agreement with the engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vizdoom", reason="the Doom engine is an extra")

from sidetuning.errors import DataError
from sidetuning_bench.doom import compiled
from sidetuning_bench.doom import frames as doom
from sidetuning_bench.doom import labels as dense_labels
from sidetuning_bench.doom.engine import EngineError, engine, freedoom
from sidetuning_bench.doom.labels import Geometry
from sidetuning_bench.doom.map import CEILING, FLOOR, LINE, SECTOR, SIDE, SKY, VERTEX, WALL, Camera, DoomMap, load_map

Array = np.ndarray[Any, Any]
CAMERA = Camera.of_size(128)


def level(*rooms: tuple[int, int, int], sky: bool = False) -> DoomMap:
    """Rooms side by side, 400 wide from south to north, each (length, floor, ceiling) from x = 0 eastwards."""
    edges = np.cumsum([0, *(length for length, _, _ in rooms)])
    # 2i: south, 2i + 1: north.
    vertices = np.array([(x, y) for x in edges for y in (-200, 200)], VERTEX)
    lines: list[Any] = []
    sides: list[Any] = []

    def add(start: int, end: int, *sectors: int) -> None:
        first = len(sides)
        sides.extend((0, 0, b"-", b"-", b"-", s) for s in sectors)
        lines.append(
            (start, end, 1 if len(sectors) == 1 else 4, 0, 0, first, first + 1 if len(sectors) == 2 else 65535)
        )

    for i in range(len(rooms)):
        # The south wall, its right side to the north.
        add(2 * i + 2, 2 * i, i)
        # The north wall.
        add(2 * i + 1, 2 * i + 3, i)
    # The west wall, its right side to the east.
    add(0, 1, 0)
    for i in range(1, len(rooms)):
        add(2 * i, 2 * i + 1, i, i - 1)
    add(2 * len(rooms) + 1, 2 * len(rooms), len(rooms) - 1)
    texture = b"F_SKY1" if sky else b"CEIL1"
    sectors = [(f, c, b"FLOOR1", texture, 160, 0, 0) for _, f, c in rooms]
    return DoomMap.of(vertices, np.array(lines, LINE), np.array(sides, SIDE), np.array(sectors, SECTOR))


@pytest.mark.slow
def test_a_room_of_known_size() -> None:
    view = level((1000, 0, 200)).look(200, 0, 60, 0, CAMERA)
    middle = CAMERA.size // 2
    # The east wall, 800 away.
    assert view.depth[middle, middle] == pytest.approx(800)
    assert tuple(view.normal[middle, middle]) == (-1, 0, 0)
    assert view.kind[middle, middle] == WALL
    row = CAMERA.size - 1
    assert view.kind[row, middle] == FLOOR and view.kind[0, middle] == CEILING
    below = (row + 0.5 - 64) / CAMERA.fy
    # The eye is 60 above the floor.
    assert view.depth[row, middle] == pytest.approx(60 / below)
    # And 140 below the ceiling.
    assert view.depth[0, middle] == pytest.approx(140 / below)
    assert tuple(view.normal[row, middle]) == (0, 0, 1) and tuple(view.normal[0, middle]) == (0, 0, -1)
    slope = (0.5 - 64) / CAMERA.fx
    # The north wall, 200 to the left.
    assert view.depth[middle, 0] == pytest.approx(200 / -slope)
    assert tuple(view.normal[middle, 0]) == (0, -1, 0)
    points = view.depth[..., None] * CAMERA.rays()
    # Nothing outside the room.
    assert np.isfinite(view.depth).all() and abs(points[..., 0]).max() < 200 + 1e-6


@pytest.mark.parametrize("yaw", [0, 90, 180, 270, 37])
def test_a_turn_turns_the_view(yaw: int) -> None:
    view = level((400, 0, 128)).look(200, 0, 41, yaw, CAMERA)
    forward = np.array([np.cos(np.radians(yaw)), np.sin(np.radians(yaw))])
    if yaw != 37:
        assert view.depth[64, 64] == pytest.approx(200)
        assert view.normal[64, 64, :2] == pytest.approx(-forward)
    rays = CAMERA.rays()
    right = np.array([forward[1], -forward[0]])
    x, y = (200 * (i == 0) + view.depth * (forward[i] + rays[..., 0] * right[i]) for i in (0, 1))
    assert x.min() > -1e-6 and x.max() < 400 + 1e-6 and abs(y).max() < 200 + 1e-6


def test_a_step_a_lintel_and_a_closed_door() -> None:
    stairs = level((500, 0, 200), (500, 40, 150)).look(100, 0, 60, 0, CAMERA)
    column = stairs.depth[:, 64]
    rows = (np.arange(128) + 0.5 - 64) / CAMERA.fy
    # Between the upper floor's edge, 20 below the eye, and the lower floor.
    step = (rows > 20 / 400) & (rows < 60 / 400)
    lintel = (-rows > 90 / 400) & (-rows < 140 / 400)
    assert step.any() and lintel.any()
    assert column[step] == pytest.approx(400) and column[lintel] == pytest.approx(400)
    assert column[64] == pytest.approx(900)
    upper_floor = (rows > 20 / 900) & (rows < 20 / 400)
    assert column[upper_floor] == pytest.approx(20 / rows[upper_floor])
    # Two floors, two ceilings, step, lintel, end.
    assert len(np.unique(stairs.surface[:, 64])) == 7
    door = level((500, 0, 200), (10, 0, 0), (500, 0, 200)).look(100, 0, 60, 0, CAMERA)
    assert door.depth[64, 64] == pytest.approx(400) and door.kind[64, 64] == WALL


def test_sky_is_nowhere() -> None:
    view = level((1000, 0, 200), sky=True).look(200, 0, 60, 0, CAMERA)
    sky = view.kind == SKY
    assert (
        sky[0, 64]
        and np.isinf(view.depth[sky]).all()
        and (view.normal[sky] == 0).all()
        and (view.surface[sky] == -1).all()
    )
    outside = level((1000, 0, 200)).look(-50, 0, 60, 0, CAMERA)
    assert level((1000, 0, 200)).sector_at(-50, 0) == -1 and (outside.kind == 0).all()


def test_places_are_free() -> None:
    # Nobody can stand in the middle one.
    rooms = level((300, 0, 200), (300, 0, 30), (300, 0, 200))
    places = rooms.free_points(np.random.default_rng(0), 50)
    assert len(places) == 50 and abs(places[:, 1]).max() <= 160
    assert ((places[:, 0] >= 40) & (places[:, 0] <= 300) | (places[:, 0] >= 600) & (places[:, 0] <= 860)).all()


def test_damaged_wads(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no map MAP99"):
        load_map(freedoom(), "MAP99")
    (tmp_path / "x.wad").write_bytes(b"hello world!")
    with pytest.raises(DataError, match="is no WAD file"):
        load_map(tmp_path / "x.wad", "MAP01")
    with pytest.raises(DataError, match="cannot be read"):
        load_map(tmp_path / "y.wad", "MAP01")


def surface(depth: Any, normal: Any, valid: Array | None = None, size: int = 128) -> Geometry:
    # Square pixels.
    camera = Camera(size, 100 * size / 128, 100 * size / 128)
    depth = depth(camera.rays()) if callable(depth) else depth
    points = depth[..., None] * camera.rays()
    normals = normal(points) if callable(normal) else np.broadcast_to(normal, points.shape)
    valid = np.ones(depth.shape, bool) if valid is None else valid
    return Geometry(
        depth.astype(np.float32),
        (normals * valid[..., None]).astype(np.float32),
        valid,
        camera.rays().astype(np.float32),
        camera.fx,
    )


def ball(radius: float, distance: float) -> Geometry:
    """The inside of a picture filled by a ball: first hit of each ray, outward normals."""

    def depth(rays: Array) -> Array:
        a, b, c = (rays**2).sum(-1), -2 * rays[..., 2] * distance, distance**2 - radius**2
        return (-b - np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a)

    return surface(depth, lambda p: (p - np.array([0, 0, distance])) / radius)


def test_curvature_of_a_ball_and_of_a_pipe() -> None:
    inside = np.s_[40:88, 40:88]
    g = ball(300, 500)
    k = dense_labels.curvature(g)[inside]
    # The angle over six pixels of a ball of radius 300.
    turn = dense_labels.FOOTPRINT * g.depth[inside] / g.focal / 300
    assert k[..., 0] == pytest.approx(turn, rel=0.05) and k[..., 1] == pytest.approx(turn, rel=0.08)

    # A vertical pipe around the camera, of radius 300.
    def pipe(rays: Array) -> Array:
        return 300 / np.hypot(rays[..., 0], rays[..., 2])

    g = surface(pipe, lambda p: -p * np.array([1, 0, 1]) / 300)
    k = dense_labels.curvature(g)[inside]
    turn = dense_labels.FOOTPRINT * g.depth[inside] / g.focal / 300
    # Hollow: negative.
    assert k[..., 1] == pytest.approx(-turn, rel=0.05)
    assert abs(k[..., 0]).max() < 0.02 * turn.max()


def slanted(rays: Array, slope: float = 2.0) -> Array:
    return 200 / (1 + slope * (rays[..., 0] + 0.7))


def test_a_slanted_plane_has_neither_curvature_nor_contours() -> None:
    # Of the plane 2 x + 2.4 z = 200.
    normal = -np.array([2.0, 0, 2.4]) / np.hypot(2, 2.4)
    g = surface(slanted, normal)
    assert g.depth.max() / g.depth.min() > 3
    assert not dense_labels.jumps(g).any()
    assert abs(dense_labels.curvature(g)[4:-4, 4:-4]).max() < 1e-3
    assert dense_labels.keypoints3d(g).max() < 0.02
    cosine = -(normal * g.rays).sum(-1) / np.linalg.norm(g.rays, axis=-1)
    assert dense_labels.reshading(g) == pytest.approx(cosine, abs=1e-6)
    assert g.distance == pytest.approx(np.linalg.norm(g.points, axis=-1), rel=1e-5)


def test_a_jump_in_depth_is_a_contour_and_no_crease() -> None:
    depth = np.full((128, 128), 400.0)
    depth[:, 64:] = 800
    g = surface(depth, np.array([0, 0, -1.0]))
    assert dense_labels.jumps(g)[:, 63].all() and dense_labels.jumps(g).sum() == 128
    edge = dense_labels.edge_occlusion(g)
    assert edge[:, 62:65].max(1).min() > 0.5 and edge[:, :56].max() == 0 and edge[:, 72:].max() == 0
    assert abs(dense_labels.curvature(g)).max() < 1e-3


def test_creases_know_inside_from_outside() -> None:
    # Two walls at 45 degrees that meet straight ahead, 400 away.
    def corner(rays: Array, sign: int) -> Array:
        return 400 / (1 - sign * abs(rays[..., 0]))

    for sign, name in ((-1, "a room's corner"), (1, "a pillar's edge")):
        g = surface(lambda rays, s=sign: corner(rays * 0.6, s), lambda p, s=sign: _walls(p, s * 0.6))
        k = dense_labels.curvature(g)[32:96, 64]
        strongest = k[np.arange(64), abs(k).argmax(1)]
        assert (strongest * sign > 0.1).all(), name
        assert abs(dense_labels.curvature(g)[32:96, 8:48]).max() < 1e-3, name


def _walls(points: Array, slope: float) -> Array:
    """Normals of z - slope |x| = const, towards the viewer."""
    n = np.stack([slope * np.sign(points[..., 0]), np.zeros(points.shape[:2]), -np.ones(points.shape[:2])], -1)
    return n / np.linalg.norm(n, axis=-1, keepdims=True)


def test_labels_of_images() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, 64:] = 255
    edge = dense_labels.edge_texture(image, 1.0)
    assert edge[20:-20, 63:65].min() == 1 and edge[:, :58].max() == 0
    # An edge is no corner.
    assert dense_labels.keypoints2d(image, 1.0)[16:-16].max() < 0.05
    image[64:] = 0
    spots = dense_labels.keypoints2d(image, 1.0)
    row, column = np.unravel_index(spots.argmax(), spots.shape)
    assert abs(row - 64) <= 2 and abs(column - 64) <= 2 and spots.max() == 1


def test_a_frame_far_away_agrees_with_the_engine() -> None:
    """Depth from the map against the engine's own depth buffer, on maps for nothing but tests, no frame left out."""
    shares = [f.disagreement for m in doom.TEST for _, _, f in doom.frames(m, 6, 128, seed=1, accept=lambda _: True)]
    assert len(shares) == 6 * len(doom.TEST)
    assert np.median(shares) <= 0.01, shares


def test_a_frame_is_consistent() -> None:
    _, _, frame = next(iter(doom.frames("map05", 1, 128, seed=2)))
    labels = frame.labels()
    valid = labels["mask_valid"]
    assert np.linalg.norm(labels["normal"][valid], axis=-1) == pytest.approx(1, abs=1e-5)
    assert (labels["depth_euclidean"][valid] >= labels["depth_zbuffer"][valid] - 1e-6).all()
    assert (labels["segment_semantic"] < len(doom.SEMANTIC)).all() and labels["class_object"].sum() == pytest.approx(1)
    assert labels["rgb"].std() > 5


def test_the_split_is_by_map() -> None:
    assert len(doom.MAPS) == 29 == len(set(doom.TRAIN) | set(doom.VAL) | set(doom.TEST))
    assert not {"map16", "map29", "map30"} & set(doom.MAPS)


def instances(folder: Path) -> set[str]:
    """The engines that run with TMPDIR=folder, by the name that their shared memory bears."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().decode().split("\0")
            if "+viz_instance_id" in words and str(folder) in " ".join(words):
                found.add(words[words.index("+viz_instance_id") + 1])
    return found


def left(folder: Path, names: set[str], seconds: float = 10) -> list[Any]:
    """What is left of engines started with TMPDIR=folder: running ones, shared memory, folders."""
    until = time.monotonic() + seconds
    while True:
        memory = [p for p in Path("/dev/shm").glob("ViZDoom*") if any(p.name.endswith(n) for n in names)]
        found = [*instances(folder), *memory, *folder.iterdir()]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def spawn(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """A Python program that runs, and has its temporary files and those of its engines, in a folder and a session."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, text=True, env=env, cwd=folder.parent, start_new_session=True, **pipes)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


@linux
@pytest.mark.parametrize("end", ["error", "kill"])
def test_the_engine_never_outlives_its_process(end: str, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom sidetuning_bench.doom.engine import engine\nwith engine('map01') as game:\n"
        "    input()\n    " + ("os.kill(os.getpid(), signal.SIGKILL)" if end == "kill" else "1 / 0")
    )
    process = spawn("-c", code, folder=tmp_path)
    until = time.monotonic() + 30
    while not (names := instances(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(names) == 1
    process.communicate("go\n", timeout=30)
    assert process.returncode == (-signal.SIGKILL if end == "kill" else 1)
    assert left(tmp_path, names) == []


def render(out: Path, *more: str, temporary: Path | None = None) -> subprocess.Popen[str]:
    # A shell may have told its children to ignore Ctrl-C.
    code = (
        "import signal, sys\nfrom sidetuning_bench.__main__ import main\nif __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n    main(sys.argv[1:])"
    )
    command = ("-c", code, "render-doom", "--frames", "58", "--out", str(out), *more)
    return spawn(*command, folder=temporary or out.parent)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*_domain_*")}


@linux
@pytest.mark.slow
def test_rendering_goes_on_after_a_kill_and_gives_the_same(tmp_path: Path) -> None:
    whole, broken, own = tmp_path / "whole", tmp_path / "broken", tmp_path / "own"
    own.mkdir()
    process = render(whole)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "58 frames in" in out, err

    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = render(broken, temporary=own)
        size = len(list(broken.rglob("*_rgb.png")))
        names = set()
        while len(list(broken.rglob("*_rgb.png"))) < size + 8 and process.poll() is None:
            names |= instances(own)
            time.sleep(0.05)
        if how == signal.SIGINT:
            # As Ctrl-C does.
            os.killpg(process.pid, how)
        else:
            process.kill()
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert names and left(own, names) == []
        assert "Traceback" not in err
    process = render(broken)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    first, second = contents(whole), contents(broken)
    assert len(first) == 58 * 15 and first == second

    process = render(broken, "--size", "64")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "size" in err and "Traceback" not in err


@linux
def test_an_engine_that_dies_raises_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EngineError, match="Doom engine on map01 failed"), engine("map01", buttons=["ATTACK"]) as game:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = file.read_bytes().decode().split("\0")
                if "+viz_instance_id" in words and str(tmp_path) in " ".join(words):
                    os.kill(int(file.parent.name), signal.SIGKILL)
        for _ in range(3):
            game.make_action([1])


def test_the_world_needs_no_torch() -> None:
    names = ", ".join(
        f"sidetuning_bench.doom.{name}" for name in ("engine", "frames", "grid", "labels", "map", "nav", "world")
    )
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_engines_of_threads_leave_the_working_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def start(level: str) -> tuple[Path, int]:
        with engine(level) as game:
            return Path.cwd(), game.get_state().screen_buffer.size

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(start, ["map01", "map03", "map05"])) == {(tmp_path, 240 * 320 * 3)}
    assert list(tmp_path.iterdir()) == []


def test_the_engine_gives_its_state() -> None:
    with engine("map01", variables=("POSITION_X",), buffers=("depth_buffer",)) as game:
        assert game.get_state().depth_buffer.shape == (240, 320)


def test_functions_are_compiled_where_nothing_can_be_kept() -> None:
    names: dict[str, Any] = {}
    # Numba finds no folder for a function of no file.
    exec(compile("def more(x):\n    return x + 1", "<text>", "exec"), names)
    assert compiled(names["more"])(1) == 2
