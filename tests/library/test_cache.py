"""The feature cache: right features, no second base pass, and no half-written cache that is taken for a whole one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import sidetuning as st
from conftest import conv_base, map_base, mlp_base
from sidetuning import cache
from sidetuning.files import signed


class Calls:
    """Calls of an augmentation; what it closes over, or reads of its module, would be part of the cache's name."""

    count = 0


class Toy(Dataset[tuple[Tensor, int]]):
    """Vectors (12,) with labels i % 3; remembers what was read in bulk, and fails once at a row if asked."""

    def __init__(self, n: int = 10, fail_at: int | None = None) -> None:
        self.x = torch.rand(n, 12, generator=torch.Generator().manual_seed(0))
        self.read: list[int] = []
        self.fail_at = fail_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index % 3

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        if self.fail_at in rows:
            raise RuntimeError("killed")
        self.read += rows
        return [self[i] for i in rows]


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand(x.shape, generator=generator)


def fill(
    path: Path, base: st.Base | None = None, data: Dataset[Any] | None = None, **options: Any
) -> st.CachedFeatures:
    options = {"progress": False, "identity": "toy", **options}
    return st.cache_features(base or mlp_base(), Toy() if data is None else data, path, **options)


def test_two_lambdas_are_two_functions(tmp_path: Path) -> None:
    """All lambdas of a scope have one name; what they do is part of the key, and so is what a partial holds."""
    net = mlp_base().net
    outputs = [lambda out: out, lambda out: 2 * out]
    folders = [
        fill(tmp_path, base=st.Base(net, example=mlp_base().example, output=output)).folder  # type: ignore[arg-type]
        for output in (*outputs, outputs[1], partial(torch.mul, other=3))
    ]
    assert folders[1] == folders[2] and len(set(folders)) == 3
    assert torch.equal(st.CachedFeatures(folders[1])[0][1].out, 2 * st.CachedFeatures(folders[0])[0][1].out)
    assert st.CachedFeatures(folders[0]).seconds > 0


@pytest.fixture
def no_base_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def encode(*_: object) -> None:
            raise AssertionError("a base pass")

        monkeypatch.setattr(st.Base, "encode", encode)

    return forbid


@pytest.mark.parametrize("make", [mlp_base, conv_base, map_base])
def test_cached_features_are_the_bases(make: Callable[[], st.Base], tmp_path: Path) -> None:
    base = make()
    assert isinstance(base.example, torch.Tensor)
    x = torch.rand(9, *base.example.shape[1:], generator=torch.Generator().manual_seed(4))
    y = torch.arange(9)
    cached = st.cache_features(base, TensorDataset(x, y), tmp_path, progress=False, batch_size=4)
    got_x, features, got_y = cached.__getitems__(list(range(9)))
    assert torch.equal(got_x, x)
    assert torch.equal(got_y, y) and torch.equal(cached.labels, y)
    torch.testing.assert_close(features.out, base(x).out, rtol=1e-4, atol=1e-5)
    one_x, one, one_y = cached[3]
    assert torch.equal(one_x, x[3]) and torch.equal(one.out, features.out[3]) and int(one_y) == 3


def test_a_second_call_does_no_base_pass(tmp_path: Path, no_base_pass: Callable[[], None]) -> None:
    base, data = mlp_base(), Toy()
    first = fill(tmp_path, base, data)
    no_base_pass()
    second = fill(tmp_path, base, data)
    assert first.folder == second.folder and data.read == list(range(10))


def test_other_weights_data_type_or_views_get_another_folder(tmp_path: Path) -> None:
    other = mlp_base()
    with torch.no_grad():
        other.net[0].bias[0] += 1  # type: ignore[index]
    views = {"views": 2, "augment": noise}
    options: tuple[dict[str, Any], ...] = (
        {},
        {"base": other},
        {"identity": "else"},
        {"dtype": "float16"},
        views,
        {**views, "seed": 1},
    )
    folders = [fill(tmp_path, **given).folder for given in options]
    assert len(set(folders)) == len(folders)


def test_the_identity_of_data_is_its_content(tmp_path: Path) -> None:
    data, same, other = Toy(), Toy(), Toy()
    other.x[7, 3] += 1
    a, b, c = (fill(tmp_path, data=d, identity=None).folder for d in (data, same, other))
    assert a == b != c


