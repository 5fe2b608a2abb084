"""Rows of 2,048 tokens of which nine matter: layers that leave tokens out, against layers that take all of them.

A tiny decoder learns to recall on rows of up to 512 tokens: eight values of eight kinds stand among random letters, and
the last token asks for one kind. Then a LoRA teaches it the same on rows four times as long, once with all tokens and
once with `training.sparse_tokens`, by the same configuration otherwise. After the value comes one of four endings at
random, and a sign that it is over, so that no model has a loss below (ln 4) / 3. Told are the held-out loss (of all
tokens, in both), the most tensor memory of a step beside what it begins with, and a step's processor time, taking
turns.

Then the memory and time of a step of SmolLM2-135M on a made-up row of as many tokens.
"""

import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench._figures import line, smollm2

SHARE = 0.25
TOKENS = 2048
ROUNDS = 3
LAYERS, WIDTH = 6, 64
BASE_STEPS = 700
STEPS = 60
KINDS = VALUES = 8
ENDINGS = 4
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<|stop|>{% endif %}"
    "{% endfor %}"
)


def run() -> list[dict[str, Any]]:
    """Loss, memory and time, sparse beside dense."""
    with tempfile.TemporaryDirectory() as folder:
        found = _recall(Path(folder))
    return [*found, *_smollm2()]


