"""Publishers' marks: taken out of texts of all agencies, quickly, and found where no list knows them."""

import random
import time
from collections import Counter

import pytest

from project.data.tokens import read_tokenizer, train_tokenizer
from project.publishers import clean_text, publisher_steps, telling_ends

MARKED = [
    ("WASHINGTON (Reuters) - The head", "datelines"),
    ("WASHINGTON/PALM BEACH, Fla. (Reuters) – The head", "datelines"),
    ("(Corrects name (of X) in paragraph 2) By A Bee and C Dee NEW YORK (Reuters) - The head", "datelines"),
    ("CORPUS CHRISTI, Texas (AP)- The head", "datelines"),
    ("PARIS, Jan. 5 (AFP) — The head", "datelines"),
    ("BEIJING, Nov. 12 (Xinhua) -- The head", "datelines"),
    ("LONDON, Dec. 3 (UPI) -- The head", "datelines"),
    ("MOSCOW, December 5. /TASS/. The head", "datelines"),
    ("(CNN) The head", "datelines"),
    ("United Nations, New York (CNN)The head", "datelines"),
    ("MADISON, WISCONSIN (The Borowitz Report) – The head", "datelines"),
    ("ROME (Reuters) - PARIS (AFP) - The head", "datelines"),
    ("CNN Politics | The head", "datelines"),
    ("The head - The New York Times", "publishers"),
    ("The head – Breitbart", "publishers"),
    ("The head | Celeb Dirty Laundry", "publishers"),
    ("The head – POLITICO Magazine", "publishers"),
    ("The head - infowars.com", "publishers"),
    ("The head - Politics - The Washington Post | Yahoo News", "publishers"),
    ("The (AFP) head", "agencies in brackets"),
    ("The head (AP Photo/Jane Doe)", "agencies in brackets"),
]
KEPT = [
    "NEWS (VIDEO) - look",
    "TRUMP JUST LOST (TWEETS) – and knows it",
    "A B C D (E) F - G",
    "He (that is, I) - and she - went",
    "Reuters reported - so they say",
    "U.S. to ask for more time - sources",
    "Who owns the Washington Post?",
    "Approval - Amazon, Reuters and the poll",
    "The Republican (R-Texas) - who else - said so",
    "",
]


@pytest.mark.parametrize(("text", "what"), MARKED)
def test_marks_go_and_are_counted(text, what):
    notes = Counter()
    left = clean_text(f"  {text}\n", notes)
    assert left in ("The head", "The head - Politics") and clean_text(left) == left
    assert notes == {"outer spaces removed": 1, f"{what} removed": 1}
    assert clean_text(f"One line.\n{text}\nAnother line") == f"One line.\n{left}\nAnother line"


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_a_mark_stays(text):
    notes = Counter()
    assert clean_text(text, notes) == text and not notes


def pieces(rng, most=6):
    """A text of marks, halves of marks and words, in any order."""
    words = [
        "Talks",
        "ended",
        "in Rome",
        "today",
        "(",
        ")",
        "- ",
        " ",
        "\n",
        "(VIDEO)",
        "WASHINGTON",
        "By Ann Lee ",
        "'s",
    ]
    return "".join(
        rng.choice([*words, *(text.replace("The head", "") for text, _ in MARKED)]) for _ in range(rng.randint(1, most))
    )


def test_a_tokenizer_reads_a_published_row_and_a_stored_one_alike():
    rng = random.Random(0)
    pairs = [
        (pieces(rng, 3) + " The title" + pieces(rng, 1), pieces(rng, 3) + " The article" + pieces(rng))
        for _ in range(600)
    ]
    raw = ["\n".join(v for v in pair if v.strip()) for pair in pairs]
    stored = ["\n".join(v for value in pair if (v := clean_text(value)).strip()) for pair in pairs]
    tokenizer = train_tokenizer(stored, least=1)
    own = train_tokenizer(stored, least=1, neutral=False).to_str().encode()
    for one in (tokenizer, read_tokenizer(tokenizer.to_str().encode()), read_tokenizer(own, neutral=True)):
        apart = [(a, b) for a, b in zip(raw, stored, strict=True) if one.encode(a).tokens != one.encode(b).tokens]
        assert len(apart) <= 1, apart[:3]  # a heap of halves may become a mark when what stood between them is gone


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "(",
            "(\n",
            "((a) ",
            "By ",
            "By (\n",
            "A",
            "AB ",
            "Ab ",
            "Ab, ",
            " - ",
            " -",
            " | CNN",
            "CNN | ",
            " (Reuters",
        ),
        *("/TASS", "a.", "ROME (AP) - ", "ROME (AP) -\n", "The following statements ", "\u00a0", " - " + "w-" * 30),
        *("(" + "x" * 398 + "\n", "((x) " + "y" * 200 + "\n", "(a) By " + "y" * 228 + "\n", "AB (" + "x" * 20 + "\n"),
        "Ab, Ab, Ab, Ab, Ab (CNN)x\n",
    ],
)
def test_no_text_takes_long(piece):
    text = (piece * (100_000 // len(piece) + 1))[:100_000]
    started = time.process_time()
    for step in publisher_steps().values():
        step.normalize_str(text)
    assert time.process_time() - started < 2.0


def headlines(end="", start=""):
    """Sixty headlines of either class; those of the second carry a publisher."""
    rng = random.Random(1)
    words = [
        f"{rng.choice('abcdefgh')}{rng.randrange(99)} {rng.randrange(999)} {rng.randrange(999)}" for _ in range(120)
    ]
    return [word if i < 60 else f"{start}{word}{end}" for i, word in enumerate(words)], [0] * 60 + [1] * 60


@pytest.mark.parametrize(
    ("marks", "where", "words"),
    [
        ({"end": " - The New York Times"}, "ends with", "- the new york times"),
        ({"end": " :: Evening Post"}, "ends with", ":: evening post"),
        ({"start": "EXCLUSIVE: "}, "begins with", "exclusive:"),
        ({"start": "Evening Post Online — "}, "begins with", "evening post online —"),
    ],
)
def test_what_one_class_begins_or_ends_with_is_found(marks, where, words):
    texts, labels = headlines(**marks)
    assert telling_ends(texts, labels, ("fake", "real")) == [
        {"where": where, "words": words, "class": "real", "rows": 60, "rows of others": 0}
    ]


def test_what_both_classes_end_with_tells_nothing():
    texts, labels = headlines(end=" today")
    assert telling_ends([f"{text} today" for text in texts[:60]] + texts[60:], labels, ("fake", "real")) == []
    texts, _ = headlines()
    mixed = [*(f"{text} again" for text in texts[:3]), *(f"{text} again" for text in texts[60:])]
    assert telling_ends(mixed, [0] * 3 + [1] * 60, ("fake", "real")) == []
    (row,) = telling_ends(mixed, [0] * 3 + [1] * 60, ("fake", "real"), purity=0.9)
    assert (row["class"], row["rows"], row["rows of others"]) == ("real", 60, 3)
    assert telling_ends([], [], ("fake", "real")) == []


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 2}, {"purity": 0.5}, {"purity": 1.1}])
def test_shares_are_checked(wrong):
    with pytest.raises(ValueError, match="expected share from 0 to 1 and purity from 0.5 to 1"):
        telling_ends(["a"], [0], ("a", "b"), **wrong)