def test_views_are_augmented_but_the_first_and_repeat_with_the_seed(tmp_path: Path) -> None:
    base, data = mlp_base(), Toy()
    one = fill(tmp_path / "a", base, data, views=3, augment=noise)
    two = fill(tmp_path / "b", base, data, views=3, augment=noise)
    seen = []
    for view in range(3):
        one.view = two.view = view
        x, features, y = one.__getitems__(list(range(10)))
        x2, features2, _ = two.__getitems__(list(range(10)))
        assert torch.equal(x, x2) and torch.equal(features.out, features2.out)
        torch.testing.assert_close(features.out, base(x).out)
        assert y.tolist() == [i % 3 for i in range(10)]
        seen.append(x)
    assert torch.equal(seen[0], data.x)
    assert not torch.equal(seen[1], data.x) and not torch.equal(seen[1], seen[2])
    other = fill(tmp_path / "a", base, data, views=3, augment=noise, seed=1)
    other.view = 1
    assert not torch.equal(other.__getitems__(list(range(10)))[0], seen[1])


def test_a_view_is_drawn_at_random_unless_named(tmp_path: Path) -> None:
    cached = fill(tmp_path, views=4, augment=noise)
    with st.seeded(0):
        draws = torch.stack([cached.__getitems__([5])[0] for _ in range(60)])
    assert len(draws.unique(dim=0)) == 4


def test_augment_without_views_is_refused(tmp_path: Path) -> None:
    with pytest.raises(st.CacheError, match="give views=2 or more, or leave augment= out"):
        fill(tmp_path, augment=noise)


FACTOR = {"now": 1.0}


class Scaled(nn.Module):
    """What it computes is in no weight, attribute or line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return FACTOR["now"] * self.linear(x)


def test_a_network_that_computes_something_else_with_equal_weights_has_a_cache_of_its_own(tmp_path: Path) -> None:
    net, data, folders = Scaled(), TensorDataset(torch.randn(5, 12), torch.arange(5)), []
    for factor in (1.0, 2.0, 1.0, 3.0, 2.0):
        FACTOR["now"] = factor
        base = st.Base(net, example=torch.zeros(1, 12))
        cached = st.cache_features(base, data, tmp_path, progress=False)
        assert torch.allclose(cached.__getitems__(range(5))[1].out, base(data.tensors[0]).out)
        folders.append(cached.folder)
    assert folders[0] == folders[2] and folders[1] == folders[4] and len(set(folders)) == 3


class Transformed(Dataset[Any]):
    """A common form of a data set: tensors, and what is done with them."""

    def __init__(self, shift: float) -> None:
        self.tensors, self.shift = (torch.arange(60.0).view(5, 12), torch.arange(5)), shift

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.tensors[0][row] + self.shift, self.tensors[1][row]


def test_what_a_data_set_does_with_its_tensors_counts(tmp_path: Path) -> None:
    first, other = (fill(tmp_path, data=Transformed(shift), identity=None) for shift in (0.0, 1.0))
    assert torch.equal(other[0][0], first[0][0] + 1)


def test_views_need_augment(tmp_path: Path) -> None:
    with pytest.raises(st.CacheError, match="augment="):
        fill(tmp_path, views=2)


@pytest.mark.parametrize("part", ["data set", "augment"])
def test_a_killed_writer_goes_on_without_reading_what_is_done(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.features, "CHUNK", 4)
    base, data = mlp_base(), Toy(10, fail_at=6 if part == "data set" else None)
    Calls.count = 0

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        Calls.count += 1
        if part == "augment" and Calls.count == 2:
            raise RuntimeError("killed")
        return noise(x, generator)

    options: dict[str, Any] = {"views": 2, "augment": augment, "batch_size": 2}
    with pytest.raises(RuntimeError, match="killed"):
        fill(tmp_path, base, data, **options)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(st.CacheError, match="no finished cache"):
        st.CachedFeatures(folder)
    data.read, data.fail_at = [], None
    cached = fill(tmp_path, base, data, **options)
    assert data.read == ([*range(4, 10), *range(10)] if part == "data set" else list(range(10)))
    whole = fill(tmp_path / "whole", base, Toy(), views=2, augment=noise, batch_size=2)
    for view in range(2):
        cached.view = whole.view = view
        a, b = cached.__getitems__(list(range(10))), whole.__getitems__(list(range(10)))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1].out, b[1].out) and torch.equal(a[2], b[2])


def test_several_processes_share_a_small_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a chunk, too; and one process goes on where several were killed."""
    shares = []
    for index in (1, 0):
        state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
        state.wait_for_everyone = lambda: None
        monkeypatch.setattr("sidetuning.cache.store.processes", lambda state=state: state)
        data = Toy(10)
        if index:
            # The other process has not written its share.
            with pytest.raises(FileNotFoundError):
                fill(tmp_path, data=data)
            shutil.copytree(tmp_path, tmp_path.with_name("half"))
        else:
            cached = fill(tmp_path, data=data)
        shares.append(set(data.read))
    assert shares[0] | shares[1] == set(range(10)) and not shares[0] & shares[1] and 4 <= len(shares[0]) <= 6
    monkeypatch.undo()
    halves, whole = fill(tmp_path.with_name("half"), data=Toy(10)), fill(tmp_path / "whole", data=Toy(10))
    for other in (halves, cached):
        torch.testing.assert_close(other.__getitems__(range(10))[1].out, whole.__getitems__(range(10))[1].out)


