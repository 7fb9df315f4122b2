"""Five jobs with PEFT and timm's data sets: `python peft_timm.py FIRST SECOND OUT SEED [eval]`.

With `eval` the batch norms stay in evaluation mode while an adapter is trained.
"""

import json
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sidetuning.bases import resnet44_cifar10

first, second, out, seed = *sys.argv[1:4], int(sys.argv[4])
folders = {"first": first, "second": second}
transform = create_transform((3, 32, 32), crop_pct=1.0)
config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*\.conv\d")
torch.manual_seed(seed)


def network() -> nn.Module:
    return nn.Sequential(resnet44_cifar10().net)


def batches(folder: str, split: str, size: int) -> DataLoader:
    data = create_dataset("", f"{folder}/{split}", transform=transform)
    return DataLoader(data, size, shuffle=split == "train")


def learn(model: nn.Module, head: nn.Module, folder: str) -> None:
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    model.train()
    if "eval" in sys.argv:  # measurement
        for module in model.modules():  # measurement
            module.train(not isinstance(module, nn.BatchNorm2d))  # measurement
    for _ in range(15):
        for x, y in batches(folder, "train", 64):
            loss = nn.functional.cross_entropy(head(model(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def answer(model: nn.Module, head: nn.Module, name: str, x: Tensor) -> Tensor:
    model.set_adapter(name)
    return head(model(x))


def accuracy(outputs: Tensor, y: Tensor) -> float:
    return float((outputs.argmax(1) == y).float().mean())


tests = {name: next(iter(batches(folder, "test", 10_000))) for name, folder in folders.items()}
heads = {name: nn.Linear(64, int(y.max()) + 1) for name, (_, y) in tests.items()}
x, y = tests["first"]

# 1. Train on my own photographs.
model = get_peft_model(network(), config, adapter_name="first")
learn(model, heads["first"], first)
before = answer(model, heads["first"], "first", x)

# 2. Add a second task.
model.add_adapter("second", config)
model.set_adapter("second")
learn(model, heads["second"], second)

# 3. Answer for both: a pass for each.
answers = {name: answer(model, head, name, x) for name, head in heads.items()}

# 4. Save, share, load; `model.push_to_hub("you/model")` uploads the adapters, and the heads need a way of their own.
model.save_pretrained(f"{out}/adapters")
torch.save({name: head.state_dict() for name, head in heads.items()}, f"{out}/heads.pt")
loaded = PeftModel.from_pretrained(network(), f"{out}/adapters/first", adapter_name="first")
loaded.load_adapter(f"{out}/adapters/second", "second")
head = nn.Linear(64, heads["first"].out_features)
head.load_state_dict(torch.load(f"{out}/heads.pt")["first"])
again = answer(loaded.eval(), head, "first", x)

# 5. Compare with LoRA: this is LoRA.
result = {
    "first": accuracy(before, y),
    "second": accuracy(answer(model, heads["second"], "second", tests["second"][0]), tests["second"][1]),
    "first_at_the_end": accuracy(answers["first"], y),
    "moved": (answers["first"] - before).abs().max().item(),
    "moved_by_loading": (again - before).abs().max().item(),
    "lora": accuracy(before, y),
}
print(json.dumps(result))
