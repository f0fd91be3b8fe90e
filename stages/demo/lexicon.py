"""The words of the demo grammar: plain tables, no rules.

Strengths are on the scale of the ``intensity`` label (0.0 to 5.0); changes are added to them.
Adjectives are sorted into four levels of strength, which stand for 1.0, 2.0, 3.0 and 4.0.
"""

from dataclasses import dataclass

TASKS = ("sentiment", "topic", "acceptability", "intensity")
TOPICS = ("food", "travel", "music", "sport")


@dataclass(frozen=True)
class Verb:
    """The four forms of a verb that the grammar needs."""

    base: str
    third: str
    past: str
    participle: str


@dataclass(frozen=True)
class TopicWords:
    """What one topic talks about; adjective tables are keyed by level, 1 to 4."""

    things: tuple[tuple[str, str], ...]
    verbs: tuple[Verb, ...]
    places: tuple[str, ...]
    people: tuple[tuple[str, bool], ...]
    good: dict[int, tuple[str, ...]]
    bad: dict[int, tuple[str, ...]]


def _verb(forms: str) -> Verb:
    base, third, past, participle = forms.split()
    return Verb(base, third, past, participle)


def _nouns(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs of singular and plural; ``+`` marks a regular plural in -s."""
    pairs = (item.split("/") for item in text.split())
    return tuple(
        (one[:-1], one[:-1] + "s") if one[-1] == "+" else (one, many[0]) for one, *many in pairs
    )


FOOD = TopicWords(
    things=_nouns(
        "soup+ curry/curries salad+ pancake+ dumpling+ sandwich/sandwiches omelette+ dessert+"
    ),
    verbs=tuple(
        map(
            _verb,
            (
                "order orders ordered ordered",
                "taste tastes tasted tasted",
                "eat eats ate eaten",
                "cook cooks cooked cooked",
            ),
        )
    ),
    places=(
        "at the corner bistro",
        "in the school canteen",
        "from the night market",
        "at our kitchen table",
        "from the village bakery",
        "in the little diner",
    ),
    people=(
        ("the cook", False),
        ("the waiters", True),
        ("the bakers", True),
        ("our hungry guests", True),
    ),
    good={2: ("tasty", "fresh"), 3: ("delicious",), 4: ("mouthwatering",)},
    bad={2: ("tasteless", "greasy"), 3: ("rotten",), 4: ("inedible",)},
)
TRAVEL = TopicWords(
    things=_nouns("hotel+ hostel+ tour+ cruise+ ferry/ferries flight+ cabin+ excursion+"),
    verbs=tuple(
        map(
            _verb,
            (
                "book books booked booked",
                "choose chooses chose chosen",
                "reserve reserves reserved reserved",
                "pick picks picked picked",
            ),
        )
    ),
    places=(
        "in Lisbon",
        "near the old harbour",
        "on the northern island",
        "outside the airport",
        "in the Alps",
        "along the desert road",
    ),
    people=(
        ("the guide", False),
        ("the tourists", True),
        ("the pilot", False),
        ("the other passengers", True),
    ),
    good={2: ("scenic", "comfortable"), 3: ("relaxing",), 4: ("breathtaking",)},
    bad={2: ("cramped", "dirty"), 3: ("exhausting",), 4: ("nightmarish",)},
)
MUSIC = TopicWords(
    things=_nouns("song+ album+ concert+ melody/melodies solo+ ballad+ chorus/choruses opera+"),
    verbs=tuple(
        map(
            _verb,
            (
                "hear hears heard heard",
                "record records recorded recorded",
                "play plays played played",
                "perform performs performed performed",
            ),
        )
    ),
    places=(
        "in the jazz club",
        "on the radio",
        "at the summer festival",
        "in the concert hall",
        "by the town choir",
        "on the main stage",
    ),
    people=(
        ("the singers", True),
        ("the drummer", False),
        ("the pianist", False),
        ("the young violinists", True),
    ),
    good={2: ("catchy", "tuneful"), 3: ("moving",), 4: ("mesmerising",)},
    bad={2: ("tuneless", "noisy"), 3: ("deafening",), 4: ("unbearable",)},
)
SPORT = TopicWords(
    things=_nouns(
        "match/matches race+ final+ game+ tournament+ marathon+ rally/rallies derby/derbies"
    ),
    verbs=tuple(
        map(
            _verb,
            (
                "watch watches watched watched",
                "attend attends attended attended",
                "follow follows followed followed",
                "film films filmed filmed",
            ),
        )
    ),
    places=(
        "at the stadium",
        "on the muddy field",
        "in the second league",
        "at the ice rink",
        "on the new track",
        "against the champions",
    ),
    people=(
        ("the goalkeeper", False),
        ("the referee", False),
        ("the fans", True),
        ("the young runners", True),
    ),
    good={2: ("exciting", "lively"), 3: ("thrilling",), 4: ("spectacular",)},
    bad={2: ("sloppy", "clumsy"), 3: ("lifeless",), 4: ("humiliating",)},
)
TOPIC_WORDS = (FOOD, TRAVEL, MUSIC, SPORT)

GOOD = {
    1: ("decent", "passable", "acceptable", "adequate"),
    2: ("good", "nice", "pleasant", "enjoyable"),
    3: ("great", "lovely", "delightful", "impressive"),
    4: ("wonderful", "superb", "magnificent", "fantastic"),
}
BAD = {
    1: ("mediocre", "forgettable", "uneven", "underwhelming"),
    2: ("bad", "poor", "dull", "boring"),
    3: ("annoying", "miserable", "lousy", "irritating"),
    4: ("awful", "terrible", "horrible", "appalling"),
}

# Degree words by the kind of adjective: "absolutely" wants an extreme one, "very" a gradable one.
DEGREES = {
    1: (("somewhat", -0.5), ("fairly", -0.5), ("rather", -0.5), ("really", 0.5), ("quite", 0.0)),
    2: (
        ("somewhat", -0.5),
        ("fairly", -0.5),
        ("quite", 0.0),
        ("really", 0.5),
        ("very", 0.5),
        ("extremely", 1.0),
        ("incredibly", 1.0),
    ),
    3: (
        ("rather", -0.5),
        ("quite", 0.0),
        ("really", 0.5),
        ("very", 0.5),
        ("extremely", 1.0),
        ("incredibly", 1.0),
    ),
    4: (("truly", 0.5), ("simply", 0.5), ("absolutely", 1.0), ("utterly", 1.0)),
}
# A negated adjective of the other polarity: words before it, words after it, change of strength.
NEGATIONS = (
    ("not", "", -0.5),
    ("not", "at all", 0.5),
    ("not very", "", -1.0),
    ("never", "", 0.5),
    ("not particularly", "", -1.0),
    ("hardly", "", -0.5),
    ("by no means", "", 0.5),
    ("far from", "", 0.5),
    ("anything but", "", 1.0),
)

LIKING = (
    (_verb("like likes liked liked"), 2.0),
    (_verb("enjoy enjoys enjoyed enjoyed"), 2.5),
    (_verb("appreciate appreciates appreciated appreciated"), 2.0),
    (_verb("admire admires admired admired"), 3.0),
    (_verb("love loves loved loved"), 4.0),
    (_verb("adore adores adored adored"), 4.5),
)
DISLIKING = (
    (_verb("dislike dislikes disliked disliked"), 2.0),
    (_verb("resent resents resented resented"), 2.5),
    (_verb("hate hates hated hated"), 4.0),
    (_verb("despise despises despised despised"), 4.0),
    (_verb("loathe loathes loathed loathed"), 4.5),
)
# Only mild verbs turn into their opposite under "did not": not to adore is not yet to dislike.
NEGATABLE_LIKING = LIKING[:3]
NEGATABLE_DISLIKING = (*DISLIKING[:2], (_verb("hate hates hated hated"), 1.5))
MILD_VERB_DEGREES = (("rather", -0.5), ("quite", 0.0), ("really", 0.5), ("truly", 0.5))
STRONG_VERB_DEGREES = (("really", 0.5), ("truly", 0.5), ("absolutely", 1.0))
JUDGING = tuple(map(_verb, ("find finds found found", "consider considers considered considered")))

_RECOMMEND = _verb("recommend recommends recommended recommended")
_AVOID = _verb("avoid avoids avoided avoided")
_CHOOSE = _verb("choose chooses chose chosen")
# Advice by polarity: words before the verb, the verb, strength.
PLAIN_ADVICE = {
    True: (("", _RECOMMEND, 2.5), ("gladly", _RECOMMEND, 3.0), ("always", _RECOMMEND, 3.5)),
    False: (("", _AVOID, 2.5), ("always", _AVOID, 4.0), ("never", _RECOMMEND, 3.5)),
}
WOULD_ADVICE = {
    True: (
        ("", _RECOMMEND, 2.5),
        ("gladly", _RECOMMEND, 3.0),
        ("warmly", _RECOMMEND, 4.0),
        ("happily", _CHOOSE, 3.0),
        ("never", _AVOID, 2.0),
        ("not", _AVOID, 1.0),
    ),
    False: (
        ("not", _RECOMMEND, 2.5),
        ("never", _RECOMMEND, 4.0),
        ("hardly", _RECOMMEND, 1.5),
        ("rather", _AVOID, 2.0),
        ("always", _AVOID, 4.0),
        ("not", _CHOOSE, 1.5),
    ),
}
ADVICE_ENDS = (
    "for a quiet evening",
    "for a birthday",
    "in any season",
    "with small children",
    "during the holidays",
)

OPENERS = (
    ("honestly", 0.0),
    ("in my opinion", 0.0),
    ("to my surprise", 0.5),
    ("as far as I know", -0.5),
    ("without a doubt", 0.5),
    ("more or less", -0.5),
    ("to be fair", -0.5),
)
REACTIONS = {
    True: (
        ("so nobody complained", "so we stayed a while", "and we nodded politely"),
        ("so we came back soon", "and everybody smiled", "so we said thank you"),
        ("and everybody cheered", "so we told all our friends", "and we wanted more"),
    ),
    False: (
        ("so we shrugged", "and nobody came back", "so we talked about something else"),
        ("so we left early", "and everybody sighed", "so we complained a bit"),
        ("so we asked for our money back", "and everybody walked out", "and we left in anger"),
    ),
}

# What a closing verdict ("Delicious food!") is about, by topic.
VERDICT_NOUNS = (
    ("food", "cooking", "meal"),
    ("trip", "journey", "holiday"),
    ("music", "sound", "evening of music"),
    ("sport", "play", "day of sport"),
)

PERSONS = (
    ("I", True),
    ("we", True),
    ("they", True),
    ("she", False),
    ("he", False),
    ("my sister", False),
    ("our neighbours", True),
    ("the critics", True),
    ("most visitors", True),
    ("my uncle", False),
    ("my old friend", False),
    ("our teacher", False),
    ("the students", True),
)
AUDIENCE = (
    "for everyone",
    "for the whole family",
    "for my parents",
    "for the children",
    "for an ordinary weekend",
    "for such a small town",
)
MODIFIERS = (
    "new",
    "old",
    "long",
    "short",
    "first",
    "second",
    "local",
    "small",
    "big",
    "famous",
    "early",
    "expensive",
    "cheap",
    "usual",
)
PAST_TIMES = (
    "last night",
    "on Friday",
    "yesterday",
    "last summer",
    "this morning",
    "2 weeks ago",
    "in 2019",
    "after 3 hours",
    "on the first day",
)
PRESENT_TIMES = ("these days", "every week", "at this time", "on most days")
PERFECT_TIMES = ("so far", "since Monday", "for 5 years", "from the start")
