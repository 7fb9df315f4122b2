"""Side-tuning: give a frozen pretrained network new skills, one small side network at a time."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sidetuning.api import *  # noqa: F403
    from sidetuning.api import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """A submodule or a public name, imported when it is first used: the command line does not wait for torch."""
        if name == "__all__" or not name.startswith("_"):
            if find_spec(f"sidetuning.{name}"):
                return import_module(f"sidetuning.{name}")
            api = import_module("sidetuning.api")
            if name in ("__all__", *api.__all__):
                return getattr(api, name)
        raise AttributeError(f"module 'sidetuning' has no attribute '{name}'")

    def __dir__() -> list[str]:
        return [*import_module("sidetuning.api").__all__, "__version__"]
