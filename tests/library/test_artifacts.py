"""Tasks on disk: what is loaded is bitwise what was saved, or nothing is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import load_file, save
from torch import nn

import sidetuning as st
from conftest import BASES, TAPS, conv_base, inputs, mlp_base, network
from sidetuning import beside, checks
from sidetuning.content import weights_sha256
from task_parts import edit, saved, scrambled


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with their right sha256."""
    text = (path / "side.json").read_text()
    (path / "side.safetensors").write_bytes(save(tensors, metadata={"sidetuning": text}))
    edit(path, lambda c: c.update(tensors_sha256=beside.hash_of(tensors)))


def refused(path: Path, match: str) -> None:
    """load_task raises ArtifactError, and the model is as before."""
    model = st.SideTuner(mlp_base())
    with pytest.raises(st.ArtifactError, match=match):
        model.load_task(path)
    assert model.tasks == [] and not model.state_dict()


@pytest.mark.parametrize("init", [None, "zero", "low-energy", "xavier"])
@pytest.mark.parametrize(
    ("kind", "side", "merge"), [("mlp", "mlp", "film"), ("conv", "fcn4", "mlp2"), ("sequence", "ladder", "alpha")]
)
def test_a_round_trip_gives_bitwise_the_same_outputs(
    kind: str, side: str, merge: str, init: str | None, tmp_path: Path
) -> None:
    model = st.SideTuner(BASES[kind](TAPS[kind]))
    model.add_task("t", side=side, merge=merge, head=3, init=init, prenorm=True, labels=["a", "b", "c"])
    scrambled(model, "t")
    model.save_task("t", tmp_path)
    other = st.SideTuner(BASES[kind](TAPS[kind]))
    assert other.load_task(tmp_path) == "t"
    assert torch.equal(other(inputs(kind), "t"), model(inputs(kind), "t"))
    assert other["t"].labels == ["a", "b", "c"] and not other["t"].training
    assert other["t"].config == model["t"].config


def test_options_of_parts_come_back(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base(TAPS["mlp"]))
    model.add_task("t", side="ladder", merge="film", head=2, side_options={"width": 8}, merge_options={"hidden": 5})
    model.save_task("t", tmp_path)
    other = st.load(tmp_path, base=mlp_base(TAPS["mlp"]))
    assert torch.equal(other(inputs("mlp"), "t"), model(inputs("mlp"), "t"))
    assert other.summary().tasks[0].total == model.summary().tasks[0].total


