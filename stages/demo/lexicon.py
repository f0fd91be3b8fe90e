"""The words of the demo grammar: plain tables, no rules.

Strengths are on the scale of the ``intensity`` label (0.0 to 5.0); changes are added to them.
Adjectives are sorted into four levels of strength, which stand for 1.0, 2.0, 3.0 and 4.0.
"""

from sherl_pipe.stages.demo.topics import verb

TASKS = ("sentiment", "topic", "acceptability", "intensity")

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
    (verb("like likes liked liked"), 2.0),
    (verb("enjoy enjoys enjoyed enjoyed"), 2.5),
    (verb("appreciate appreciates appreciated appreciated"), 2.0),
    (verb("admire admires admired admired"), 3.0),
    (verb("love loves loved loved"), 4.0),
    (verb("adore adores adored adored"), 4.5),
)
DISLIKING = (
    (verb("dislike dislikes disliked disliked"), 2.0),
    (verb("resent resents resented resented"), 2.5),
    (verb("hate hates hated hated"), 4.0),
    (verb("despise despises despised despised"), 4.0),
    (verb("loathe loathes loathed loathed"), 4.5),
)
# Only mild verbs turn into their opposite under "did not": not to adore is not yet to dislike.
NEGATABLE_LIKING = LIKING[:3]
NEGATABLE_DISLIKING = (*DISLIKING[:2], (verb("hate hates hated hated"), 1.5))
MILD_VERB_DEGREES = (("rather", -0.5), ("quite", 0.0), ("really", 0.5), ("truly", 0.5))
STRONG_VERB_DEGREES = (("really", 0.5), ("truly", 0.5), ("absolutely", 1.0))
JUDGING = tuple(map(verb, ("find finds found found", "consider considers considered considered")))

_RECOMMEND = verb("recommend recommends recommended recommended")
_AVOID = verb("avoid avoids avoided avoided")
_CHOOSE = verb("choose chooses chose chosen")
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
