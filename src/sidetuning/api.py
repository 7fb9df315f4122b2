"""The public names, as `import sidetuning as st` gives them."""

from sidetuning.automatic import AutoResult, auto
from sidetuning.base import Base, Features, Input
from sidetuning.branch import Branch
from sidetuning.cache import CachedFeatures, cache_bytes, cache_features, loader_over
from sidetuning.callbacks import Callback
from sidetuning.candidates import Candidate, SweepResult, Trial
from sidetuning.changing import forget, update
from sidetuning.closed_form import SolveResult, solve
from sidetuning.distillation import distill
from sidetuning.engines import with_engine
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
from sidetuning.exporting import Exported, export
from sidetuning.heads import HEADS, Head
from sidetuning.hub import pull, push
from sidetuning.loading import BASES, load, load_base
from sidetuning.loop import TrainResult, train
from sidetuning.merges import MERGES, Merge
from sidetuning.objective import accuracy
from sidetuning.predicting import Answer, Word
from sidetuning.router import Routes
from sidetuning.routing import learn_routes
from sidetuning.seeding import seeded
from sidetuning.sides import SIDES, Side
from sidetuning.sweeping import sweep
from sidetuning.training import evaluate, fit
from sidetuning.transforms import ImageTransform
from sidetuning.tuner import SideTuner

__all__ = [
    "BASES",
    "HEADS",
    "MERGES",
    "SIDES",
    "Answer",
    "ArtifactError",
    "AutoResult",
    "Base",
    "Branch",
    "CacheError",
    "CachedFeatures",
    "Callback",
    "Candidate",
    "DataError",
    "Exported",
    "Features",
    "Head",
    "ImageTransform",
    "Input",
    "Merge",
    "Routes",
    "ShapeError",
    "Side",
    "SideTuner",
    "SideTuningError",
    "SolveResult",
    "SweepResult",
    "TaskError",
    "TrainResult",
    "TrainingError",
    "Trial",
    "UnknownNameError",
    "Word",
    "accuracy",
    "auto",
    "cache_bytes",
    "cache_features",
    "distill",
    "evaluate",
    "export",
    "fit",
    "forget",
    "learn_routes",
    "load",
    "load_base",
    "loader_over",
    "pull",
    "push",
    "seeded",
    "solve",
    "sweep",
    "train",
    "update",
    "with_engine",
]