def test_a_folder_without_meta_is_no_cache(tmp_path: Path) -> None:
    folder = fill(tmp_path).folder
    (folder / "meta.json").unlink()
    with pytest.raises(st.CacheError, match=r"meta\.json is missing"):
        st.CachedFeatures(folder)


def test_a_full_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = Toy()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(st.CacheError, match="full"):
            fill(tmp_path, data=data)
    assert data.read == []
    assert len(fill(tmp_path, data=data)) == 10


def test_a_file_system_that_is_really_full(small_disk: Callable[[str], Path]) -> None:
    with pytest.raises(st.CacheError, match="full"):
        fill(small_disk("12k"))
    assert len(fill(small_disk("4m"))) == 10


def test_a_read_only_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(st.CacheError, match="cannot be written to"):
        fill(tmp_path)


@pytest.mark.parametrize(("views", "dtype"), [(1, "float32"), (3, "float32"), (2, "float16")])
def test_cache_bytes_is_what_the_fields_take(views: int, dtype: str, tmp_path: Path) -> None:
    base = mlp_base(("0",))
    cached = fill(tmp_path, base, views=views, augment=noise if views > 1 else None, dtype=dtype)
    on_disk = sum((cached.folder / name).stat().st_size for name in cached.fields)
    assert st.cache_bytes(base, Toy(), views, dtype) == on_disk > 0


def test_a_loader_gives_relabelled_rows_of_a_subset(tmp_path: Path) -> None:
    base = mlp_base()
    cached = fill(tmp_path, base)
    loader = st.loader_over(cached, batch_size=2, shuffle=True, indices=[1, 4, 7, 2, 5], relabel=lambda y: y - 1)
    batches = list(loader)
    assert [len(y) for _, _, y in batches] == [2, 2, 1] and len(loader) == 3
    for x, features, _ in batches:
        assert isinstance(features, st.Features)
        torch.testing.assert_close(features.out, base(x).out)
    rows = {tuple(x.tolist()): int(y) for xs, _, ys in batches for x, y in zip(xs, ys, strict=True)}
    assert rows == {tuple(Toy().x[i].tolist()): i % 3 - 1 for i in (1, 4, 7, 2, 5)}


def test_a_loader_leaves_a_small_last_batch_out(tmp_path: Path) -> None:
    # Of ten.
    cached = fill(tmp_path)
    sizes = {n: [len(y) for _, _, y in st.loader_over(cached, batch_size=n, drop_last=True)] for n in (4, 10, 11)}
    # But not the only one.
    assert sizes == {4: [4, 4], 10: [10], 11: [10]}


def test_a_loader_without_shuffling_keeps_the_order(tmp_path: Path) -> None:
    cached = fill(tmp_path)
    ordered = torch.cat([x for x, _, _ in st.loader_over(cached, batch_size=3, shuffle=False)])
    assert torch.equal(ordered, Toy().x)
    with st.seeded(0):
        shuffled = torch.cat([x for x, _, _ in st.loader_over(cached, batch_size=3)])
    assert not torch.equal(shuffled, ordered)


def test_taps_are_cached(tmp_path: Path) -> None:
    base = mlp_base(("0", "1"))
    cached = fill(tmp_path, base)
    x, features, _ = cached.__getitems__([8, 2])
    assert list(features.taps) == ["0", "1"]
    for name, tap in base(x).taps.items():
        torch.testing.assert_close(features.taps[name], tap)
    assert set(cached[0][1].taps) == {"0", "1"}


