"""The identity of a cache, from what makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sherl_pipe.cache import Codec, Identity, StreamSpec
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.inputs import preprocessor_fingerprint
from sherl_pipe.stages.taps import extracted_taps


def identify(
    backbone: Backbone,
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    codec: Codec,
    taps: str | Sequence[int],
    versions: Mapping[str, str],
) -> Identity:
    """The identity of the cache that these settings make. Raises InputError for odd taps."""
    depths = {stream: len(backbone.blocks(stream)) for stream in backbone.family.streams}
    chosen = extracted_taps(backbone.family, depths, taps)
    return Identity(
        backbone={
            "name": backbone.name,
            "revision": backbone.revision,
            "architecture": type(backbone.model).__name__,
            "model_type": backbone.config.model_type,
            "parameters": backbone.parameters,
            "fingerprint": backbone.fingerprint,
            "config": backbone.config_hash,
            "dtype": str(backbone.dtype).removeprefix("torch."),
        },
        tokenizer=preprocessor_fingerprint(tokenizer),
        template=template,
        max_length=max_length,
        streams={
            stream: StreamSpec(chosen[stream], depths[stream], backbone.width_of(stream))
            for stream in depths
        },
        codec=codec,
        versions=versions,
    )
