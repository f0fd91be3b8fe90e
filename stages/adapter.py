"""Tuned modules on the live backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.adapter_files import AdapterConfig, read_adapter
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import FAMILIES, stack_of
from sherl_pipe.stages.first_tokens import FirstTokens
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.live import count_tokens, speaking
from sherl_pipe.stages.methods.route import Route, pooled, trainable
from sherl_pipe.stages.surgery import placed
from sherl_pipe.stages.words import Scoring
from torch import Tensor, nn
from torch.nn import functional as F


class TunedModel(nn.Module):
    """The live backbone with a tuned route in it.

    Calling it gives what the backbone's own class gives for a text-to-text model, or a causal one
    that keeps its head (`loss`, `logits`, ...), `loss` and `logits [B, outputs]` for a pooled head,
    and unit embeddings of texts or images or both for a dual encoder (`text_embeds`,
    `image_embeds`, ...). Inputs may be padded on either side: the backbone is told where tokens
    are, unless it finds that by itself.
    """

    def __init__(self, backbone: Backbone, route: Route) -> None:
        super().__init__()
        self.route = route
        self.model = route.attach(backbone)
        self._spoken = backbone.family.seq2seq
        if backbone.family.causal and not route.spec.outputs:
            self._spoken = True
            self.model = speaking(backbone, self.model)
        self._width, self._family = backbone.width, backbone.family
        if self._family.places is not None:
            count_tokens(self.model, self._family)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """One forward pass.

        Args:
            input_ids: `[B, S]`.
            pixel_values: `[B, channels, height, width]`, of a model of images and in place of
                `input_ids`; of a dual encoder beside them too.
            attention_mask: `[B, S]`, 1 where there is a token; all ones by default.
            labels: token ids `[B, P]` with -100 where there is none (text-to-text), class
                numbers `[B]` or floats `[B]` (pooled head; mean squared error for one output).
            inputs: handed on to the backbone (`decoder_input_ids`, `token_type_ids`, ...).
        """
        if self._family.towers:
            return self.model(input_ids, attention_mask, pixel_values)
        if self._family.images:
            states = self.model(pixel_values=pixel_values, **inputs).last_hidden_state
            return self._answers(states, states.new_ones(states.shape[:2]), labels)
        if input_ids is None:
            raise TypeError("input_ids are missing")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self._family.seq2seq:
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs
            )
            # The two memories travel as one through the model; callers want the backbone's own.
            out.encoder_last_hidden_state = out.encoder_last_hidden_state[..., : self._width]
            return out
        if self._spoken:
            return self._continued_forward(input_ids, attention_mask, labels, inputs)
        return self._pooled_forward(input_ids, attention_mask, labels, inputs)

    def _continued_forward(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor | None, inputs: dict[str, Any]
    ) -> Any:
        if self._family.numbered:
            inputs.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        inputs.setdefault("use_cache", False)
        model: Any = self.model
        return model(input_ids=input_ids, attention_mask=mask, labels=labels, **inputs)

    def _pooled_forward(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor | None, inputs: dict[str, Any]
    ) -> Any:
        if self._family.numbered:
            # Padding in front of the tokens does not move them.
            inputs.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        states = self.model(input_ids=input_ids, attention_mask=mask, **inputs).last_hidden_state
        return self._answers(states, mask, labels)

    def _answers(self, states: Tensor, mask: Tensor, labels: Tensor | None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        route: Any = self.route
        logits = route.head(pooled(states, mask.bool(), route.spec.pool, route.spec.front))
        loss = None
        if labels is not None and logits.shape[-1] == 1:
            loss = F.mse_loss(logits[:, 0], labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own `generate`, KV cache included. Raises InputError for encoders."""
        if not self._spoken:
            raise InputError("an encoder with a pooled head does not generate; call the model")
        model: Any = self.model
        return model.generate(*args, **kwargs)

    def word_scores(self, scoring: Scoring | FirstTokens, **inputs: Tensor) -> Tensor:
        """Log-probability `[B, words]` of every label word."""
        if isinstance(scoring, FirstTokens):
            out = self(**inputs)
            last = pooled(out.logits, inputs["attention_mask"].bool(), "last")
            return scoring.score(last[:, None, list(scoring.tokens)])
        size, tree = inputs["input_ids"].shape[0], scoring.tree
        device = inputs["input_ids"].device
        mask = tree.flat_mask(next(self.parameters()).dtype).to(device)
        decoder = stack_of(self.model, self._family, "decoder")
        with placed(decoder, self._family, tree.flat_places().to(device)):
            out = self(
                **inputs,
                decoder_input_ids=tree.flat_tokens().to(device).expand(size, -1),
                decoder_attention_mask=mask.expand(size, -1, -1, -1),
            )
        return scoring.score(scoring.pick(out.logits[:, tree.first_places().to(device)]))


def load_route(folder: str | Path, backbone: Backbone) -> tuple[AdapterConfig, Route]:
    """An adapter's route on its backbone. Raises StaleCacheError for another backbone."""
    config, weights = read_adapter(folder)
    backbone.require(config.backbone, str(folder))
    route: Route = find_method(config.route.method).build(backbone, config.route)
    load_weights(route, weights, str(folder))
    return config, route


def load_weights(route: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy tuned weights in. Raises InputError unless exactly the tuned ones are given."""
    mine = trainable(route)
    if mine.keys() != weights.keys():
        odd = sorted(mine.keys() ^ weights.keys())
        raise InputError(explain(f"weights in {source}", expected=sorted(mine), found=odd))
    put_weights(mine, weights, source)


def put_weights(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], source: str
) -> None:
    """Copy weights into the parameters of the same names. Raises InputError unless all of them
    fit."""
    for name, values in weights.items():
        wanted = tuple(parameters[name].shape) if name in parameters else "no such weight"
        if wanted != tuple(values.shape):
            raise InputError(
                explain(f"{source}: shape of {name}", expected=wanted, found=tuple(values.shape))
            )
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)


def load_reference(
    backbone: Backbone | nn.Module,
    params: Mapping[str, Tensor],
    *,
    method: str,
    encoder_side_layers: Sequence[int] | None,
    decoder_side_layers: Sequence[int] | None,
    reduction: int,
) -> TunedModel:
    """The live T5 with the papers' side parameters.

    Args:
        backbone: a T5, from Hugging Face or as a `Backbone`.
        params: tensors under the papers' names: for `sherl` (SPEC 3.6)
            `encoder.side_mtsa_block.*`, for `lst` (SPEC 4) `encoder.side_block.*`, ...
        method: a key of `METHODS`.
        encoder_side_layers: 0-based blocks whose outputs are read; None for all of them.
        decoder_side_layers: the same.
        reduction: the backbone's width over the reduced width.

    Raises InputError for an unknown method or parameters that do not fit.
    """
    if not isinstance(backbone, Backbone):
        backbone = Backbone(backbone)
    if backbone.family is not FAMILIES["t5"]:
        raise InputError(
            explain("backbone of load_reference", expected="a T5", found=backbone.config.model_type)
        )
    layers = {"encoder": encoder_side_layers, "decoder": decoder_side_layers}
    try:
        route = find_method(method).from_reference(backbone, params, layers, reduction)
    except RuntimeError as error:  # how torch says that a name or a shape does not fit
        raise InputError(f"parameters: {' '.join(str(error).split())}") from error
    return TunedModel(backbone, route.to(backbone.device)).eval()
