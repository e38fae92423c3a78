"""
Writes little stories, one JSON object a line: something to pretrain on without downloading anything.

    python examples/pretrain/stories.py --count 20000 > stories.jsonl

Each is drawn from a small grammar by a seeded generator, so the file is the same everywhere. There is structure to
learn: names and pronouns agree, what is lost is what is found, and the end answers the beginning.
"""

from __future__ import annotations

import argparse
import json
import random

HEROES = [
    ("Mia", "she", "her", "girl"), ("Tom", "he", "his", "boy"), ("Anna", "she", "her", "girl"),
    ("Ben", "he", "his", "boy"), ("Lily", "she", "her", "girl"), ("Max", "he", "his", "boy"),
    ("Rosa", "she", "her", "girl"), ("Sam", "he", "his", "boy"),
]  # fmt: skip
PLACES = ["a small village", "a house by the sea", "a tower on a hill", "a cottage in the forest", "a town by a river"]
THINGS = ["red ball", "silver key", "blue kite", "wooden boat", "warm scarf", "golden ring", "little drum", "old book"]
ANIMALS = ["fox", "owl", "rabbit", "bear", "mouse", "hedgehog", "duck", "cat"]
TRAITS = ["kind", "brave", "curious", "quiet", "cheerful", "clever"]
SPOTS = ["under the old bridge", "behind the mill", "in the tall grass", "at the foot of the oak", "beside the well"]
WEATHER = ["sunny", "windy", "rainy", "snowy", "foggy"]
THANKS = ["a piece of cake", "a bowl of soup", "a handful of nuts", "a jar of honey", "a warm blanket"]
OPENINGS = ["Once upon a time", "Long ago", "One {weather} morning", "In those days"]


def story(draw: random.Random) -> str:
    """One story of about a hundred words."""
    name, pronoun, possessive, kind = draw.choice(HEROES)
    thing, animal, trait = draw.choice(THINGS), draw.choice(ANIMALS), draw.choice(TRAITS)
    place, spot, weather, thanks = (draw.choice(words) for words in (PLACES, SPOTS, WEATHER, THANKS))
    opening = draw.choice(OPENINGS).format(weather=weather)
    said = pronoun.capitalize()
    parts = [
        f"{opening} there was a {trait} {kind} called {name}, who lived in {place}.",
        f"{name} had a {thing}, and {pronoun} loved the {thing} more than anything.",
        f"One {weather} day {name} went for a walk, and when {pronoun} came home, the {thing} was gone.",
        draw.choice([f"{said} looked everywhere, but {pronoun} could not find it.", f"{said} sat down and cried."]),
        f'Then a {animal} came by. "Why are you sad?" asked the {animal}.',
        f'"I have lost my {thing}," said {name}.',
        draw.choice(
            [
                f'"I know where it is," said the {animal}. "Come with me!"',
                f'"Let us look for it together," said the {animal}.',
            ]
        ),
        f"So they went, and {spot} they found the {thing}.",
        f'"Thank you!" said {name}, and {pronoun} gave the {animal} {thanks}.',
        f"From that day on {name} and the {animal} were friends, and {name} never lost {possessive} {thing} again.",
    ]
    return " ".join(parts)


def main() -> None:
    """Print so many stories."""
    parser = argparse.ArgumentParser(description="Little stories to pretrain on.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    for _ in range(args.count):
        print(json.dumps({"text": story(draw)}))


if __name__ == "__main__":
    main()
