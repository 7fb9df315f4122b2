"""Side-tuning and the methods it is compared with, all with the one contract of `Method`.

method = METHODS["ewc"](base)
method.learn(Task("pets", head=37), loader, Recipe(steps=1000))
logits = method(x, "pets")
"""

from pathlib import Path

from sidetuning.base import Base
from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning.registry import Registry
from sidetuning_bench.methods.method import MEND, Method, read_config, saved_tasks
from sidetuning_bench.methods.recipe import Recipe, Task, one_cycle

METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "sidetune": "sidetuning_bench.methods.sidetune:SideTune",
        "features": "sidetuning_bench.methods.sidetune:FixedFeatures",
        "solve": "sidetuning_bench.methods.sidetune:Solve",
        "finetune": "sidetuning_bench.methods.finetune:FineTune",
        "scratch": "sidetuning_bench.methods.finetune:Scratch",
        "independent": "sidetuning_bench.methods.finetune:Independent",
        "ewc": "sidetuning_bench.methods.ewc:EWC",
        "psp": "sidetuning_bench.methods.psp:PSP",
        "pnn": "sidetuning_bench.methods.pnn:PNN",
        "residual-adapter": "sidetuning_bench.methods.residual_adapter:ResidualAdapter",
        "lora": "sidetuning_bench.methods.lora:LoRA",
        "piggyback": "sidetuning_bench.methods.piggyback:Piggyback",
        "boosting": "sidetuning_bench.methods.sidetune:Boosting",
    },
)


def load_method(folder: str | Path, base: Base) -> Method:
    """Build the method saved in `folder`, with all its tasks, on `base`.

    Raises:
        ArtifactError: the folder is missing, damaged, or of another base.
    """
    config = read_config(Path(folder))
    try:
        method: Method = METHODS.build(config["method"], base, options=config["options"])
        method.load(folder)
    except SideTuningError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        # Options of another type, which each method meets in its own way.
        raise ArtifactError(f"{folder} describes a method that cannot be built ({error}); {MEND}") from error
    return method


__all__ = ["METHODS", "Method", "Recipe", "Task", "load_method", "one_cycle", "saved_tasks"]
