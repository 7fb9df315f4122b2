"""The two wheels hold what they should, and the library runs with its six dependencies and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sidetuning import __version__

ROOT = Path(__file__).parents[2]
DEPENDENCIES = {"torch", "numpy", "safetensors", "huggingface-hub", "accelerate", "tqdm"}
MEGABYTE = 1_000_000

# What the library must do alone; the bench, timm, pillow, tyro and all else cannot be imported there.
ALONE = """
import importlib.util, subprocess, sys
import torch, sidetuning as st

absent = ("sidetuning_bench", "timm", "transformers", "onnxruntime", "PIL", "tyro", "pyarrow", "pandas", "pytest")
assert not [n for n in absent if importlib.util.find_spec(n)], [n for n in absent if importlib.util.find_spec(n)]
torch.set_num_threads(1)
base = st.load_base("resnet44-cifar10")
assert st.BASES.names() == ["resnet44-cifar10"]
model = st.SideTuner(base)
model.add_task("pets", side="fcn4", head=3, init="distilled")
model.add_task("cars", side="mlp", merge="mlp2", head=2, laterals=["pets"])
x, y = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
before = model(x, "pets")
cached = st.cache_features(base, torch.utils.data.TensorDataset(x, y), "cache")
st.fit(model, "cars", st.loader_over(cached, batch_size=4), epochs=1, progress=False)
assert torch.equal(model(x, "pets"), before)
assert st.evaluate(model, "cars", [(x, y)])["samples"] == 8
model.save_task("pets", "out")
assert torch.equal(st.load("out")(x, "pets"), before)
try:
    st.load_base("timm:resnet18")
    raise AssertionError("timm is not here")
except ImportError as error:
    assert "sidetuning[timm]" in str(error), error
command = [sys.executable, "-c", "from sidetuning.cli import main; main(['parts'])"]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode and "sidetuning[cli]" in done.stderr and "Traceback" not in done.stderr, done.stderr
print("alone")
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """Both wheels, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheels")
    found = {}
    for project in (ROOT, ROOT / "bench"):
        out = folder / project.name
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(project)]
        subprocess.run(command, check=True, capture_output=True)
        (file,) = out.iterdir()
        found[file.name.partition("-")[0]] = zipfile.ZipFile(file)
    return found


def contents(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def sources(folder: Path) -> set[str]:
    """The files of a package in this checkout."""
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return {file.relative_to(folder.parent).as_posix() for file in files}


def size(wheel: zipfile.ZipFile) -> int:
    return Path(str(wheel.filename)).stat().st_size


def required(wheel: zipfile.ZipFile) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = HeaderParser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist", [])
    return [Requirement(line) for line in lines]


def names(requirements: list[Requirement]) -> set[str]:
    """The distributions that an installation without extras brings."""
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {canonicalize_name(r.name) for r in needed}


def test_the_library_is_small_and_needs_six_packages(wheels: dict[str, zipfile.ZipFile]) -> None:
    wheel = wheels["sidetuning"]
    assert contents(wheel) == sources(ROOT / "src/sidetuning")
    assert {Path(name).suffix for name in contents(wheel)} == {".py", ".typed", ".safetensors", ".md", ".html", ".j2"}
    assert size(wheel) <= 3 * MEGABYTE
    assert names(required(wheel)) == DEPENDENCIES
    # The README, which METADATA repeats, is the page of both packages.
    texts = {name: wheel.read(name).lower() for name in wheel.namelist() if not name.endswith("/METADATA")}
    assert not [name for name, text in texts.items() if b"doom" in text or "doom" in name]


def test_the_bench_holds_its_package_and_needs_the_library(wheels: dict[str, zipfile.ZipFile]) -> None:
    wheel = wheels["sidetuning_bench"]
    assert contents(wheel) == sources(ROOT / "bench/src/sidetuning_bench")
    assert size(wheel) <= 8 * MEGABYTE
    needed = names(required(wheel))
    assert "sidetuning" in needed and "vizdoom" not in needed and "stable-baselines3" not in needed


def test_both_wheels_hold_their_licences_and_a_page_that_renders(wheels: dict[str, zipfile.ZipFile]) -> None:
    for name, weights in (("sidetuning", "bases"), ("sidetuning_bench", "dense/weights")):
        files = {path.partition(".dist-info/licenses/")[2] for path in wheels[name].namelist()}
        assert {"LICENSE", f"src/{name}/{weights}/LICENSE.md"} <= files
        files = contents(wheels[name])
        folders = {path.rpartition("/")[0] for path in files if path.endswith(".safetensors")}
        assert folders and all(f"{folder}/LICENSE.md" in files for folder in folders)
        command = [sys.executable, "-m", "twine", "check", "--strict", str(wheels[name].filename)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_sources_that_are_published_hold_a_package_alone(tmp_path: Path) -> None:
    for project in (ROOT, ROOT / "bench"):
        out = tmp_path / project.name
        command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(project)]
        subprocess.run(command, check=True, capture_output=True)
        (file,) = out.iterdir()
        with tarfile.open(file) as archive:
            tops = {Path(name).parts[1] for name in archive.getnames()}
        assert {"src", "README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= tops
        assert not tops & {"tests", "docs", "records", "bench", "examples"}


def with_requirements(wanted: set[str]) -> set[str]:
    """The distributions in `wanted` and all that they need, as they are installed here."""
    found: set[str] = set()
    waiting = set(wanted)
    while waiting:
        name = waiting.pop()
        found.add(name)
        requirements = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        waiting |= names(requirements) - found
    return found


def test_the_version_is_written_once_and_has_its_changes(wheels: dict[str, zipfile.ZipFile]) -> None:
    assert {Path(str(wheel.filename)).name.split("-")[1] for wheel in wheels.values()} == {__version__}
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] in (__version__, "Unreleased")


def in_a_clean_environment(wheels: list[zipfile.ZipFile], needed: set[str], folder: Path, *arguments: str) -> str:
    """Install wheels and what they need, as it is here, in a new environment; return what its Python prints there."""
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    for wheel in wheels:
        wheel.extractall(packages)
    for name in with_requirements(needed):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    command = [str(folder / "venv/bin/python"), "-I", "-W", "error", *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_the_library_runs_where_nothing_else_is_installed(wheels: dict[str, zipfile.ZipFile], tmp_path: Path) -> None:
    wheel = wheels["sidetuning"]
    assert in_a_clean_environment([wheel], names(required(wheel)), tmp_path, "-c", ALONE).endswith("alone\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_both_packages_run_together_where_they_are_installed(
    wheels: dict[str, zipfile.ZipFile], tmp_path: Path
) -> None:
    both = [wheels["sidetuning"], wheels["sidetuning_bench"]]
    # Those of the extra `cli`, which the bench asks for.
    needed = set().union(*(names(required(wheel)) for wheel in both)) - {"sidetuning"} | {"tyro", "rich", "pillow"}
    arguments = ("-m", "sidetuning", "bench", "icifar", "psp", "--help")
    assert "--statistics {batch,task}" in in_a_clean_environment(both, needed, tmp_path, *arguments)
