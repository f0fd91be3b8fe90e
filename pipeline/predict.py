"""Predictions of an adapter on the live backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.machine import pick_device
from sherl_pipe.pipeline.opening import positions
from sherl_pipe.stages.adapter import TunedModel, load_route
from sherl_pipe.stages.adapter_files import AdapterConfig, read_adapter
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.first_tokens import FirstTokens
from sherl_pipe.stages.inputs import check_preprocessor, load_preprocessor, pad_id, read_inputs
from sherl_pipe.stages.methods.route import Route
from sherl_pipe.stages.picture_files import image_files
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.source import check_text
from sherl_pipe.stages.task import predictions
from sherl_pipe.stages.templates import Input, PictureTemplate, Template
from sherl_pipe.stages.words import PrefixTree, Scoring

# Of a generated text, where nobody says how many.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Prediction:
    """One input's answer: `label` is a class name, a number or a generated text; `probability` is
    of that class, None for numbers and texts. `text` are the segments, or the name of the image."""

    text: tuple[str, ...]
    label: str | float
    probability: float | None


def open_adapter(
    folder: Path, model: str | None, device: str
) -> tuple[AdapterConfig, Backbone, Route, Any]:
    """An adapter's config, its live backbone, its route, and what reads inputs.

    Raises what loading raises, and StaleCacheError for another backbone or preprocessor.
    """
    config, _ = read_adapter(folder)
    name = model or str(config.backbone["name"])
    revision = config.backbone.get("revision")
    # A dual encoder compares embeddings and has no head.
    spoken = config.route.outputs == 0 and config.labels.kind != "retrieval"
    where = pick_device(device)
    backbone = load_backbone(name, revision=revision, device=where, head=spoken)
    config, route = load_route(folder, backbone)
    preprocessor = load_preprocessor(name, revision)
    check_preprocessor(config.tokenizer, preprocessor, str(folder))
    return config, backbone, route, preprocessor


class Predictor:
    """An adapter attached to its live backbone.

    Args:
        folder: of the adapter.
        model: where the backbone is now; by default where the adapter's cache had it from.
        device: `auto`, `cpu`, `cuda`, ...
        max_new_tokens: of a generated text, at most.

    Raises StaleCacheError for another backbone or tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str | None = None,
        device: str = "auto",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        if read_adapter(folder)[0].labels.kind == "retrieval":
            raise InputError(
                explain(
                    f"inputs for {folder}",
                    expected="--text and --image, which the adapter compares",
                    found="only one of them, or --file",
                )
            )
        self.config, backbone, route, self.tokenizer = open_adapter(folder, model, device)
        config = self.config
        spoken = config.route.outputs == 0
        self.template = Template.from_json(config.template)
        self.device = backbone.device
        self.model = TunedModel(backbone, route).eval()
        self.scoring: Scoring | FirstTokens | None = None
        self.max_new_tokens = max_new_tokens
        if backbone.family.seq2seq and config.labels.kind != "text":
            tree = PrefixTree.of_words(config.labels.words, self.tokenizer, backbone.start)
            self.scoring = Scoring.of(tree, config.loss)
        elif spoken and config.labels.kind != "text":
            self.scoring = FirstTokens.of_words(config.labels.words, self.tokenizer)
        self.causal, self.room = backbone.family.causal, positions(backbone)

    @property
    def images(self) -> bool:
        """Whether inputs are images."""
        return isinstance(self.template, PictureTemplate)

    def rows_of_images(self, files: Sequence[Path]) -> list[Input]:
        """Images from the command line; of folders all that are in them."""
        if not self.images:
            raise _other_inputs("--image", "--text", "texts")
        return [Picture(file, str(file)) for path in files for file in image_files(path)]

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
        texts = [(each.origin,) if isinstance(each, Picture) else each for each in inputs]
        if self.config.labels.kind == "text":
            said = self.say(inputs, bars, batch_size)
            return [
                Prediction(text, answer, None) for text, answer in zip(texts, said, strict=True)
            ]
        outputs = self.outputs(inputs, bars, batch_size)
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

        def of(inputs: dict[str, Any]) -> torch.Tensor:
            if self.scoring is not None:
                return self.model.word_scores(self.scoring, **inputs)
            found: torch.Tensor = self.model(**inputs).logits
            return found

        batches = self._batches(texts, bars, batch_size)
        with torch.inference_mode():
            return torch.cat([of(inputs).float().cpu() for inputs in batches])

    def say(self, texts: Sequence[Input], bars: Bars, batch_size: int = 32) -> list[str]:
        """Texts generated for rendered texts, greedily."""
        found: list[str] = []
        with torch.inference_mode():
            for inputs in self._batches(texts, bars, batch_size):
                if self.causal:
                    inputs = _padded_before(inputs)
                out = self.model.generate(
                    **inputs,
                    max_new_tokens=self._most(inputs),
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=pad_id(self.tokenizer),
                )
                if self.causal:
                    out = out[:, inputs["input_ids"].shape[1] :]
                found += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [each.strip() for each in found]

    def _most(self, inputs: dict[str, Any]) -> int:
        """Tokens that may be generated: what is asked for, as far as there are learned positions.

        Raises InputError for a prompt that leaves none.
        """
        if self.room is None:
            return self.max_new_tokens
        left = self.room - (inputs["input_ids"].shape[1] if self.causal else 1)
        if left < 1:
            raise InputError(
                explain("text", expected=f"fewer than {self.room} tokens", found=self.room - left)
            )
        return min(self.max_new_tokens, left)

    def _batches(
        self, texts: Sequence[Input], bars: Bars, batch_size: int
    ) -> Iterator[dict[str, Any]]:
        tokens = read_inputs(self.tokenizer, texts, self.config.max_length)
        for at in range(0, len(texts), batch_size):
            members = list(range(at, min(at + batch_size, len(texts))))
            inputs: dict[str, Any] = tokens.batch(members, pad_id(self.tokenizer))
            yield {name: values.to(self.device) for name, values in inputs.items()}
            bars("predicting", members[-1] + 1, len(texts), "examples")


def _other_inputs(wrong: str, right: str, kind: str) -> InputError:
    return InputError(
        explain(wrong, expected=f"{right}: the adapter reads {kind}", found=f"{wrong}")
    )


def _padded_before(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch that is padded behind its tokens, padded before them: what is generated follows."""
    mask = inputs["attention_mask"]
    away = mask.shape[1] - mask.sum(1, keepdim=True)
    places = (torch.arange(mask.shape[1], device=mask.device) - away) % mask.shape[1]
    return {name: values.gather(1, places) for name, values in inputs.items()}
