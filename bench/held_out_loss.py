"""What rounding costs in quality: held-out losses of LoRA over nf4 against bfloat16, and of products in 8 bits against
float32, on tasks that SmolLM2 learns.

Both sides have the same rows in the same order, the same first weights and steps, run as `ftkit train`. Over nf4 a
round is a seed, in 8 bits it is a task. The shipped base is Q4_1, so that nf4 rounds it a second time, and bfloat16
hardly does. Every task leaves something to chance (which of several wordings, which of two words): even a perfect model
keeps that loss, and what is lost is held against it.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from bench._figures import line, smollm2

SEEDS = (0, 1, 2)
STEPS = 160
_SETTINGS = {
    "method.rank": 16,
    "method.alpha": 32,
    "optimizer.learning_rate": 1e-3,
    "output.samples": 0,
    "evaluation.every_steps": 40,
    "data.max_tokens": 320,
}
_SIDES = {
    "nf4": ["--quant", "nf4"],
    "bfloat16": ["--set", "model.dtype=bfloat16"],
    "int8": ["--precision", "int8"],
    "float32": [],
}
Rows = list[tuple[str, str]]


def run() -> list[dict[str, Any]]:
    """Held-out losses, nats a token."""
    seeds, tasks = [("inns", seed) for seed in SEEDS], [(task, SEEDS[0]) for task in TASKS]
    return [_pair("nf4", "bfloat16", seeds), _pair("int8", "float32", tasks)]


def _pair(ours: str, peer: str, rounds: list[tuple[str, int]]) -> dict[str, Any]:
    losses: dict[str, list[float]] = {ours: [], peer: []}
    with tempfile.TemporaryDirectory() as place:
        for (task, seed), side in itertools.product(rounds, losses):
            losses[side].append(_loss(side, task, seed, Path(place)))
    return line(f"held-out loss, {ours}", f"nats a token of {peer}", losses[ours], losses[peer], less=True)


def _loss(side: str, task: str, seed: int, place: Path) -> float:
    rows, name = TASKS[task](random.Random(7)), f"{side}-{task}-{seed}"
    train, held_out = _write(place / f"{task}.jsonl", rows[:400]), _write(place / f"{task}-held-out.jsonl", rows[400:])
    words = ["train", "--model", str(smollm2()), "--data", str(train), "--evaluation-data", str(held_out)]
    words += [*_SIDES[side], "--seed", str(seed), "--max-steps", str(STEPS), "--name", name, "--json"]
    words += ["--runs-dir", str(place), *(f"--set={key}={value}" for key, value in _SETTINGS.items())]
    made = subprocess.run([sys.executable, "-m", "ftkit", *words], check=True, capture_output=True, text=True)
    events = (place / name / "events.jsonl").read_text(encoding="utf-8").splitlines()
    course = [event["loss"] for event in map(json.loads, events) if event["event"] == "evaluation"]
    print(f"{side}, {task}, seed {seed}: " + " → ".join(f"{loss:.4f}" for loss in course), file=sys.stderr)
    loss: float = json.loads(made.stdout)["eval_loss"]
    return loss


def _write(path: Path, rows: Rows) -> Path:
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in rows]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    return path


_FIELDS = {
    "name": ["The Copper Kettle", "Heron House", "The Idle Oar", "Saltmarsh Rooms", "The Ninth Bell", "Alder Court"],
    "kind": ["inn", "café", "guest house", "pub", "bakery"],
    "food": ["fish soup", "flat bread", "roast roots", "plum cake", "smoked trout", "barley stew"],
    "place": ["by the harbour", "near the mill", "behind the market", "on the north road", "under the old wall"],
    "price": ["cheap", "fair", "dear"],
}
_FIRST = [
    "{name} is a {kind} {place}.",
    "{place}, you will find the {kind} called {name}.",
    "There is a {kind} {place}: {name}.",
    "The {kind} {name} stands {place}.",
]
_SECOND = ["It serves {food}, and prices are {price}.", "Try its {food}; it is {price}.", "Its {food} is {price}."]


def _inns(generator: random.Random) -> Rows:
    """A record of five fields becomes one of twelve wordings of it."""
    records = [dict(zip(_FIELDS, values, strict=True)) for values in itertools.product(*_FIELDS.values())]
    rows = []
    for record in generator.sample(records, 464):
        said = f"{generator.choice(_FIRST)} {generator.choice(_SECOND)}".format(**record)
        rows.append(("; ".join(f"{key}: {value}" for key, value in record.items()), said[0].upper() + said[1:]))
    return rows


_MATTERS = {
    "billing": ["I was charged twice", "my invoice is wrong", "the refund never came", "the price went up"],
    "delivery": ["the parcel is late", "the box was left outside", "the driver never rang", "the address is wrong"],
    "technical": ["the app will not start", "my password fails", "the screen stays black", "updates never finish"],
}
_OPENINGS = [
    "Hello,",
    "Hi there,",
    "Once more:",
    "Since Monday",
    "To whom it may concern,",
    "Please help,",
    "Sorry, but",
    "Good morning,",
]
_ENDINGS = ["and nobody answers.", "what now?", "please look into it.", "as my sister says, too.", "I am at a loss."]


def _tickets(generator: random.Random) -> Rows:
    """A customer's complaint becomes its desk, how urgent it is (by chance), and a receipt."""
    rows = []
    texts = [
        (desk, f"{a} {b} {c}") for desk, cores in _MATTERS.items() for a in _OPENINGS for b in cores for c in _ENDINGS
    ]
    for desk, text in generator.sample(texts, 464):
        urgency = generator.choice(["now", "later"])
        rows.append((text, f"desk: {desk}; when: {urgency}; receipt: {desk[0].upper()}{generator.randrange(10)}"))
    return rows


def _dates(generator: random.Random) -> Rows:
    """A date and a number of days become the date after so many, in one of two ways to write it."""
    rows = []
    for _ in range(464):
        day = date(2000, 1, 1) + timedelta(days=generator.randrange(9000))
        later = day + timedelta(days=7 * generator.randrange(1, 3))
        weeks = "one week" if (later - day).days == 7 else "two weeks"
        said = generator.choice(["{0:%Y-%m-%d}", "{0.day} {0:%B %Y}"]).format(later)
        rows.append((f"{day.day} {day:%B %Y}, {weeks} on", said))
    return rows


TASKS: dict[str, Callable[[random.Random], Rows]] = {"inns": _inns, "tickets": _tickets, "dates": _dates}
