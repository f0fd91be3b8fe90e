"""The two objectives of the demo's pre-training, on lists of token ids.

Span corruption is T5's: spans of the input give way to sentinels, the target lists what stood
there.  Repair is an addition: one or two words are dropped, doubled, exchanged or replaced by a
look-alike, and the target is the sentence as it was; some sentences stay as they are.  It makes
the encoder notice faults of grammar, which hardly any span corruption does in so small a model.
Its noise is blind to grammar: it draws on ids and spellings, not on the violations of the tasks.
"""

import random
from collections.abc import Sequence

CORRUPTED_SHARE = 0.15
MEAN_SPAN = 3
_UNTOUCHED_SHARE = 0.35
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


def repair(ids: Sequence[int], alike: dict[int, tuple[int, ...]], rng: random.Random) -> Pair:
    """A damaged copy of the sentence, and the sentence."""
    damaged = list(ids)
    if rng.random() >= _UNTOUCHED_SHARE:
        for _ in range(1 + (rng.random() < 0.2)):
            _damage(damaged, alike, rng)
    return damaged, list(ids)


def _damage(ids: list[int], alike: dict[int, tuple[int, ...]], rng: random.Random) -> None:
    """One fault at a random place; look-alikes come most often, for they are the hard ones."""
    place, kind = rng.randrange(len(ids) - 1), rng.random()
    if kind < 0.4:
        candidates = [index for index, item in enumerate(ids) if item in alike]
        if candidates:
            place = rng.choice(candidates)
            ids[place] = rng.choice(alike[ids[place]])
    elif kind < 0.6:
        ids[place], ids[place + 1] = ids[place + 1], ids[place]
    elif kind < 0.8:
        ids.insert(place, ids[place])
    elif len(ids) > 2:
        del ids[place]
