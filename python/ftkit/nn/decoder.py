"""A decoder over the ragged batch: embedding, layers of attention and feed-forward, a final norm, a head.

    x ← x + o_proj(attention(rope(norm(q_proj h)), rope(norm(k_proj h)), v_proj h)),   h = norm(x)
    x ← x + down_proj(swiglu(gate_proj h, up_proj h)),                                 h = norm(x)

`DecoderConfig` says in what models of this shape differ: sizes, biases, norms of queries and keys, windows, angles.
Modules carry the names of published safetensors (`model.layers.0.self_attn.q_proj`).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.kernels.attention import attention
from ftkit.kernels.decoder_layers import decoder_layers
from ftkit.kernels.lora_linears import Origin
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.cache import KVCache
from ftkit.nn.linear import DenseWeight, Linear, Weight, together
from ftkit.nn.rotary import Rope, Rotary
from ftkit.nn.routes import Routes
from ftkit.nn.sparse_tokens import SparseTokens, Thinning
from ftkit.nn.tables import Embedding, RMSNorm


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What decides a decoder's shape."""

    family: str
    """The file in `models` that reads and writes its weights."""
    variant: str
    """The name that published configurations call it by (`model_type`), such as `llama` or `mistral`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope: Rope
    tied_embeddings: bool = False
    """The head's weight is the embedding's."""
    query_key_value_bias: bool = False
    output_bias: bool = False
    """A bias on the attention's output projection."""
    feed_forward_bias: bool = False
    query_key_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """By layer: the tokens that a token sees, itself included; None or empty: all."""

    def window(self, layer: int) -> int | None:
        """The window of a layer."""
        return self.windows[layer] if self.windows else None


class Attention(nn.Module):
    """Self-attention with grouped key and value heads."""

    def __init__(self, config: DecoderConfig, layer: int, make: "Maker") -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        q, kv = config.heads * config.head_dim, config.key_value_heads * config.head_dim
        self.layer, self.config = layer, config
        self.q_proj = make.linear(f"{name}.q_proj", q, config.hidden_size, config.query_key_value_bias)
        self.k_proj = make.linear(f"{name}.k_proj", kv, config.hidden_size, config.query_key_value_bias)
        self.v_proj = make.linear(f"{name}.v_proj", kv, config.hidden_size, config.query_key_value_bias)
        self.o_proj = make.linear(f"{name}.o_proj", config.hidden_size, q, config.output_bias)
        self.q_norm = make.norm(f"{name}.q_norm", config.head_dim) if config.query_key_norm else None
        self.k_norm = make.norm(f"{name}.k_norm", config.head_dim) if config.query_key_norm else None

    def linears(self) -> tuple[Linear, ...]:
        """In the order of their use."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: RaggedBatch,
        cache: KVCache | None,
        origin: Origin | None = None,
    ) -> Tensor:
        """[T, d] to [T, d]; `origin` is x's."""
        routes, config = batch.routes, self.config
        q, k, v = self.projected(x, angles, routes, origin)
        scale, window = config.head_dim**-0.5, config.window(self.layer)
        if cache is None:
            y = attention(q, k, v, batch.lengths, scale=scale, window=window, shared=batch.shared)
        else:
            y = cache.attend(self.layer, q, k, v, batch, scale=scale, window=window)
        output: Tensor = self.o_proj(y.flatten(1), routes)
        return output

    def projected(
        self, x: Tensor, angles: tuple[Tensor, Tensor], routes: Routes, origin: Origin | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, d] to queries [T, heads, head_dim], keys and values [T, key_value_heads, head_dim], at their angles."""
        q, k, v = (
            y.unflatten(-1, (-1, self.config.head_dim))
            for y in together((self.q_proj, self.k_proj, self.v_proj), x, routes, origin)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, routes), self.k_norm(k, routes)
        return rope(q, *angles), rope(k, *angles), v


class FeedForward(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: DecoderConfig, layer: int, make: "Maker") -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        inner, outer, bias = config.intermediate_size, config.hidden_size, config.feed_forward_bias
        self.gate_proj = make.linear(f"{name}.gate_proj", inner, outer, bias)
        self.up_proj = make.linear(f"{name}.up_proj", inner, outer, bias)
        self.down_proj = make.linear(f"{name}.down_proj", outer, inner, bias)

    def linears(self) -> tuple[Linear, ...]:
        """In the order of their use."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor, routes: Routes, origin: Origin | None = None) -> Tensor:
        """[T, d] to [T, d]; `origin` is x's."""
        inner = together((self.gate_proj, self.up_proj), x, routes, origin)
        return together((self.down_proj,), swiglu(*inner), routes, Origin(swiglu, inner))[0]


