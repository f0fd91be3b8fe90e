"""Which taps a method reads and an extraction stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.families import Family


def paper_blocks(blocks: int) -> list[int]:
    """Side layers of the published T5-base run, [1,2,3,5,6,7,9,10,11] of 12 (SPEC 3.2), for any
    depth: every block whose number is no multiple of four."""
    return [block for block in range(blocks) if block % 4] or [0]


def paper_taps(family: Family, stream: str, blocks: int, late: int = 1) -> list[int]:
    """Taps that SHERL reads from a stream.

    T5 encoder: the embedding and the outputs of the side layers. T5 decoder: the same below the
    late block. Encoders: every input up to that of the late block.
    """
    if not family.seq2seq:
        return list(range(blocks - late + 1))
    top = blocks if stream == "encoder" else blocks - late
    return [0, *(block + 1 for block in paper_blocks(blocks) if block + 1 <= top)]


class LackingTapsError(InputError):
    """A cache lacks taps that a method needs (exit 3).

    Attributes:
        taps: that `extract` would have to add.
    """

    def __init__(self, stream: str, expected: object, held: Sequence[int], wanted: Iterable[int]):
        self.taps = tuple(sorted({*wanted} - {*held}))
        listed = ",".join(map(str, self.taps))
        super().__init__(
            explain(
                f"taps of the {stream} stream",
                expected=expected,
                found=f"{list(held)} in the cache",
                todo=f"`sherl-pipe extract --taps {listed}`, else as the cache was made, adds "
                "what is missing.",
            )
        )


def extracted_taps(
    family: Family, depths: Mapping[str, int], wanted: str | Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The taps that `extract` stores per stream.

    Args:
        depths: blocks per stream.
        wanted: `paper`, `all`, or tap numbers, for every stream that has them.

    A T5 encoder's top tap is always among them (label words attached later need it), and so is
    the state that enters the last decoder block (the late route's own input).

    Raises InputError for a tap that no stream has.
    """
    deepest = max(depths, key=lambda stream: depths[stream])
    taps: dict[str, tuple[int, ...]] = {}
    for stream, blocks in depths.items():
        if wanted == "paper":
            chosen = paper_taps(family, stream, blocks)
        elif wanted == "all":
            chosen = list(range(blocks + (0 if stream == "decoder" else 1)))
        else:
            chosen = [int(tap) for tap in wanted if stream == deepest or int(tap) <= blocks]
        needed = [blocks] if stream == "encoder" else [blocks - 1] if stream == "decoder" else []
        result = tuple(sorted({*chosen, *needed}))
        if result[0] < 0 or result[-1] > blocks:
            raise InputError(
                explain(f"taps of the {stream}", expected=f"0 to {blocks}", found=list(result))
            )
        taps[stream] = result
    return taps
