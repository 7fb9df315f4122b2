"""Side-tuning: give a frozen pretrained network new skills, a small side network at a time (Zhang et al., ECCV 2020)."""

from sidetuning.artifacts import load, load_task, save_task
from sidetuning.base import BASES, Base, Features, Input, Observation, load_base
from sidetuning.branch import Branch
from sidetuning.cache import CachedFeatures, cache_bytes, cache_features, loader_over
from sidetuning.distill import distill
from sidetuning.errors import (
    ArtifactError,
    CacheError,
    DataError,
    ShapeError,
    SideTuningError,
    TaskError,
    TrainingError,
    UnknownNameError,
)
from sidetuning.heads import HEADS
from sidetuning.hub import pull, push
from sidetuning.merges import MERGES
from sidetuning.sides import SIDES
from sidetuning.training import TrainResult, accuracy, evaluate, fit, seeded, train
from sidetuning.tuner import SideTuner

__version__ = "0.1.0"

__all__ = [
    "BASES",
    "HEADS",
    "MERGES",
    "SIDES",
    "ArtifactError",
    "Base",
    "Branch",
    "CacheError",
    "CachedFeatures",
    "DataError",
    "Features",
    "Input",
    "Observation",
    "ShapeError",
    "SideTuner",
    "SideTuningError",
    "TaskError",
    "TrainResult",
    "TrainingError",
    "UnknownNameError",
    "accuracy",
    "cache_bytes",
    "cache_features",
    "distill",
    "evaluate",
    "fit",
    "load",
    "load_base",
    "load_task",
    "loader_over",
    "pull",
    "push",
    "save_task",
    "seeded",
    "train",
]
