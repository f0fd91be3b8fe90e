"""The embedded demo: its size, its corpus, and that its states can be tuned on."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from sherl_pipe.cache import FeatureCache
from sherl_pipe.pipeline.config import read_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.steps import run_extract
from sherl_pipe.pipeline.tuning import run_tune
from sherl_pipe.stages.demo.data import write_corpus
from sherl_pipe.stages.demo.grammar import corpus, pretraining_text
from sherl_pipe.stages.demo.lexicon import TASKS

DEMO = Path(str(files("sherl_pipe.stages.demo")))


def test_weights_are_small() -> None:
    assert (DEMO / "model" / "model.safetensors").stat().st_size < 4_000_000


def test_corpus_is_deterministic_distinct_and_balanced() -> None:
    first, second = corpus(1600, 5), corpus(1600, 5)
    assert first == second != corpus(1600, 6)
    assert len({each.sentence for each in first}) == 1600
    for task, share in (("sentiment", 0.5), ("topic", 0.25), ("acceptability", 0.5)):
        labels = [getattr(each, task) for each in first]
        assert max(labels.count(label) for label in set(labels)) == 1600 * share
    assert np.std([each.intensity for each in first]) > 1


def test_pretraining_text_is_another_one() -> None:
    assert pretraining_text(50, 3) == pretraining_text(50, 3)
    assert not set(pretraining_text(500, 11)) & {each.sentence for each in corpus(500, 11)}


def test_data_set_has_one_set_of_sentences(tmp_path: Path) -> None:
    write_corpus(tmp_path, train=60, validation=20)
    for role, count in (("train", 60), ("validation", 20)):
        columns = []
        for task in TASKS:
            lines = (tmp_path / task / f"{role}.jsonl").read_text().splitlines()
            columns.append([json.loads(line)["sentence"] for line in lines])
            assert len(lines) == count
        assert all(column == columns[0] for column in columns)


@pytest.mark.slow
def test_one_cache_four_labellings(tmp_path: Path) -> None:
    """What `make demo` does: one extraction, four tunings, each clearly above the majority."""
    config = read_config(DEMO / "pipeline.yaml")
    tune = config.tune.model_copy(update={"out": tmp_path / "runs"})
    config = config.model_copy(update={"cache": tmp_path / "cache", "tune": tune})
    reports = run_extract(config, Bars(None))
    encoders = [report for report in reports if report.stream == "encoder"]
    # Every sentence is extracted once, for whichever task comes first.
    assert sum(report.examples for report in encoders) == 2500
    assert sum(report.reused for report in encoders) == 3 * 2500
    results = {result.task: result for result in run_tune(config, Bars(None))}
    assert results["sentiment"].score > 92
    assert results["topic"].score > 97
    assert results["acceptability"].score > 88
    assert results["intensity"].score > 90
    assert FeatureCache.open(tmp_path / "cache").verify() == []
