"""What every method says of itself, and checks that methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import Family
from sherl_pipe.stages.methods.route import RouteSpec
from sherl_pipe.stages.taps import LackingTapsError
from torch import Tensor


class Method(ABC):
    """A tuning method: which taps it reads, and how its route is built.

    Attributes:
        usual: defaults of the settings that mean something of their own to each method:
            `reduction`, `late` and `init`.
        inits: what its trained weights can start from.
        speaks: whether it has a route in front of a causal model's own head.
        given: those of them that `Tuner.start_from` has to be given weights for.
        dual: whether it has a form for dual encoders.
    """

    usual: ClassVar[Mapping[str, Any]]
    inits: ClassVar[tuple[str, ...]]
    given: ClassVar[frozenset[str]] = frozenset()
    dual: ClassVar[bool] = False
    speaks: ClassVar[bool] = False

    @classmethod
    def usual_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """`usual`, where the backbone or the cached taps decide what is; `head` too.

        Args:
            streams: what a cache holds, or would hold.
        """
        return cls.usual

    @classmethod
    def published_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """What the paper has otherwise than `usual_for`, of the same settings and `loss`.

        Args:
            streams: what a cache holds, or would hold.
        """
        return {}

    @staticmethod
    @abstractmethod
    def late_blocks(late: int) -> dict[str, int]:
        """How many of a stream's last blocks its route runs; none of one that is not named."""

    @staticmethod
    @abstractmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """`RouteSpec.taps` and `RouteSpec.last`, of the taps that a cache holds.

        Raises InputError where the cache lacks what the method cannot do without.
        """

    @staticmethod
    def variant(family: Family) -> str | None:
        """`RouteSpec.variant` on a family's backbones; there is one by default."""
        return None

    @staticmethod
    @abstractmethod
    def build(backbone: Backbone, spec: RouteSpec) -> Any:
        """A fresh `Route`; only its own parameters require gradients.

        Raises InputError for a structure that the backbone does not allow.
        """

    @staticmethod
    def from_reference(
        backbone: Backbone,
        params: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[int] | None],
        reduction: int,
    ) -> Any:
        """A `Route` on T5 with the papers' parameters, where a paper has T5.

        Args:
            params: tensors by the papers' names.
            layers: by stream, the 0-based blocks with side layers; None for all of them.
            reduction: the backbone's width over the reduced width.

        Raises InputError or RuntimeError for parameters that do not fit, and InputError for a
        method that was not published for T5.
        """
        raise InputError(
            explain("method", expected="one that was published for T5: sherl, lst", found="another")
        )


def cached_taps(
    stream: str, held: Sequence[int], wanted: Sequence[int], least: int = 1
) -> tuple[int, ...]:
    """Those of `wanted` that a cache holds of a stream, at least `least` of them.

    Raises LackingTapsError for fewer.
    """
    found = tuple(tap for tap in wanted if tap in held)
    if len(found) < least:
        which = "" if least == len(wanted) else f"{least} or more of "
        raise LackingTapsError(stream, f"{which}{list(wanted)}", held, wanted)
    return found


def require_late(late: int, least: int, most: int, method: str) -> None:
    """Raise InputError for a late route of other than `least` to `most` blocks."""
    if not least <= late <= most:
        wanted = f"{least} to {most}" if least < most else f"{least}"
        raise InputError(explain("late", expected=f"{wanted} for {method}", found=late))
