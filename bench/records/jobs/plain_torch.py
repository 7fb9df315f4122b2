"""Five jobs with plain torch, a fine-tuned copy a task: `python plain_torch.py FIRST SECOND OUT SEED`."""

import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sidetuning.bases import resnet44_cifar10

first, second, out, seed = *sys.argv[1:4], int(sys.argv[4])
folders = {"first": first, "second": second}
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
torch.manual_seed(seed)


class Images(Dataset):
    def __init__(self, folder: str) -> None:
        classes = sorted(path for path in Path(folder).iterdir() if path.is_dir())
        self.files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        image = Image.open(file).convert("RGB").resize((32, 32))
        return (torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 - mean) / std, label


def network(outputs: int) -> nn.Module:
    parts = {"base": resnet44_cifar10().net.requires_grad_(True), "head": nn.Linear(64, outputs)}
    return nn.Sequential(OrderedDict(parts))


def learn(net: nn.Module, folder: str) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    net.train()
    for _ in range(15):
        for x, y in DataLoader(Images(f"{folder}/train"), 64, shuffle=True):
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def answer(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def accuracy(outputs: Tensor, y: Tensor) -> float:
    return float((outputs.argmax(1) == y).float().mean())


tests = {name: next(iter(DataLoader(Images(f"{folder}/test"), 10_000))) for name, folder in folders.items()}
classes = {name: int(y.max()) + 1 for name, (_, y) in tests.items()}
x, y = tests["first"]

# 1. Train on my own photographs.
models = {"first": learn(network(classes["first"]), first)}
before = answer(models["first"], x)

# 2. Add a second task.
models["second"] = learn(network(classes["second"]), second)

# 3. Answer for both: a whole network for each.
answers = {name: answer(net, x) for name, net in models.items()}

# 4. Save, share, load; `huggingface_hub.upload_file` uploads the file.
torch.save({name: net.state_dict() for name, net in models.items()}, f"{out}/models.pt")
weights = torch.load(f"{out}/models.pt")
loaded = {name: network(count).eval() for name, count in classes.items()}
for name, net in loaded.items():
    net.load_state_dict(weights[name])
again = answer(loaded["first"], x)

# 5. Compare with LoRA.
config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*\.conv\d", modules_to_save=["head"])
lora = learn(get_peft_model(network(classes["first"]), config), first)

result = {
    "first": accuracy(before, y),
    "second": accuracy(answer(models["second"], tests["second"][0]), tests["second"][1]),
    "first_at_the_end": accuracy(answers["first"], y),
    "moved": (answers["first"] - before).abs().max().item(),
    "moved_by_loading": (again - before).abs().max().item(),
    "lora": accuracy(answer(lora, x), y),
}
print(json.dumps(result))
