"""What carries over to rooms that are not Doom: merges and the recipe, on drawn rooms with exact labels.

A room is a box of 3 to 6 m with furniture, boxes that stand on the floor, lit by one lamp, with painted, striped and
chequered surfaces. Rays are cast from a camera at the height of eyes. The base has seen Doom alone.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from record import Record, public, read_all, recorded, write
from sidetuning.files import write_text
from sidetuning_bench import compare, domains, grid
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.doom import labels
from sidetuning_bench.doom.frames import UNITS_PER_METRE
from sidetuning_bench.doom.labels import Geometry
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import Count, with_values
from sidetuning_bench.results import RunResult, markdown, measures_table, summary_table

Array = NDArray[np.floating[Any]]

TASKS = ("curvature", "reshading", "keypoints3d", "edge_texture", "depth_zbuffer", "depth_euclidean", "normal")
# For each row its method, and other settings.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp2": ("sidetune", {"merge": "mlp2"}),
    "alpha": ("sidetune", {"merge": "alpha"}),
    "recipe=best": ("sidetune", {"recipe": "best"}),
    "features": ("features", {}),
}
# Pixels of a frame, and the tangent of half its field of view.
SIZE, SPREAD = 96, 0.8
# Rooms for training and for the test, and frames of each.
ROOMS, FRAMES = (48, 16), 10


@dataclass(frozen=True)
class Settings:
    """Merges, the recipe and fixed features on drawn rooms."""

    seeds: Count = 3
    """Seeds; each draws its own rooms."""
    epochs: Count = 3
    """Passes over the frames."""
    out: str | None = None
    """Folder of the runs, which resume there; by default a temporary one."""


@dataclass(frozen=True)
class Block:
    """A box: the room, seen from inside, or a piece of furniture.

    Attributes:
        centre, half: its middle and half its size in metres: x, y up, z.
        angle: how it is turned about the vertical.
        colours: of its six sides (6, 2, 3): two that take turns.
        pattern: of each side, stripes, squares or one colour, and how many of them a metre.
    """

    centre: Array
    half: Array
    angle: float
    colours: Array
    pattern: NDArray[np.int64]
    fine: Array


def block(rng: np.random.Generator, centre: Array, half: Array, angle: float) -> Block:
    """A box with drawn surfaces."""
    first = rng.uniform(0.2, 0.95, (6, 1, 3))
    colours = np.concatenate([first, np.clip(first + rng.normal(0, 0.15, (6, 1, 3)), 0, 1)], 1)
    return Block(centre, half, angle, colours, rng.integers(0, 3, 6), rng.uniform(1, 5, 6))


def room(rng: np.random.Generator) -> list[Block]:
    """The walls, and the furniture before them."""
    half = np.array([rng.uniform(1.5, 3), rng.uniform(1.15, 1.5), rng.uniform(1.5, 3)])
    blocks = [block(rng, np.array([0, half[1], 0]), half, 0.0)]
    for _ in range(int(rng.integers(3, 9))):
        size = rng.uniform([0.15, 0.15, 0.15], [0.6, 0.9, 0.6])
        x, z = (rng.uniform(-half[k] + 0.3, half[k] - 0.3) for k in (0, 2))
        blocks.append(block(rng, np.array([x, size[1], z]), size, rng.uniform(0, np.pi)))
    return blocks


def turned(vectors: Array, angle: float) -> Array:
    """Vectors (…, 3) turned about the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return vectors @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def met(one: Block, eye: Array, rays: Array, inside: bool) -> tuple[Array, Array, Array]:
    """Where rays (n, 3) meet a block: their lengths, infinite where they pass by, normals (n, 3) and colours (n, 3)."""
    start, along = turned(eye - one.centre, one.angle), turned(rays, one.angle)
    with np.errstate(divide="ignore"):
        near, far = (-start - np.sign(along) * one.half) / along, (-start + np.sign(along) * one.half) / along
    axis = far.argmin(1) if inside else near.argmax(1)
    rows = np.arange(len(rays))
    length = (far if inside else near)[rows, axis]
    if not inside:
        length = np.where((length > 0.05) & (length < far.min(1)), length, np.inf)
    sign = np.sign(along[rows, axis])
    normal = np.zeros_like(rays)
    normal[rows, axis] = -sign
    side = 2 * axis + (sign > 0)
    point = start + np.where(np.isfinite(length), length, 0)[:, None] * along
    u, v = point[rows, (axis + 1) % 3] * one.fine[side], point[rows, (axis + 2) % 3] * one.fine[side]
    both = np.where(one.pattern[side] == 0, np.floor(u), np.floor(u) + np.floor(v))
    which = np.where(one.pattern[side] == 2, 0, both.astype(int) % 2)
    return length, turned(normal, -one.angle), one.colours[side, which]


