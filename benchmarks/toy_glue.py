"""Write files of GLUE's form from the embedded demo's corpus: to see whether benchmarks still run.

What is measured on them says nothing; the texts are there wherever the package is::

    python benchmarks/toy_glue.py build/toy/glue
    python benchmarks/beyond.py run --data build/toy/glue --folder build/toy/beyond
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sherl_pipe.stages.data import load_sources

from glue_tasks import TASKS

ROWS = {"train": 120, "validation": 40}
# The demo's task that each of GLUE's gets its labels from.
LIKE = {"cola": "acceptability", "sst2": "sentiment", "stsb": "intensity", "rte": "topic"}


def main() -> None:
    """Write all tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    rows = {source.key: source.rows for source in load_sources("demo")}
    for name, like in LIKE.items():
        for role, count in ROWS.items():
            file = folder / name / f"{role}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            chosen = rows[f"{like}/{role}"][:count]
            lines = [json.dumps(row_of(name, row)) for row in chosen]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as GLUE's task `name` has it; a pair is a text and its first half."""
    spec, text = TASKS[name], str(row["sentence"])
    texts = dict(zip(spec.fields, (text, text[: len(text) // 2]), strict=False))
    number = float(row["label"])
    return texts | {"label": number if spec.regression else int(number) % 2}


if __name__ == "__main__":
    main()
