"""What is exported."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ftkit import adapters
from ftkit.eval.parity import Answers
from ftkit.export._calibration import Calibration
from ftkit.models import LoadedModel
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Weight
from ftkit.quant._scheme import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Material:
    """A loaded model, and the weights it comes to with its adapter."""

    loaded: LoadedModel
    adapter_id: int | None
    tensors: dict[str, Tensor]
    """Weights by their published names, the adapter merged in."""
    changed: frozenset[str]
    """Names of the weights that differ from those on disk."""
    blocks: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Name → (format, blocks) of GGUF that hold a changed weight to the bit, where there are such."""
    calibration: Calibration | None = None
    """How much columns count when weights are rounded; None: all alike."""
    held: dict[str, Weight] = field(default_factory=dict)
    """Name → the matrix as the model holds it, but for those that an adapter is merged into as floats."""
    quantized: dict[str, Weight] = field(default_factory=dict)
    """Name → the matrix in the scheme that it is to be written in; empty for an export of floats."""
    rounded_to: str | None = None
    """The scheme that some of `quantized` were rounded to for this export."""
    near: bool = False
    """The weights are only near what the live model computes with."""
    beside: Callable[[LoadedModel, Path], None] | None = None
    """Writes the adapter that belongs to the written model, which is read back for it, to a new directory."""
    base: Answers | None = None
    """What the base says without the adapter, where it was asked already."""

    @classmethod
    def of(cls, loaded: LoadedModel, adapter_id: int | None = None) -> "Material":
        """The model as it is, or with the adapter of that id."""
        model = loaded.model
        converted = _converted(model)
        held = {f"{name}.weight": linear.weight for name, linear in model.linears().items()}
        changed = {f"{name}.weight" for name in converted}
        if adapter_id is None:
            own = {}
            tensors = model.tensors()
        else:
            tensors = adapters.merged(model, adapter_id)
            adapted = [name for name, layer in model.layers_by_name().items() if str(adapter_id) in layer.adapters]
            own = adapters.merged_weights(model, adapter_id)
            held = {name: weight for name, weight in held.items() if name.removesuffix(".weight") not in adapted} | own
            changed |= {f"{name}.{kind}" for name in adapted for kind in ("weight", "bias")}
            if model.config.tied_embeddings:  # a head of its own came out of a tied one
                changed.add("lm_head.weight")
            if model.attached[adapter_id].edits_base:
                changed = set(tensors)
        weights = {
            name: weight for name, weight in held.items() if name in own or name.removesuffix(".weight") in converted
        }
        blocks = {name: blocks for name, weight in weights.items() if (blocks := weight.blocks_of_file()) is not None}
        return cls(
            loaded=loaded,
            adapter_id=adapter_id,
            tensors=tensors,
            changed=frozenset(changed & tensors.keys()),
            blocks=blocks,
            held={name: weight for name, weight in held.items() if name in tensors},
        )

    @property
    def exact(self) -> bool:
        """Whether the adapter's merged matrices are all in `blocks`, so that a file can hold just what was trained."""
        return not self.near and bool(self.blocks) and self.changed <= self.blocks.keys()

    @property
    def rounds(self) -> bool:
        """Whether writing the weights in the formats of the source changes what they answer."""
        return self.near or (bool(self.changed) and not self.exact)

    def importance(self, name: str) -> Tensor | None:
        """Of the columns of the weight `name`, float32 [in]; None where none was measured.

        An embedding is looked up, which has no input; one that is the head as well counts as the head does.
        """
        if self.calibration is None:
            return None
        layer = name.removesuffix(".weight")
        if (
            layer == "model.embed_tokens"
            and self.loaded.config.tied_embeddings
            and "lm_head.weight" not in self.tensors
        ):
            layer = "lm_head"
        return self.calibration.importance.get(layer)

    @property
    def template(self) -> str | None:
        """The source of the chat template, None for a model without one."""
        template = self.loaded.template
        return None if template is None else template.source


def _converted(model: Decoder) -> set[str]:
    """The layers that hold what a scheme made of the weights on disk."""
    return {name for name, linear in model.linears().items() if isinstance(linear.weight, QuantizedWeight)}