def frame(blocks: list[Block], rng: np.random.Generator) -> tuple[NDArray[np.uint8], Geometry]:
    """What a camera at a free place sees: the picture (n, n, 3), and the exact geometry of its pixels."""
    half = blocks[0].half
    while True:
        eye = np.array([rng.uniform(0.3 - half[0], half[0] - 0.3), rng.uniform(1.1, 1.7), 0])
        eye[2] = rng.uniform(0.3 - half[2], half[2] - 0.3)
        inside = [np.all(abs(turned(eye - one.centre, one.angle)) < one.half + 0.2) for one in blocks[1:]]
        if not any(inside):
            break
    lamp = np.array([rng.uniform(-half[0], half[0]) / 2, 2 * half[1] - 0.2, rng.uniform(-half[2], half[2]) / 2])
    across = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * SPREAD
    x, y = np.meshgrid(across, across)
    # In the camera's frame y points down and z forward.
    rays = np.stack([x, y, np.ones_like(x)], -1)
    yaw, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.15)
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    flip = np.array([1, -1, 1])
    world = turned((rays.reshape(-1, 3) * flip) @ tilt, yaw)
    length, normal, colour = met(blocks[0], eye, world, True)
    for one in blocks[1:]:
        other, their, painted = met(one, eye, world, False)
        closer = other < length
        length, normal, colour = (
            np.where(closer, other, length),
            *(np.where(closer[:, None], new, old) for new, old in ((their, normal), (painted, colour))),
        )
    way = lamp - (eye + length[:, None] * world)
    distance = np.linalg.norm(way, axis=1)
    light = 0.35 + 0.65 * np.clip((normal * way).sum(1) / distance, 0, 1) * np.clip(2.5 / distance, 0, 1.3)
    noise = rng.normal(0, 0.015, colour.shape)
    image = (255 * np.clip(colour * light[:, None] + noise, 0, 1)).astype(np.uint8).reshape(SIZE, SIZE, 3)
    seen = (turned(normal, -yaw) @ tilt.T * flip).reshape(SIZE, SIZE, 3)
    depth = (length * UNITS_PER_METRE).reshape(SIZE, SIZE)
    return image, Geometry(depth, seen, np.ones((SIZE, SIZE), bool), rays, SIZE / 2 / SPREAD)


def draw_rooms(root: Path, seed: int) -> Path:
    """Frames of drawn rooms in Taskonomy's layout, a room being a building."""
    rows = ["id,train,val,test"]
    for number in range(sum(ROOMS)):
        rng = np.random.default_rng((seed, number))
        blocks, name = room(rng), f"room{number:03}"
        rows.append(f"{name},{int(number < ROOMS[0])},0,{int(number >= ROOMS[0])}")
        for i in range(FRAMES):
            image, g = frame(blocks, rng)
            values: dict[str, Any] = {
                "rgb": image,
                "depth_zbuffer": g.depth / UNITS_PER_METRE,
                "depth_euclidean": g.distance / UNITS_PER_METRE,
                "normal": g.normal * [1, -1, -1],
                "reshading": labels.reshading(g),
                "keypoints3d": labels.keypoints3d(g),
                "edge_texture": labels.edge_texture(image, g.scale),
                "principal_curvature": labels.curvature(g),
                "mask_valid": g.valid,
            }
            for domain, value in values.items():
                domains.write(domains.path_of(root, domain, name, i, 0), domain, value)
    write_text(root / "splits.csv", "\n".join(rows) + "\n")
    return root


def run(given: Settings) -> None:
    """Learn the rooms of each seed that has no result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.out or temporary)
        for seed in range(given.seeds):
            if recorded(f"rooms-{seed}", public(given), ("seeds",)):
                continue
            root, cells = draw_rooms(folder / f"data-{seed}", seed), []
            for name, (method, own) in ROWS.items():
                out = folder / f"{name.replace('=', '-')}-{seed}"
                values = {"method": itaskonomy.METHODS[method], "out": str(out), "data": str(root), "seed": seed, **own}
                values |= {"cache": str(folder / "cache"), "batch": 16, "pictures": 0, "progress": False}
                settings = with_values(itaskonomy.Settings(tasks=TASKS, epochs=given.epochs), values)
                settings = with_values(settings, {"lr": itaskonomy.rate_of(settings)})
                cells.append(Cell(name, out, settings, "" if name == method else name, len(TASKS)))
            found = grid.run(cells, itaskonomy.run, compare.finished, unit="task")
            rows = [asdict(replace(result, variant=cell.variant)) for cell, result in found]
            for row in rows:
                row["settings"] = {"epochs": given.epochs, "seed": seed}
            write(f"rooms-{seed}", {"rows": rows}, given)


def table(given: Settings) -> str:
    """All rows, and their measures, over the seeds."""
    rows = [RunResult(**row) for result in read_all("rooms-?.json") for row in result["rows"]]
    order = ["", *ROWS]
    rows.sort(key=lambda row: (order.index(row.variant), row.seed))
    return f"{markdown(summary_table(rows))}\n{measures_table(rows)}"


ROOMS_RECORD = Record(Settings(), run, table)
