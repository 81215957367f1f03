"""The demo's tasks: what the base model is taught, and the one thing it is not.

Most are about a short order, "Please ship 12 green lamps to Maria in Oslo by Friday.". The base learns to pick out of
it what the instruction names ("Give the name and the day." is answered by "Maria, Friday"), and a few plain string
tasks. The fine-tuning task, never shown to the base, asks for the whole order as one line of JSON.
"""

import json
import random
from pathlib import Path

WORDS = json.loads((Path(__file__).parent / "words.json").read_text())
NAMES, CITIES, GOODS, COLOURS, DAYS = (WORDS[kind] for kind in ("names", "cities", "goods", "colours", "days"))

SENTENCES = [
    "Please ship {count} {item} to {name} in {city} by {day}.",
    "{name} from {city} would like {count} {item} before {day}.",
    "We need {count} {item} on {day}. Deliver them to {name}, {city}.",
    "Could you send {name} in {city} {count} {item}? {day} is fine.",
    "By {day}, {count} {item} must reach {name} in {city}.",
    "{day} order: {count} {item}, for {name} who lives in {city}.",
]

# What an order is made of, unless it is of made-up words.
KNOWN = {"name": NAMES, "city": CITIES, "goods": GOODS}

JSON_INSTRUCTION = "Return the order as JSON."


def prompt(instruction: str, text: str) -> str:
    """The one prompt format of the demo; the completion starts on the line after it."""
    return f"Instruction: {instruction}\nInput: {text}\nResponse:\n"


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that no list holds, so that the base learns to copy words and not to recite lists."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(["", "n", "s", "r", "l", "t"])


def order(rng: random.Random, values: dict[str, list[str]]) -> tuple[str, dict]:
    """One random order: its sentence and its fields."""
    fields = {
        "item": f"{rng.choice(COLOURS)} {rng.choice(values['goods'])}",
        "count": rng.randint(2, 99),
        "name": rng.choice(values["name"]),
        "city": rng.choice(values["city"]),
        "day": rng.choice(DAYS),
    }
    return rng.choice(SENTENCES).format(**fields), fields


def json_row(rng: random.Random) -> dict[str, str]:
    """One row of the fine-tuning task."""
    sentence, fields = order(rng, KNOWN)
    return {"prompt": prompt(JSON_INSTRUCTION, sentence), "completion": json.dumps(fields)}


def base_row(rng: random.Random) -> dict[str, str]:
    """One row of what the base is taught. A third of the orders has made-up words for name, city and goods."""
    values = KNOWN
    if rng.random() < 1 / 3:
        values = {
            "name": [made_up_word(rng).capitalize()],
            "city": [made_up_word(rng).capitalize()],
            "goods": [made_up_word(rng)],
        }
    sentence, fields = order(rng, values)
    words = [rng.choice([*NAMES, *CITIES, *GOODS, *COLOURS, made_up_word(rng)]) for _ in range(rng.randint(2, 6))]
    text = " ".join(words)
    kind = rng.choice(["give"] * 6 + ["repeat", "reverse", "quote", "number"])
    if kind == "give":
        asked = rng.sample(list(fields), rng.randint(1, len(fields)))
        named = " and the ".join(filter(None, [", the ".join(asked[:-1]), asked[-1]]))
        instruction, given, answer = f"Give the {named}.", sentence, ", ".join(str(fields[field]) for field in asked)
    elif kind == "repeat":
        instruction, given, answer = "Repeat the input.", sentence, sentence
    elif kind == "reverse":
        instruction, given, answer = "List the words from last to first.", text, " ".join(words[::-1])
    elif kind == "quote":
        instruction, given, answer = "Put each word in quotes.", text, ", ".join(f'"{word}"' for word in words)
    else:
        numbered = (f"{number} {word}" for number, word in enumerate(words, 1))
        instruction, given, answer = "Number the words.", text, ", ".join(numbered)
    return {"prompt": prompt(instruction, given), "completion": answer}


def copy_row(rng: random.Random, vocabulary: list[str]) -> dict[str, str]:
    """Random words to repeat: the plainest way to learn to look back, which all the other tasks build on."""
    text = " ".join(rng.choice(vocabulary) for _ in range(rng.randint(2, 8)))
    return {"prompt": prompt("Repeat the input.", text), "completion": text}
