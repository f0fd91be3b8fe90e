"""What stands between data and a dual encoder: a tokenizer and an image processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.stages.pictures import Picture, PictureReader, Pictures
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.templates import Input
from sherl_pipe.stages.tokens import Tokens, tokenize, tokenizer_fingerprint

# The end of a text in configs of old checkpoints, where the token of the largest number is meant.
_LARGEST = 2


class DualReader:
    """Reads texts for one tower and images for the other.

    Args:
        tokenizer: of the model.
        pictures: the model's image processor.
        config: of the model.

    Attributes:
        size: tokens of every image.
    """

    def __init__(self, tokenizer: Any, pictures: PictureReader, config: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        self.pad_token_id = tokenizer.pad_token_id
        vision = config.vision_config
        self.size = (int(vision.image_size) // int(vision.patch_size)) ** 2 + 1
        self._end = int(config.text_config.eos_token_id)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that turns texts into ids and pixels into values."""
        return hash_json([tokenizer_fingerprint(self.tokenizer), self.pictures.fingerprint])

    def read(self, inputs: Sequence[Input], max_length: int, progress: Progress = silent) -> Tokens:
        """Texts cut at `max_length`, or images; not both.

        Raises InputError for a text whose end is not its last token: the tower's embedding is that
        of its first end, and a cache has that of its last token.
        """
        if inputs and isinstance(inputs[0], Picture):
            return Pictures(list(inputs), 0, self.pictures, self.size)
        texts: Any = inputs
        tokens = tokenize(self.tokenizer, texts, max_length, progress)
        for text, each in zip(texts, tokens.inputs, strict=True):
            ids = each["input_ids"]
            ends = ids == (ids.max() if self._end == _LARGEST else self._end)
            if np.flatnonzero(ends).tolist() != [len(ids) - 1]:
                raise InputError(
                    explain(
                        f"text {text[0]!r}",
                        expected="one token that ends a text, the last one",
                        found=f"{int(ends.sum())} among {len(ids)} tokens",
                        todo="Remove what the tokenizer takes for the end from the text, or use "
                        "the tokenizer that belongs to the model.",
                    )
                )
        return tokens