def _recall(folder: Path) -> list[dict[str, Any]]:
    model = folder / "model"
    _learn_base(model)
    dice = random.Random(1)
    for name, count in (("train", 2 * STEPS), ("held-out", 32)):
        rows = [_row(dice, TOKENS - 2) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, steps = {}, {}
    for name, share in (("sparse", SHARE), ("dense", 1.0)):
        results[name] = _train(folder, model, name, share)
        steps[name] = _step(_config(folder, model, name, share))
    loss = {name: [result.eval_loss] for name, result in results.items()}
    print(f"# final held-out losses: {loss}", file=sys.stderr)
    told = f"recall, {TOKENS} tokens"
    return [
        line(f"{told}, held-out loss", "nats a token", loss["sparse"], loss["dense"], less=True),
        *_memory_and_time(told, steps),
    ]


def _smollm2() -> list[dict[str, Any]]:
    """One made-up row of which the last 16 tokens are trained on."""
    with tempfile.TemporaryDirectory() as folder:
        word = {"prompt": " ".join(["weir"] * (TOKENS - 48)), "completion": " ".join(["leat"] * 8)}
        (Path(folder) / "train.jsonl").write_text(json.dumps(word) + "\n")
        steps = {
            name: _step(_config(Path(folder), smollm2(), name, share))
            for name, share in (("sparse", SHARE), ("dense", 1.0))
        }
        return _memory_and_time(f"SmolLM2-135M, {TOKENS} tokens", steps)


def _memory_and_time(told: str, steps: dict[str, Callable[[], tuple[float, float]]]) -> list[dict[str, Any]]:
    """Of steps that take turns."""
    peaks: dict[str, list[float]] = {"sparse": [], "dense": []}
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            peak, seconds = step()
            if number:  # the first warms up
                peaks[name].append(peak)
                times[name].append(seconds)
    return [
        line(f"{told}, memory of a step", "MiB beside weights", peaks["sparse"], peaks["dense"], less=True),
        line(f"{told}, a step", "processor s", times["sparse"], times["dense"], less=True),
    ]


def _config(folder: Path, model: Path, name: str, share: float) -> Any:
    from ftkit.config import RunConfig

    settings: dict[str, Any] = {
        "model.source": str(model),
        "data.path": str(folder / "train.jsonl"),
        "data.max_tokens": TOKENS + 64,
        "method.rank": 16,
        "optimizer.learning_rate": 1e-3,
        "training.max_steps": STEPS,
        "training.gradient_accumulation_steps": 2,
        "training.sparse_tokens": share,
        "training.activation_checkpointing": False,
        "output.name": name,
        "output.runs_dir": str(folder / "runs"),
        "output.samples": 0,
        "output.checkpoint_every_steps": STEPS,
    }
    if (held_out := folder / "held-out.jsonl").exists():
        settings |= {"evaluation.path": str(held_out), "evaluation.every_steps": STEPS}
    return RunConfig.from_toml(None, settings)


def _train(folder: Path, model: Path, name: str, share: float) -> Any:
    """The result of a run; what it says goes to standard error."""
    from ftkit import train

    def listen(event: dict[str, Any]) -> None:
        if event["event"] in ("notice", "evaluation", "memory") or event["step"] % 20 == 0:
            print(f"# {name}: {event}", file=sys.stderr)

    return train.run(_config(folder, model, name, share), listen, overwrite=True)


def _step(config: Any) -> Callable[[], tuple[float, float]]:
    """A step's forward and backward pass on the run's largest batch: (MiB of tensors at its peak beside those before
    it, processor seconds)."""
    from ftkit.plan.recorder import Recorder
    from ftkit.train import session

    made = session.build(dataclasses.replace(config), lambda _: None)
    batch = made.worst(1)

    def step() -> tuple[float, float]:
        start = time.process_time()
        made.loss(batch).sum.sum().backward()
        seconds = time.process_time() - start
        for parameter in made.parameters.values():
            parameter.grad = None
        recorder = Recorder()
        for category, tensors in made.tensors().items():
            recorder.adopt(tensors, category)
        with recorder, recorder.category("activations"):
            made.loss(batch).sum.sum().backward()
        for parameter in made.parameters.values():
            parameter.grad = None
        return recorder.peak().by_category["activations"] / 2**20, seconds

    return step


def _row(dice: random.Random, tokens: int) -> dict[str, str]:
    """A prompt of so many tokens, and the value that it asks for with an ending."""
    body = [dice.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(tokens - KINDS - 1)]
    values = [dice.randrange(VALUES) for _ in range(KINDS)]
    for kind, value in enumerate(values):
        body.insert(dice.randrange(len(body) + 1), f"<{kind}:{value}>")
    asked = dice.randrange(KINDS)
    answer = f"<{asked}:{values[asked]}><end:{dice.randrange(ENDINGS)}>"
    return {"prompt": "".join(body) + f"<ask:{asked}>", "completion": answer}


def _learn_base(folder: Path) -> None:
    """Writes a model that recalls in short rows, with its tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ftkit import models
    from ftkit.nn.batch import RaggedBatch
    from ftkit.objectives import sft

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = [f"<{kind}:{value}>" for kind in range(KINDS) for value in range(VALUES)]
    asks = [f"<ask:{kind}>" for kind in range(KINDS)] + [f"<end:{ending}>" for ending in range(ENDINGS)]
    tokenizer.add_special_tokens(["<|begin|>", "<|stop|>"])
    tokenizer.add_tokens([*kinds, *asks])  # special ones mean nothing inside a message
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|stop|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
        initializer_range=WIDTH**-0.5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    loaded = models.load(folder)
    model, dice = loaded.model.train(), random.Random(0)
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(BASE_STEPS):
        length = (32, 64, 128, 256, 512)[5 * step // BASE_STEPS]
        rows = []
        for _ in range(1024 // length):
            row = _row(dice, length - 3)
            text = row["prompt"] + row["completion"] + "<|stop|>"
            rows.append(tokenizer.encode(text, add_special_tokens=False).ids)
        targets = [[-100] * (len(row) - 4) + [*row[-3:], -100] for row in rows]
        parts = sft.loss(model, RaggedBatch.pack(rows, targets=targets))
        loss = (parts.sum / parts.count).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / BASE_STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"# base: loss {statistics.mean(losses[-20:]):.3f} on rows of 512 tokens", file=sys.stderr)
    save_file({name: tensor.contiguous() for name, tensor in model.tensors().items()}, folder / "model.safetensors")
