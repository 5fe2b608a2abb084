"""What is exported, its matrices in a scheme of few bits: as they are held where they are held so, else quantized.

Matrices of the layers are quantized; embeddings and the head stay dense, and so does what a base in this very scheme
holds dense. Rows that blocks don't divide stay dense, too: int4 has no groups for them, and bitsandbytes 0.50 decodes
them wrongly on a CPU, where it takes each row to begin a block. Nothing is rounded twice without saying so.
"""

import dataclasses
from typing import Any

import torch

from ftkit.errors import InputError
from ftkit.export._material import Material
from ftkit.models._quantized import STAY_DENSE, scheme_of
from ftkit.nn.linear import Weight
from ftkit.quant._scheme import QuantizedWeight

_WHOLE_ZERO_POINTS = ("int4",)
"""Schemes whose zero points are whole numbers, which floats that are added to groups are not."""
_BLOCK = 64
"""Values in a block of nf4 and fp4, and in a group of int4 without an option."""
_FLOATS = ("f32", "f16", "bf16")


def quantized(material: Material, quant: str, requantize: bool) -> tuple[Material, list[str]]:
    """The material with `quantized` and `rounded_to` filled in, and remarks.

    `quant`: the scheme; without an option of its own it is the one that the model's matrices are in, where they are.
    Raises InputError where float offsets would become whole zero points and `requantize` is not set.
    """
    name, _, option = quant.partition(":")
    held = {key: weight for key, weight in material.held.items() if isinstance(weight, QuantizedWeight)}
    base = [
        linear.weight.scheme
        for linear in material.loaded.model.linears().values()
        if isinstance(linear.weight, QuantizedWeight) and linear.weight.scheme.name.partition(":")[0] == name
    ]
    own = base[0] if base and option in ("", base[0].name.partition(":")[2]) else None
    scheme: Any = own or scheme_of(quant)
    dense = _dense(material) if own is not None else set(STAY_DENSE)
    if name in _WHOLE_ZERO_POINTS and not requantize:
        _refuse_offsets(material, quant)
    block = int(digits) if (digits := scheme.name.partition(":")[2]).isdigit() else _BLOCK
    found: dict[str, Weight] = {}
    error = total = 0.0
    rounded, uneven = [], []
    for key, tensor in material.tensors.items():
        weight = held.get(key)
        if tensor.dim() != 2 or (key in dense and key not in held):
            continue
        if tensor.shape[1] % block:
            uneven.append(key)
        elif weight is not None and weight.scheme.name == scheme.name:
            found[key] = weight
        else:
            values = tensor.detach().float().cpu()
            made = scheme.weight(values, torch.float32)
            found[key] = made
            error += float((made.dense() - values).double().square().sum())
            total += float(values.double().square().sum())
            rounded.append(key)
    if not found:
        raise InputError(f"--quant {quant}: expected rows of whole blocks of {block} values, got none")
    remarks = []
    if kept := len(found) - len(rounded):
        remarks.append(f"{kept} matrices keep the {scheme.name} codes that they are held in")
    if rounded:
        linears = material.loaded.model.linears()
        again = sum(_has_codes(linears[key.removesuffix(".weight")].weight) for key in rounded)
        twice = f" ({again} of them had been quantized before)" if again else ""
        moved = (error / total) ** 0.5 if total else 0.0
        remarks.append(
            f"{len(rounded)} matrices were quantized to {scheme.name}{twice}: weights moved by {moved:.1%} "
            "(root mean square), and the parity says what that costs"
        )
    if uneven:
        remarks.append(
            f"{len(uneven)} matrices, such as {uneven[0]}, stay dense: blocks of {block} don't divide their rows"
        )
    return dataclasses.replace(material, quantized=found, rounded_to=name if rounded else None), remarks


def _dense(material: Material) -> set[str]:
    """The matrices that a quantized base holds dense."""
    layers = material.loaded.model.layers_by_name()
    return {f"{name}.weight" for name, layer in layers.items() if not isinstance(layer.weight, QuantizedWeight)}


def _has_codes(weight: Weight) -> bool:
    """Whether the weight was rounded to few bits before."""
    blocks = weight.blocks_of_file()
    return isinstance(weight, QuantizedWeight) or (blocks is not None and blocks[0] not in _FLOATS)


def _refuse_offsets(material: Material, quant: str) -> None:
    weights = {name: linear.weight for name, linear in material.loaded.model.linears().items()}
    floats = [name for name, weight in weights.items() if weight.group_offsets() is not None]
    if floats:
        raise InputError(
            f"--quant {quant}: expected matrices without float offsets, got {len(floats)} with them "
            f"(q4_1, q5_1 or int4_group), such as {floats[0]}: {quant} has whole zero points, which cannot hold them",
            "--requantize rounds them to it and says what that costs; --to gguf --type q4_1 keeps them to the bit",
        )
