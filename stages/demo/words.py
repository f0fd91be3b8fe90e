"""Words with their roles, and the small pieces that the demo grammar builds clauses from."""

from dataclasses import dataclass

from sherl_pipe.stages.demo.topics import Verb

DETERMINERS = frozenset(("the", "this", "these", "those", "a", "an", "my", "our", "most"))
_WRONG_DETERMINER = {"this": "these", "these": "this", "those": "that", "a": "an", "an": "a"}


@dataclass(frozen=True)
class Word:
    """One word, its role and, where there is one, the form that would be an error here."""

    text: str
    role: str = "other"
    wrong: str = ""


@dataclass(frozen=True)
class Phrase:
    """A noun phrase with what its verb agrees with."""

    words: tuple[Word, ...]
    plural: bool


@dataclass(frozen=True)
class Clause:
    """A finished opinion: its words and how strongly it is expressed, not yet clipped."""

    words: list[Word]
    strength: float


def words_of(text: str, role: str = "other") -> list[Word]:
    """The words of a fixed phrase, determiners recognised."""
    return [
        Word(item, "det", _WRONG_DETERMINER.get(item, ""))
        if item in DETERMINERS
        else Word(item, role)
        for item in text.split()
    ]


def article(following: str) -> Word:
    """The indefinite article that fits the word ``following``."""
    vowel = following[0] in "aeiou"
    return Word("an", "det", "a") if vowel else Word("a", "det", "an")


def agreeing(one: str, many: str, plural: bool, role: str = "verb") -> Word:
    """The form that agrees with the subject; its error is the other one."""
    return Word(many, role, one) if plural else Word(one, role, many)


def be(tense: str, plural: bool) -> Word:
    """A form of "be" in the tense ``past`` or ``present``."""
    return agreeing("was", "were", plural) if tense == "past" else agreeing("is", "are", plural)


def past(verb: Verb, plural: bool) -> Word:
    """A past form; its error is the present form that does not agree with the subject."""
    return Word(verb.past, "verb", verb.third if plural else verb.base)


def present(verb: Verb, plural: bool) -> Word:
    """A present form; its error is the other one."""
    return agreeing(verb.third, verb.base, plural)
