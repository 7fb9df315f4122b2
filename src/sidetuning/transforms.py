"""From a file, an image or a text to what a base takes: its own preprocessing, which is recorded with a task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.errors import ArtifactError, DataError
from sidetuning.files import check_json
from sidetuning.images import MOST_PIXELS, open_image

if TYPE_CHECKING:
    from PIL import Image

# Tags of TIFF: bits of a sample, and what 0 means.
BITS, PHOTOMETRIC = 258, 262
Crop = Literal["squash", "border", "center"]
CROPS: tuple[Crop, ...] = get_args(Crop)
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Tokens of a text that are read where the network would take more.
MOST_TOKENS = 512
# Thai, Lao, Burmese, Khmer, Japanese and Chinese: scripts without spaces between words.
UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
# What stands between spaces in a text, and each mark at its ends.
MARK = r"[!-#%-*,-/:;?@\[-\]_{}\u00a1\u00a7\u00ab\u00b6\u00b7\u00bb\u00bf\u2010-\u2027\u2030-\u205e]"
WORD = rf"{MARK}|(?!{MARK})\S(?:\S*(?!{MARK})\S)?"


class Transform(Protocol):
    """Turns one source into one sample, without the batch dimension."""

    def __call__(self, source: Any) -> Any: ...

    def batch(self, sources: Sequence[Any]) -> Any:
        """Turn sources into a batch as the base takes it.

        Raises:
            DataError: a source that cannot be read; the message names it.
        """

    def is_one(self, source: Any) -> bool:
        """Whether `source` is one sample, and no list of them."""

    def to_json(self) -> dict[str, Any]:
        """What `transform_from` reads."""


@dataclass(frozen=True)
class ImageTransform:
    """An image to uint8 (3, height, width): resized, cropped at the centre; the base normalises it.

    Args:
        size: height and width in pixels.
        crop_pct: share of the resized image's edge that is kept, up to 1.
        crop_mode: "center" resizes the shorter edge and cuts the longer one; "squash" resizes both edges; "border"
            resizes the longer edge and fills the rest.
        interpolation: Pillow's name of the filter, in lower case.
        fill: colour of the border.
    """

    size: tuple[int, int]
    crop_pct: float = 1.0
    crop_mode: Crop = "center"
    interpolation: str = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, source: str | PathLike[str] | bytes | Image.Image | NDArray[np.uint8] | Tensor) -> Tensor:
        """One image to (3, height, width).

        Args:
            source: a path, the bytes of a file, a Pillow image, or uint8: an array (h, w, 3) or a tensor (3, h, w).

        Raises:
            DataError: the image cannot be read, or is none.
        """
        return tensor_of(self.fit(picture(source)))

    def batch(self, sources: Sequence[Any]) -> Tensor:
        """Images to (b, 3, height, width)."""
        return torch.stack([self(source) for source in some(sources)])

    def is_one(self, source: Any) -> bool:
        """Whether `source` is one image: a tensor or array of four dimensions holds several."""
        return source.ndim < 4 if isinstance(source, (Tensor, np.ndarray)) else not isinstance(source, (list, tuple))

    def fit(self, image: Image.Image) -> Image.Image:
        """A picture in RGB, resized and cropped."""
        from PIL import Image

        if not (image.width and image.height):
            raise DataError(f"the image is {image.width} x {image.height} pixels, and has none; give another")
        wide, high = self._resized(image.width, image.height)
        if wide * high > MOST_PIXELS:
            raise DataError(f"the image is {image.width} x {image.height} pixels, far from a square; crop it first")
        if (wide, high) != image.size:
            image = image.resize((wide, high), Image.Resampling[self.interpolation.upper()])
        height, width = self.size
        if wide < width or high < height:
            padded = Image.new("RGB", (max(wide, width), max(high, height)), self.fill)
            padded.paste(image, ((padded.width - wide) // 2, (padded.height - high) // 2))
            image, wide, high = padded, padded.width, padded.height
        left, top = round((wide - width) / 2), round((high - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the crop, rounded as timm and torchvision do."""
        goal_high, goal_wide = (max(1, math.floor(edge / self.crop_pct)) for edge in self.size)
        if self.crop_mode == "squash":
            return goal_wide, goal_high
        if self.crop_mode == "center" and goal_high == goal_wide:
            longer = int(goal_wide * max(width, height) / min(width, height))
            return (goal_wide, longer) if width <= height else (longer, goal_wide)
        ratios = height / goal_high, width / goal_wide
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def to_json(self) -> dict[str, Any]:
        """What `transform_from` reads."""
        return {"kind": "image", **asdict(self), "size": list(self.size), "fill": list(self.fill)}


