"""Images found by texts, with an adapter of a dual encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.pipeline.predict import open_adapter
from sherl_pipe.stages.adapter import TunedModel
from sherl_pipe.stages.adapter_files import read_adapter
from sherl_pipe.stages.inputs import read_inputs
from sherl_pipe.stages.picture_files import image_files
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.progress import Progress
from sherl_pipe.stages.source import check_text
from sherl_pipe.stages.templates import Input
from torch import Tensor

_BATCH = 32


class Retriever:
    """An adapter attached to its live dual encoder.

    Args:
        folder: of the adapter.
        model, device: as for `Predictor`.

    Raises InputError for an adapter that ranks nothing, StaleCacheError for another backbone,
    tokenizer or image processor.
    """

    def __init__(self, folder: Path, *, model: str | None = None, device: str = "auto") -> None:
        kind = read_adapter(folder)[0].labels.kind
        if kind != "retrieval":
            raise InputError(
                explain(
                    f"inputs for {folder}",
                    expected=f"--text or --image: its answers are a {kind}",
                    found="both",
                )
            )
        self.config, backbone, route, self.reader = open_adapter(folder, model, device)
        self.device, self.model = backbone.device, TunedModel(backbone, route).eval()

    def rank(
        self, texts: Sequence[str], images: Sequence[Path], top: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """For every text the nearest images: `{"text", "images": [{"image", "score"}, ...]}`, the
        score being the cosine, the first the nearest.

        Args:
            texts: at least one.
            images: files, or folders of them.
            top: how many of them, at most.

        Raises InputError for an empty text, and what reading images raises.
        """
        for number, text in enumerate(texts):
            check_text(text, f"--text {number + 1}")
            if not text.strip():
                found = "an empty one"
                raise InputError(explain(f"--text {number + 1}", expected="a text", found=found))
        pictures = [Picture(file, str(file)) for path in images for file in image_files(path)]
        queries = self.embeddings([(text,) for text in texts], progress)
        scores = queries @ self.embeddings(pictures, progress).T
        best = scores.topk(min(top, len(pictures)), dim=1)
        return [
            {
                "text": text,
                "images": [
                    {"image": pictures[place].origin, "score": score}
                    for score, place in zip(values, places, strict=True)
                ],
            }
            for text, values, places in zip(
                texts, best.values.tolist(), best.indices.tolist(), strict=True
            )
        ]

    def embeddings(self, inputs: Sequence[Input], progress: Progress) -> Tensor:
        """Unit embeddings `[N, E]` of texts, or of images."""
        tokens = read_inputs(self.reader, inputs, self.config.max_length)
        found = []
        with torch.inference_mode():
            for at in range(0, len(inputs), _BATCH):
                members = range(at, min(at + _BATCH, len(inputs)))
                batch = tokens.batch(list(members), self.reader.pad_token_id or 0)
                out = self.model(**{name: each.to(self.device) for name, each in batch.items()})
                own = out.text_embeds if out.image_embeds is None else out.image_embeds
                found.append(own.float().cpu())
                progress("embedding", members[-1] + 1, len(inputs), "inputs")
        return torch.cat(found)
