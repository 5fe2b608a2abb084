"""A decoder's layers one after another, over a cache of pages.

    x ← layer_i(x)   for every layer i

The `fused` backend computes all of them in one call into the core, where a small model's token takes less time than
torch takes to start its operations. It needs float32 on the CPU, no gradients, and adapters that are LoRAs, and makes
each row's result independent of the rest of the batch, to the bit. Where an adapter is no LoRA but merges into the
weights' own format, the sequences of each adapter are computed in a call of their own, over its merged weights.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftkit import _core
from ftkit.kernels import operation

KEPT = (torch.float32, torch.uint8)
"""The core's caches: numbers, or codes of 8 bits with scales."""


@operation
def decoder_layers(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> Tensor:
    """x [T, d], cos and sin [T, head_dim / 2], the batch, its cache (or None) and the decoder to [T, d].

    The activations of the model's first `recomputed_layers` are not kept for a backward pass but computed again in it.
    They come first since what is kept grows from layer to layer, and a recomputed layer's activations come on top of
    what is kept before it. What a recomputed layer keeps is its input; the model's `input_hooks` say where. Where the
    model is thinned out, a layer takes only some of the rows.
    """
    learns = cache is None and torch.is_grad_enabled()
    recomputed: int = model.recomputed_layers if learns else 0
    thinning: Any = model.thinning(batch) if learns else None
    for number, layer in enumerate(model.layers):
        run = functools.partial(_recomputed, layer, model.input_hooks) if number < recomputed else layer
        kept = None if thinning is None else thinning.kept(number, layer, x)
        if kept is None:
            x = run(x, angles, batch, cache)
        else:
            cos, sin = (angle.index_select(0, kept) for angle in angles)
            x = x.index_copy(0, kept, run(x.index_select(0, kept), (cos, sin), thinning.batch(kept), None))
    return x


def _recomputed(layer: Any, hooks: Callable[[], Any], *inputs: Any) -> Tensor:
    """The layer's output; in the backward pass it is computed again."""
    with hooks():  # inside, the checkpoint has its own
        output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return output


@dataclass
class _Fused:
    """The core's view of a model's layers, and what it was made of."""

    weights: list[tuple[dict[str, Any], Any]]
    adapters: dict[int, Any]
    layers: dict[int | None, _core.DecoderLayers | None]
    """Under all adapters but those left out (None), or under one or the base alone; None where the core cannot."""
    left_out: set[int]
    """Adapters that the core cannot compute beside others."""
    revision: tuple[int, int] | None = None
    """Of the model when it was last looked at."""
    step: tuple[Any, _core.DecoderStep] | None = None
    """The step over a cache of pages."""

    def current(self) -> bool:
        """Whether the model still has these weights."""
        return all(modules["weight"] is weight for modules, weight in self.weights)

    def follow(self, model: Any) -> None:
        """Takes over which adapters are on the model; the view under all of them is changed, not made anew."""
        before, now = self.adapters, dict(model.attached)
        gone = [key for key, value in before.items() if now.get(key) is not value]
        new = [key for key, value in now.items() if before.get(key) is not value]
        if not gone and not new:
            return
        together = self.layers.get(None)
        self.adapters, self.layers = now, {}
        if together is None:
            self.step = None
        else:
            self.layers[None] = together
            for key in gone:
                together.remove_adapter(key)
                self.left_out.discard(key)
            self.add(model, together, new)

    def add(self, model: Any, together: _core.DecoderLayers, new: Iterable[int]) -> None:
        """Puts adapters on the view under all."""
        for key in new:
            loras = _loras(model, key, with_head=together.has_head)
            if loras is None:
                self.left_out.add(key)
            else:
                together.add_adapter(key, loras)


def fused_layers(model: Any, adapter_id: int | None = None) -> _core.DecoderLayers | None:
    """The core's view of the layers under all adapters that it can compute beside others, or under one or the base
    alone; None where it has none."""
    found: _Fused | None = getattr(model, "_fused", None)
    revision = model.revision
    if found is not None and found.revision == revision and adapter_id in found.layers:
        return found.layers[adapter_id]
    if found is None or not found.current():
        found = _Fused(
            weights=[(linear._modules, linear.weight) for linear in model.linears().values()],
            adapters=dict(model.attached),
            layers={},
            left_out=set(),
        )
        object.__setattr__(model, "_fused", found)  # no part of the module's state
    found.follow(model)
    found.revision = revision
    if adapter_id not in found.layers:
        layers = found.layers[adapter_id] = _build(model, adapter_id)
        if layers is not None and adapter_id is None:
            found.left_out = set()
            found.add(model, layers, found.adapters)
    return found.layers[adapter_id]


def together(model: Any, batch: Any) -> _core.DecoderLayers | None:
    """The core's view under all adapters of a batch; None where it has none."""
    layers = fused_layers(model)
    alone = model._fused.left_out
    return None if alone and any(adapter_id in alone for adapter_id, _, _ in batch.routes.spans) else layers


def whole_step(model: Any, cache: Any) -> _core.DecoderStep | None:
    """The core's step from token ids to logits, over a cache; None where the core has none.

    It computes adapters that it knows, and is good for as long as the model's revision stays the same.
    """
    pages = getattr(cache, "pages", None)
    if pages is None or model.training or model.device.type != "cpu" or model.dtype != torch.float32:
        return None
    if pages.dtype not in KEPT:
        return None
    layers = fused_layers(model)
    if layers is None or not layers.has_head or model.embed_tokens.adapters:
        return None
    found: _Fused = model._fused
    if found.step is None or found.step[0] is not cache:
        embedding = model.embed_tokens.weight.stored()
        if embedding is None or isinstance(embedding, _core.PackedMatrix):
            return None
        with torch.inference_mode():
            most = torch.arange(cache.page_count * cache.block_tokens, dtype=torch.int32)  # no sequence is longer
            angles = model.rotary(most, torch.float32)
        flat = [angle.contiguous().view(-1) for angle in angles]
        width = model.config.hidden_size
        found.step = (cache, _core.DecoderStep(layers, (embedding, width), (flat[0], flat[1]), pages))
    return found.step[1]


def supports(dtype: torch.dtype, device: torch.device, batch: Any, cache: Any, model: Any) -> bool:
    """Whether a step of serving, in `dtype` on `device`, is one that the core may compute."""
    pages = getattr(cache, "pages", None)
    if pages is None or torch.is_grad_enabled() or model.training or batch.block_table is None:
        return False
    return device.type == "cpu" and dtype == torch.float32 and pages.dtype in KEPT


def _supports(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> bool:  # noqa: ARG001
    if not supports(x.dtype, x.device, batch, cache, model):
        return False
    if together(model, batch) is not None:
        return True
    return all(fused_layers(model, adapter_id) is not None for adapter_id, _, _ in batch.routes.spans)


@decoder_layers.backend("fused", _supports)
def _run(x: Tensor, angles: tuple[Tensor, Tensor], batch: Any, cache: Any, model: Any) -> Tensor:
    """All layers in the core."""
    x = x.clone(memory_format=torch.contiguous_format)
    cos, sin = (angle.contiguous() for angle in angles)
    table = batch.block_table.contiguous()
    layers, spans = together(model, batch), list(batch.routes.spans)
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
    layers: list[Any] = []
    merged: set[Any] = set()
    if model.dtype != torch.float32:
        return None
    for layer in model.layers:
        linears = []
        for module in (*layer.self_attn.linears(), *layer.mlp.linears()):
            linear = _linear(module, adapter_id, merged)
            if linear is None:
                return None
            linears.append(linear)
        window = config.window(layer.self_attn.layer)
        norms, head_norms = _norms(layer)
        layers.append((_weights(norms), _weights(head_norms), window, linears))
    # one that changes the head or the last norm alone is left to these modules, where it is alone
    alone = str(adapter_id) in model.norm.adapters
    last = None if alone else _linear(model.lm_head, adapter_id, merged)
    if adapter_id is not None and _lora(model.lm_head, adapter_id, merged) is _UNKNOWN:
        last = None
    head = None if last is None else (model.norm.weight.detach(), last)
    sizes = (config.heads, config.key_value_heads, config.head_dim)
    made = _core.DecoderLayers(layers, head, *sizes, config.norm_epsilon)
    if adapter_id is not None and adapter_id in model.attached:
        loras = _loras(model, adapter_id, with_head=head is not None, merged=merged)
        if loras is None:
            return None
        made.add_adapter(adapter_id, loras)
    return made


def _norms(layer: Any) -> tuple[list[Any], list[Any]]:
    """The norms before attention and feed-forward, and those of queries and keys."""
    attention = layer.self_attn
    head_norms = [] if attention.q_norm is None else [attention.q_norm, attention.k_norm]
    return [layer.input_layernorm, layer.post_attention_layernorm], head_norms


def _weights(norms: Sequence[nn.Module]) -> list[Tensor]:
    return [norm.weight.detach() for norm in norms]  # type: ignore[operator]


def _linear(module: Any, only: int | None, merged: set[Any]) -> tuple[Any, ...] | None:
    """(matrix, inputs, bias) of a linear layer, merged with `only` one adapter where that can be, and then noted; None
    for one that the core doesn't know."""
    weight = module.weight
    adapter = None if only is None else module.adapter(only)
    # what is still trained changes in place, and a merged weight would not
    if adapter is not None and adapter.bias is None and not any(p.requires_grad for p in adapter.parameters()):
        found = adapter.merged_weight(weight)
        if found is not None:
            weight = found
            merged.add(module)
    stored = weight.stored()
    if stored is None:
        return None
    return (stored, module.shape[1], None if module.bias is None else module.bias.detach())


_UNKNOWN = ()
"""In place of a LoRA: what an adapter does to a layer is none."""


def _lora(module: Any, adapter_id: int, merged: Set[Any] = frozenset()) -> tuple[Any, ...] | None:
    """(A, B, whether B is given by columns, scale) of an adapter on a linear layer; None where it adds nothing, empty
    where it is no LoRA."""
    adapter = module.adapter(adapter_id)
    if adapter is None or module in merged:
        return None
    lora = adapter.as_lora()
    if lora is None or adapter.bias is not None or lora[0].dtype != torch.float32:
        return _UNKNOWN
    a, b, scale = lora[0].detach(), lora[1].detach(), lora[2]
    return (a, b, False, scale) if b.is_contiguous() else (a, b.t(), True, scale)


def _loras(
    model: Any, adapter_id: int, *, with_head: bool, merged: Set[Any] = frozenset()
) -> list[tuple[Any, ...] | None] | None:
    """What an adapter adds to each linear layer, the head's last; None where the core cannot compute it."""
    found: list[tuple[Any, ...] | None] = []
    for layer in model.layers:
        norms, head_norms = _norms(layer)
        if any(str(adapter_id) in norm.adapters for norm in (*norms, *head_norms)):
            return None
        linears = (*layer.self_attn.linears(), *layer.mlp.linears())
        found += [_lora(module, adapter_id, merged) for module in linears]
    if with_head:
        if str(adapter_id) in model.norm.adapters:
            return None
        found.append(_lora(model.lm_head, adapter_id, merged))
    return None if any(lora is _UNKNOWN for lora in found) else found
