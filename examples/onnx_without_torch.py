"""Ask an exported model about photographs with ONNX Runtime, Pillow and NumPy alone: FOLDER IMAGE…"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder = Path(sys.argv[1])
about = json.loads((folder / "model.json").read_text())
how, base = about["preprocessing"], onnxruntime.InferenceSession(folder / about["base"]["file"])
filter, bleed = Image.Resampling[how["interpolation"].upper()], (1 - how["crop_pct"]) / 2
images = [ImageOps.fit(Image.open(f).convert("RGB"), how["size"][::-1], filter, bleed) for f in sys.argv[2:]]
given = {str(about["base"]["inputs"][0]["name"]): np.stack([*map(np.asarray, images)]).transpose(0, 3, 1, 2)}
given |= zip(about["base"]["outputs"], base.run(None, given))
for name, task in about["tasks"].items():
    session = onnxruntime.InferenceSession(folder / task["file"])
    print(name, [task["labels"][i] for i in session.run(None, {n: given[n] for n in task["inputs"]})[0].argmax(1)])
