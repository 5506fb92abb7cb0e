"""The texts that the tiny base model and its tokenizer are made from: generated, by seed.

They hold what the embedded tasks need (sums, products, kinds of things, opposites, finding an
option), told in other forms than the tasks tell it. A document is a tuple of parts, in turn given
and learned: random words that nothing foretells would drown what a small model can learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from tlora.tasks import arithmetic, choice


def _words(text: str) -> list[str]:
    """Split a list of words, or of phrases between bars."""
    return text.split("|") if "|" in text else text.split()


PEOPLE = [
    *_words("John Mary James Anna Lucy Mark Jane Peter Rosa Adam Ella Kate Jack Emma Carl Amy"),
    *arithmetic.NAMES,
]
GOODS = [
    *_words(
        "flowers marbles candies pencils cookies tickets bottles chairs boxes pages bags plates "
        "oranges dollars hours minutes miles pounds pieces students friends children people"
    ),
    *arithmetic.THINGS,
]
PLACES = _words("garden school house store farm park kitchen market river road city room hill")
TIMES = [
    *_words(
        "in the morning|in the evening|every day|every week|last year|next month|at noon|today|"
        "yesterday|tomorrow|after school|before dinner|on the weekend|for the first time|now"
    ),
    *(f"on {day}" for day in arithmetic.DAYS),
]
VERBS = _words(
    "buys sells makes finds needs takes brings keeps sees likes uses loses gives paints reads "
    "writes eats drinks plants collects carries counts washes cooks wants spends saves earns"
)
WORK = _words("walks runs works plays sits sleeps sings swims waits stays lives talks travels")
LINKS = _words("and then|so|but|because|while|when|after that|which is why|if|together")
QUANTITIES = _words(
    "half of the|twice as many|three times as many|a total of ten|the rest of the|some of the|"
    "each of the|one more of the|the remaining|all of the|fewer|several|the same number of"
)
MOODS = _words("happy tired hungry late early ready sad busy free sure glad young old")
LETTERS = "abcd"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
SHORT = "### Instruction:\n{instruction}\n\n### Response:"

Document = tuple[str, ...]
"""Texts that follow each other: given, learned, given, learned, ..."""


def documents(seed: int) -> Iterator[Document]:
    """Draw documents without end."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def _joined(heading: str, facts: Sequence[tuple[str, str]], link: str = ",") -> Document:
    """Return a list of facts, of each its given and its learned part."""
    parts: list[str] = []
    for given, learned in facts:
        parts += [(link if parts else heading) + given, learned]
    return tuple(parts)


def _calculation(rng: random.Random) -> tuple[int, str, int, int]:
    """Draw a sum or difference with a number of one digit, or a product of two of them."""
    sign = rng.choice("++--*")
    if sign == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return a, sign, b, a * b
    a, b = rng.randint(1, 60), rng.randint(1, 9)
    return (a, sign, b, a + b) if sign == "+" else (a + b, sign, b, a)


def _facts(rng: random.Random) -> Document:
    drawn = [_calculation(rng) for _ in range(rng.randint(4, 12))]
    facts = [(f" {a} {sign} {b} =", f" {c}") for a, sign, b, c in drawn]
    return _joined("Facts:", facts, rng.choice((",", ".", "\n")))


def _spoken(rng: random.Random) -> Document:
    words = {"+": "plus", "-": "minus", "*": "times"}
    drawn = [_calculation(rng) for _ in range(rng.randint(3, 8))]
    facts = [
        (f" {a} {words[sign]} {b} {rng.choice(('is', 'makes'))}", f" {c}")
        for a, sign, b, c in drawn
    ]
    return _joined("Aloud:", facts)


def _counting(rng: random.Random) -> Document:
    start, step = rng.randint(0, 60), rng.choice((1, 1, 1, 2, 3, 5))
    numbers = [f" {number}" for number in range(start, min(start + 10 * step, 100), step)]
    if rng.random() < 0.4:
        numbers.reverse()
    return "Counting:" + ",".join(numbers[:2]) + ",", ",".join(numbers[2:])