def test_a_folder_of_tasks_is_loaded_with_laterals_first(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("z", side="mlp", head=2)
    model.add_task("m", side="mlp", head=2, laterals=["z"])
    model.add_task("a", side="mlp", head=2, merge="mlp2", laterals=["z", "m"])
    for name in model.tasks:
        scrambled(model, name)
        model.save_task(name, tmp_path / "run" / "tasks" / name)
    for path in (tmp_path / "run", tmp_path / "run" / "tasks"):
        other = st.load(path, base=mlp_base())
        assert sorted(other.tasks) == ["a", "m", "z"]
        for name in model.tasks:
            assert torch.equal(other(inputs("mlp"), name), model(inputs("mlp"), name))
    other = st.SideTuner(mlp_base())
    other.add_task("z", side="mlp", head=5)  # another of that name
    with pytest.raises(st.ArtifactError, match="beside another task 'z'"):
        other.load_task(tmp_path / "run" / "tasks" / "m")
    other.load_task(tmp_path / "run" / "tasks" / "m", any_base=True)
    shutil.rmtree(tmp_path / "run" / "tasks" / "z")
    with pytest.raises(st.ArtifactError, match="laterals"):
        st.load(tmp_path / "run", base=mlp_base())
    with pytest.raises(st.TaskError, match="load that task first"):
        st.SideTuner(mlp_base()).load_task(tmp_path / "run" / "tasks" / "m")


def test_a_packaged_base_is_built_again_from_its_spec(tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("t", side="mlp", head=2)
    model.save_task("t", tmp_path)
    other = st.load(tmp_path)
    assert torch.equal(other(inputs("conv"), "t"), model(inputs("conv"), "t"))


def test_a_base_without_a_spec_must_be_given(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(st.ArtifactError, match="base=base"):
        st.load(tmp_path)


def test_another_base_is_refused_unless_any_will_do(tmp_path: Path) -> None:
    saved(tmp_path)
    base = mlp_base()
    with torch.no_grad():
        base.net[0].weight[0, 0] += 1e-3  # type: ignore[index]
    model = st.SideTuner(base)
    with pytest.raises(st.ArtifactError, match="another base"):
        model.load_task(tmp_path)
    assert model.tasks == []
    assert model.load_task(tmp_path, any_base=True) == "pets"


@pytest.mark.parametrize("other", [{"mean": [0.5] * 3, "std": [0.2] * 3}, {"output": lambda out: 2 * out}])
def test_a_base_that_prepares_otherwise_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    """The same weights on other inputs, or another of their outputs, are another base."""
    x = inputs("conv")
    net = conv_base().net
    options: dict[str, Any] = dict(other)
    plain, changed = st.Base(net, example=x), st.Base(net, example=x, **options)
    assert plain.identity().sha256 == changed.identity().sha256
    model = st.SideTuner(plain)
    model.add_task("pets", side="fcn4", head=3)
    model.save_task("pets", tmp_path / "task")
    with pytest.raises(st.ArtifactError, match="prepared its inputs or picked its output otherwise"):
        st.SideTuner(changed).load_task(tmp_path / "task")
    assert st.SideTuner(changed).load_task(tmp_path / "task", any_base=True) == "pets"


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    first = nn.Linear(8, 8)
    side = nn.Sequential(nn.Flatten(), first, nn.ReLU(), first)
    model = st.SideTuner(st.Base(nn.Linear(8, 8), example=torch.zeros(1, 8)))
    model.add_task("tied", side=side, head=3)
    model.save_task("tied", tmp_path)
    again = st.SideTuner(model.base)
    twin = nn.Linear(8, 8)
    again.load_task(tmp_path, side=nn.Sequential(nn.Flatten(), twin, nn.ReLU(), twin))
    x = torch.randn(2, 8)
    assert torch.equal(again(x, "tied"), model(x, "tied"))


def test_a_task_can_be_loaded_under_another_name_but_never_twice(tmp_path: Path) -> None:
    model = saved(tmp_path)
    with pytest.raises(st.TaskError, match="exists already"):
        model.load_task(tmp_path)
    assert model.load_task(tmp_path, name="again") == "again"
    assert torch.equal(model(inputs("mlp"), "again"), model(inputs("mlp"), "pets"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_tensors_are_refused(keep: int, tmp_path: Path) -> None:
    saved(tmp_path)
    data = (tmp_path / "side.safetensors").read_bytes()
    (tmp_path / "side.safetensors").write_bytes(data[:keep])
    refused(tmp_path, "truncated")


@pytest.mark.parametrize("place", [3, 20, -1])
def test_tampered_bytes_are_refused(place: int, tmp_path: Path) -> None:
    saved(tmp_path)
    data = bytearray((tmp_path / "side.safetensors").read_bytes())
    data[place] ^= 1
    (tmp_path / "side.safetensors").write_bytes(data)
    refused(tmp_path, r"was changed|is truncated|side\.safetensors is not JSON|no valid field")


def test_whatever_byte_of_a_task_is_changed_it_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("side.json", "side.safetensors"):
        data = (tmp_path / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 150)):
            changed = bytearray(data)
            changed[place] ^= 4
            (tmp_path / name).write_bytes(changed)
            with contextlib.suppress(ValueError):
                # A blank between two entries says nothing.
                if json.loads(bytes(changed)) == json.loads(data):
                    continue
            refused(tmp_path, r"side\.(json|safetensors)")
        (tmp_path / name).write_bytes(data)
    assert st.SideTuner(mlp_base()).load_task(tmp_path) == "pets"


def test_an_edited_text_is_refused(tmp_path: Path) -> None:
    """Labels turned round, or another merge without parameters, change every answer and no tensor."""
    saved(tmp_path)
    text = (tmp_path / "side.json").read_text()
    for change in ({"labels": ["fish", "dog", "cat"]}, {"alpha": 0.1}, {"metrics": {"accuracy": 1.0}}):
        (tmp_path / "side.json").write_text(json.dumps({**json.loads(text), **change}))
        refused(tmp_path, r"side\.json was changed")


def test_a_broken_header_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    data = (tmp_path / "side.safetensors").read_bytes()
    (tmp_path / "side.safetensors").write_bytes(b"\xff" * 8 + data[8:])
    refused(tmp_path, "not a safetensors file")


@pytest.mark.parametrize("found", [0, 3, "1", None, True])
def test_an_unknown_format_is_refused(found: object, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, lambda c: c.update(format_version=found))
    refused(tmp_path, "format_version")


@pytest.mark.parametrize("field", ["task", "parts", "base", "tensors_sha256"])
def test_a_missing_field_is_refused(field: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, lambda c: c.pop(field))
    refused(tmp_path, field)


def test_a_frozen_task_stays_frozen(tmp_path: Path) -> None:
    model = saved(tmp_path)
    model.save(tmp_path / "model")
    model.freeze_task("pets")
    model.save(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        again = st.load(folder, base=mlp_base())
        assert again["pets"].frozen == (folder != tmp_path) and not again["pets"].training
    again.freeze_task("pets", False)
    again.save(tmp_path / "model")
    assert not st.load(tmp_path / "model", base=mlp_base())["pets"].frozen


def test_missing_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"side\.json is missing")
    with pytest.raises(st.ArtifactError, match="no saved task"):
        st.load(tmp_path, base=mlp_base())
    saved(tmp_path)
    (tmp_path / "side.safetensors").unlink()
    refused(tmp_path, r"side\.safetensors is missing")


@pytest.mark.parametrize("text", [b"", b'{"format_version": 1', b"\xff\xfe\x00", b"[]"])
def test_broken_json_is_refused(text: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "side.json").write_bytes(text)
    refused(tmp_path, r"side\.json")


def test_missing_extra_or_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = parse((tmp_path / "side.safetensors").read_bytes())
    first = min(tensors)
    fewer = {k: v for k, v in tensors.items() if k != first}
    more, other = {**tensors, "evil": torch.zeros(1)}, {**tensors, "head.linear.bias": torch.zeros(9)}
    cases = [(fewer, "missing"), (more, "too many"), (other, "has the shape")]
    for content, match in cases:
        rewrite(tmp_path, content)
        refused(tmp_path, match)


def test_parts_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = st.SideTuner(mlp_base())
    edit(tmp_path, lambda c: c["parts"].update(unheard_of=1))
    refused(tmp_path, "parts")
    edit(tmp_path, lambda c: (c["parts"].pop("unheard_of"), c["parts"].update(side=["mpl", {}])))
    with pytest.raises(st.UnknownNameError, match="'mlp'"):
        model.load_task(tmp_path)
    assert model.tasks == []


@pytest.mark.parametrize("part", ["side", "merge", "head"])
def test_a_part_of_the_users_own_is_passed_as_an_instance(part: str, tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, base: torch.Tensor, side: torch.Tensor, laterals: object = ()) -> torch.Tensor:
            return self.scale * (base + side) / 2

    def own() -> nn.Module:
        return {"side": lambda: nn.Linear(12, 16), "merge": Mean, "head": lambda: nn.Linear(16, 2)}[part]()

    model = st.SideTuner(mlp_base())
    parts: dict[str, Any] = {"side": "mlp", "merge": "alpha", "head": 2, part: own()}
    model.add_task("t", **parts)
    scrambled(model, "t")
    model.save_task("t", tmp_path)
    other = st.SideTuner(mlp_base())
    with pytest.raises(st.TaskError, match=f"{part}=module"):
        other.load_task(tmp_path)
    assert other.tasks == []
    given: dict[str, Any] = {part: own()}
    other.load_task(tmp_path, **given)
    assert torch.equal(other(inputs("mlp"), "t"), model(inputs("mlp"), "t"))


def test_a_task_is_two_files_without_the_base_or_pickle(tmp_path: Path) -> None:
    model = st.SideTuner(conv_base())
    model.add_task("t", side="fcn4", merge="mlp2", head=2)
    model.save_task("t", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["side.json", "side.safetensors"]
    tensors = load_file(tmp_path / "side.safetensors")
    assert tensors.keys() == model["t"].state_dict().keys()
    hidden = {v.numpy().tobytes() for v in network(model.base).state_dict().values() if v.ndim > 1}
    assert hidden and not hidden & {v.numpy().tobytes() for v in tensors.values()}


def test_saving_over_a_task_replaces_it(tmp_path: Path) -> None:
    model = saved(tmp_path)
    scrambled(model, "pets")
    model.save_task("pets", tmp_path)
    other = st.load(tmp_path, base=mlp_base())
    assert torch.equal(other(inputs("mlp"), "pets"), model(inputs("mlp"), "pets"))


def test_a_task_that_cannot_be_written_leaves_the_one_that_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    before = model(inputs("mlp"), "pets")
    model["pets"].config.merge[1]["start"] = np.float32(0.5)
    with pytest.raises(st.TaskError, match="cannot be saved"):
        model.save_task("pets", tmp_path)
    model["pets"].config.merge[1].clear()
    scrambled(model, "pets")
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        model.save_task("pets", tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write)
    assert torch.equal(st.load(tmp_path, base=mlp_base())(inputs("mlp"), "pets"), before)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["side.json", "side.safetensors"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_save_that_is_killed_leaves_the_old_task_or_the_new(tmp_path: Path, killed_at: int) -> None:
    model = saved(tmp_path)
    before = model(inputs("mlp"), "pets")
    scrambled(model, "pets")
    if os.fork() == 0:
        renames, replace = [], Path.replace

        def replace_or_die(self: Path, target: Path) -> Path:
            renames.append(target)
            if len(renames) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = replace_or_die  # type: ignore[assignment, method-assign]
        model.save_task("pets", tmp_path)
    os.wait()
    after = st.load(tmp_path, base=mlp_base())(inputs("mlp"), "pets")
    assert any(torch.equal(after, expected) for expected in (before, model(inputs("mlp"), "pets")))
    model.save_task("pets", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["side.json", "side.safetensors"]


def test_savers_and_readers_side_by_side_meet_whole_tasks(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = saved(tmp_path)
    scrambled(other, "pets")
    other.save_task("pets", tmp_path)
    known = [m(inputs("mlp"), "pets") for m in (model, other)]
    failures: list[BaseException] = []

    def save_often(saver: st.SideTuner) -> None:
        try:
            for _ in range(15):
                saver.save_task("pets", tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save_often, args=(saver,)) for saver in (model, other, model, other)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        out = st.load(tmp_path, base=model.base)(inputs("mlp"), "pets")
        assert any(torch.equal(out, expected) for expected in known)
    assert not failures
    assert sorted(f.name for f in tmp_path.iterdir()) == ["side.json", "side.safetensors"]


def test_labels_and_metrics_of_any_kind_come_back(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("digits", side="mlp", head=3, labels=range(3))  # type: ignore[arg-type]
    model.save_task("digits", tmp_path, metrics={"accuracy": torch.tensor(0.5)})  # type: ignore[dict-item]
    assert st.load(tmp_path, base=mlp_base())["digits"].labels == ["0", "1", "2"]
    with pytest.raises(st.TaskError, match="2 labels for 3 outputs"):
        model.add_task("pets", side="mlp", head=3, labels=["cat", "dog"])


def test_tasks_with_different_taps_live_on_one_base(tmp_path: Path) -> None:
    x, outputs = inputs("conv"), {}
    for name, side, taps in (("a", "ladder", ("0", "3")), ("b", "fusion", ("2", "4")), ("c", "ladder", ("4", "2"))):
        model = st.SideTuner(conv_base())
        model.add_task(name, side=side, head=2, taps=taps)
        scrambled(model, name)
        model.save_task(name, tmp_path / name)
        outputs[name] = model(x, name)
        assert list(model.base.tap_shapes) == list(taps) == list(model[name].taps)
    for base in (conv_base(), conv_base(("0",)), conv_base(("4", "3", "2", "0", "1"))):
        together = st.SideTuner(base)
        before = dict(base(x).taps)
        for name in ("c", "a", "b"):
            together.load_task(tmp_path / name)
        assert {"0", "2", "3", "4"} <= set(together.base.tap_shapes)
        assert all(torch.equal(together(x, name), out) for name, out in outputs.items())
        assert all(torch.equal(out, outputs[name]) for name, out in together.forward_all(x).items())
        assert base(x).taps.keys() == before.keys()  # the caller's base is as it was
    assert st.load(tmp_path, base=conv_base()).tasks == ["a", "b", "c"]


def test_a_side_without_the_taps_of_its_features_says_so() -> None:
    model = st.SideTuner(conv_base())
    model.add_task("a", side="ladder", head=2, taps=("2", "4"))
    with pytest.raises(st.ShapeError, match=r"reads the tap '2', which the features do not hold"):
        model(inputs("conv"), "a", features=conv_base()(inputs("conv")))
    with pytest.raises(st.TaskError, match="reads no taps"):
        model.add_task("b", side="fcn4", head=2, taps=("2",))
    with pytest.raises(st.UnknownNameError, match="tap"):
        model.add_task("b", side="ladder", head=2, taps=("nowhere",))
    assert model.tasks == ["a"]


def test_an_empty_module_is_a_part_too(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("a", side="mlp", head=nn.Sequential())
    model.save_task("a", tmp_path)
    other = st.SideTuner(mlp_base())
    other.load_task(tmp_path, head=nn.Sequential())
    assert torch.equal(other(inputs("mlp"), "a"), model(inputs("mlp"), "a"))
    saved(tmp_path / "linear")
    for part in ("side", "merge", "head"):
        module: dict[str, Any] = {part: nn.Sequential()}
        with pytest.raises(st.TaskError, match=f"leave {part}= out"):
            other.load_task(tmp_path / "linear", **module)
    assert other.tasks == ["a"]


def test_ten_tasks_hash_the_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = st.SideTuner(mlp_base())
    hashed: list[int] = []
    hash_weights = weights_sha256

    def counted(*given: Any) -> str:
        hashed.append(1)
        return hash_weights(*given)

    monkeypatch.setattr("sidetuning.base.weights_sha256", counted)
    for i in range(10):
        model.add_task(f"t{i}", side="mlp", head=2)
        model.save_task(f"t{i}", tmp_path / f"t{i}")
    assert len(st.load(tmp_path, base=model.base)) == 10 and len(hashed) == 1
    model.base.net[0].weight.data[0, 0] += 1  # type: ignore[index]  # goes round the version of the tensor
    with pytest.raises(st.ArtifactError, match="another base"):
        st.load(tmp_path, base=model.base)


LARGE: list[tuple[str, Any]] = [
    ("head", ["linear", {"outputs": 10**9}]),
    ("side", ["mlp", {"hidden": 10**9}]),
    ("side", ["mlp", {"hidden": 2**62}]),
    ("head", ["linear", {"outputs": 10**7}]),
]


@pytest.mark.parametrize(("part", "value"), LARGE)
def test_a_small_file_takes_little_memory_whatever_it_describes(part: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, lambda c: c["parts"].update({part: value}))
    refused(tmp_path, "take far more memory than its tensors|cannot be built|option of")


def test_a_billion_small_layers_end_soon() -> None:
    with pytest.raises(st.ArtifactError, match="far more memory"), checks.Sized({"w": torch.zeros(4)}):
        for _ in range(10**9):
            torch.nn.Linear(1, 1)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
@pytest.mark.parametrize("name", ["side.json", "side.safetensors"])
def test_a_task_is_read_from_files_alone(name: str, target: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / name).symlink_to(target)
    refused(tmp_path, rf"{name} is .*it is no file")


@pytest.mark.parametrize("lost", ["side.json", "side.safetensors"])
def test_a_model_folder_does_not_leave_out_a_task_that_lost_a_file(lost: str, tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    for name in ("pets", "cars"):
        model.add_task(name, side=None, merge="base-only", head=2)
        model.save_task(name, tmp_path / "tasks" / name)
    assert st.load(tmp_path).tasks == ["cars", "pets"]
    (tmp_path / "tasks/pets" / lost).unlink()
    with pytest.raises(st.ArtifactError, match=f"{lost} is missing"):
        st.load(tmp_path)


def test_a_task_that_was_taken_to_another_base_is_saved_with_that_one(tmp_path: Path) -> None:
    saved(tmp_path / "tasks" / "pets")
    base = mlp_base()
    with torch.no_grad():
        base.net[0].weight[0, 0] += 1e-3  # type: ignore[index]
    model = st.SideTuner(base)
    model.load_task(tmp_path / "tasks" / "pets", any_base=True)
    model.save(tmp_path)
    again = st.load(tmp_path, base=base)
    assert torch.equal(again(inputs("mlp"), "pets"), model(inputs("mlp"), "pets"))
    stamp = (tmp_path / "tasks/pets/side.json").stat().st_mtime_ns
    again.save(tmp_path)
    assert (tmp_path / "tasks/pets/side.json").stat().st_mtime_ns == stamp