def test_half_precision_is_half_the_size_and_read_as_single(tmp_path: Path) -> None:
    base = mlp_base()
    cached = fill(tmp_path, base, dtype="float16")
    x, features, _ = cached.__getitems__(list(range(10)))
    assert (cached.folder / "out").stat().st_size == 10 * 16 * 2
    assert features.out.dtype == torch.float32
    torch.testing.assert_close(features.out, base(x).out, rtol=2e-3, atol=1e-3)
    assert not torch.equal(features.out, base(x).out)
    with pytest.raises(st.CacheError, match="float32 or float16"):
        fill(tmp_path, dtype="int8")


@pytest.mark.parametrize("field", ["x", "out", "y"])
def test_a_truncated_field_is_refused(field: str, tmp_path: Path) -> None:
    folder = fill(tmp_path).folder
    file = folder / field
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(st.CacheError, match="wrong size"):
        fill(tmp_path)
    file.unlink()
    with pytest.raises(st.CacheError, match="missing"):
        st.CachedFeatures(folder)


def test_cached_features_spare_every_base_pass(tmp_path: Path, no_base_pass: Callable[[], None]) -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("a", side="mlp", head=3)
    model.add_task("b", side="mlp", head=2, laterals=["a"])
    cached = fill(tmp_path, model.base)
    x, features, y = cached.__getitems__(list(range(10)))
    expected = model.forward_all(x)
    no_base_pass()
    for name, output in model.forward_all(x, features=features).items():
        torch.testing.assert_close(output, expected[name])
    st.fit(model, "b", [(x, features, y.remainder(2))], steps=1, progress=False)
    with pytest.raises(AssertionError, match="a base pass"):
        model.forward_all(x)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (({"ids": torch.arange(3)}, 0), "one tensor, not a dict.*cache_tokens"),
        (({"ids": 1}, {"ids": 1}, 0), r"samples \(x, y\), and the first is a tuple"),
        ({"image": torch.zeros(12), "label": 0}, r"a mapping \(image, label\)"),
        ((torch.zeros(12), "cat"), "numbers, not a str"),
        (torch.zeros(12), "the first is a Tensor"),
    ],
)
def test_samples_that_cannot_be_kept_are_refused_in_a_sentence(tmp_path: Path, sample: Any, said: str) -> None:
    class Others(Toy):
        def __getitem__(self, index: int) -> Any:
            return sample

    with pytest.raises(st.ShapeError, match=said):
        fill(tmp_path, data=Others())


def test_an_empty_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(st.DataError, match="empty"):
        st.cache_features(mlp_base(), torch.utils.data.TensorDataset(torch.zeros(0, 12), torch.zeros(0)), tmp_path)


def test_a_cache_of_version_0_1_0_is_not_taken_for_one_of_a_base_that_is_channels_last(tmp_path: Path) -> None:
    """Version 0.1.0 gave both the same name, and vectors are the same either way: the folder would be found."""
    folder = Path(__file__).parents[1] / "legacy/0.1.0/caches/vectors-named"
    shutil.copytree(folder, tmp_path / "caches")
    expected, key = load_file(folder / "expected.safetensors"), json.loads((folder / "about.json").read_text())["key"]
    data, base = TensorDataset(expected["data.x"], expected["data.y"]), mlp_base()
    last = st.Base(base.net, example=base.example, channels_last=True)
    found = [fill(tmp_path / "caches", each, data, identity="ten vectors").folder.name for each in (base, last)]
    assert found[0] == key != found[1]


def test_views_of_another_type_are_refused(tmp_path: Path) -> None:
    images = TensorDataset(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6))

    def share(x: Tensor, generator: torch.Generator) -> Tensor:
        return (x.float() / 255).flip(-1)

    with pytest.raises(st.ShapeError, match=r"'x' of sample .* is float32, that of the first one uint8"):
        st.cache_features(conv_base(), images, tmp_path, views=2, augment=share, progress=False)