@dataclass(frozen=True)
class TextTransform:
    """A text, or a pair of texts, to token ids and a mask, by the base's own tokenizer.

    Args:
        max_length: tokens of a text at most; what is longer is cut off.
        names: entries that the network reads, such as "input_ids" and "attention_mask".
        tokenizer: gives the tokenizer of transformers.
    """

    max_length: int
    names: tuple[str, ...] = field(compare=False)
    tokenizer: Callable[[], Any] = field(compare=False, repr=False)

    def __call__(self, source: str | Sequence[str]) -> dict[str, Tensor]:
        """One text (str) or pair of texts to entries (tokens,)."""
        return {name: values[0] for name, values in self.batch([source]).items()}

    def batch(self, sources: Sequence[str | Sequence[str]]) -> dict[str, Tensor]:
        """Texts to entries (b, tokens of the longest); shorter ones are padded at the end."""
        pairs = [source for source in some(sources) if not isinstance(source, str)]
        for source in pairs:
            if not (isinstance(source, (list, tuple)) and len(source) == 2 and all(isinstance(s, str) for s in source)):
                raise DataError(f"this base reads a text or a pair of texts, not {source!r:.60}; give a str")
        if pairs and len(pairs) != len(sources):
            raise DataError("some of the sources are texts and some are pairs of texts; ask for them one by one")
        given = [list(column) for column in zip(*sources)] if pairs else [list(sources)]
        return self._entries(*given)[0]

    def _entries(self, *texts: list[str], **more: Any) -> tuple[dict[str, Tensor], Any]:
        """What the network reads, and all that the tokenizer tells."""
        how: dict[str, Any] = {"max_length": self.max_length, "padding_side": "right", "return_tensors": "pt", **more}
        # Halves of characters, which JSON can hold, are none.
        whole = ([text.encode("utf-8", "replace").decode() for text in column] for column in texts)
        found = self.tokenizer()(*whole, padding=True, truncation=True, **how)
        if "input_ids" in found and not found["input_ids"].numel():
            raise DataError("the tokenizer makes no token of the texts; give texts with words that it knows")
        return {name: found[name] for name in self.names if name in found}, found

    def is_one(self, source: Any) -> bool:
        """Whether `source` is one text, or a tuple of two, which are a pair."""
        return isinstance(source, str) or (isinstance(source, tuple) and len(source) == 2)

    def to_json(self) -> dict[str, Any]:
        """What `transform_from` reads; the tokenizer is the base's."""
        return {"kind": "text", "max_length": self.max_length}


# The words of a text, each with the place of its first token; None where it was cut off, or has no token.
Aligned = list[tuple[str, int | None]]


@dataclass(frozen=True)
class WordTransform(TextTransform):
    """A text, or the list of its words, to token ids and a mask; what is said of a word stands at its first token.

    The words are joined by spaces, and tokens are known by their places in that text: a tokenizer that marks the space
    before a word sees what its network was trained on, where words one by one would run into each other.
    """

    def batch(self, sources: Sequence[str | Sequence[str]]) -> dict[str, Tensor]:
        """Texts, or lists of words, to entries (b, tokens of the longest); shorter ones are padded at the end."""
        return self.aligned(sources)[0]

    def aligned(self, sources: Sequence[str | Sequence[str]]) -> tuple[dict[str, Tensor], list[Aligned]]:
        """A batch, and the words of each source; DataError where one has none, or the tokenizer tells no places."""
        rows = [self.words(source) for source in some(sources)]
        if not getattr(self.tokenizer(), "is_fast", False):
            raise DataError(
                "the base's tokenizer, without a tokenizer.json, does not tell words apart; choose another base"
            )
        texts = [" ".join(word.strip() for word in row) for row in rows]
        entries, found = self._entries(texts, return_offsets_mapping=True)
        aligned = []
        for words, offsets in zip(rows, found["offset_mapping"].tolist()):
            # The word of each letter, none of the spaces between words.
            owners = [owner for k, word in enumerate(words) for owner in (*[k] * len(word.strip()), None)]
            firsts: dict[int | None, int] = {}
            for place, (begin, end) in enumerate(offsets):
                # A token of two words is the first one's.
                firsts.setdefault(next((k for k in owners[begin:end] if k is not None), None), place)
            aligned.append([(word, firsts.get(k)) for k, word in enumerate(words)])
        return entries, aligned

    def words(self, source: str | Sequence[str]) -> list[str]:
        """The words of a source; a text is split at spaces, and punctuation at the ends of a word stands alone."""
        if isinstance(source, str) and re.search(UNSPACED, source):
            raise DataError(f"'{source:.40}' has no spaces between its words; give the words, a list")
        found = re.findall(WORD, source) if isinstance(source, str) else source
        if not (isinstance(found, (list, tuple)) and found and all(isinstance(word, str) for word in found)):
            raise DataError(f"this task reads a text with words, or a list of them, not {source!r:.60}")
        return list(found)

    def is_one(self, source: Any) -> bool:
        """Whether `source` is one text, or a tuple of its words."""
        return isinstance(source, (str, tuple))

    def to_json(self) -> dict[str, Any]:
        """What `transform_from` reads."""
        return {**super().to_json(), "words": True}


class Transforming(Protocol):
    """What has a transform of its own: a base."""

    @property
    def transform(self) -> Transform | None: ...


