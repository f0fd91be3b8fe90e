"""Sentences of the demo grammar with four labellings, and text to pre-train on.

Both come from a seed alone: no files, no models.  The task corpus is balanced by design: topic,
sentiment and acceptability are dealt out like cards before the sentences are written.
"""

import random
from dataclasses import dataclass

from sherl_pipe.stages.demo import lexicon as lex
from sherl_pipe.stages.demo.sentences import Writer
from sherl_pipe.stages.demo.topics import TOPICS
from sherl_pipe.stages.demo.violations import spoil
from sherl_pipe.stages.demo.words import Clause, Word, words_of

SHORTEST, LONGEST = 6, 18
_KINDS = (
    "copular",
    "feeling",
    "presenting",
    "judgement",
    "contrast",
    "comparison",
    "advice",
    "absence",
)
_KIND_WEIGHTS = (0.34, 0.2, 0.12, 0.12, 0.05, 0.07, 0.07, 0.03)
# Reactions ("so we complained") give the sentiment away, and teach it: rare in the tasks,
# frequent in the text to pre-train on.
_TASK_REACTIONS, _PRETRAINING_REACTIONS = 0.1, 0.4
_VERDICTS = 0.5
_NEUTRAL_SHARE = 0.2
_DECK = 16


@dataclass(frozen=True)
class Example:
    """One sentence and its labels for the four tasks."""

    sentence: str
    sentiment: int
    topic: int
    acceptability: int
    intensity: float


def corpus(count: int, seed: int) -> list[Example]:
    """``count`` distinct labelled sentences; the same arguments give the same list."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(seed)
    plan = [slot % _DECK for slot in range(count)]
    rng.shuffle(plan)
    examples: list[Example] = []
    seen: set[str] = set()
    for slot in plan:
        example = _example(rng, slot)
        while example.sentence in seen:
            example = _example(rng, slot)
        seen.add(example.sentence)
        examples.append(example)
    return examples


def pretraining_text(count: int, seed: int) -> list[str]:
    """``count`` acceptable sentences, opinions and neutral ones, to pre-train on.

    The seed is stretched so that it shares no random stream with a corpus of the same seed.
    """
    rng = random.Random(f"pre-training {seed}")
    sentences = []
    for _ in range(count):
        topic, positive = rng.randrange(len(TOPICS)), rng.random() < 0.5
        if rng.random() < _NEUTRAL_SHARE:
            sentences.append(render(_neutral(Writer(rng, topic, positive)), "."))
        else:
            writer = Writer(rng, topic, positive)
            words, strength, mark = _opinion(writer, _PRETRAINING_REACTIONS)
            line = render(words, mark)
            if rng.random() < _VERDICTS:
                line += " " + _verdict(writer, topic, strength)
            sentences.append(line)
    return sentences


def _verdict(writer: Writer, topic: int, strength: float) -> str:
    """A closing fragment of the same polarity and about the same strength: "Awful music!"."""
    level = min(4, max(1, round(strength)))
    noun = writer.pick(lex.VERDICT_NOUNS[topic])
    words = [Word(writer.adjective(writer.positive, level)), *words_of(noun)]
    return render(words, "!" if strength > 4 else ".")


def render(words: list[Word], mark: str) -> str:
    """The words as a line of text: a capital in front, marks attached, ``mark`` at the end."""
    text = " ".join(word.text for word in words).replace(" ,", ",")
    return text[:1].upper() + text[1:] + mark


def _example(rng: random.Random, slot: int) -> Example:
    """A sentence for one card of the deck: two bits and a topic."""
    topic, positive, acceptable = slot % 4, bool(slot // 4 % 2), bool(slot // 8 % 2)
    while True:
        words, strength, mark = _opinion(Writer(rng, topic, positive), _TASK_REACTIONS)
        if not acceptable:
            words = spoil(rng, words)
        if SHORTEST <= sum(word.role != "mark" for word in words) <= LONGEST:
            break
    return Example(render(words, mark), int(positive), topic, int(acceptable), strength)


def _opinion(writer: Writer, reactions: float) -> tuple[list[Word], float, str]:
    """An opinion with what may surround it: its words, its intensity and the closing mark."""
    kind = writer.rng.choices(_KINDS, _KIND_WEIGHTS)[0]
    clause: Clause = getattr(writer, kind)()
    words, strength, mark = list(clause.words), clause.strength, "."
    if writer.chance(0.25):
        opener, change = writer.pick(lex.OPENERS)
        words = [*words_of(opener), Word(",", "mark"), *words]
        strength += change
    if strength >= 2.5 and writer.chance(0.2):
        mark, strength = "!", strength + 0.5
    strength = min(5.0, max(0.0, strength))
    if writer.chance(reactions):
        table = lex.REACTIONS[writer.positive]
        reaction = writer.pick(table[(strength >= 2) + (strength >= 3.5)])
        words += [Word(",", "mark"), *words_of(reaction)]
    return words, strength, mark


def _neutral(writer: Writer) -> list[Word]:
    """A sentence without an opinion, often with a number in it."""
    who, what = writer.person(), writer.thing(plain=True)
    number = str(writer.rng.randrange(10))
    decimal = f"{writer.rng.randrange(10)}.{writer.rng.randrange(10)}"
    place = words_of(writer.pick(writer.topic.places))
    things = words_of(writer.pick(writer.topic.things)[1])
    time = words_of(writer.pick(lex.PAST_TIMES))
    verb = words_of(writer.pick(writer.topic.verbs).past)
    return writer.pick(
        (
            [*words_of("the price of"), *what.words, *words_of(f"was {decimal} euros"), *time],
            [*words_of(f"there were {number}"), *things, *place, *time],
            [*who.words, *verb, *what.words, *place, *time],
            [*who.words, *words_of("waited for"), *what.words, *words_of(f"for {decimal} hours")],
            [*who.words, *verb, *words_of(f"{number} or {decimal[0]}"), *things, *time],
            [
                *words_of(f"number {number} on the list of"),
                *things,
                *words_of(f"was chosen by {decimal[0]} people"),
            ],
        )
    )
