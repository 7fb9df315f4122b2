"""Groups of settings: flat names, the rules of their types, and what version 0.1.0 wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import tyro

from sidetuning.errors import SideTuningError
from sidetuning_bench.options import (
    BoostingOptions,
    Count,
    EWCOptions,
    ImageTraining,
    MethodOptions,
    Names,
    PSPOptions,
    RunOptions,
    SideTuneOptions,
    check,
    choice,
    flat,
    image_methods,
    translated,
    with_values,
)

METHODS = image_methods(SideTuneOptions(merge="alpha"), BoostingOptions(), EWCOptions())


@dataclass(frozen=True)
class Settings:
    """Settings of a scenario."""

    tasks: Names = ("a", "b")
    frames: tuple[Count, ...] = (1, 2)
    order: int | None = None
    method: Annotated[MethodOptions, choice(METHODS)] = METHODS["sidetune"]
    training: ImageTraining = field(default=ImageTraining(batch=16))
    run: RunOptions = field(default=RunOptions(out="runs/x"))


def parsed(*words: str) -> Settings:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
    return tyro.cli(Settings, args=list(words), config=config)


def test_settings_are_flat_on_the_command_line_and_in_files() -> None:
    given = flat(parsed("--batch", "4", "--side", "fcn5"))
    assert (given["method"], given["side"], given["merge"], given["batch"]) == ("sidetune", "fcn5", "alpha", 4)
    assert given["out"] == "runs/x" and "statistics" not in given
    for words in (("--batch", "4", "psp", "--statistics", "task"), ("psp", "--statistics", "task", "--batch", "4")):
        assert parsed(*words) == with_values(Settings(), {"method": PSPOptions("task"), "batch": 4})


def test_a_setting_of_another_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("psp", "--merge", "alpha")
    assert "sidetune" in capsys.readouterr().err
    with pytest.raises(TypeError, match="Settings has no setting merge, rank"):
        with_values(Settings(), {"method": PSPOptions(), "merge": "alpha", "rank": 8})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", 0, "--batch must be 1 or more, not 0"),
        ("lr", float("nan"), "--lr must be above 0, not nan"),
        ("weight_decay", -1.0, "--weight-decay must be 0 or more"),
        ("frames", (0, 4), "--frames must be 1 or more, not 0"),
        ("tasks", (), "--tasks must name something"),
        ("tasks", ("a", "a"), "--tasks must name something, and nothing twice"),
        ("side_width", 0.0, "--side-width must be above 0"),
        ("side_width", float("inf"), "--side-width must be a number between -2,147,483,648 and 2,147,483,648"),
        ("lr", float("inf"), "--lr must be a number between"),
        ("save_every", float("inf"), "--save-every must be a number between"),
        ("seed", 18446744073709551616, "--seed must be a number between"),
        ("seed", 2**31, "--seed must be a number between"),
        ("order", -(2**63), "--order must be a number between"),
        ("frames", (4, 10**400), "--frames must be a number between"),
        ("side_shift", -1, "--side-shift must be 0 or more, not -1"),
    ],
)
def test_values_that_break_a_rule_are_named(name: str, value: Any, message: str) -> None:
    check(Settings())
    with pytest.raises(SideTuningError, match=message):
        check(with_values(Settings(), {name: value}))


def test_settings_of_version_0_1_0_are_read_by_todays_names() -> None:
    saved = {"method": "psp", "psp_statistics": "task", "merge": "mlp2", "lora_rank": 8, "batch": 16}
    wanted = flat(with_values(Settings(), {"method": PSPOptions()}))
    assert translated(saved, wanted) == {"method": "psp", "statistics": "task", "batch": 16}