def transform_from(record: Any, base: Transforming) -> Transform:
    """The transform that `to_json` recorded, for a base.

    Raises:
        ArtifactError: a record that is damaged, or of another kind of base.
    """
    mend = "fetch or save the task again"
    where, own = "the recorded transform", base.transform
    kind = check_json(record, where, {"kind": {"image", "text"}}, mend)["kind"]
    if kind == "text":
        text = check_json(record, where, {"max_length": int, "words?": bool}, mend)
        length, made = text["max_length"], WordTransform if text.get("words") else TextTransform
        if not isinstance(own, TextTransform):
            raise ArtifactError(f"{where} is of texts, which this base does not read; load the task's own base")
        if not 1 <= length <= 2**20:
            raise ArtifactError(f"{where} cuts texts to {length} tokens; {mend}")
        return made(length, own.names, own.tokenizer)
    schema = {"size": [int], "crop_pct": float, "crop_mode": str, "interpolation": str, "fill": [int]}
    values = check_json(record, where, schema, mend)
    size, fill = tuple(values["size"]), tuple(values["fill"])
    fits = len(size) == 2 and min(size) > 0 and max(size) <= 2**13 and 0.05 <= values["crop_pct"] <= 1
    fits = fits and len(fill) == 3 and min(fill) >= 0 and max(fill) <= 255
    if not fits or values["crop_mode"] not in CROPS:
        raise ArtifactError(f"{where} is damaged ({record}); {mend}")
    if values["interpolation"] not in INTERPOLATIONS:
        raise ArtifactError(f"{where} names the filter '{values['interpolation']}', which is not known; {mend}")
    return ImageTransform(size, float(values["crop_pct"]), values["crop_mode"], values["interpolation"], fill)


def for_example(transform: Transform | None, example: Any) -> Transform | None:
    """A base's transform, at the size of its example (b, 3, h, w); a plain one of images where it has none."""
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[1] != 3:
        return transform if isinstance(transform, TextTransform) else None
    size = (int(example.shape[2]), int(example.shape[3]))
    return replace(transform, size=size) if isinstance(transform, ImageTransform) else ImageTransform(size)


def some(sources: Sequence[Any]) -> Sequence[Any]:
    """The sources; DataError where there are none."""
    if len(sources) == 0:
        raise DataError("a batch has one source at least, and none was given")
    return sources


def picture(source: Any) -> Image.Image:
    """An image in RGB from a path, the bytes of a file, a Pillow image, or uint8 (h, w, 3) or (3, h, w).

    Raises:
        DataError: it cannot be read, or is no image; the message names a path.
    """
    from PIL import Image

    if isinstance(source, bytes):
        return decode(source)
    if isinstance(source, (str, PathLike)):
        try:
            return decode(Path(source))
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{source} cannot be read ({why}); give the path of an image file") from error
    if isinstance(source, Image.Image):
        try:
            return upright(source)
        except (OSError, ValueError, SyntaxError) as error:
            raise error if isinstance(error, DataError) else DataError(f"the image cannot be read ({error})") from error
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
        source = source.transpose(1, 2, 0) if source.ndim == 3 else source
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        if source.ndim == 3 and source.shape[2] == 1:
            source = source[:, :, 0]
        if source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3):
            return Image.fromarray(np.ascontiguousarray(source)).convert("RGB")
    shown = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else f"a {type(source).__name__}"
    raise DataError(
        f"this base reads images, not {shown}; give a path, the bytes of a file, a Pillow image, a uint8 array "
        "(h, w, 3) or a uint8 tensor (3, h, w)"
    )


def decode_image(source: bytes | Path) -> Tensor:
    """An image to uint8 (3, h, w).

    Args:
        source: the bytes of an image file, or its path.

    Raises:
        DataError: it is damaged, too large, of another format, or has values whose range no file tells.
        OSError: the path cannot be read.
    """
    return tensor_of(decode(source))


def tensor_of(image: Image.Image) -> Tensor:
    """A picture in RGB as uint8 (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(source: bytes | Path) -> Image.Image:
    """An image to a picture in RGB; as `decode_image`."""
    with open_image(source) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A picture in RGB, as the camera was held."""
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode[0] in "IF":
        turned = Image.fromarray(_eight_bits(np.asarray(turned), image))
    elif turned.mode in ("P", "PA"):
        # At once to RGB, Pillow would warn of transparency.
        turned = turned.convert("RGBA")
    return turned.convert("RGB")


def _eight_bits(values: NDArray[Any], image: Any) -> NDArray[np.uint8]:
    """Grey values of more than eight bits, which Pillow would cut off at 255, scaled to 0 … 255."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "F":
        # Not the other way round, so that NaN is refused too.
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError("the image holds floats outside 0 … 1; scale them, or save it with 8 or 16 bits")
        return (values * 255).round().astype(np.uint8)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise DataError("the image holds numbers whose range no file tells; save it with 8 or 16 bits a channel")
    scaled = values.astype(np.int64) * 255 // (2 ** tags.get(BITS, (16,))[0] - 1)
    # TIFF may count from white down.
    return (255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled).astype(np.uint8)
