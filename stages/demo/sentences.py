"""The rules of the demo grammar: clauses built word by word, each word with its role.

A clause is a list of words; their roles are what the violations of
:mod:`sherl_pipe.stages.demo.violations` act on.  Every function takes its choices from the
random generator of the :class:`Writer`, so a seed fixes the text.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

from sherl_pipe.stages.demo import lexicon as lex
from sherl_pipe.stages.demo.topics import TOPIC_WORDS, Verb
from sherl_pipe.stages.demo.words import (
    Clause,
    Phrase,
    Word,
    agreeing,
    article,
    be,
    past,
    present,
    words_of,
)

Item = TypeVar("Item")

NEGATED = 0.12
_LEVEL_WEIGHTS = (0.25, 0.3, 0.25, 0.2)


class Writer:
    """Writes clauses about one topic with one polarity."""

    def __init__(self, rng: random.Random, topic: int, positive: bool) -> None:
        self.rng = rng
        self.topic = TOPIC_WORDS[topic]
        self.positive = positive

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One item, all equally likely."""
        return items[int(self.rng.random() * len(items))]

    # Parts

    def person(self) -> Phrase:
        """Somebody who holds the opinion."""
        text, plural = self.pick(lex.PERSONS + self.topic.people)
        return Phrase(tuple(words_of(text)), plural)

    def thing(self, plain: bool = False) -> Phrase:
        """Something to have an opinion on; ``plain`` leaves out place and relative clause."""
        plural = self.chance(0.45)
        determiner = self.pick(
            ("the", "the", "these", "those", "most", "our")
            if plural
            else ("the", "the", "this", "our")
        )
        words = words_of(determiner)
        if self.chance(0.3):
            words.append(Word(self.pick(lex.MODIFIERS), "adj"))
        words.append(Word(self.pick(self.topic.things)[plural], "noun"))
        if not plain and self.chance(0.45):
            words += words_of(self.pick(self.topic.places))
        elif not plain and self.chance(0.25):
            who = self.person()
            verb, _ = self.finite(self.pick(self.topic.verbs), who.plural)
            words += [Word("that"), *who.words, verb]
        return Phrase(tuple(words), plural)

    def finite(self, verb: Verb, plural: bool) -> tuple[Word, tuple[str, ...]]:
        """A past or present form, and the times that suit it."""
        if self.chance(0.65):
            return past(verb, plural), lex.PAST_TIMES
        return present(verb, plural), lex.PRESENT_TIMES

    def denied(self, verb: Verb, plural: bool) -> list[Word]:
        """ "Did not like", "does not like"."""
        do = Word("did", "aux")
        if self.chance(0.35):
            do = agreeing("does", "do", plural, "aux")
        return [do, Word("not", "adv"), Word(verb.base, "verb", verb.past)]

    def level(self) -> int:
        """A level of strength, 1 to 4."""
        return self.rng.choices((1, 2, 3, 4), _LEVEL_WEIGHTS)[0]

    def adjective(self, positive: bool, level: int) -> str:
        """An adjective of the polarity and level, sometimes one of the topic's own."""
        own = (self.topic.good if positive else self.topic.bad).get(level, ())
        general = (lex.GOOD if positive else lex.BAD)[level]
        return self.pick(own) if own and self.chance(0.3) else self.pick(general)

    def praise(self, positive: bool, level: int | None = None) -> Clause:
        """An adjective with or without a degree word."""
        level = level or self.level()
        words, strength = [Word(self.adjective(positive, level), "adj")], float(level)
        if self.chance(0.5):
            degree, change = self.pick(lex.DEGREES[level])
            words.insert(0, Word(degree, "adv"))
            strength += change
        elif self.chance(0.15):
            second = Word(self.adjective(positive, level), "adj")
            words += [Word("and"), second] if second not in words else []
        return Clause(words, strength)

    def negated_praise(self) -> Clause:
        """A negation and an adjective of the other polarity, which is never an extreme one."""
        level = self.pick((1, 2, 2, 3))
        before, after, change = self.pick(lex.NEGATIONS)
        adjective = Word(self.adjective(not self.positive, level), "adj")
        words = [*words_of(before, "adv"), adjective, *words_of(after, "adv")]
        return Clause(words, level + change)

    def understated(self) -> Clause:
        """What a negation may stand before: an adjective of the other polarity, or with "very"."""
        level = self.pick((1, 2, 2, 3))
        words = [Word(self.adjective(not self.positive, level), "adj")]
        if level > 1 and self.chance(0.3):
            return Clause([Word("very", "adv"), *words], level - 1.0)
        return Clause(words, level - 0.5)

    def linking_verb(self, plural: bool, negated: bool) -> tuple[list[Word], tuple[str, ...]]:
        """A form of "be" or its like, and the times that suit the tense."""
        tense = self.rng.random()
        if tense < 0.55:
            return [be("past", plural)], lex.PAST_TIMES
        if tense < 0.75 or negated:
            return [be("present", plural)], lex.PRESENT_TIMES
        if tense < 0.85:
            return [agreeing("has", "have", plural, "aux"), Word("been", "verb")], lex.PERFECT_TIMES
        if tense < 0.93:
            return [agreeing("seems", "seem", plural)], lex.PRESENT_TIMES
        return [Word("seemed", "verb", "seems" if plural else "seem")], lex.PAST_TIMES

    # Clauses

    def copular(self, plain: bool = False) -> Clause:
        """ "The soup was really good last night"."""
        subject, negated = self.thing(plain), self.chance(NEGATED)
        verb, times = self.linking_verb(subject.plural, negated)
        opinion = self.negated_praise() if negated else self.praise(self.positive)
        words = [*subject.words, *verb, *opinion.words]
        if not plain and self.chance(0.4):
            words += words_of(self.pick(times))
        return Clause(words, opinion.strength)

    def feeling(self) -> Clause:
        """ "My sister really loved the soup because it was good"."""
        who, what = self.person(), self.thing()
        if self.chance(NEGATED):
            verb, strength = self.pick(
                lex.NEGATABLE_DISLIKING if self.positive else lex.NEGATABLE_LIKING
            )
            words = [*who.words, *self.denied(verb, who.plural), *what.words]
            strength -= 0.5
            if self.chance(0.5):
                words += words_of("at all", "adv")
                strength += 1.0
            return Clause(words, strength)
        verb, strength = self.pick(lex.LIKING if self.positive else lex.DISLIKING)
        words = list(who.words)
        if self.chance(0.5):
            degree, change = self.pick(
                lex.STRONG_VERB_DEGREES if strength >= 4 else lex.MILD_VERB_DEGREES
            )
            words.append(Word(degree, "adv"))
            strength += change
        form, times = self.finite(verb, who.plural)
        words += [form, *what.words]
        if self.chance(0.3) and len(words) < 12:
            reason = self.praise(self.positive, min(4, int(strength) or 1))
            tense = "present" if times is lex.PRESENT_TIMES else "past"
            words += [
                Word("because"),
                Word("they" if what.plural else "it"),
                be(tense, what.plural),
                *reason.words,
            ]
        elif self.chance(0.4):
            words += words_of(self.pick(times))
        return Clause(words, strength)

    def presenting(self) -> Clause:
        """ "It was not a good soup for the children" or "what a good soup that was"."""
        noun = self.pick(self.topic.things)[0]
        negated = self.chance(NEGATED)
        opinion = self.understated() if negated else self.praise(self.positive)
        described = [article(opinion.words[0].text), *opinion.words, Word(noun, "noun")]
        if not negated and opinion.strength >= 3 and self.chance(0.4):
            words = [Word("what"), *described, Word("that"), Word("was", "verb", "were")]
            return Clause([*words, *words_of(self.pick(lex.PAST_TIMES))], opinion.strength + 0.5)
        was = Word("was", "verb", "were")
        middle = [was, Word("not", "adv")] if negated else [was]
        words = [Word("it"), *middle, *described, *words_of(self.pick(lex.AUDIENCE))]
        return Clause(words, opinion.strength)

    def judgement(self) -> Clause:
        """ "The critics found the soup rather good"."""
        who, what, verb = self.person(), self.thing(), self.pick(lex.JUDGING)
        if self.chance(NEGATED):
            opinion = self.understated()
            denied = self.denied(verb, who.plural)
            return Clause([*who.words, *denied, *what.words, *opinion.words], opinion.strength)
        opinion = self.praise(self.positive)
        form, _ = self.finite(verb, who.plural)
        return Clause([*who.words, form, *what.words, *opinion.words], opinion.strength)

    def contrast(self) -> Clause:
        """ "Although the cake was bad, the soup was good": the main clause is the opinion."""
        other = Writer(self.rng, TOPIC_WORDS.index(self.topic), not self.positive)
        side, main = other.copular(plain=True), self.copular(plain=True)
        strength = main.strength - 0.5
        if self.chance(0.5):
            return Clause([Word("although"), *side.words, Word(",", "mark"), *main.words], strength)
        return Clause([*main.words, *words_of("even though"), *side.words], strength)

    def comparison(self) -> Clause:
        """ "We have never heard such a good song": "never" does not flip this one."""
        who, verb = self.person(), self.pick(self.topic.verbs)
        nouns, level = self.pick(self.topic.things), self.level()
        adjective = self.adjective(self.positive, level)
        plural = self.chance(0.4)
        have = agreeing("has", "have", who.plural, "aux")
        often, change = self.pick((("never", 1.0), ("rarely", 0.5), ("seldom", 0.5)))
        words = [*who.words, have, Word(often, "adv"), Word(verb.participle, "verb"), Word("such")]
        if not plural:
            words.append(article(adjective))
        return Clause([*words, Word(adjective, "adj"), Word(nouns[plural], "noun")], level + change)

    def advice(self) -> Clause:
        """ "We would gladly recommend the soup for a birthday"."""
        who, what = self.person(), self.thing()
        if self.chance(0.35):
            before, verb, strength = self.pick(lex.PLAIN_ADVICE[self.positive])
            words = [*who.words, *words_of(before, "adv"), present(verb, who.plural)]
        else:
            before, verb, strength = self.pick(lex.WOULD_ADVICE[self.positive])
            words = [
                *who.words,
                Word("would", "aux"),
                *words_of(before, "adv"),
                Word(verb.base, "verb", verb.third),
            ]
        words += what.words
        if self.chance(0.5):
            words += words_of(self.pick(lex.ADVICE_ENDS))
        return Clause(words, strength)

    def absence(self) -> Clause:
        """ "There was nothing bad about the soup"."""
        level = self.pick((1, 2, 3, 4))
        words = [
            Word("there"),
            Word("was", "verb", "were"),
            Word("nothing", "adv"),
            Word(self.adjective(not self.positive, level), "adj"),
            Word("about"),
            *self.thing().words,
        ]
        return Clause(words, level + 0.5)
