"""Keep what the rounding loses as a small LoRA: codes of the base's size, and the greatest part of their error beside.

    Q = quantize(W + ΔW − B A),   B A ≈ W + ΔW − Q        A [rank, in], B [out, rank]

A matrix that keeps its format keeps its codes and scales to the bit: Q = W, and the factors take ΔW alone. (Measured on
a 4-bit file with a trained LoRA of rank 16: quantizing W + ΔW anew, or only its scales and offsets, comes 3 % nearer to
it, as noise of full rank; with factors of rank 8 a share of 0.30 of ΔW is missing then, and of 0.24 so.)
A matrix that changes its format is quantized once without what the factors hold, and they are fitted again
to what is missing. ΔW of any method is taken; at the rank of a LoRA the result is that LoRA.

Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023, arXiv 2310.08659; Guo et
al., LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition, 2023, arXiv 2311.12023.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ftkit import _core, adapters
from ftkit.errors import InputError
from ftkit.export import Material, gguf
from ftkit.kernels.block_matmul import dequantize
from ftkit.merge.onto._low_rank import factors
from ftkit.models import LoadedModel

_FORMATS = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}


def made(material: Material, kind: str, rank: int) -> Material:
    """What is written. Raises InputError for a method that changes the base itself, and weights that aren't finite."""
    loaded, adapter_id = material.loaded, material.adapter_id
    if adapter_id is None or loaded.model.attached[adapter_id].edits_base:
        raise InputError("--onto compensated: expected one adapter that leaves the base as it is, got another")
    base = Material.of(loaded)
    forms = gguf.formats(base, kind)
    tensors, blocks, changed = dict(material.tensors), dict(material.blocks), set(material.changed)
    loras: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in loaded.model.linears():
        name = f"{layer}.weight"
        if name not in material.changed or name not in base.tensors or _FORMATS[forms[name][0]][0] == 1:
            continue
        form, kept = forms[name]
        before, after = base.tensors[name].float(), material.tensors[name].float()
        a, b = factors(after - before, rank)
        if kept:
            tensors[name] = base.tensors[name]
            changed.remove(name)
            blocks.pop(name, None)
        else:
            blocks[name] = form, _quantized(form, after - b @ a)
            tensors[name] = dequantize(*blocks[name]).to(after.dtype)
            a, b = factors(after - tensors[name], rank)
        if b.any():
            loras[layer] = a, b

    def beside(written: LoadedModel, folder: Path) -> None:
        _save(written, loras, rank, folder)

    return replace(
        material,
        tensors=tensors,
        blocks=blocks,
        changed=frozenset(changed),
        near=True,
        beside=beside if loras else None,
    )


def _quantized(form: str, values: Tensor) -> Tensor:
    """Blocks uint8 [out, bytes of a row] of values [out, in]."""
    size, nbytes = _FORMATS[form]
    blocks = torch.empty(values.shape[0], values.shape[1] // size * nbytes, dtype=torch.uint8)
    _core.quantize(form, values.contiguous(), blocks)
    return blocks


def _save(written: LoadedModel, loras: dict[str, tuple[Tensor, Tensor]], rank: int, folder: Path) -> None:
    """Writes the factors as a LoRA over the model that was written."""
    options = {"rank": rank, "alpha": float(rank), "target_modules": tuple(loras)}
    adapters.attach(written.model, "lora", options, seed=0)
    parameters = adapters.trainable(written.model)
    with torch.no_grad():
        for layer, (a, b) in loras.items():
            parameters[f"{layer}.lora_A"].copy_(a)
            parameters[f"{layer}.lora_B"].copy_(b)
    adapters.save(written.model, 0, folder, written.fingerprint, written.name)
    adapters.detach(written.model, 0)
