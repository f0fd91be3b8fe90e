"""Texts as rows of token ids."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from model_tools import save_model
from sherl_pipe.stages.tokens import TokenRows, load_tokenizer, tokenize

SENTENCES = ["the red house", "a cat", "she likes the blue book and the red house", "mood"]


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_the_tokenizers_own(tmp_path: Path, family: str, pairs: bool) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path, family))
    # More than are tokenised at once.
    texts = [(text, text[::-1]) if pairs else (text,) for text in SENTENCES] * 600
    found = tokenize(tokenizer, texts, 8)
    assert len(found.inputs) == len(texts)
    cut = 0
    for text, row in zip(texts, found.inputs, strict=True):
        given = tokenizer(*text, truncation=True, max_length=8, return_attention_mask=False)
        assert {name: values.tolist() for name, values in row.items()} == dict(given)
        cut += len(tokenizer(*text).input_ids) > 8
    assert found.truncated == cut > 0
    assert found.lengths.tolist() == [len(row["input_ids"]) for row in found.inputs]
    batch = found.batch([5, 0, 2001], 9)
    for place, member in enumerate([5, 0, 2001]):
        size = int(found.lengths[member])
        assert batch["attention_mask"][place].sum() == size
        assert (
            batch["input_ids"][place, :size].tolist() == found.inputs[member]["input_ids"].tolist()
        )
        assert (batch["input_ids"][place, size:] == 9).all()


def test_no_texts_make_no_rows(tmp_path: Path) -> None:
    found = tokenize(load_tokenizer(save_model(tmp_path, "bert")), [], 8)
    assert len(found.inputs) == len(found.lengths) == found.truncated == 0


def test_rows_are_a_sequence() -> None:
    values = {"input_ids": np.arange(6, dtype=np.int32), "kind": np.ones(6, np.int32)}
    rows = TokenRows(values, np.array([2, 0, 3, 1]))
    whole = [row["input_ids"].tolist() for row in rows]
    assert whole == [[0, 1], [], [2, 3, 4], [5]]
    assert [row["input_ids"].tolist() for row in rows[1:3]] == whole[1:3]
    assert rows[-1]["kind"].tolist() == [1] and rows[np.int64(2)]["kind"].tolist() == [1] * 3
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            rows[wrong]
    again = pickle.loads(pickle.dumps(rows))
    assert [row["input_ids"].tolist() for row in again] == whole
    # A row on its way to a worker takes no other row along.
    large = TokenRows({"input_ids": np.zeros(10**6, np.int32)}, np.array([10, 10**6 - 10]))
    assert len(pickle.dumps(large[0])) < 1000
