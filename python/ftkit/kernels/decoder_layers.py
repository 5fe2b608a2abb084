"""A decoder's layers one after another, over a cache of pages.

    x ← layer_i(x)   for every layer i

The `fused` backend computes all of them in one call into the core, where a small model's token takes less time than
torch takes to start its operations. It needs float32 on the CPU, no gradients, and adapters that are LoRAs, and makes
each row's result independent of the rest of the batch, to the bit. Where an adapter is no LoRA but merges into the
weights' own format, the sequences of each adapter are computed in a call of their own, over its merged weights.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftkit import _core
from ftkit.kernels import operation


@operation
def decoder_layers(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> Tensor:
    """x [T, d], cos and sin [T, head_dim / 2], the batch, its cache (or None) and the decoder to [T, d].

    The activations of the model's first `recomputed_layers` are not kept for a backward pass but computed again in it.
    They come first since what is kept grows from layer to layer, and a recomputed layer's activations come on top of
    what is kept before it.
    """
    recomputed = model.recomputed_layers if cache is None and torch.is_grad_enabled() else 0
    for layer in model.layers[:recomputed]:
        x = checkpoint(layer, x, angles, batch, None, use_reentrant=False)
    for layer in model.layers[recomputed:]:
        x = layer(x, angles, batch, cache)
    return x


@dataclass(frozen=True)
class _Fused:
    """The core's view of a model's layers, and what it was made of."""

    weights: list[tuple[dict[str, Any], Any]]
    adapters: dict[int, Any]
    layers: dict[int | None, _core.DecoderLayers | None]
    """Under all adapters (None), or under one or the base alone; None where the core cannot compute them."""

    def current(self, attached: dict[int, Any]) -> bool:
        """Whether the model still has these weights and adapters."""
        same = len(attached) == len(self.adapters) and all(self.adapters.get(k) is v for k, v in attached.items())
        return same and all(modules["weight"] is weight for modules, weight in self.weights)


def fused_layers(model: Any, adapter_id: int | None = None) -> _core.DecoderLayers | None:
    """The core's view of the layers under all adapters, or under one or the base alone; None where it has none."""
    found: _Fused | None = getattr(model, "_fused", None)
    if found is None or not found.current(model.attached):
        found = _Fused(
            weights=[(linear._modules, linear.weight) for linear in model.linears().values()],
            adapters=dict(model.attached),
            layers={},
        )
        object.__setattr__(model, "_fused", found)  # no part of the module's state
    if adapter_id not in found.layers:
        found.layers[adapter_id] = _build(model, adapter_id)
    return found.layers[adapter_id]


def supports(dtype: torch.dtype, device: torch.device, batch: Any, cache: Any, model: Any) -> bool:
    """Whether a step of serving, in `dtype` on `device`, is one that the core may compute."""
    pages = getattr(cache, "pages", None)
    if pages is None or torch.is_grad_enabled() or model.training or batch.block_table is None:
        return False
    return device.type == "cpu" and dtype == pages.dtype == torch.float32


def _supports(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> bool:  # noqa: ARG001
    if not supports(x.dtype, x.device, batch, cache, model):
        return False
    if fused_layers(model) is not None:
        return True
    return all(fused_layers(model, adapter_id) is not None for adapter_id, _, _ in batch.routes.spans)


@decoder_layers.backend("fused", _supports)
def _run(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> Tensor:
    """All layers in the core."""
    x = x.clone(memory_format=torch.contiguous_format)
    cos, sin = (angle.contiguous() for angle in angles)
    table = batch.block_table.contiguous()
    layers, spans = fused_layers(model), list(batch.routes.spans)
    if layers is not None:
        layers.forward(x, cos, sin, batch.positions, batch.cu_seqlens, table, cache.pages, spans)
        return x
    ends = list(itertools.accumulate(batch.lengths, initial=0))
    for adapter_id, start, end in spans:
        layers = fused_layers(model, adapter_id)
        assert layers is not None
        first, last = bisect.bisect_left(ends, start), bisect.bisect_right(ends, end) - 1
        layers.forward(
            x[start:end],
            cos[start:end],
            sin[start:end],
            batch.positions[start:end],
            batch.cu_seqlens[first : last + 1] - start,
            table[first:last],
            cache.pages,
            [(adapter_id, 0, end - start)],
        )
    return x


def _build(model: Any, adapter_id: int | None) -> _core.DecoderLayers | None:
    config = model.config
    layers = []
    for layer in model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        head_norms = [] if attention.q_norm is None else [attention.q_norm, attention.k_norm]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        modules = (*attention.linears(), *feed_forward.linears())
        linears = [linear for module in modules if (linear := _linear(module, adapter_id)) is not None]
        if len(linears) < len(modules) or any(norm.adapters for norm in (*norms, *head_norms)):
            return None
        window = config.window(attention.layer)
        layers.append((_weights(norms), _weights(head_norms), window, linears))
    last = None if model.norm.adapters else _linear(model.lm_head, adapter_id)
    head = None if last is None else (model.norm.weight.detach(), last)
    return _core.DecoderLayers(layers, head, config.heads, config.key_value_heads, config.head_dim, config.norm_epsilon)


def _weights(norms: Sequence[nn.Module]) -> list[Tensor]:
    return [norm.weight.detach() for norm in norms]  # type: ignore[operator]


def _linear(module: Any, only: int | None) -> tuple[Any, ...] | None:
    """(matrix, inputs, bias, LoRAs) of a linear layer under all adapters or `only` one; None for one that the core
    doesn't know."""
    weight = module.weight
    under = {key: adapter for key, adapter in module.adapters.items() if only is None or key == str(only)}
    for key, adapter in list(under.items()) if only is not None else ():
        # what is still trained changes in place, and a merged weight would not
        frozen = not any(parameter.requires_grad for parameter in adapter.parameters())
        merged = adapter.merged_weight(weight) if frozen and adapter.bias is None else None
        if merged is not None:
            weight = merged
            del under[key]
    stored = weight.stored()
    if stored is None:
        return None
    loras = []
    for adapter_id, adapter in under.items():
        lora = adapter.as_lora()
        if lora is None or adapter.bias is not None or lora[0].dtype != torch.float32:
            return None
        loras.append((int(adapter_id), lora[0].detach(), lora[1].detach(), lora[2]))
    bias = None if module.bias is None else module.bias.detach()
    return (stored, module.shape[1], bias, loras)
