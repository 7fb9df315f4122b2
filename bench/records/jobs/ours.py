"""Five jobs with sidetuning: `python ours.py FIRST SECOND OUT SEED`, folders of images by split and class."""

import json
import sys

from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from sidetuning_bench.methods import METHODS, Recipe, Task

first, second, out, seed = *sys.argv[1:4], int(sys.argv[4])
model = st.SideTuner(st.load_base("resnet44-cifar10"))
photographs = st.data.load(first).splits
x = model.base.transform.batch(photographs["test"].sources)

# 1. Train on my own photographs.
one = st.auto(model, "first", first, cache=f"{out}/cache", budget=20, seed=seed, progress=False)
before = model(x, "first")

# 2. Add a second task.
two = st.auto(model, "second", second, cache=f"{out}/cache", budget=20, seed=seed, progress=False)

# 3. Answer for both in one pass.
answers = model.forward_all(x)

# 4. Save, share, load; `sidetuning push OUT/model you/model` uploads it.
model.save(f"{out}/model")
again = st.load(f"{out}/model")(x, "first")

# 5. Compare with LoRA.
rows = TensorDataset(model.base.transform.batch(photographs["train"].sources), photographs["train"].targets)
lora = METHODS["lora"](model.base)
lora.learn(
    Task("first", len(model["first"].labels), seed=seed),
    DataLoader(rows, 64, shuffle=True),
    Recipe(steps=60, seed=seed),
)
score = st.evaluate(lora, "first", [(x, photographs["test"].targets)])["accuracy"]

result = {
    "first": one.scores["test"]["accuracy"],
    "second": two.scores["test"]["accuracy"],
    "first_at_the_end": st.evaluate(model, "first", [(x, photographs["test"].targets)])["accuracy"],
    "moved": (answers["first"] - before).abs().max().item(),
    "moved_by_loading": (again - before).abs().max().item(),
    "lora": score,
}
print(json.dumps(result))