def _comparing(rng: random.Random) -> Document:
    facts = []
    for _ in range(rng.randint(2, 5)):
        numbers = rng.sample(range(1, 60), rng.randint(2, 4))
        given = f" of {', '.join(map(str, numbers))}"
        if rng.random() < 0.5:
            facts.append((f"{given} in order:", " " + ", ".join(map(str, sorted(numbers)))))
        else:
            word, number = rng.choice((("most", max(numbers)), ("least", min(numbers))))
            facts.append((f"{given} the {word} is", f" {number}"))
    return _joined("Numbers:", facts, ";")


def _kinds(rng: random.Random) -> Document:
    facts = []
    for _ in range(rng.randint(3, 8)):
        category = rng.choice(sorted(choice.CATEGORIES))
        word = rng.choice(choice.members(category))
        facts.append(
            rng.choice(
                (
                    (f" {choice.article(word)} is", f" {choice.article(category)}"),
                    (f" the {word} is one of the", f" {category}s"),
                )
            )
        )
    return _joined("Kinds:", facts)


def _opposites(rng: random.Random) -> Document:
    facts = []
    for _ in range(rng.randint(3, 8)):
        one, other = rng.sample(rng.choice(choice.OPPOSITES), 2)
        facts.append(rng.choice(((f" {one} or", f" {other}"), (f" not {one} but", f" {other}"))))
    return _joined("Opposites:", facts)


def _sentence(rng: random.Random) -> str:
    name, other = rng.sample(PEOPLE, 2)
    place, time, goods = rng.choice(PLACES), rng.choice(TIMES), rng.choice(GOODS)
    number = rng.randint(2, 99)
    return rng.choice(
        (
            f"{name} {rng.choice(VERBS)} {number} {goods} {time}",
            f"{name} {rng.choice(VERBS)} {rng.choice(QUANTITIES)} {goods} at the {place}",
            f"{name} {rng.choice(WORK)} with {other} in the {place} {time}",
            f"{name} and {other} are {rng.choice(MOODS)} {time}",
            f"there are {number} {goods} in the {place}",
            f"{name} {rng.choice(VERBS)} the {goods} for {other}",
            f"each of the {goods} costs ${number}",
            f"{name} was {rng.choice(MOODS)} and had to go to the {place} {time}",
            f"how many {goods} does {name} have {time}?",
            f"he needs {number} more {goods} than {other}, who has {rng.choice(QUANTITIES)}",
            f"she gets {number}% of the {goods} they have from her {place}",
            f"then {number} {goods} are left for {other}",
        )
    )


def _story(rng: random.Random) -> Document:
    sentences = []
    for _ in range(rng.randint(2, 6)):
        text = _sentence(rng)
        if rng.random() < 0.4:
            text = f"{text.rstrip('?')} {rng.choice(LINKS)} {_sentence(rng)}"
        sentences.append(text[0].upper() + text[1:] + ("" if text.endswith("?") else "."))
    return "", " ".join(sentences)


def _step(rng: random.Random) -> tuple[str, str, int]:
    """Draw a problem of one step: its text, its working and its result."""
    name, other = rng.sample(PEOPLE, 2)
    goods, place = rng.choice(GOODS), rng.choice(PLACES)
    a, sign, b, c = _calculation(rng)
    if sign == "+":
        text = rng.choice(
            (
                f"There are {a} {goods} in the {place}. {name} brings {b} {goods}. "
                f"How many {goods} are there?",
                f"{name} has {a} {goods} and {other} has {b} {goods}. How many are there in all?",
                f"{name} finds {a} {goods}, then {b} more. How many {goods} is that?",
            )
        )
    elif sign == "-":
        text = rng.choice(
            (
                f"{name} had {a} {goods} and gave {b} to {other}. How many {goods} remain?",
                f"There were {a} {goods} in the {place}. {name} took {b}. How many stay there?",
                f"{name} needs {a} {goods} and has {b}. How many more does {name} need?",
            )
        )
    else:
        text = rng.choice(
            (
                f"There are {a} bags with {b} {goods} in each bag. How many {goods} are there?",
                f"{name} takes {b} {goods} a day for {a} days. How many {goods} is that?",
            )
        )
    return text, f"{a} {sign} {b} = {c}", c


