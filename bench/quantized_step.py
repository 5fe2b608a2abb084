"""Training over quantized weights: a LoRA step of SmolLM2-135M against the step over dense weights, and over nf4
against transformers with peft and bitsandbytes on the CPU; and the products of a layer over nf4 alone.

Rank 16 on all linear layers, AdamW, rows of 256 tokens; sides take turns, each in a process of its own. Over nf4 both
compute in float32 and in bfloat16. The products, which take turns in one process, are those of one decoder layer's
seven matrices for 1,024 tokens, forward and backward; bitsandbytes' are made in bfloat16 whatever x is.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._figures import line, smollm2
from bench._side import Side
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import sft
from ftkit.quant.nf4 import scheme

ROUNDS = 3
SCHEMES = ("gguf", "nf4", "int4_group", "int8")
PRECISIONS = ("float32", "bfloat16")
ROWS, LENGTH = 8, 256
TOKENS = 1024


def run() -> list[dict[str, Any]]:
    """Tokens a second of a step over each scheme, and of a layer's products."""
    sides = {name: Side(_step, name, torch.float32) for name in ("none", *SCHEMES)}
    sides["nf4, bfloat16"] = Side(_step, "nf4", torch.bfloat16)
    peer = importlib.util.find_spec("bitsandbytes") is not None
    if peer:
        sides |= {f"bitsandbytes, {dtype}": Side(_theirs, getattr(torch, dtype), peer=True) for dtype in PRECISIONS}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            seconds, _ = side.step(number)
            if number:  # the first warms up
                rates[name].append(ROWS * LENGTH / seconds)
    for side in sides.values():
        side.close()
    found = [line(f"train step, {name}", "tokens/s of dense", rates[name], rates["none"]) for name in SCHEMES]
    if not peer:
        print("quantized_step: bitsandbytes left out, it is not installed (uv sync --group test)", file=sys.stderr)
        return found
    for ours, dtype in (("nf4", "float32"), ("nf4", "bfloat16"), ("nf4, bfloat16", "bfloat16")):
        name = f"train step, {ours}, bitsandbytes in {dtype}"
        found.append(line(name, "tokens/s of bitsandbytes", rates[ours], rates[f"bitsandbytes, {dtype}"]))
    ours, theirs = _products()
    return [*found, line("products of a layer, nf4", "tokens/s of bitsandbytes", ours, theirs)]


def _rows(number: int) -> list[list[int]]:
    return [[1000 + (number * 7919 + row * 31 + at * 17) % 40000 for at in range(LENGTH)] for row in range(ROWS)]


def _step(quant: str, dtype: torch.dtype) -> Callable[[int], None]:
    model = models.load(smollm2(), quant=quant, dtype=dtype).model
    adapters.attach(model, "lora", {"rank": 16}, seed=0)
    model.train()
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-4)

    def step(number: int) -> None:
        rows = _rows(number)
        batch = RaggedBatch.pack(rows, targets=[[*row[1:], -100] for row in rows], adapter=0)
        optimizer.zero_grad()
        found = sft.loss(model, batch)
        (found.sum.sum() / (ROWS * (LENGTH - 1))).backward()
        optimizer.step()

    return step


def _theirs(dtype: torch.dtype) -> Callable[[int], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as place:
        words = ["export", str(smollm2()), "--to", "safetensors", "--out", f"{place}/dense"]
        subprocess.run([sys.executable, "-m", "ftkit", *words], check=True, capture_output=True)
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        base = AutoModelForCausalLM.from_pretrained(
            f"{place}/dense", quantization_config=settings, dtype=dtype, device_map="cpu"
        )
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> None:
        ids = torch.tensor(_rows(number))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


def _products() -> tuple[list[float], list[float]]:
    import bitsandbytes.functional as peer
    from bitsandbytes import matmul_4bit

    linears = models.load(smollm2()).model.linears()
    dense = [linear.weight.dense() for name, linear in linears.items() if name.startswith("model.layers.3.")]
    weights = [scheme("").weight(values, torch.float32) for values in dense]
    states = [peer.quantize_4bit(values, quant_type="nf4", compress_statistics=True) for values in dense]
    inputs = [torch.randn(TOKENS, values.shape[1]) for values in dense]

    def ours(x: Tensor, at: int) -> Tensor:
        return weights[at].matmul(x)

    def theirs(x: Tensor, at: int) -> Tensor:
        y: Tensor = matmul_4bit(x, states[at][0].t(), quant_state=states[at][1])
        return y

    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for products, found in zip((ours, theirs), rates, strict=True):
            start = time.perf_counter()
            for at, values in enumerate(inputs):
                x = values.clone().requires_grad_()
                products(x, at).sum().backward()
            if number:
                found.append(TOKENS / (time.perf_counter() - start))
    return rates
