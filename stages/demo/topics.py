"""The words of the demo grammar's four topics."""

from dataclasses import dataclass

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


def verb(forms: str) -> Verb:
    """A verb from its four forms, separated by blanks."""
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
            verb,
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
            verb,
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
            verb,
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
            verb,
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
