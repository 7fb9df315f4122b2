"""The causal language model around a base: what its output embedding makes of a code, and its own generation."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sidetuning.content import tensor_bytes, weights_version


class LanguageModel:
    """A causal language model of transformers, whose backbone is the network of a base.

    Its output embedding (tied or not, with a bias, a scale or a soft cap) is that of its own `forward`, which runs here
    over another backbone. Nothing is put on the shared modules, so that any number of threads may ask.

    Args:
        net: the model; its class knows how logits are made and how texts go on.

    Attributes:
        name, backbone: the part of it that is the network of a base.
    """

    def __init__(self, net: Any) -> None:
        from transformers import PreTrainedModel

        self.net = net.eval().requires_grad_(False)
        self.name, self.backbone = next(pair for pair in net.named_children() if isinstance(pair[1], PreTrainedModel))
        self._sha256: tuple[object, str] | None = None

    def over(self, run: Callable[..., Any]) -> Any:
        """The same model, with the same weights, whose backbone is the function `run`, called as the backbone is."""
        other, backbone = _shallow(self.net), _shallow(self.backbone)
        other._modules[self.name], backbone.forward = backbone, run
        if "decoder" in backbone._modules:
            # OPT calls what is within.
            backbone._modules["decoder"] = _shallow(backbone.decoder)
            backbone.decoder.forward = run
        return other

    def around(self, backbone: Any) -> LanguageModel:
        """The same model around another backbone, such as one in fewer bits."""
        other = copy.copy(self)
        other.net, other.backbone = _shallow(self.net), backbone
        other.net._modules[self.name] = backbone
        return other

    def logits(self, code: Tensor) -> Tensor:
        """The scores (b, t, vocabulary) of the next token after each, of codes (b, t, d), and of their type."""
        given = _Returned(code.to(self.net.dtype))
        ids = torch.zeros(code.shape[:2], dtype=torch.long, device=code.device)
        logits: Tensor = self.over(lambda *_, **__: given)(input_ids=ids, use_cache=False).logits
        return logits.to(code.dtype)

    def sha256(self) -> str:
        """Hash of what makes logits of a code: the weights beside the backbone's, and what the configuration adds."""
        version = weights_version(self.net.get_output_embeddings())
        if self._sha256 is None or self._sha256[0] != version:
            config = {
                key: value for key, value in self.net.config.to_dict().items() if "logit" in key or "head_m" in key
            }
            digest = hashlib.sha256(repr(sorted(config.items())).encode())
            for name, tensor in sorted(self.net.state_dict().items()):
                if not name.startswith(f"{self.name}."):
                    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor_bytes(tensor).numpy().tobytes())
            self._sha256 = version, digest.hexdigest()
        return self._sha256[1]


class _Returned:
    """What a backbone returns: the code, and nothing else that may be asked for."""

    def __init__(self, code: Tensor) -> None:
        self.last_hidden_state = code

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _shallow(module: Any) -> Any:
    """A module with the same parts, one of which may then be another."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
