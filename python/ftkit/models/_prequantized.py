"""Directories of safetensors whose matrices other libraries quantized: read as they are, and written.

`quantization_config` in config.json names the library. One file a layout: `METHOD`, `SCHEMES`, `scheme(table)`,
`sides(weights)`, `tensors_of(name)`, `parts(weights, name, scheme)` to read; `tensors` and `configuration` to write.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.models import _bitsandbytes, _compressed_tensors
from ftkit.models._quantized import scheme_of
from ftkit.models._weights import FLOATS, Safetensors
from ftkit.nn.linear import Weight

_LAYOUTS: tuple[Any, ...] = (_bitsandbytes, _compressed_tensors)
_TABLES = ("table", "map")


class Prequantized:
    """The weights of such a directory, by the names that they have when nothing is quantized."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        """`table`: the `quantization_config`. Raises InputError for a method that is not read."""
        method = table.get("quant_method")
        layouts = {layout.METHOD: layout for layout in _LAYOUTS}
        if method not in layouts:
            raise InputError(
                f"{folder / 'config.json'}: quantization_config: expected the quant_method "
                f"{' or '.join(layouts)}, got {method!r}",
                "take the published model that it was made of, or save it dequantized with transformers",
            )
        self._layout = layouts[method]
        try:
            self.scheme: str = self._layout.scheme(table)
            self._file = Safetensors(folder, floats=False)
            self.sides: dict[str, tuple[int, int]] = self._layout.sides(self._file)
        except InputError as error:
            raise InputError(f"{folder}: {error.message}", error.hint) from None
        parts = {part for name in self.sides for part in self._layout.tensors_of(name)}
        dense = {name: shape for name, shape in self._file.shapes.items() if name not in parts}
        for name in dense:
            if (dtype := self._file.dtypes[name]) not in FLOATS:
                raise InputError(
                    f"{folder}: {name}: expected one of {', '.join(FLOATS)}, or a matrix of {method}, got {dtype}"
                )
        self.shapes: dict[str, tuple[int, ...]] = dense | self.sides

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor, dequantized where it is quantized."""
        return self.weight(name, dtype).dense() if name in self.sides else self._file.read(name, dtype)

    def read_mapped(self, name: str) -> Tensor:
        """The tensor as it is stored; in float32 where it is quantized."""
        return self.weight(name, torch.float32).dense() if name in self.sides else self._file.read_mapped(name)

    def weight(self, name: str, dtype: torch.dtype) -> Weight:
        """A quantized matrix as it is in the file; `dtype` is what the model computes in.

        Raises InputError for parts of other shapes or dtypes than the scheme's, and scales that are not finite.
        """
        scheme: Any = scheme_of(self.scheme)
        sides = self.sides[name]
        parts = self._layout.parts(self._file, name, self.scheme)
        for part, (shape, kind) in scheme.layout(sides).items():
            values = parts[part]
            alike = values.dtype == kind or (values.is_floating_point() and kind.is_floating_point)
            if tuple(values.shape) != shape or not alike:
                got = f"{values.dtype} {tuple(values.shape)}"
                raise InputError(f"{name}: expected {part} of {kind} {shape}, got {got}")
        for part, values in parts.items():
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise InputError(f"{name}: expected finite {part}, got NaN or infinite ones")
        own = scheme.coded({part: values for part, values in parts.items() if part not in _TABLES}, sides)
        for part, ours in (("table", own.table), ("map", own.nested and own.nested.map)):
            if part in parts:
                if parts[part].shape != ours.shape:
                    raise InputError(
                        f"{name}: expected a {part} of {len(ours)} numbers, got {tuple(parts[part].shape)}"
                    )
                if torch.equal(parts[part].float(), ours):  # the scheme's own, which are held once
                    del parts[part]
        weight: Weight = scheme.hold(parts, sides, dtype)
        return weight

    def fingerprint(self) -> str:
        """See `Weights`."""
        return self._file.fingerprint()


def serialized(
    weights: Mapping[str, Any], dtype: torch.dtype, dense: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors of `QuantizedWeight`s by name, and their `quantization_config`.

    `dense`: names of the linear layers that are not quantized. Raises InputError where `dtype` cannot hold the scales.
    """
    scheme: str = next(iter(weights.values())).scheme.name
    (layout,) = (layout for layout in _LAYOUTS if scheme.partition(":")[0] in layout.SCHEMES)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        found |= layout.tensors(name, weight, dtype)
    return found, layout.configuration(scheme, dtype, dense)
