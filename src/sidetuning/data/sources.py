"""From what a user names to columns: folders of images by class by our own reader, tables by the library datasets."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidetuning.data.rows import Cells
from sidetuning.data.tables import KINDS, SPLITS, files_of, read, split_of
from sidetuning.errors import DataError
from sidetuning.images import class_folders, hidden, image_endings, image_folder

IMAGES = ("image", "img", "file", "file_name", "filename", "image_path", "filepath", "path", "photo", "picture")
PAIRS: tuple[tuple[str, str], ...] = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
)
PAIRS += (("question", "sentence"), ("question", "passage"), ("query", "document"))
TEXTS = ("text", "sentence", "content", "review", "comment", "body", "message", "question", "title", "document")
LABELS: tuple[str, ...] = ("label", "labels", "class", "fine_label", "category", "target", "targets", "y", "answer")
WORDS = ("tokens", "words")
LABELS += ("score", "rating", "ner_tags", "tags", "pos_tags", "chunk_tags")


@dataclass
class Opened:
    """A source whose columns are known.

    Attributes:
        sources: by split, what the transform takes; None where a row has nothing.
        answers: by split, a list for each label column.
        places: by split, how each row is called.
        kind: "image" or "text".
        words: the texts are lists of words.
        labels: names of the label columns.
        classes: names of the classes where the source tells them.
        notes, skipped: what was guessed, and by split what was left out already, with its count.
        csv: it is a table of texts, in which some words stand for empty cells.
        columns: the columns of a table as `data.load` takes them: "image", "text" and "label".
    """

    sources: dict[str, Sequence[Any]]
    answers: dict[str, list[list[Any]]]
    places: dict[str, Sequence[str]]
    kind: str
    words: bool = False
    labels: tuple[str, ...] = ("class",)
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    csv: bool = False
    columns: dict[str, Any] = field(default_factory=dict)


def open_source(
    source: str | Path,
    image: str | None,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    revision: str | None,
    configuration: str | None,
    problem: str | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Opened:
    """Find out what a source is, and its columns; arguments as of `data.load`."""
    path = Path(source).expanduser()
    saved = [path / name for name in ("dataset_dict.json", "state.json") if (path / name).is_file()]
    if path.is_dir() and not saved:
        roots = _split_folders(path)
        folder_of_images = any(_holds_images(root) for root in roots.values())
        if folder_of_images:
            if image or texts or labels or revision or configuration or problem == "tokens":
                raise DataError(f"{source} is a folder of images by class, which has no columns; leave them out")
            return _images_by_class(roots)
    kind, notes, folders = "", list[str](), dict[str, Path]()
    with _quiet(str(source)) as datasets:
        if saved:
            tables = datasets.load_from_disk(str(path))
        elif path.exists():
            kind, files = files_of(path, notes)
            folders = {split: some[0].parent for split, some in files.items() if len({f.parent for f in some}) == 1}
            tables = {split: read(datasets, kind, some) for split, some in files.items()}
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) and path.suffix.lower() not in KINDS:
            tables = datasets.load_dataset(str(source), configuration, revision=revision)
        else:
            raise DataError(f"{source} does not exist; give a folder of images by class, a table, or a Hub name")
        tables = tables if isinstance(tables, Mapping) else {"train": tables}
        known = _named_splits(tables, str(source))
        opened = _columns(datasets, known, path, folders, image, texts, labels, problem, usual or {})
        opened.csv, opened.notes = kind == "csv", [*notes, *opened.notes]
        if left := [str(name) for name, table in tables.items() if all(table is not one for one in known.values())]:
            opened.notes.append(f"left out: the splits {', '.join(left)}, which are not train, validation or test")
        return opened


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of splits, where there is one of "train"; else the folder itself as "train".

    Raises:
        DataError: two folders of one split, or folders of classes beside those of splits.
    """
    inner = {f.name: f for f in sorted(path.iterdir()) if f.is_dir() and not hidden(f.name)}
    found = {split_of(name): folder for name, folder in inner.items() if split_of(name)}
    # A class may be called "train": its folder holds no folders of images.
    if "train" not in found or (any(not split_of(n) for n in inner) and not _holds_images(found["train"])):
        return {"train": path}
    others = {name: folder for name, folder in inner.items() if folder not in found.values()}
    if more := [name for name, folder in others.items() if _holds_any_image(folder)]:
        raise DataError(
            f"{path} has the folders of splits {', '.join(f.name for f in found.values())}, and also "
            f"{', '.join(more[:5])}{', …' * (len(more) > 5)}; move these elsewhere, since they are of no split"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _holds_images(root: Path) -> bool:
    folders = [folder for paths in class_folders(root).values() for folder in paths]
    return any(map(_holds_any_image, folders))


def _holds_any_image(folder: Path) -> bool:
    return any(file.suffix.lower() in image_endings() for file in folder.rglob("*"))


def _images_by_class(roots: Mapping[str, Path]) -> Opened:
    every = {split: image_folder(root) for split, root in roots.items()}
    names = sorted({name for found in every.values() for name in found.names})
    opened = Opened({}, {}, {}, "image", classes=names)
    for split, found in every.items():
        opened.sources[split] = found.files
        opened.answers[split] = [[found.names[label] for label in found.labels]]
        opened.places[split] = [str(file.relative_to(roots[split])) for file in found.files]
        opened.skipped[split] = Counter(found.skipped)
    return opened


@contextlib.contextmanager
def _quiet(source: str) -> Iterator[Any]:
    """The library datasets without its bars and warnings; what it raises becomes one sentence."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("tables and data sets of the Hub need datasets: pip install 'sidetuning[data]'") from error
    from huggingface_hub.utils import logging as hub

    bars, level, hub_level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity(), hub.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    # It would tell of every attempt to reach the Hub.
    hub.set_verbosity_error()
    try:
        yield datasets
    except (DataError, ImportError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        told = str(cause).partition("\n")[0][:200]
        raise DataError(
            f"{source} cannot be read ({type(cause).__name__}: {told}); check the name, the network and the format, or "
            "give a folder of images by class, a CSV, Parquet or JSON Lines file, or a Hub name"
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            datasets.enable_progress_bars()


def _named_splits(tables: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Tables by our names of splits; others are left out where there is a "train"."""
    # Of "dev" and "validation" the one with our name.
    names = sorted(map(str, tables), key=lambda name: name in SPLITS)
    known = {split_of(name): tables[name] for name in names if split_of(name)}
    if "train" not in known:
        if len(tables) != 1:
            raise DataError(f"{source} has the splits {', '.join(map(str, tables))}; one of them must be called train")
        known = {"train": next(iter(tables.values()))}
    return {split: known[split] for split in SPLITS if split in known}


def _columns(
    datasets: Any,
    tables: dict[str, Any],
    path: Path,
    folders: Mapping[str, Path],
    image: str | None,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    problem: str | None,
    usual: Mapping[str, Any],
) -> Opened:
    """Choose the columns of tables, and read them; files of images lie in the `folders` of the splits, or in `path`."""
    first = tables["train"]
    for column in (*([image] if image else []), *texts, *labels):
        if column not in first.column_names:
            raise DataError(f"{path} has no column '{column}'; it has {', '.join(first.column_names)}")
    notes = []
    given = bool(image or texts)
    lists = {key: (names,) if isinstance(names, str) else tuple(names or ()) for key, names in usual.items()}
    usual = {key: names for key, names in lists.items() if {*names} <= {*first.column_names}}
    if not labels:
        labels = usual.get("label") or (_label_column(datasets, first, {image, *texts}),)
        notes.append(f"the answers are taken from {_quoted(labels)} (--label)")
    if not given:
        image = next(iter(usual.get("image", ())), None)
        texts = () if image else usual.get("text") or _words_column(first, labels, problem)
        image = image if image or texts else _image_column(datasets, first, labels, path)
        texts = texts if image or texts else _text_columns(first, labels)
        what, option, columns = ("images", "--image", (image,)) if image else ("texts", "--text", texts)
        notes.append(f"{what} are taken from {_quoted(columns)} ({option})")
    words = len(texts) == 1 and _holds_words(first, texts[0])
    if problem is not None and words != (problem == "tokens"):
        mend = "give texts, or --problem tokens" if words else "give JSON Lines or Parquet; CSV cannot hold lists"
        raise DataError(f"{_quoted(texts or (image,))} holds {'' if words else 'no '}lists of words; {mend}")
    if words and len(labels) > 1:
        raise DataError(f"the classes of words are one column of lists, and --label names {len(labels)}")
    # What class numbers are called.
    inner = getattr(first.features[labels[0]], "feature", first.features[labels[0]])
    classes = list(inner.names) if isinstance(inner, datasets.ClassLabel) and len(labels) == 1 else None
    opened = Opened({}, {}, {}, "image" if image else "text", words, labels, classes, notes)
    opened.columns = {"image": image, "text": list(texts), "label": list(labels)}
    for split, table in tables.items():
        if lost := [name for name in (image, *texts, *labels) if name and name not in table.column_names]:
            raise DataError(f"{path}: {split} has no column '{lost[0]}', which train has; give only files that have it")
        opened.answers[split] = [table[column][:] for column in labels]
        if classes is not None:
            opened.answers[split] = [[_class_names(value, classes) for value in opened.answers[split][0]]]
        folder = folders.get(split, path)
        opened.sources[split] = _images(datasets, table, image, folder) if image else _texts(table, texts)
        opened.places[split] = [f"row {i + 1} of {split}" for i in range(len(table))]
    return opened


def _class_names(value: Any, classes: list[str]) -> Any:
    """The name of a class number, or those of a list of them; numbers below 0 stand for no label."""
    if isinstance(value, (list, tuple)):
        return [_class_names(k, classes) for k in value]
    return classes[value] if value is not None and value >= 0 else None


def _quoted(names: Sequence[str | None]) -> str:
    return f"the column{'s' * (len(names) > 1)} " + " and ".join(f"'{name}'" for name in names)


def _label_column(datasets: Any, table: Any, taken: set[str | None]) -> str:
    names = [name for name in table.column_names if name not in taken]
    by_name = [name for wanted in LABELS for name in names if name.lower() == wanted]
    marked = [name for name in names if isinstance(table.features[name], datasets.ClassLabel)]
    if found := [*by_name, *marked]:
        return str(found[0])
    raise DataError(f"no column is called label; name it with --label, one of {', '.join(table.column_names)}")


def _image_column(datasets: Any, table: Any, labels: tuple[str, ...], path: Path) -> str | None:
    names = [name for name in table.column_names if name not in labels]
    if marked := [name for name in names if isinstance(table.features[name], datasets.Image)]:
        return str(marked[0])
    for name in [name for wanted in IMAGES for name in names if name.lower() == wanted]:
        value = next((cell for cell in table[name][:100] if cell), None)
        if isinstance(value, dict) and "bytes" in value:
            return str(name)
        if isinstance(value, (bytes, str)):
            ending = Path(value).suffix.lower() if isinstance(value, str) else ""
            if isinstance(value, bytes) or ending in image_endings():
                return str(name)
    return None


def _holds_words(table: Any, column: str) -> bool:
    inner = getattr(table.features[column], "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _words_column(table: Any, labels: tuple[str, ...], problem: str | None) -> tuple[str, ...]:
    """The column of lists of words, beside one of answers whose lists are mostly as long; none where there is none."""
    names = [name for name in table.column_names if name not in labels and _holds_words(table, name)]
    for name in sorted(names, key=lambda name: name.lower() not in WORDS) if problem in (None, "tokens") else ():
        rows = [pair for pair in zip(table[name][:100], table[labels[0]][:100]) if isinstance(pair[1], list)]
        if problem or 2 * sum(len(words or ()) == len(answers) for words, answers in rows) > len(rows):
            return (name,)
    return ()


def _text_columns(table: Any, labels: tuple[str, ...]) -> tuple[str, ...]:
    types = {name: getattr(table.features[name], "dtype", "") for name in table.column_names}
    names = {n.lower(): n for n in types if n not in labels and types[n] in ("string", "large_string")}
    for pair in PAIRS:
        if all(name in names for name in pair):
            return tuple(names[name] for name in pair)
    by_name = [names[wanted] for wanted in TEXTS if wanted in names]
    if not (found := by_name or list(names.values())):
        raise DataError(f"no column holds images or texts ({', '.join(types)}); name it with --image or --text")
    if not by_name and len(found) > 1:
        raise DataError(f"several columns hold texts ({', '.join(found)}); name one with --text")
    return (found[0],)


def _texts(table: Any, columns: tuple[str, ...]) -> list[Any]:
    """Texts, pairs of them, or lists of words; None where a part is missing or empty."""
    read = [table[column][:] for column in columns]
    if _holds_words(table, columns[0]):
        return [row if row and None not in row and "".join(row).strip() else None for row in read[0]]
    rows = zip(*read)
    whole = [row if all(isinstance(part, str) and part.strip() for part in row) else None for row in rows]
    return [row if row is None or len(columns) > 1 else row[0] for row in whole]


def _images(datasets: Any, table: Any, column: str, folder: Path) -> Sequence[Any]:
    """Images that lie in the table, read when asked for, or the paths of files; None where there is none."""
    if isinstance(table.features[column], datasets.Image):
        return Cells(table.cast_column(column, datasets.Image(decode=False)), column, folder)
    cells = table[column][:]
    if not any(isinstance(cell, str) for cell in cells):
        return Cells(table, column, folder)
    return [folder / cell if isinstance(cell, str) and cell else None for cell in cells]
