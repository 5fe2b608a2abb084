"""QLoRA's quality: the held-out loss of LoRA over nf4 against bfloat16 LoRA's, on a task that SmolLM2 learns.

A record of five fields becomes one of twelve wordings of it, so that even a perfect model keeps the loss of guessing
which. Both sides have the same rows in the
same order, the same first weights and steps, run as `ftkit train`; a round is a seed. The shipped base is Q4_1, so that
nf4 rounds it a second time, and bfloat16 hardly does.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
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
    "evaluation.every_steps": 20,
    "data.max_tokens": 320,
}
_SIDES = {"nf4": ["--quant", "nf4"], "bfloat16": ["--set", "model.dtype=bfloat16"]}


def run() -> dict[str, Any]:
    """Held-out losses, nats a token."""
    losses: dict[str, list[float]] = {side: [] for side in _SIDES}
    with tempfile.TemporaryDirectory() as place:
        for seed, side in itertools.product(SEEDS, _SIDES):
            losses[side].append(_loss(side, seed, *_inns(Path(place))))
    unit = "nats a token of bfloat16 LoRA"
    return line("held-out loss over nf4", unit, losses["nf4"], losses["bfloat16"], less=True)


def _loss(side: str, seed: int, train: Path, held_out: Path) -> float:
    words = ["train", "--model", str(smollm2()), "--data", str(train), "--evaluation-data", str(held_out)]
    words += [*_SIDES[side], "--seed", str(seed), "--max-steps", str(STEPS), "--name", f"{side}-{seed}", "--json"]
    words += ["--runs-dir", str(train.parent), *(f"--set={key}={value}" for key, value in _SETTINGS.items())]
    made = subprocess.run([sys.executable, "-m", "ftkit", *words], check=True, capture_output=True, text=True)
    events = (train.parent / f"{side}-{seed}" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    course = [event["loss"] for event in map(json.loads, events) if event["event"] == "evaluation"]
    print(f"{side}, seed {seed}: " + " → ".join(f"{loss:.4f}" for loss in course), file=sys.stderr)
    loss: float = json.loads(made.stdout)["eval_loss"]
    return loss


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


def _inns(folder: Path) -> tuple[Path, Path]:
    """Rows to train on, and rows that are held out."""
    generator = random.Random(7)
    records = [dict(zip(_FIELDS, values, strict=True)) for values in itertools.product(*_FIELDS.values())]
    rows = []
    for record in generator.sample(records, 464):
        said = f"{generator.choice(_FIRST)} {generator.choice(_SECOND)}".format(**record)
        rows.append(("; ".join(f"{key}: {value}" for key, value in record.items()), said[0].upper() + said[1:]))
    return _write(folder / "train.jsonl", rows[:400]), _write(folder / "held_out.jsonl", rows[400:])


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in rows]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    return path
