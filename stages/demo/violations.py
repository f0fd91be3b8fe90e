"""Ways to spoil a sentence: each makes one grammatical error, or nothing where it cannot.

The errors are chosen so that the result is no sentence of ordinary English: a verb before an
adverb, for one, is not swapped with it, because that order is often fine too.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from sherl_pipe.stages.demo.words import Word

Violation = Callable[[random.Random, list[Word]], list[Word] | None]


def _places(words: list[Word], *roles: str) -> list[int]:
    return [index for index, word in enumerate(words) if word.role in roles]


def wrong_form(rng: random.Random, words: list[Word]) -> list[Word] | None:
    """ "The singers was": a verb that does not agree with its subject or auxiliary."""
    return _substitute(rng, words, _places(words, "verb", "aux"))


def wrong_determiner(rng: random.Random, words: list[Word]) -> list[Word] | None:
    """ "A excellent song", "this songs"."""
    return _substitute(rng, words, _places(words, "det"))


def _substitute(rng: random.Random, words: list[Word], places: list[int]) -> list[Word] | None:
    places = [index for index in places if words[index].wrong]
    if not places:
        return None
    index = rng.choice(places)
    spoilt = replace(words[index], text=words[index].wrong, wrong="")
    return [*words[:index], spoilt, *words[index + 1 :]]


def swapped(rng: random.Random, words: list[Word]) -> list[Word] | None:
    """ "Soup the was good", "the soup good was"."""
    places = [
        index
        for index in _places(words, "det", "verb")
        if index + 1 < len(words) and words[index + 1].role in ("det", "adj", "noun", "verb")
    ]
    if not places:
        return None
    index = rng.choice(places)
    return [*words[:index], words[index + 1], words[index], *words[index + 2 :]]


def missing_verb(rng: random.Random, words: list[Word]) -> list[Word] | None:
    """ "The soup really good"."""
    places = _places(words, "verb")
    if not places:
        return None
    index = rng.choice(places)
    return words[:index] + words[index + 1 :]


def doubled(rng: random.Random, words: list[Word]) -> list[Word] | None:
    """ "The soup was was good", "the the soup"."""
    places = _places(words, "verb", "det")
    if not places:
        return None
    index = rng.choice(places)
    return [*words[:index], words[index], *words[index:]]


VIOLATIONS: tuple[Violation, ...] = (
    wrong_form,
    wrong_form,
    wrong_determiner,
    swapped,
    missing_verb,
    doubled,
)


def spoil(rng: random.Random, words: list[Word]) -> list[Word]:
    """The sentence with one error in it; every sentence of the grammar has a verb to spoil."""
    for violation in rng.sample(VIOLATIONS, len(VIOLATIONS)):
        spoilt = violation(rng, words)
        if spoilt is not None:
            return spoilt
    return [words[0], *words]
