"""Side-tuning and the methods it is compared with, all with the one contract of `Method`.

method = METHODS["ewc"](base)
method.learn(Task("pets", head=37), loader, Recipe(steps=1000))
logits = method(x, "pets")
"""

from collections.abc import Callable

from sidetuning.methods.method import Method, Recipe, Task, load_method, saved_tasks
from sidetuning.registry import Registry

METHODS: Registry[Callable[..., Method]] = Registry(
    "method",
    {
        "sidetune": "sidetuning.methods.sidetune:SideTune",
        "features": "sidetuning.methods.features:FixedFeatures",
        "finetune": "sidetuning.methods.finetune:FineTune",
        "scratch": "sidetuning.methods.scratch:Scratch",
        "independent": "sidetuning.methods.independent:Independent",
        "ewc": "sidetuning.methods.ewc:EWC",
        "psp": "sidetuning.methods.psp:PSP",
        "pnn": "sidetuning.methods.pnn:PNN",
        "residual-adapter": "sidetuning.methods.residual_adapter:ResidualAdapter",
        "lora": "sidetuning.methods.lora:LoRA",
        "piggyback": "sidetuning.methods.piggyback:Piggyback",
        "boosting": "sidetuning.methods.boosting:Boosting",
    },
)

__all__ = ["METHODS", "Method", "Recipe", "Task", "load_method", "saved_tasks"]
