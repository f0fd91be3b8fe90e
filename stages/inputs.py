"""What stands between data and a backbone: a tokenizer for texts, an image processor for images,
both for a dual encoder.

All are called the preprocessor here; a cache keeps its fingerprint as its `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sherl_pipe.cache import StaleCacheError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import model_class
from sherl_pipe.stages.dual_reader import DualReader
from sherl_pipe.stages.families import Family, family_of
from sherl_pipe.stages.pictures import PictureReader, Pictures, load_picture_reader
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.templates import Input
from sherl_pipe.stages.tokens import Tokens, load_tokenizer, tokenize, tokenizer_fingerprint


def family_of_model(name: str, revision: str | None = None) -> Family:
    """The family of a model, by its config alone. Raises InputError, UnsafeError."""
    _, config, _ = model_class(name, revision)
    return family_of(config)


def load_preprocessor(name: str, revision: str | None = None) -> Any:
    """The model's own tokenizer, or its image processor as a `PictureReader`, or both as a
    `DualReader`.

    Raises InputError, UnsafeError.
    """
    _, config, _ = model_class(name, revision)
    family = family_of(config)
    if family.towers:
        pictures = load_picture_reader(name, revision)
        return DualReader(load_tokenizer(name, revision), pictures, config)
    if family.images:
        return load_picture_reader(name, revision)
    return load_tokenizer(name, revision)


def preprocessor_fingerprint(preprocessor: Any) -> str:
    """Hash of everything that turns an input into what the backbone reads."""
    if isinstance(preprocessor, PictureReader | DualReader):
        return preprocessor.fingerprint
    return tokenizer_fingerprint(preprocessor)


def check_preprocessor(expected: str, preprocessor: Any, where: str) -> None:
    """Raise StaleCacheError unless the preprocessor has this fingerprint."""
    found = preprocessor_fingerprint(preprocessor)
    if found != expected:
        kinds = {PictureReader: "image processor", DualReader: "tokenizer or image processor"}
        kind = kinds.get(type(preprocessor), "tokenizer")
        raise StaleCacheError(
            explain(
                f"{where}: {kind}",
                expected=expected,
                found=found,
                todo=f"Use the {kind} that it was made with.",
            )
        )


def read_inputs(
    preprocessor: Any, inputs: Sequence[Input], max_length: int, progress: Progress = silent
) -> Tokens:
    """Inputs as a backbone reads them: token ids cut at `max_length`, or images of that many
    tokens, whose pixels are read batch by batch."""
    if isinstance(preprocessor, DualReader):
        return preprocessor.read(inputs, max_length, progress)
    if isinstance(preprocessor, PictureReader):
        return Pictures(list(inputs), 0, preprocessor, max_length)
    texts: Any = inputs
    return tokenize(preprocessor, texts, max_length, progress)


def pad_id(tokenizer: Any) -> int:
    """What inputs are padded with; the mask hides it, so any id will do."""
    pad = tokenizer.pad_token_id
    return 0 if pad is None else int(pad)
