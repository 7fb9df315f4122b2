"""Side-tuning and the methods it is compared with, all with the one contract of `Method`.

method = METHODS["ewc"](base)
method.learn(Task("pets", head=37), loader, Recipe(steps=1000))
logits = method(x, "pets")
"""

from collections.abc import Callable

from sidetuning.registry import Registry
from sidetuning_bench.methods.method import Method, Recipe, Task, load_method, saved_tasks

METHODS: Registry[Callable[..., Method]] = Registry(
    "method",
    {
        "sidetune": "sidetuning_bench.methods.sidetune:SideTune",
        "features": "sidetuning_bench.methods.features:FixedFeatures",
        "finetune": "sidetuning_bench.methods.finetune:FineTune",
        "scratch": "sidetuning_bench.methods.scratch:Scratch",
        "independent": "sidetuning_bench.methods.independent:Independent",
        "ewc": "sidetuning_bench.methods.ewc:EWC",
        "psp": "sidetuning_bench.methods.psp:PSP",
        "pnn": "sidetuning_bench.methods.pnn:PNN",
        "residual-adapter": "sidetuning_bench.methods.residual_adapter:ResidualAdapter",
        "lora": "sidetuning_bench.methods.lora:LoRA",
        "piggyback": "sidetuning_bench.methods.piggyback:Piggyback",
        "boosting": "sidetuning_bench.methods.boosting:Boosting",
    },
)

__all__ = ["METHODS", "Method", "Recipe", "Task", "load_method", "saved_tasks"]
