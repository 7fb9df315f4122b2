"""`sidetuning pretrain doom-curvature`: make the packaged base of dense tasks, a ResNet that sees curvature in Doom, and its side.

Resumable; the base of 20,000 frames takes 53 minutes on one core that knows bfloat16. The weights of the base, of its decoder and of the FCN5 side
distilled from it land in `--out` as safetensors. Only frames of training maps are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sidetuning.base import Base
from sidetuning.bases import IMAGENET_MEAN, IMAGENET_STD
from sidetuning.bases.resnet_map import ResNetMap
from sidetuning.cache import cache_features, loader_over
from sidetuning.data.taskonomy import Taskonomy
from sidetuning.data.taskonomy_files import target
from sidetuning.distill import distill
from sidetuning.heads import HEADS
from sidetuning.scenarios.pretrain_cifar import AugmentedBatches, groups, write
from sidetuning.scenarios.runs import Run
from sidetuning.sides.initialise import DISTILLED
from sidetuning.training import default_accelerator, seeded, train
from sidetuning.tuner import SideTuner


@dataclass(frozen=True)
class Settings:
    """Make resnet-doom-curvature, its decoder and its distilled FCN5."""

    data: str = "runs/doom-pretrain"
    """A folder written by `sidetuning render-doom --frames 27600 --seed 1`, or any other in Taskonomy's layout with a splits.csv."""
    out: str = "runs/pretrain-doom-curvature"
    """Folder for the weights and the resume files."""
    epochs: int = 12
    """Passes over the training frames."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate of AdamW."""
    batch: int = 64
    """Frames per step."""
    weight_decay: float = 0.02
    """On kernels, none on norms and biases."""
    precision: Literal["no", "bf16"] = "bf16"
    """Mixed precision."""
    distill_epochs: int = 10
    """Passes over cached features in which the side learns to imitate the base."""
    seed: int = 0
    """Of initial weights, order and augmentation."""


class Regression(nn.Module):
    """Encoder and decoder; `forward` is the training objective: the paper's masked L2."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.net = ResNetMap().to(memory_format=torch.channels_last)
        like_net = base_of(ResNetMap(), size)  # of another net, since a base freezes its own
        self.decoder = HEADS.build("pixels", like_net, options={"channels": 2})
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def predict(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> curvatures in the range of targets, (b, 2, h, w)."""
        x = (images.float() / 255 - self.mean) / self.std
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16" and self.training):
            return self.decoder(self.net(x.contiguous(memory_format=torch.channels_last))).float()

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, raw, mask = batch
        return masked_l2(self.predict(images), raw, mask)

    @torch.no_grad()
    def error(self, images: Tensor, raw: Tensor, masks: Tensor) -> float:
        """The loss over a whole split, in float32."""
        was, device = self.training, self.mean.device
        self.eval()
        chunks = zip(images.split(100), raw.split(100), masks.split(100), strict=True)
        total = sum(
            float(masked_l2(self.predict(x.to(device)), y.to(device), m.to(device))) * len(x) for x, y, m in chunks
        )
        self.train(was)
        return total / len(images)


def masked_l2(prediction: Tensor, raw: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over valid pixels."""
    error = (prediction - target("curvature", raw)).square().mean(1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def base_of(net: nn.Module, size: int) -> Base:
    """The encoder as a base."""
    return Base(net, example=torch.zeros(1, 3, size, size, dtype=torch.uint8), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def flipped_and_recoloured(images: Tensor, raw: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """How training batches are augmented: principal curvatures of a mirrored surface are those of the surface."""
    flip = torch.rand(len(images)) < 0.5
    for t in (images, raw, masks):
        t[flip] = t[flip].flip(-1)
    return augment(images), raw, masks


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image's colours raised to a power and scaled, per channel a little, uint8 (b, 3, h, w) -> the same."""
    b = len(images)
    power = torch.empty(b, 1, 1, 1).uniform_(0.7, 1.4, generator=generator)
    gain = torch.empty(b, 3, 1, 1).uniform_(0.85, 1.15, generator=generator)
    return ((images.float() / 255) ** power * gain * 255).clamp(0, 255).to(torch.uint8)


def load(root: str, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, raw curvatures and masks of a split, in memory."""
    frames = Taskonomy(root, ("rgb", "principal_curvature"), split, subset=None)
    return frames.tensors("rgb"), frames.tensors("principal_curvature"), frames.tensors("mask")


def main(settings: Settings) -> None:
    """Train, distil, write the weights; prints the errors of both."""
    s, out = settings, Path(settings.out)
    Run(out, "pretrain doom-curvature", s, free=("data", "out"))
    device = default_accelerator().device
    images, raw, masks = load(s.data, "train")
    val = load(s.data, "val")
    few = tuple(t[::4] for t in val)  # nothing is chosen by it
    size = images.shape[-1]
    with seeded(s.seed):
        model = Regression(size, s.precision).to(device)
    loader = AugmentedBatches((images, raw, masks), s.batch, flipped_and_recoloured)
    steps = s.epochs * len(loader)
    optimizer = torch.optim.AdamW(groups(model, s.weight_decay), lr=s.lr)
    train(
        model, loader, optimizer, steps=steps, seed=s.seed, resume=out / "train.pt", clip=1.0,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, steps + 1, pct_start=0.15, cycle_momentum=False),
        validate=lambda: {"error on frames of validation maps": model.error(*few)}, progress="ResNet on Doom's curvature",
    )  # fmt: skip
    zero = float(masked_l2(torch.full(val[1].shape, -1 / 255), val[1], val[2]))
    print(
        f"error on {len(val[0])} frames of validation maps: {model.error(*val):.5f}, of a flat guess: {zero:.5f}",
        flush=True,
    )
    write(out / "resnet-doom-curvature.safetensors", model.net)
    write(out / "resnet-doom-curvature-decoder.safetensors", model.decoder)

    tuner = SideTuner(base_of(model.net.eval(), size).to(device))
    _, options = DISTILLED["resnet-doom-curvature", "fcn5"]
    with seeded(s.seed):
        branch = tuner.add_task("imitation", side="fcn5", side_options=options, merge="side-only", head="identity")
    cached = cache_features(
        tuner.base, TensorDataset(images, torch.zeros(len(images))), out / "cache", views=2, augment=mirrored, seed=s.seed
    )  # fmt: skip
    passes = loader_over(cached, batch_size=64)
    distill(
        tuner, "imitation", passes, steps=s.distill_epochs * len(passes), lr=1e-3, seed=s.seed, resume=out / "distill.pt"
    )  # fmt: skip
    assert branch.side is not None
    write(out / "fcn5-doom-curvature-distilled.safetensors", branch.side)
    with torch.no_grad():
        chunks = list(zip(*(t.split(100) for t in val), strict=True))
        errors = [masked_l2(model.decoder(tuner(x.to(device), "imitation")).cpu(), y, m) * len(x) for x, y, m in chunks]
    print(f"error of the side through the decoder: {float(sum(errors)) / len(val[0]):.5f}; weights in {out}")


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """The views that the side is distilled on."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return augment(torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images), generator)
