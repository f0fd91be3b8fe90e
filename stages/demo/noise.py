"""What the demo's pre-training does to a line of text, on lists of token ids.

Span corruption is T5's: spans of the input give way to sentinels, the target lists what stood
there.  Two additions make the encoder itself do the work, which in so small a model the decoder
would do otherwise.  Fault spotting drops, doubles, exchanges or replaces a word and marks the
place; its faults are blind to grammar, drawn on ids and spellings, not from the violations of the
tasks.  Foresight cuts a line at a mark, so that the rest can be guessed from what went before.
"""

import random
from collections.abc import Sequence

CORRUPTED_SHARE = 0.15
MEAN_SPAN = 3
_UNTOUCHED_SHARE = 0.5
_SHORTEST_START = 6
_COMMON_LETTERS = 3
_LOOK_ALIKES = (
    ("was", "were"),
    ("is", "are"),
    ("has", "have"),
    ("a", "an"),
    ("it", "they"),
    ("this", "these"),
    ("that", "those"),
    ("did", "would"),
)

Pair = tuple[list[int], list[int]]


def span_corruption(ids: Sequence[int], sentinels: Sequence[int], rng: random.Random) -> Pair:
    """Input and target of T5's objective; both without the closing end-of-sequence id."""
    noisy = min(max(1, round(len(ids) * CORRUPTED_SHARE)), len(ids) - 1)
    spans = min(max(1, round(noisy / MEAN_SPAN)), len(sentinels) - 1, len(ids) - noisy)
    lengths = _partition(noisy, spans, rng)
    # One token at least is kept between two spans; the ends may go.
    gaps = _partition(len(ids) - noisy + 2, spans + 1, rng)
    gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
    source: list[int] = []
    target: list[int] = []
    position = 0
    for gap, length, sentinel in zip(gaps, lengths, sentinels, strict=False):
        source += [*ids[position : position + gap], sentinel]
        target += [sentinel, *ids[position + gap : position + gap + length]]
        position += gap + length
    source += ids[position:]
    return source, [*target, sentinels[spans]]


def _partition(total: int, parts: int, rng: random.Random) -> list[int]:
    """``parts`` positive numbers with the sum ``total``, all compositions equally likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]


def look_alikes(words: Sequence[tuple[str, int]]) -> dict[int, tuple[int, ...]]:
    """For each word's id the ids of its look-alikes: inflections by spelling, and a short list."""
    ids = dict(words)
    groups: dict[str, list[str]] = {}
    for word, _ in words:
        if len(word) > _COMMON_LETTERS:
            groups.setdefault(word[:_COMMON_LETTERS], []).append(word)
    pairs = {
        (one, other)
        for group in groups.values()
        for one in group
        for other in group
        if one != other
        and other.startswith(one[: max(_COMMON_LETTERS, len(one) - 2)])
        and abs(len(one) - len(other)) <= 2
    }
    pairs |= set(_LOOK_ALIKES) | {(other, one) for one, other in _LOOK_ALIKES}
    table: dict[int, list[int]] = {}
    for one, other in sorted(pairs):
        if one in ids and other in ids:
            table.setdefault(ids[one], []).append(ids[other])
    return {word: tuple(others) for word, others in table.items()}


def faulty(ids: Sequence[int], alike: dict[int, tuple[int, ...]], rng: random.Random) -> Pair:
    """The sentence, half of the time with a fault, and a 1 at the fault for each token.

    The marks are one longer than the sentence, for the closing end-of-sequence id: a word that
    is missing is marked on what follows it.
    """
    words, marks = list(ids), [0] * (len(ids) + 1)
    if len(words) > 1 and rng.random() >= _UNTOUCHED_SHARE:
        _damage(words, marks, alike, rng)
    return words, marks


def _damage(
    ids: list[int], marks: list[int], alike: dict[int, tuple[int, ...]], rng: random.Random
) -> None:
    """One fault at a random place; look-alikes come most often, for they are the hard ones."""
    place, kind = rng.randrange(len(ids) - 1), rng.random()
    if kind < 0.4:
        candidates = [index for index, item in enumerate(ids) if item in alike]
        if candidates:
            place = rng.choice(candidates)
            ids[place], marks[place] = rng.choice(alike[ids[place]]), 1
    elif kind < 0.6:
        if ids[place] != ids[place + 1]:
            ids[place], ids[place + 1] = ids[place + 1], ids[place]
            marks[place] = marks[place + 1] = 1
    elif kind < 0.8:
        ids.insert(place, ids[place])
        marks.insert(place + 1, 1)
    elif len(ids) > 2:
        del ids[place], marks[place]
        marks[place] = 1


def cuts(ids: Sequence[int], marks: frozenset[int], digits: frozenset[int]) -> list[int]:
    """Where the line may be cut: after a mark inside it that is no decimal point."""
    return [
        place + 1
        for place in range(_SHORTEST_START - 1, len(ids) - 1)
        if ids[place] in marks and ids[place + 1] not in digits
    ]