def _solved(rng: random.Random) -> Document:
    text, working, result = _step(rng)
    return rng.choice(
        (
            (f"Problem: {text}\nSolution:", f" {working}. So it is {result}."),
            (f"{text} Let us see:", f" {working}, so {result}."),
            (f"Q: {text}\nA:", f" {result}"),
        )
    )


def _instructed(rng: random.Random) -> Document:
    text, working, result = _step(rng)
    prompt = rng.choice((ALPACA, SHORT, SHORT)).replace("{instruction}", text)
    return prompt, f"It is {working}.\nThe answer is: {result}\n"


def _repeat(rng: random.Random) -> Document:
    """Draw words and numbers in an order of their own, and say them again."""
    words = [word for category in choice.CATEGORIES for word in choice.members(category)]
    words += [*PEOPLE, *GOODS]
    said = " ".join(
        str(rng.randint(1, 60)) if rng.random() < 0.4 else rng.choice(words)
        for _ in range(rng.randint(3, 10))
    )
    return f"Again: {said},", f" {said}"


def _options(rng: random.Random) -> tuple[str, list[str], int]:
    """Draw a question, the options and which of them is right."""
    at = rng.randrange(choice.OPTIONS)
    if rng.random() < 0.7:
        categories = rng.sample(sorted(choice.CATEGORIES), choice.OPTIONS)
        options = [rng.choice(choice.members(category)) for category in categories]
        asked = f"the {categories[at]}"
    else:
        pairs = [rng.sample(pair, 2) for pair in rng.sample(choice.OPPOSITES, choice.OPTIONS)]
        options = [one for one, _ in pairs]
        asked = rng.choice((options[at], f"not {pairs[at][1]}"))
    text = rng.choice(("Which of these is {}?", "What is {}?", "Find {}."))
    return text.replace("{}", asked), options, at


def _lookup(rng: random.Random) -> Document:
    """Draw a list with labels, then where in it each of its entries stands."""
    _, options, _ = _options(rng)
    labels = LETTERS if rng.random() < 0.5 else "1234"
    listed = " ".join(f"{label} {o}" for label, o in zip(labels, options, strict=True))
    order = rng.sample(range(len(options)), len(options))
    return _joined(f"{listed}\n", [(f" {options[at]}", f" {labels[at]}") for at in order])


def _checked(rng: random.Random) -> Document:
    """Draw a question whose options are each called right or wrong."""
    text, options, at = _options(rng)
    facts = [
        (f"Answer{i}: {option}", " yes" if i == at + 1 else " no")
        for i, option in enumerate(options, start=1)
    ]
    return (*_joined(f"{text}\n\n", facts, " "), "\n\nIt is answer", f"{at + 1}")


def _quiz(rng: random.Random) -> Document:
    """Draw a question with its options and the answer alone."""
    text, options, at = _options(rng)
    listed = " ".join(f"Answer{i}: {option}" for i, option in enumerate(options, start=1))
    if rng.random() < 0.7:
        return f"{text}\n\n{listed}\n\nIt is answer", f"{at + 1}"
    names = "/".join(f"answer{i}" for i in range(1, choice.OPTIONS + 1))
    prompt = SHORT.replace("{instruction}", f"{text}\n\n{listed}\n\nAnswer format: {names}")
    return prompt, f"the correct answer is answer{at + 1}\n"


KINDS: tuple[tuple[Callable[[random.Random], Document], float], ...] = (
    (_facts, 4),
    (_spoken, 1),
    (_counting, 0.5),
    (_comparing, 1),
    (_kinds, 2),
    (_opposites, 1),
    (_story, 0.5),
    (_solved, 5),
    (_instructed, 2),
    (_repeat, 1),
    (_lookup, 1),
    (_checked, 8),
    (_quiz, 7),
)
"""The kinds of documents and how often each is drawn."""
