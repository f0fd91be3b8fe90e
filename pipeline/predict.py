"""Predictions of an adapter on the live backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.opening import pick_device
from sherl_pipe.stages.adapter import TunedModel, load_route, read_adapter
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.data import check_text, load_sources
from sherl_pipe.stages.inputs import check_preprocessor, load_preprocessor, read_inputs
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.task import predictions
from sherl_pipe.stages.templates import Input, PictureTemplate, Template
from sherl_pipe.stages.words import PrefixTree, Scoring


@dataclass(frozen=True)
class Prediction:
    """One input's answer: `label` is a class name or a number; `probability` is of that class,
    None for numbers. `text` are the segments, or the name of the image."""

    text: tuple[str, ...]
    label: str | float
    probability: float | None


class Predictor:
    """An adapter attached to its live backbone.

    Args:
        folder: of the adapter.
        model: where the backbone is now; by default where the adapter's cache had it from.
        device: `auto`, `cpu`, `cuda`, ...

    Raises StaleCacheError for another backbone or tokenizer.
    """

    def __init__(self, folder: Path, *, model: str | None = None, device: str = "auto") -> None:
        config, _ = read_adapter(folder)
        name = model or str(config.backbone["name"])
        revision = config.backbone.get("revision")
        backbone = load_backbone(name, revision=revision, device=pick_device(device))
        self.config, route = load_route(folder, backbone)
        self.tokenizer = load_preprocessor(name, revision)
        check_preprocessor(config.tokenizer, self.tokenizer, str(folder))
        self.template = Template.from_json(config.template)
        self.device = backbone.device
        self.model = TunedModel(backbone, route).eval()
        self.scoring: Scoring | None = None
        if backbone.family.seq2seq:
            tree = PrefixTree.of_words(config.labels.words, self.tokenizer, backbone.start)
            self.scoring = Scoring.of(tree, config.loss)

    @property
    def images(self) -> bool:
        """Whether inputs are images."""
        return isinstance(self.template, PictureTemplate)

    def rows_of_images(self, files: Sequence[Path]) -> list[Input]:
        """Images from the command line."""
        if not self.images:
            raise _other_inputs("--image", "--text", "texts")
        return [Picture(file, str(file)) for file in files]

    def rows_of_texts(self, texts: Sequence[str]) -> list[Input]:
        """Texts from the command line; for pairs, two and two belong together."""
        if self.images:
            raise _other_inputs("--text", "--image", "images")
        columns = self.template.columns
        if len(texts) % len(columns):
            raise InputError(
                explain(
                    "--text",
                    expected=f"{len(columns)} for each input: {columns}",
                    found=f"{len(texts)} texts",
                )
            )
        for number, text in enumerate(texts):
            check_text(text, f"--text {number + 1}")
        groups = [texts[at : at + len(columns)] for at in range(0, len(texts), len(columns))]
        return [self.template.render(dict(zip(columns, group, strict=True))) for group in groups]

    def rows_of_file(
        self, file: Path, text_columns: Sequence[str], image_column: str | None = None
    ) -> list[Input]:
        """Texts or images of a data file, under the columns of the adapter or the ones named."""
        if self.images:
            if text_columns:
                raise _other_inputs("--text-column", "--image-column", "images")
            (source,) = load_sources(str(file), images=True, image_column=image_column)
            return source.inputs(self.template.reading(source.columns))
        if image_column:
            raise _other_inputs("--image-column", "--text-column", "texts")
        columns = tuple(text_columns) or self.template.columns
        if len(columns) != len(self.template.columns):
            raise InputError(
                explain(
                    "--text-column",
                    expected=f"{len(self.template.columns)} of them",
                    found=list(columns),
                )
            )
        (source,) = load_sources(str(file), text_columns=columns)
        return source.inputs(self.template.reading(columns))

    def predict(
        self, inputs: Sequence[Input], bars: Bars, batch_size: int = 32
    ) -> list[Prediction]:
        """Answers for rendered texts or images, in their order."""
        outputs = self.outputs(inputs, bars, batch_size)
        texts = [(each.origin,) if isinstance(each, Picture) else each for each in inputs]
        spec = self.config.labels
        answers = predictions(spec, outputs, self.config.scaling)
        if spec.kind == "regression":
            return [
                Prediction(text, float(answer), None)
                for text, answer in zip(texts, answers, strict=True)
            ]
        shares = outputs.softmax(-1).amax(-1).tolist()
        return [
            Prediction(text, spec.classes[int(answer)], share)
            for text, answer, share in zip(texts, answers, shares, strict=True)
        ]

    def outputs(self, texts: Sequence[Input], bars: Bars, batch_size: int = 32) -> torch.Tensor:
        """Head outputs or word scores `[N, C]`."""
        tokens = read_inputs(self.tokenizer, texts, self.config.max_length)
        pad = self.tokenizer.pad_token_id or 0
        found = []
        with torch.inference_mode():
            for at in range(0, len(texts), batch_size):
                members = list(range(at, min(at + batch_size, len(texts))))
                inputs: dict[str, Any] = tokens.batch(members, pad)
                inputs = {name: values.to(self.device) for name, values in inputs.items()}
                if self.scoring is not None:
                    found.append(self.model.word_scores(self.scoring, **inputs).float().cpu())
                else:
                    found.append(self.model(**inputs).logits.float().cpu())
                bars("predicting", members[-1] + 1, len(texts), "examples")
        return torch.cat(found)


def _other_inputs(wrong: str, right: str, kind: str) -> InputError:
    return InputError(
        explain(wrong, expected=f"{right}: the adapter reads {kind}", found=f"{wrong}")
    )
