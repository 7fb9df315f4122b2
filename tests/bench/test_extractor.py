"""The extractor of agents: tuned copies, networks from scratch, bfloat16, and the compass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("stable_baselines3")

from gymnasium import spaces

import sidetuning as st
from agent_parts import PICTURE, check_learning_and_saving, learner, small_base
from sidetuning.errors import ShapeError
from sidetuning.sides import SIDES
from sidetuning.sides.initialise import distilled_weights, load_weights
from sidetuning_bench.agents.extractor import AgentExtractor
from sidetuning_bench.agents.trajectories import COMPASS, compass_numbers, extra_of

PARTS: dict[str, Any] = {"base": small_base, "side": "fcn4", "init": None, "hidden": 32}


@pytest.mark.parametrize("method", ["finetune", "scratch", "side-only"])
def test_the_base_stays_as_it_is_and_out_of_the_zip(method: str, tmp_path: Path) -> None:
    check_learning_and_saving(learner(method, extractor=AgentExtractor), tmp_path)


def test_a_distilled_side_and_a_copy_survive_the_policys_initialisation() -> None:
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 64, 64), np.uint8)})
    options = {"width": 0.25, "signed": True}
    with st.seeded(0):
        extractor: Any = AgentExtractor(space)
    extractor.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None)
    wanted = SIDES.build("fcn5", extractor.base, options=options)
    load_weights(wanted, distilled_weights(extractor.base, "fcn5", options), "fcn5")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(extractor.branch.side.state_dict()[name], tensor)
    tuned: Any = AgentExtractor(space, method="finetune").train()
    x = {"rgb": torch.rand(2, 3, 64, 64)}
    # The batch norms are merged into the convolutions.
    assert not [name for name, _ in tuned.trunk.named_buffers() if "running" in name]
    assert all(p.requires_grad for p in tuned.trunk.parameters())
    # The same in training as in use, so PPO's ratios start at 1.
    assert torch.equal(tuned(x), tuned.eval()(x))
    code = tuned.trunk(tuned.base.prepare(x["rgb"]))
    assert torch.allclose(code, tuned.base(x["rgb"]).out, atol=1e-3)


@pytest.mark.parametrize("method", ["finetune", "scratch", "side-only"])
def test_tuned_networks_may_run_in_bfloat16(method: str) -> None:
    """When acting and when learning alike, or PPO's ratios would not start at 1."""
    space, x = spaces.Dict({"rgb": PICTURE}), {"rgb": torch.rand(4, 3, 16, 16)}
    made: dict[str, Any] = {}
    for precision in ("no", "bf16"):
        with st.seeded(0):
            made[precision] = AgentExtractor(space, **PARTS, method=method, precision=precision)
    kinds: list[torch.dtype] = []
    made["bf16"].trunk.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with torch.no_grad():
        exact, acting = made["no"].eval()(x), made["bf16"].eval()(x)
    learning = made["bf16"].train()(x)
    assert kinds == [torch.bfloat16] * 2 and acting.dtype == learning.dtype == torch.float32
    assert torch.equal(acting, learning)
    assert not torch.equal(acting, exact) and torch.allclose(acting, exact, atol=0.1)
    learning.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made["bf16"].trunk.parameters())
    with pytest.raises(st.UnknownNameError, match="precision"):
        AgentExtractor(space, **PARTS, precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["scratch", "side-only"])
def test_from_random_weights_the_base_is_not_run(method: str) -> None:
    extractor: Any = learner(method, extractor=AgentExtractor).policy.features_extractor
    seen: list[int] = []
    extractor.base.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    extractor({"rgb": torch.rand(4, 3, 16, 16)})
    sidetuned: Any = learner("sidetune").policy.features_extractor
    like = sidetuned.branch.side if method == "side-only" else extractor.base.net
    nets = (extractor.trunk, like) if method == "side-only" else (extractor.trunk.net, like)
    (names, own), (wanted, given) = ([*zip(*net.named_parameters(), strict=True)] for net in nets)
    assert not seen and names == wanted and [p.shape for p in own] == [p.shape for p in given]
    # One seed draws the same side for both methods.
    same = [torch.equal(a, b) for a, b in zip(own, given, strict=True) if a.ndim == 4]
    assert all(same) if method == "side-only" else not any(same)


def test_a_compass_goes_with_the_features() -> None:
    compass = torch.tensor([[3.0, np.pi / 2], [0.0, -np.pi]])
    numbers = compass_numbers(compass)
    assert torch.allclose(numbers, torch.tensor([[np.log(4), 0, 1], [0, -1, 0]]).float(), atol=1e-6)
    assert torch.equal(extra_of({COMPASS: compass.numpy()}, 2), numbers) and extra_of({}, 2).shape == (2, 0)
    box = spaces.Box(np.array([0, -4], np.float32), np.array([9, 4], np.float32))
    extractor: Any = AgentExtractor(spaces.Dict({"rgb": PICTURE, COMPASS: box}), **PARTS)
    out = extractor({"rgb": torch.rand(2, 3, 16, 16), COMPASS: compass})
    assert out.shape == (2, extractor.features_dim) == (2, 64)
    assert torch.equal(out[:, 32:], extractor.given(numbers))
    with pytest.raises(ShapeError, match="distance and angle"):
        AgentExtractor(spaces.Dict({"rgb": PICTURE, COMPASS: spaces.Box(0, 1, (3,))}), **PARTS)
    speed: Any = AgentExtractor(spaces.Dict({"rgb": PICTURE, "speed": spaces.Box(-1, 1, (2,))}), **PARTS)
    assert speed.given[0].in_features == 2
