"""Images as inputs: decoded pixels, ids that name them, and what a backbone reads of them.

Pixels are read when they are wanted and not kept, so that a split may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sherl_pipe.cache import InputError, UnsafeError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import example_id, hash_json
from sherl_pipe.stages.backbone import Backbone, loading_errors, resolve_model
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.tokens import Tokens
from torch import Tensor

# Modes of one depth that Pillow turns into RGB by one rule. Others (16 bits, floats) it would clip.
_EIGHT_BITS = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"}
_ALPHA = {"LA", "PA", "RGBA", "La", "RGBa"}
# Decoding and resizing let other threads run.
THREADS = min(4, os.cpu_count() or 1)
# Of an image whose only use is to see what a processor makes of it: no square, and no usual size.
_BLANK = (70, 50)


@dataclass(frozen=True)
class Picture:
    """An image that lies in a file or in memory.

    Attributes:
        content: the file, or its bytes.
        origin: for messages: the file, or the file and row that name it.
    """

    content: Path | bytes = field(repr=False)
    origin: str

    def pixels(self) -> Image.Image:
        """The image, RGB and upright.

        Grey, palette and CMYK images become RGB by Pillow's rules, and the orientation that a
        camera noted (EXIF) is applied.

        Raises:
            InputError: no image, a damaged one, more than one, transparent pixels, or values that
                do not fit into 8 bits.
            UnsafeError: more pixels than Pillow takes for honest.
        """
        try:
            return self._decoded()
        except Image.DecompressionBombError as error:
            raise UnsafeError(f"{self.origin}: {error} Make the image smaller.") from error
        except UnidentifiedImageError as error:
            raise self._wrong("an image", "something that Pillow does not know") from error
        except FileNotFoundError as error:
            raise self._wrong("an image", "no file") from error
        except (OSError, ValueError, SyntaxError, IndexError, EOFError) as error:
            text = " ".join(str(error).split())[:160]
            raise self._wrong("a whole image", f"a damaged one ({text})") from error

    def _decoded(self) -> Image.Image:
        source = self.content if isinstance(self.content, Path) else io.BytesIO(self.content)
        with Image.open(source) as image:
            frames = getattr(image, "n_frames", 1)
            # A camera's MPO is a JPEG with views of the same scene behind it.
            if frames != 1 and image.format != "MPO":
                raise self._wrong("one image", f"{frames} of them", "Save one of them alone.")
            image.load()
            upright = ImageOps.exif_transpose(image)
        if upright.mode not in _EIGHT_BITS | _ALPHA:
            raise self._wrong(
                "8 bits a channel", f"mode {upright.mode}", "Scale the image to 8 bits."
            )
        if upright.mode in _ALPHA or "transparency" in upright.info:
            alpha = upright.convert("RGBA")
            if alpha.getchannel("A").getextrema() != (255, 255):
                raise self._wrong(
                    "no transparent pixels", "some", "Put the image on a background and save that."
                )
            upright = alpha
        return upright if upright.mode == "RGB" else upright.convert("RGB")

    def _wrong(self, expected: str, found: str, todo: str | None = None) -> InputError:
        todo = todo or "Replace the file, or remove it."
        return InputError(explain(self.origin, expected=expected, found=found, todo=todo))

    @cached_property
    def identity(self) -> bytes:
        """The example's id: a hash of the decoded, upright RGB pixels and their layout, 16 bytes.

        So it names what the image processor is given, whatever the file is called and however its
        pixels are stored. Raises what `pixels` raises.
        """
        return _identity(self.pixels())

    def named_pixels(self) -> Image.Image:
        """The image, which has to be the one that `identity` named before.

        Raises what `pixels` raises, and InputError where the file has changed since.
        """
        named = self.__dict__.get("identity")  # without naming it now
        image = self.pixels()
        if named is not None and _identity(image) != named:
            raise self._wrong(
                "the image that it was", "another one", "Leave images alone while they are read."
            )
        return image


def _identity(image: Image.Image) -> bytes:
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    return example_id(("image", f"{image.width}x{image.height}", digest))


def identify_pictures(pictures: Sequence[Picture], progress: Progress = silent) -> list[bytes]:
    """The id of every picture. Raises what `Picture.pixels` raises."""
    found = []
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for identity in pool.map(lambda picture: picture.identity, pictures):
                found.append(identity)
                progress("reading images", len(found), len(pictures), "images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


class PictureReader:
    """A model's own image processor, in its form that needs Pillow and numpy only.

    Args:
        processor: from transformers.
        name: of the model, for messages.

    Attributes:
        shape: channels, height and width of what every image becomes.

    Raises InputError for a processor that makes something else of images, or of images of different
    shapes something of different shapes.
    """

    pad_token_id = None  # as a tokenizer that has none

    def __init__(self, processor: Any, name: str) -> None:
        self.processor, self.name = processor, name
        wide, high = Image.new("RGB", _BLANK), Image.new("RGB", _BLANK[::-1])
        shapes = {self._values(each, name).shape for each in (wide, high)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 3:
            raise InputError(
                explain(
                    f"image processor of {name}",
                    expected="one that makes all images one size",
                    found=f"shapes {sorted(shapes)}",
                    todo="Let its preprocessor_config.json resize to a height and a width, or crop "
                    "the centre.",
                )
            )
        self.shape: tuple[int, ...] = shapes.pop()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that turns decoded pixels into values."""
        rules = json.loads(self.processor.to_json_string())
        return hash_json({key: value for key, value in rules.items() if value is not None})

    def values(self, picture: Picture) -> npt.NDArray[np.float32]:
        """Pixel values `[channels, height, width]`. Raises what `Picture.named_pixels` raises."""
        found = self._values(picture.named_pixels(), picture.origin)
        if found.shape != self.shape:
            raise InputError(
                explain(picture.origin, expected=f"{self.shape} values", found=found.shape)
            )
        return found

    def _values(self, image: Image.Image, origin: str) -> npt.NDArray[np.float32]:
        try:
            made = self.processor(images=[image], return_tensors="np")["pixel_values"]
            return np.ascontiguousarray(made[0], np.float32)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                explain(
                    f"{origin}: image processor of {self.name}",
                    expected="pixel values",
                    found=f"{type(error).__name__}: {text}",
                )
            ) from error

    def batch(self, pictures: Sequence[Picture]) -> Tensor:
        """`pixel_values [B, channels, height, width]`, float32, on the CPU. Raises what `values`
        raises."""
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self.values, pictures))))

    def tokens(self, backbone: Backbone) -> int:
        """Tokens that a backbone makes of every image. Raises InputError where it takes no images
        of this shape."""
        blank = torch.zeros(1, *self.shape, device=backbone.device, dtype=backbone.dtype)
        embeddings = backbone.model.get_submodule(backbone.family.embeddings[0])
        try:
            with torch.inference_mode():
                return int(embeddings(blank).shape[1])
        except (ValueError, RuntimeError) as error:
            raise InputError(
                explain(
                    f"image processor of {self.name}",
                    expected="images that the model takes",
                    found=f"{self.shape}: {' '.join(str(error).split())[:160]}",
                    todo="Use the preprocessor_config.json that belongs to the model.",
                )
            ) from error


def load_picture_reader(name: str, revision: str | None = None) -> PictureReader:
    """The model's own image processor. Raises InputError, UnsafeError.

    It is the one on Pillow whether torchvision is there or not: theirs differ in the last bits.
    """
    from transformers import AutoImageProcessor

    with loading_errors(name, "image processor"):
        processor = AutoImageProcessor.from_pretrained(
            resolve_model(name), revision=revision or "main", trust_remote_code=False, backend="pil"
        )
    return PictureReader(processor, name)


@dataclass(frozen=True)
class Pictures(Tokens):
    """Images as inputs. Each makes the same number of tokens, so there is no padding and no mask.

    Attributes:
        inputs: per example, the `Picture`.
        reader: makes pixel values of them.
        size: tokens of each.
    """

    reader: PictureReader
    size: int

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.full(len(self.inputs), self.size, np.int64)

    def batch(self, members: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """`pixel_values [B, channels, height, width]` of some examples; nothing is padded."""
        return {"pixel_values": self.reader.batch([self.inputs[member] for member in members])}
