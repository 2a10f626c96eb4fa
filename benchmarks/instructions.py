"""Instructions from a grammar of our own: prompts for `spdbench distill --prompts`, of the tasks that people have.

Why: turns that the model writes for itself are a third of what it can learn from, and seldom ask for maths with steps,
code with a signature, or work on a given text. Texts to be worked on are put together from sentences below, so that
copying, which drafters are good at, occurs as often as in real use.
Regime: no model, no network; equal for equal seeds. A third of the conversations goes on with a second turn.
Output: one JSON object a line with `id`, `category` and `turns`.

    python -m benchmarks.instructions --count 20000 --seed 1 > instructions.jsonl
    spdbench distill --out data.jsonl --prompts instructions.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

NAMES = ("Amara", "Bram", "Chioma", "Dmitri", "Elif", "Farid", "Greta", "Hana", "Ines", "Jonas", "Kofi", "Lena",
         "Mateo", "Noor", "Oskar", "Priya", "Quentin", "Rosa", "Sven", "Tariq", "Uma", "Vera", "Zoe")  # fmt: skip
GOODS = ("pencils", "lamps", "tickets", "bricks", "jars of honey", "chairs", "seed packets", "batteries", "postcards",
         "bottles", "bolts", "candles", "loaves", "tiles", "cables", "mugs", "plants", "stamps")  # fmt: skip
PLACES = ("the harbour", "a mountain village", "the public library", "an old mill", "the train station", "a bakery",
          "the town hall", "a small island", "the weather station", "a glass factory", "the city park")  # fmt: skip
TOPICS = ("tides", "compost", "bridges", "sleep", "volcanoes", "inflation", "vaccines", "batteries", "bees", "glaciers",
          "recycling", "chess openings", "bread", "solar panels", "memory", "earthquakes", "rivers", "public transport",
          "encryption", "friction", "photosynthesis", "taxes", "migration of birds", "soil", "steam engines",
          "time zones", "databases", "version control", "first aid", "budgeting")  # fmt: skip
READERS = ("a child of ten", "a new colleague", "someone who is in a hurry", "an engineer", "a customer", "a teacher",
           "my grandmother", "a visitor from abroad")  # fmt: skip
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
DOERS = ("The council", "A team of students", "The owner", "Our neighbour", "The museum", "A local company",
         "The school", "An old sailor", "The new director", "A group of farmers")  # fmt: skip
DEEDS = ("repaired the roof", "planted forty trees", "opened a reading room", "measured the water level every morning",
         "sold the last of the boats", "tested a new kind of window", "wrote to every household", "closed the road",
         "hired two apprentices", "drew a map of the cellars", "lost the keys twice", "paid back the loan")  # fmt: skip
TIMES = ("in March", "last autumn", "after the storm", "on a Monday", "before the festival", "in 1987", "two years ago",
         "early in the morning", "during the holidays", "at the end of June")  # fmt: skip
RESULTS = ("Costs fell by {a} percent.", "About {a} people came to see it.", "Nobody had expected that.",
           "It took {b} days longer than planned.", "The work was paid for by {name}.",
           "Since then {a} visitors a week come.",
           "{name} keeps the papers in a blue folder.", "The next step is planned for spring.",
           "Rain delayed the work by {b} days.", "A second attempt went better.")  # fmt: skip
FUNCTIONS = (
    ("running_total(values: list[float]) -> list[float]", "returns the sum of all values up to each place"),
    ("most_common_word(text: str) -> str", "returns the word that occurs most often, without regard to case"),
    ("is_leap_year(year: int) -> bool", "tells whether the year has 366 days"),
    ("chunks(items: list, size: int) -> list[list]", "cuts a list into parts of at most the given size"),
    ("to_snake_case(name: str) -> str", "turns a name in camel case into snake case"),
    ("merge_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]", "adds the counts of two dictionaries"),
    ("transpose(rows: list[list[int]]) -> list[list[int]]", "swaps rows and columns of a table"),
    ("parse_duration(text: str) -> int", "reads texts such as '2h 15m' and returns minutes"),
    ("dedupe(items: list[str]) -> list[str]", "removes repeated items and keeps the order"),
    ("clamp(value: float, low: float, high: float) -> float", "limits a value to a range"),
    ("caesar(text: str, shift: int) -> str", "moves each letter by some places in the alphabet"),
    ("median(values: list[float]) -> float", "returns the middle value of a list"),
    ("roman(number: int) -> str", "writes a number below 4000 in Roman numerals"),
    ("overlaps(a: tuple[int, int], b: tuple[int, int]) -> bool", "tells whether two ranges share a number"),
    ("count_lines(path: str) -> int", "counts the lines of a text file that are not empty"),
    ("mask_email(address: str) -> str", "hides all but the first letter before the at sign"),
)
VERBS = (("count", "int", "counts"), ("find", "str", "returns the first of"), ("select", "list", "returns"),
         ("remove", "list", "returns all without"), ("group", "dict", "groups by first letter"),
         ("sort", "list", "returns in order of length"), ("join", "str", "joins with commas"))  # fmt: skip
THINGS = ("words", "lines", "names", "paths", "keys", "tags", "messages", "addresses", "dates", "prices", "commands")
WHICH = ("with more than {n} characters", "that begin with {letter!r}", "that end in {letter!r}",
         "that contain a digit", "that occur {n} times", "at every place divisible by {n}",
         "without the letter {letter!r}", "whose length is even", "that are not empty", "in upper case")  # fmt: skip
CHANGES = ("add type hints and a docstring", "raise a ValueError for bad input", "write three tests with assert",
           "explain it line by line", "make it work without a loop", "rewrite it in JavaScript")  # fmt: skip
FOLLOW_UPS = ("Say that in one sentence.", "Give an example.", "Now write it as a list of steps.", "Why is that so?",
              "What would you leave out?", "Repeat it with simpler words.", "Which part matters most?",
              "Are you sure? Check it once more.", "Write a title for it.", "Turn it into a short letter.")  # fmt: skip

Turn = Callable[[random.Random], str]


def passage(rng: random.Random, num_sentences: int) -> str:
    """Sentences that hang together loosely: who did what where and when, and what came of it."""
    sentences = []
    for index in range(num_sentences):
        if index % 2 == 0:
            sentences.append(f"{rng.choice(DOERS)} at {rng.choice(PLACES)} {rng.choice(DEEDS)} {rng.choice(TIMES)}.")
        else:
            sentences.append(
                rng.choice(RESULTS).format(a=rng.randint(3, 90), b=rng.randint(2, 30), name=rng.choice(NAMES))
            )
    return " ".join(sentences)


def maths(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    goods, a, b, c = rng.choice(GOODS), rng.randint(4, 60), rng.randint(2, 12), rng.randint(2, 9)
    return rng.choice((
        f"{name} packs {a} boxes with {b} {goods} each and gives {other} {c} boxes. How many {goods} are left?",
        f"A set of {b} {goods} costs {a} euros. What do {b * c} {goods} cost? Explain each step.",
        f"{name} walks {c} km in {10 * b} minutes. How fast is that in km per hour? Think step by step.",
        f"{other} has {a * c} {goods}, which is {c} times as many as {name} has. How many have both?",
        f"A price of {10 * a} euros falls by {5 * c} percent and then rises by {b} euros. What is it now? Show how.",
        f"Solve {c}x + {b} = {a} for x, one step a line.",
        f"{name} works {b} hours a day for {c} days at {a} euros an hour. A third goes to taxes. How much remains?",
    ))  # fmt: skip


def function(rng: random.Random) -> tuple[str, str]:
    """The signature of a function, and what it does."""
    if rng.random() < 0.25:
        return rng.choice(FUNCTIONS)
    (verb, result, does), things = rng.choice(VERBS), rng.choice(THINGS)
    which = rng.choice(WHICH).format(n=rng.randint(2, 9), letter=rng.choice("abcdefghklmnoprstw"))
    return f"{verb}_{things}({things}: list[str]) -> {result}", f"{does} the {things} {which}"


def code(rng: random.Random) -> str:
    signature, does = function(rng)
    return rng.choice((
        f"Write a Python function `{signature}` that {does}. Then {rng.choice(CHANGES)}.",
        f"Complete this function:\n\ndef {signature}:\n    # {does}\n",
        f"A program begins:\n\ndef {signature}:\n    ...\n\nIt {does}. Write the body and {rng.choice(CHANGES)}.",
        f"Which mistakes are common when one writes a function that {does}? Show a correct version.",
    ))  # fmt: skip


def on_a_text(rng: random.Random) -> str:
    text = passage(rng, rng.randint(3, 8))
    task = rng.choice((
        "Summarise this text in two sentences:",
        "Rewrite this text in a friendly tone:",
        "Rewrite this text so that every sentence is shorter:",
        "Correct the style of this text and change as little as possible:",
        f"Translate this text into {rng.choice(LANGUAGES)}:",
        "List all numbers in this text and what they stand for:",
        "Extract who did what and when, as a JSON list of objects:",
        "Make a table with the columns who, what, when from this text:",
        "Which questions does this text leave open?",
        "Write three questions about this text and answer them:",
    ))  # fmt: skip
    return f"{task}\n\n{text}"


def explain(rng: random.Random) -> str:
    topic, reader = rng.choice(TOPICS), rng.choice(READERS)
    other = rng.choice([word for word in TOPICS if word != topic])
    return rng.choice((
        f"Explain {topic} to {reader} in {rng.randint(3, 8)} sentences.",
        f"What are {rng.randint(3, 6)} common mistakes about {topic}?",
        f"Write a plan of {rng.randint(3, 7)} days for learning about {topic}.",
        f"Compare {topic} and {other}: what do they share, and where do they differ?",
        f"Give {rng.randint(4, 9)} facts about {topic} as a numbered list.",
        f"Why should {reader} know something about {topic}?",
    ))  # fmt: skip


def write(rng: random.Random) -> str:
    name, place, topic = rng.choice(NAMES), rng.choice(PLACES), rng.choice(TOPICS)
    return rng.choice((
        f"Write a short story in which {name} finds something odd at {place}.",
        f"Write an email in which {name} asks for a date to talk about {topic}.",
        f"Write a poem of {4 * rng.randint(1, 3)} lines about {place}.",
        f"Write a dialogue between {name} and {rng.choice(NAMES)} about {topic}.",
        f"Write a notice for {place}: it will be closed {rng.choice(TIMES)}.",
        f"Invent a product that has to do with {topic} and describe it in {rng.randint(3, 6)} sentences.",
    ))  # fmt: skip


CATEGORIES: Mapping[str, tuple[Turn, int]] = {
    "maths": (maths, 3), "code": (code, 3), "text": (on_a_text, 4), "explain": (explain, 3), "write": (write, 2),
}  # fmt: skip


class Conversation(TypedDict):
    id: str
    category: str
    turns: list[str]


def conversations(count: int, seed: int) -> list[Conversation]:
    """`count` conversations of one or two user turns, no two with the same first turn.

    Raises:
        ValueError: The grammar has not that many.
    """
    rng, seen, rows = random.Random(seed), set[str](), list[Conversation]()
    names, weights = list(CATEGORIES), [weight for _, weight in CATEGORIES.values()]
    for _ in range(40 * count):
        if len(rows) == count:
            return rows
        category = rng.choices(names, weights)[0]
        first = CATEGORIES[category][0](rng)
        if first not in seen:
            seen.add(first)
            turns = [first] + ([rng.choice(FOLLOW_UPS)] if rng.random() < 1 / 3 else [])
            rows.append({"id": f"{category}-{len(rows)}", "category": category, "turns": turns})
    if len(rows) == count:
        return rows
    raise ValueError(f"the grammar gives only {len(rows)} different conversations, not {count}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    for row in conversations(args.count, args.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