class Layer(nn.Module):
    """Attention and feed-forward, each around a residual."""

    def __init__(self, config: DecoderConfig, layer: int, make: "Maker") -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = make.norm(f"{name}.input_layernorm", config.hidden_size)
        self.self_attn = Attention(config, layer, make)
        self.post_attention_layernorm = make.norm(f"{name}.post_attention_layernorm", config.hidden_size)
        self.mlp = FeedForward(config, layer, make)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: RaggedBatch, cache: KVCache | None) -> Tensor:
        """[T, d] to [T, d]."""
        before, between, routes = self.input_layernorm, self.post_attention_layernorm, batch.routes
        x = x + self.self_attn(before(x, routes), angles, batch, cache, before.origin(x))
        output: Tensor = x + self.mlp(between(x, routes), routes, between.origin(x))
        return output


class Attachments(dict[int, Any]):
    """What is known of a model's adapters by their ids, and how often that changed."""

    changes = 0
    _fresh = 1 << 20  # ids that people choose are smaller

    def fresh(self) -> int:
        """An id that no adapter of this model has had, whether it was ever attached or not."""
        self._fresh += 1
        return self._fresh

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.changes += 1

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        self.changes += 1


class Decoder(nn.Module):
    """The model: `forward` to the hidden states after the final norm, `head` from these to logits."""

    def __init__(self, config: DecoderConfig, make: "Maker") -> None:
        super().__init__()
        self.config = config
        self.sparse_tokens: SparseTokens | None = None  # what training leaves out of which layers
        self.recomputed_layers = 0  # of the first layers, the activations are recomputed in the backward pass
        self.input_hooks: Callable[[], Any] = contextlib.nullcontext  # a context for saving the inputs of those layers
        self.fingerprint: str | None = None  # of the weights that were loaded
        self.attached = Attachments()  # what `adapters` knows of the adapters by their ids
        self.embed_tokens = make.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, make) for layer in range(config.layers))
        self.norm = make.norm("model.norm", config.hidden_size)
        if config.tied_embeddings:
            self.lm_head = Linear("lm_head", self.embed_tokens.weight)
        else:
            self.lm_head = make.linear("lm_head", config.vocab_size, config.hidden_size, False)
        self.rotary = Rotary(config.rope, config.head_dim)

    def forward(self, batch: RaggedBatch, cache: KVCache | None = None) -> Tensor:
        """The hidden states [T, d] of the batch's tokens, after the final norm.

        With a cache, the batch's tokens continue what the cache holds of their sequences.
        """
        x: Tensor = self.embed_tokens(batch.tokens, batch.routes)
        angles = self.rotary(batch.positions, x.dtype)
        x = decoder_layers(x, angles, batch, cache, self)
        hidden: Tensor = self.norm(x, batch.routes)
        return hidden

    def head(self, hidden: Tensor, routes: Routes | None = None) -> Tensor:
        """Hidden states [rows, d] to logits [rows, vocab_size].

        `routes` says which rows are under which adapter; it is needed only where an adapter changes the head.
        """
        if routes is None:
            if self.lm_head.adapters:
                raise ValueError("expected the rows' routes, since an adapter changes the head; got none")
            routes = Routes(((-1, 0, hidden.shape[0]),))
        logits: Tensor = self.lm_head(hidden, routes)
        return logits

    def thinning(self, batch: RaggedBatch) -> Thinning | None:
        """What of the batch is left out of layers; None: nothing, and never but in training."""
        return self.sparse_tokens.thinning(batch) if self.sparse_tokens is not None and self.training else None

    def shell(self) -> "Decoder":
        """A decoder over the same weights that no adapter is on."""
        own = self.layers_by_name()

        def tensor(name: str, _shape: tuple[int, ...]) -> Tensor:
            layer, _, inner = name.rpartition(".")
            found: Tensor = getattr(own[layer], inner).detach()
            return found

        def stored(name: str) -> Weight:
            return own[name.removesuffix(".weight")].weight  # type: ignore[return-value]

        shell = Decoder(self.config, Maker(tensor, self.config.norm_epsilon, stored)).train(self.training)
        shell.fingerprint = self.fingerprint
        return shell

    def linears(self) -> dict[str, Linear]:
        """The linear layers by name, in the order of the forward pass, the head last."""
        return {module.name: module for module in self.modules() if isinstance(module, Linear)}

    def layers_by_name(self) -> dict[str, Linear | Embedding | RMSNorm]:
        """Every layer with weights, by its published name."""
        return {module.name: module for module in self.modules() if isinstance(module, Linear | Embedding | RMSNorm)}

    def tensors(self) -> dict[str, Tensor]:
        """The base model's weights as dense tensors by their published names; a tied head is left out."""
        found: dict[str, Tensor] = {}
        for name, module in self.layers_by_name().items():
            if name == "lm_head" and self.config.tied_embeddings:
                continue
            weight = module.weight
            found[f"{name}.weight"] = weight.detach() if isinstance(weight, Tensor) else weight.dense()
            if isinstance(module, Linear) and module.bias is not None:
                found[f"{name}.bias"] = module.bias.detach()
        return found

    @property
    def revision(self) -> tuple[int, int]:
        """Another one whenever a linear layer has another weight, or the model other adapters."""
        return Linear.replaced, self.attached.changes

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.norm.weight.device


