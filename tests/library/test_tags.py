"""Entities that tags mark, as CoNLL-2000's script finds them, and the F1 of what is found."""

from __future__ import annotations

import pytest
import torch

import sidetuning as st
from conftest import sequence_base
from sidetuning.tags import SCORE, are_tags, entities, entity_counts, entity_f1

FOUND = [
    ("O B-PER I-PER O B-LOC", {(1, 3, "PER"), (4, 5, "LOC")}),
    ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
    # Without a B, as in CoNLL-2003's first files: a new kind begins.
    ("I-PER I-PER I-LOC O I-LOC", {(0, 2, "PER"), (2, 3, "LOC"), (4, 5, "LOC")}),
    ("S-PER S-PER E-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
    ("B-PER I-PER E-PER I-PER U-LOC L-LOC", {(0, 3, "PER"), (3, 4, "PER"), (4, 5, "LOC"), (5, 6, "LOC")}),
    ("B-a-b I-a-b", {(0, 2, "a-b")}),
    ("O O", set()),
    ("", set()),
]


@pytest.mark.parametrize(("tags", "found"), FOUND)
def test_entities_are_read_as_the_script_of_conll_does(tags: str, found: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == found


@pytest.mark.parametrize("names", [["B-PER", "I-PER", "O"], ["O", "S-x"], ["O", "B-a", "L-a", "U-a"]])
def test_tags_are_told_by_their_names(names: list[str]) -> None:
    assert are_tags(names)


@pytest.mark.parametrize(
    "names", [[], ["O"], ["NOUN", "VERB"], ["B-PER", "I-PER"], ["O", "B-PER", "other"], ["O", "B-"]]
)
def test_other_classes_are_no_tags(names: list[str]) -> None:
    assert not are_tags(names)


def test_f1_counts_whole_entities() -> None:
    counts = entity_counts(["B-a", "I-a", "O", "B-b"], ["B-a", "I-a", "I-a", "B-b"])
    assert counts == (1, 2, 2) and entity_f1([counts]) == 0.5 and entity_f1([(0, 0, 0)]) == 0


def test_evaluate_scores_entities_whatever_the_batches_and_the_padding() -> None:
    model, names = st.SideTuner(sequence_base()), ["O", "B-a", "I-a"]
    model.add_task("t", side=None, merge="base-only", head="tokens", head_options={"outputs": 3}, labels=names)
    generator = torch.Generator().manual_seed(0)
    x = {"input_ids": torch.randint(0, 50, (8, 6), generator=generator), "attention_mask": torch.ones(8, 6).long()}
    y = torch.randint(0, 3, (8, 6), generator=generator)
    y[:, ::2], y[3] = -100, -100
    said = model(x, "t").argmax(-1)
    pairs = [([names[k] for k in a[b >= 0]], [names[k] for k in b[b >= 0]]) for a, b in zip(said, y)]
    expected = entity_f1([entity_counts(*pair) for pair in pairs])
    whole = st.evaluate(model, "t", [(x, y)])
    parts = [({key: value[i : i + 3] for key, value in x.items()}, y[i : i + 3]) for i in (0, 3, 6)]
    assert 0 < expected < 1 and whole[SCORE] == pytest.approx(expected)
    assert st.evaluate(model, "t", parts) == pytest.approx(whole)
    assert set(whole) == {"loss", "samples", "accuracy", SCORE}
    model["t"].labels = ["x", "y", "z"]
    assert SCORE not in st.evaluate(model, "t", [(x, y)])


def test_labels_are_one_for_each_output() -> None:
    with pytest.raises(st.TaskError, match="2 labels for 3 outputs"):
        options = {"head": "tokens", "head_options": {"outputs": 3}, "labels": ["a", "b"]}
        st.SideTuner(sequence_base()).add_task("t", side=None, merge="base-only", **options)  # type: ignore[arg-type]
