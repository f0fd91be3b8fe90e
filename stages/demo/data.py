"""The demo's corpus as a data set folder."""

import json
from pathlib import Path

from sherl_pipe.stages.demo.grammar import corpus
from sherl_pipe.stages.demo.lexicon import TASKS

TRAIN, VALIDATION, SEED = 2000, 500, 11


def write_corpus(
    folder: str | Path, train: int = TRAIN, validation: int = VALIDATION, seed: int = SEED
) -> None:
    """Write ``<folder>/<task>/<split>.jsonl`` for the four tasks.

    All tasks have the same sentences in the same order; no sentence of the training split is in
    the validation split.
    """
    examples = corpus(train + validation, seed)
    parts = {"train": examples[:train], "validation": examples[train:]}
    for task in TASKS:
        for split, members in parts.items():
            file = Path(folder) / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"sentence": each.sentence, "label": getattr(each, task)} for each in members]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