class Maker:
    """Makes a decoder's layers, with tensors from `tensor(name, shape)`; `stored(name)` has the matrices that are not
    dense."""

    def __init__(
        self,
        tensor: Callable[[str, tuple[int, ...]], Tensor],
        epsilon: float,
        stored: Callable[[str], Weight | None] = lambda name: None,  # noqa: ARG005
    ) -> None:
        self._tensor, self._epsilon, self._stored = tensor, epsilon, stored

    def linear(self, name: str, out: int, inp: int, bias: bool) -> Linear:
        """A linear layer [out, in]."""
        return Linear(name, self._weight(name, out, inp), self._tensor(f"{name}.bias", (out,)) if bias else None)

    def embedding(self, name: str, rows: int, width: int) -> Embedding:
        """An embedding [rows, width]."""
        return Embedding(name, self._weight(name, rows, width))

    def norm(self, name: str, width: int) -> RMSNorm:
        """A norm [width]."""
        return RMSNorm(name, self._tensor(f"{name}.weight", (width,)), self._epsilon)

    def _weight(self, name: str, rows: int, columns: int) -> Weight:
        stored = self._stored(f"{name}.weight")
        return DenseWeight(self._tensor(f"{name}.weight", (rows, columns))) if stored is None else stored


@functools.lru_cache(maxsize=8)
def shapes(config: DecoderConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(published name, shape) of every weight of a model of this configuration, without making any."""
    with torch.device("meta"):
        found: list[tuple[str, tuple[int, ...]]] = []

        def note(name: str, shape: tuple[int, ...]) -> Tensor:
            found.append((name, shape))
            return torch.empty(shape)

        Decoder(config, Maker(note, config.norm_epsilon))
    return tuple(found)
