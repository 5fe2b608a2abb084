"""What is exported."""

from dataclasses import dataclass

from torch import Tensor

from ftkit import adapters
from ftkit.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Material:
    """A loaded model, and the weights it comes to with its adapter."""

    loaded: LoadedModel
    adapter_id: int | None
    tensors: dict[str, Tensor]
    """Weights by their published names, the adapter merged in."""
    changed: frozenset[str]
    """Names of the weights that differ from those on disk."""

    @classmethod
    def of(cls, loaded: LoadedModel, adapter_id: int | None = None) -> "Material":
        """The model as it is, or with the adapter of that id."""
        base = loaded.model.tensors()
        if adapter_id is None:
            return cls(loaded=loaded, adapter_id=None, tensors=base, changed=frozenset())
        tensors = adapters.merged(loaded.model, adapter_id)
        changed = {name for name, tensor in tensors.items() if _differs(tensor, base.get(name))}
        if loaded.model.attached[adapter_id].edits_base:
            changed = set(tensors)
        return cls(loaded=loaded, adapter_id=adapter_id, tensors=tensors, changed=frozenset(changed))

    @property
    def template(self) -> str | None:
        """The source of the chat template, None for a model without one."""
        template = self.loaded.template
        return None if template is None else template.source


def _differs(tensor: Tensor, base: Tensor | None) -> bool:
    return base is None or tensor.data_ptr() != base.data_ptr()