def flipped(file: Path, at: int = 5) -> None:
    """One bit of a file is another."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["x", "y", "out", "sum.out", "sum.y"])
def test_a_changed_bit_is_found_when_its_row_is_read(tmp_path: Path, name: str) -> None:
    cached = fill(tmp_path)
    last = cached[9][1].out
    flipped(cached.folder / name)
    again = st.CachedFeatures(cached.folder)
    # Rows that nobody touched are read.
    assert torch.equal(again[9][1].out, last)
    with pytest.raises(st.CacheError, match="was changed since it was written"):
        again[0]


def test_rows_that_changed_places_are_found(tmp_path: Path) -> None:
    cached = fill(tmp_path)
    file = cached.folder / "y"
    data = file.read_bytes()
    file.write_bytes(data[8:16] + data[:8] + data[16:])
    with pytest.raises(st.CacheError, match="was changed"):
        print(st.CachedFeatures(cached.folder).labels)


@pytest.mark.parametrize("change", [{"dtype": "O"}, {"shape": [-1]}, {"shape": [2**70]}, {"shape": "x"}])
def test_a_cache_of_a_stranger_names_numbers_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    file = fill(tmp_path).folder / "meta.json"
    content = json.loads(file.read_text())
    content["fields"]["x"].update(change)
    file.write_text(json.dumps(signed(content)))
    with pytest.raises(st.CacheError, match=r"meta\.json"):
        st.CachedFeatures(file.parent)


def begun(tmp_path: Path) -> Path:
    """The folder of a cache of which all rows are written, and which is not finished."""
    folder = fill(tmp_path).folder
    (folder / "meta.json").unlink()
    return folder


@pytest.mark.parametrize("lost", ["out", "sum.out", "x", "done/0-0"])
def test_rows_of_a_lost_file_are_computed_again(tmp_path: Path, lost: str) -> None:
    (begun(tmp_path) / lost).unlink()
    cached = fill(tmp_path)
    assert torch.equal(cached.__getitems__(range(10))[1].out, mlp_base()(Toy().x).out)


@pytest.mark.parametrize("name", ["out", "sum.x", "done/0-0"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    other, folder = tmp_path / "other", begun(tmp_path / "caches")
    other.write_text("precious")
    (folder / name).unlink()
    (folder / name).symlink_to(other)
    cached = fill(tmp_path / "caches")
    assert other.read_text() == "precious"
    assert torch.equal(cached.__getitems__(range(10))[1].out, mlp_base()(Toy().x).out)


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    cached = fill(tmp_path)
    os.truncate(cached.folder / "out", 10)
    with pytest.raises(st.CacheError, match="was cut"):
        cached[9]


def test_a_probe_that_tells_nothing_names_no_cache(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(5, 12), torch.arange(5))
    base = st.Base(lambda x: x.masked_fill(x > 0, float("inf"))[:, :0].sum(1, keepdim=True), example=torch.ones(1, 12))
    folders = {st.cache_features(base, data, tmp_path, progress=False).folder for _ in range(3)}
    assert len(folders) == 1


def test_the_probe_outlives_a_folder_that_is_begun_anew(tmp_path: Path) -> None:
    folder = fill(tmp_path).folder
    (folder / "meta.json").unlink()
    (folder / "link").symlink_to(tmp_path)
    assert fill(tmp_path).folder == folder and (folder / "probe.json").is_file()


class Targets(Toy):
    """Targets as Python writes them."""

    def __init__(self, target: Callable[[int], Any]) -> None:
        super().__init__()
        self.target = target

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.x[index], self.target(index)


@pytest.mark.parametrize("target", [lambda i: 0.5 * i, lambda i: [1.0 * i, 2.0], lambda i: (i, 2), lambda i: i > 4])
def test_targets_are_numbers_of_any_kind(target: Callable[[int], Any], tmp_path: Path) -> None:
    labels = fill(tmp_path, data=Targets(target), identity=None).labels
    assert labels.tolist() == [list(t) if isinstance(t := target(i), tuple) else t for i in range(10)]


def test_a_slice_is_a_batch(tmp_path: Path) -> None:
    cached = fill(tmp_path)
    x, features, y = cached[2:5]
    assert torch.equal(x, cached.__getitems__([2, 3, 4])[0]) and len(features.out) == len(y) == 3


@pytest.mark.parametrize("indices", [[], [10], [-11], torch.ones(10, dtype=torch.bool)])
def test_a_loader_over_rows_that_are_none_is_refused(indices: Any, tmp_path: Path) -> None:
    with pytest.raises(st.DataError, match="indices= are numbers"):
        cache.loader_over(fill(tmp_path), indices=indices)


def test_features_of_a_base_in_64_bits_are_kept_in_64_bits(tmp_path: Path) -> None:
    base = mlp_base().to(torch.float64)
    with pytest.raises(st.CacheError, match="kept as float64, not float32; give dtype="):
        fill(tmp_path, base)
    cached = fill(tmp_path, base, dtype="float64")
    x, features, _ = cached.__getitems__([0, 1])
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=2)
    torch.testing.assert_close(model(x, "t", features=features), model(x, "t"), rtol=1e-12, atol=1e-12)
