"""How much a linear model finds in the frozen demo encoder: one probe per task."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.stages.demo.grammar import Example, corpus
from sherl_pipe.stages.demo.lexicon import TASKS
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, T5ForConditionalGeneration

PROBE_SEED = 7
TRAIN, TEST = 2000, 500
_BATCH = 250


def probe(folder: Path) -> dict[str, tuple[float, float]]:
    """Per task the test figure of the probe and that of the majority class.

    The figure is the accuracy of a logistic regression, for ``intensity`` the Pearson
    correlation of a ridge regression, whose counterpart (a constant) counts as 0.
    """
    examples = corpus(TRAIN + TEST, PROBE_SEED)
    features = pooled_features(folder, [example.sentence for example in examples])
    return {task: _figures(task, features, examples) for task in TASKS}


@torch.inference_mode()
def pooled_features(folder: Path, sentences: list[str]) -> npt.NDArray[np.float32]:
    """The last encoder layer averaged over the tokens of each sentence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().encoder
    pooled = []
    for start in range(0, len(sentences), _BATCH):
        batch = tokenizer(sentences[start : start + _BATCH], padding=True, return_tensors="pt")
        states = encoder(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(pooled).numpy()


def _figures(
    task: str, features: npt.NDArray[np.float32], examples: list[Example]
) -> tuple[float, float]:
    labels = np.array([getattr(example, task) for example in examples])
    train, test = slice(0, TRAIN), slice(TRAIN, None)
    graded = task == "intensity"
    model = make_pipeline(
        StandardScaler(), Ridge(alpha=10.0) if graded else LogisticRegression(C=0.1, max_iter=2000)
    )
    predicted = model.fit(features[train], labels[train]).predict(features[test])
    if graded:
        return float(np.corrcoef(predicted, labels[test])[0, 1]), 0.0
    classes, counts = np.unique(labels[train], return_counts=True)
    majority = classes[counts.argmax()]
    return float((predicted == labels[test]).mean()), float((labels[test] == majority).mean())
