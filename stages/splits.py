"""The inputs of a split: each text or image once, and none that a split before it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.stages.source import Source
from sherl_pipe.stages.templates import Input, Template
from sherl_pipe.stages.tokens import Tokens


@dataclass(frozen=True)
class Inputs:
    """What a split asks for.

    Attributes:
        rows: of the data.
        distinct: different inputs among them.
        texts: rendered segments, or the image, by example id, of inputs that no split before this
            one holds.
        template: that rendered them.
    """

    rows: int
    distinct: int
    texts: Mapping[bytes, Input]
    template: Template

    @property
    def reused(self) -> int:
        """Inputs that another split holds already."""
        return self.distinct - len(self.texts)

    def notes(self, tokens: Tokens) -> dict[str, Any]:
        """What the main stream's manifest says of them."""
        return {
            "template": self.template.to_json(),
            "reused": self.reused,
            "truncated": tokens.truncated,
        }


def inputs_of(source: Source, template: Template, known: dict[bytes, str]) -> Inputs:
    """The inputs of a split. `known`, the split of every example, gets those of this one."""
    distinct: dict[bytes, Input] = {}
    for identity, texts in zip(source.ids(template), source.inputs(template), strict=True):
        distinct.setdefault(identity, texts)
    here = {
        identity: texts
        for identity, texts in distinct.items()
        if known.setdefault(identity, source.name) == source.name
    }
    return Inputs(len(source.rows), len(distinct), here, template)
