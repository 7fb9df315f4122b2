"""Labelled frames of Freedoom's levels: pictures from the Doom engine, labels from the exact geometry of its maps.

`render_map` places a player at random places of a map and writes its views in Taskonomy's layout, a map being a
building. The engine gives the picture and which object covers each pixel (objects are flat and face the viewer, so
their depth is one number); everything else is computed by `DoomMap.look`. A frame whose exact depth disagrees with the
engine's own coarse depth buffer (a lift has moved, a wall is see-through) is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sidetuning.files import write_json, write_text
from sidetuning_bench import domains
from sidetuning_bench.doom import labels as dense_labels
from sidetuning_bench.doom.engine import engine, freedoom
from sidetuning_bench.doom.labels import Geometry
from sidetuning_bench.doom.map import FLOOR, SKY, Camera, DoomMap, load_map

UNITS_PER_METRE = 32
# Depth of the sky, in map units.
SKY_DEPTH = 4096.0
# Three maps are left out, since many of their frames fail the gate: 16, 29 and 30. Validation and test maps are spread
# over the game.
VAL = ("map03", "map14", "map26")
TEST = ("map05", "map11", "map18", "map22", "map27")
TRAIN = tuple(m for i in range(1, 33) if (m := f"map{i:02d}") not in (*VAL, *TEST, "map16", "map29", "map30"))
MAPS = tuple(sorted(TRAIN + VAL + TEST))

# Classes of segment_semantic, in the order of `map`'s kinds of surfaces, and of class_object.
SURFACES = ("uncertain", "floor", "ceiling", "wall", "sky", "liquid")
THINGS = ("monster", "item", "weapon", "decoration", "light", "other")
SEMANTIC, OBJECTS = (*SURFACES, *THINGS), ("none", *THINGS)
LIQUID = SEMANTIC.index("liquid")
# The engine's category of an object -> semantic class.
CATEGORY = {"Monster": "monster", "Weapon": "weapon", "LightSource": "light"}
CATEGORY |= dict.fromkeys(("Health", "Armor", "Ammo", "Key", "Powerup"), "item")
CATEGORY |= dict.fromkeys(("Decoration", "Vegetation", "Gore", "Gibs"), "decoration")
# Share of the picture from which an object counts as present.
VISIBLE = 12 / 128**2
# Doom is a dark place.
BRIGHTER = (255 * (np.arange(256) / 255) ** 0.55).astype(np.uint8)
VARIABLES = ("POSITION_X", "POSITION_Y", "ANGLE", "CAMERA_POSITION_Z")
# Nobody moves, nobody dies.
SETUP = ("god", "notarget", "freeze")


@dataclass
class Frame:
    """One view of a map and its labels.

    Attributes:
        image: the picture. (n, n, 3) uint8
        geometry: depth and normals in the camera's frame, things included; lengths in map units.
        semantic: index into SEMANTIC. (n, n) uint8
        surface: an id per floor, ceiling, wall part and thing; -1 at the sky. (n, n)
        objects: index into OBJECTS of those present, sorted; never empty.
        pose: x, y and eye height in map units, yaw in degrees.
        disagreement: share of pixels whose depth differs from the engine's.
    """

    image: NDArray[np.uint8]
    geometry: Geometry
    semantic: NDArray[np.uint8]
    surface: NDArray[np.int64]
    objects: list[int]
    pose: tuple[float, float, float, float]
    disagreement: float

    def labels(self) -> dict[str, Any]:
        """Every domain of Taskonomy that this frame has, in its own units, ready for `domains.write`."""
        g, scale = self.geometry, self.geometry.scale
        x, y, eye, yaw = self.pose
        scores = np.zeros(len(OBJECTS), np.float32)
        scores[self.objects] = 1 / len(self.objects)
        # Normals are stored as x right, y up, z towards the viewer.
        up_towards = np.array([1, -1, -1], np.float32)
        return {
            "rgb": self.image,
            "depth_zbuffer": np.where(g.valid, g.depth / UNITS_PER_METRE, np.inf),
            "depth_euclidean": np.where(g.valid, g.distance / UNITS_PER_METRE, np.inf),
            "normal": g.normal * up_towards,
            "principal_curvature": dense_labels.curvature(g),
            "reshading": dense_labels.reshading(g),
            "edge_texture": dense_labels.edge_texture(self.image, scale),
            "edge_occlusion": dense_labels.edge_occlusion(g),
            "keypoints2d": dense_labels.keypoints2d(self.image, scale),
            "keypoints3d": dense_labels.keypoints3d(g),
            "segment_semantic": self.semantic,
            "segment_unsup25d": dense_labels.false_colours(self.surface),
            "class_object": scores,
            "mask_valid": g.valid,
            "point_info": {
                "camera_location": [round(v / UNITS_PER_METRE, 4) for v in (x, y, eye)],
                "yaw_degrees": round(yaw, 3),
                "field_of_view_rads": round(float(2 * np.arctan(len(g.depth) / 2 / g.focal)), 6),
            },
        }


def see(state: Any, level: DoomMap, camera: Camera) -> Frame:
    """A frame from the engine's state (with depth and labels buffers) and the level's geometry."""
    x, y, yaw, eye = state.game_variables
    view = level.look(x, y, eye, yaw, camera)
    covered = _middle(state.labels_buffer, camera.size)
    # Fitted: the engine's buffer has 8 bits and reaches to 1828 units.
    coarse = 7.134 * _middle(state.depth_buffer, camera.size).astype(np.float32) + 9.1
    known = np.isfinite(view.depth) & (covered == 0) & (view.depth < 1700) & (coarse > 30)
    wrong = abs(coarse - view.depth)[known] > 12 + 0.03 * view.depth[known]

    semantic = view.kind.astype(np.uint8)
    semantic[(view.kind == FLOOR) & level.liquid[view.sector]] = LIQUID
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    present: set[int] = set()
    for thing in state.labels:
        pixels = covered == thing.value
        if thing.object_name == "DoomPlayer" or not pixels.any():
            continue
        name = CATEGORY.get(thing.object_category, "other")
        view.depth[pixels] = max((thing.object_position_x - x) * c + (thing.object_position_y - y) * s, 1.0)
        view.normal[pixels] = (-c, -s, 0)
        view.surface[pixels] = 5_000_000 + thing.object_id
        semantic[pixels] = SEMANTIC.index(name)
        if pixels.mean() > VISIBLE:
            present.add(OBJECTS.index(name))

    valid = np.isfinite(view.depth)
    east, north, up = (view.normal[..., i] for i in range(3))
    normal = np.stack([east * s - north * c, -up, east * c + north * s], -1).astype(np.float32)
    depth = np.where(valid, view.depth, SKY_DEPTH).astype(np.float32)
    geometry = Geometry(depth, normal, valid, camera.rays().astype(np.float32), camera.fx)
    image = picture(state.screen_buffer, camera.size)
    disagreement = float(wrong.mean()) if len(wrong) else 0.0
    return Frame(image, geometry, semantic, view.surface, sorted(present) or [0], (x, y, eye, yaw), disagreement)


def good(frame: Frame) -> bool:
    """The gate: the engine agrees on the geometry, and the view is not a wall close by, the sky, or dark."""
    return (
        frame.disagreement <= 0.04
        and frame.image.mean() > 50
        and float(np.median(frame.geometry.depth)) >= 40
        and float((frame.semantic == SKY).mean()) <= 0.5
        and len(np.unique(frame.surface)) >= 6
    )


def frames(
    name: str, count: int, size: int, seed: int = 0, accept: Callable[[Frame], bool] = good
) -> Iterator[tuple[int, int, Frame]]:
    """Up to `count` accepted frames of a map, with the numbers of their place and view (two views of most places).

    The same arguments give the same frames. Where eight tries per frame are not enough, there are fewer.
    """
    rng = np.random.default_rng([seed, int(name[-2:])])
    level = load_map(freedoom(), name)
    camera = Camera.of_size(size)
    places = level.free_points(rng, max(count // 2, 8))
    views = [0] * len(places)
    found = 0
    turning, buffers = ("TURN_LEFT_RIGHT_DELTA",), ("depth_buffer", "labels_buffer")
    with engine(name, size=max(size, 240), buttons=turning, variables=VARIABLES, seed=seed, buffers=buffers) as game:
        for attempt in range(8 * count if len(places) else 0):
            if found == count:
                return
            if attempt == 0 or game.is_episode_finished():
                game.new_episode()
                for command in SETUP:
                    game.send_game_command(command)
            at = attempt % len(places)
            turn = float(rng.uniform(-180, 180))
            game.send_game_command(f"warp {places[at, 0]:.0f} {places[at, 1]:.0f}")
            # A turn in the same tic as a warp is lost.
            game.make_action([0], 1)
            game.make_action([turn], 1)
            state = game.get_state()
            if state is None or np.abs(np.array(state.game_variables[:2]) - places[at]).sum() > 80:
                # Something stood in the way.
                continue
            frame = see(state, level, camera)
            if accept(frame):
                yield at, views[at], frame
                views[at] += 1
                found += 1


def render_map(root: Path, name: str, count: int, size: int, seed: int) -> int:
    """Write the frames of one map in Taskonomy's layout; returns how many there are."""
    # There is a rendering process per core.
    cv2.setNumThreads(1)
    total = 0
    for place, view, frame in frames(name, count, size, seed):
        for domain, values in frame.labels().items():
            domains.write(domains.path_of(root, domain, name, place, view), domain, values)
        total += 1
    return total


def write_index(root: Path) -> None:
    """The files beside the frames: the split of the maps, and the names of the classes."""
    rows = [f"{m},{int(m in TRAIN)},{int(m in VAL)},{int(m in TEST)}" for m in MAPS]
    write_text(root / "splits.csv", "\n".join(["id,train,val,test", *rows]) + "\n")
    write_json(root / "names.json", {"segment_semantic": SEMANTIC, "class_object": OBJECTS})


def picture(screen: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The engine's picture as frames show it: its middle square, brighter. (h, w, 3) -> (size, size, 3) uint8"""
    return BRIGHTER[_middle(screen, size, cv2.INTER_AREA)]


def _middle(buffer: NDArray[np.uint8], size: int, interpolation: int = cv2.INTER_NEAREST_EXACT) -> Any:
    """The middle square of a 4:3 picture, resized."""
    height, width = buffer.shape[:2]
    left = (width - height) // 2
    return cv2.resize(np.ascontiguousarray(buffer[:, left : left + height]), (size, size), interpolation=interpolation)
