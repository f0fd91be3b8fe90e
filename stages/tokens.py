"""Tokenizers, and texts as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.stages.backbone import loading_errors, resolve_model
from sherl_pipe.stages.progress import Progress, silent
from torch import Tensor


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The model's own tokenizer. Raises InputError, UnsafeError."""
    from transformers import AutoTokenizer

    with loading_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision or "main", trust_remote_code=False
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Set per call, not part of the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"vocab": tokenizer.get_vocab()}
    special = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    return hash_json([rules, special])


class TokenRows(Sequence[dict[str, npt.NDArray[np.int32]]]):
    """Rows of token ids that stand one behind another, which takes less than an array each.

    Args:
        values: of all rows, by name (`input_ids`, `token_type_ids`, ...).
        lengths: of the rows.
    """

    def __init__(
        self, values: Mapping[str, npt.NDArray[np.int32]], lengths: npt.NDArray[np.int64]
    ) -> None:
        self._values, self._ends = values, lengths.cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> dict[str, npt.NDArray[np.int32]]: ...

    @overload
    def __getitem__(self, row: slice) -> list[dict[str, npt.NDArray[np.int32]]]: ...

    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        place = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        return {name: values[place] for name, values in self._values.items()}


@dataclass(frozen=True)
class Tokens:
    """Tokenized inputs.

    Attributes:
        inputs: per example, integer arrays of equal length by name (`input_ids`,
            `token_type_ids`, ...).
        truncated: examples that were cut at the maximum length.
    """

    inputs: Sequence[Any]
    truncated: int

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(each["input_ids"]) for each in self.inputs], np.int64)

    def batch(self, members: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Right-padded `[B, S]` tensors of some examples, the attention mask included."""
        chosen = [self.inputs[member] for member in members]
        longest = max(len(each["input_ids"]) for each in chosen)
        out = {
            name: np.full((len(chosen), longest), pad_id if name == "input_ids" else 0, np.int64)
            for name in (*chosen[0], "attention_mask")
        }
        for row, each in enumerate(chosen):
            size = len(each["input_ids"])
            for name, values in each.items():
                out[name][row, :size] = values
            out["attention_mask"][row, :size] = 1
        return {name: torch.from_numpy(values) for name, values in out.items()}


def tokenize(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int, progress: Progress = silent
) -> Tokens:
    """Token ids of text segments, cut at `max_length`."""
    parts: list[dict[str, npt.NDArray[np.int32]]] = []
    lengths: list[int] = []
    truncated = 0
    step = 2000
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        pairs = [each[1] for each in part] if part and len(part[0]) == 2 else None
        encoded = tokenizer(
            text=[each[0] for each in part],
            text_pair=pairs,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        truncated += sum(bool(each.overflowing) for each in encoded.encodings or ())
        lengths += map(len, encoded["input_ids"])
        parts.append(
            {
                name: np.fromiter(chain.from_iterable(rows), np.int32)
                for name, rows in encoded.items()
            }
        )
        progress("tokenizing", len(lengths), len(texts), "examples")
    names = parts[0] if parts else ()
    values = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Tokens(TokenRows(values, np.array(lengths, np.int64)), truncated)
