"""Targets of export: one file a target.

A target has `TYPES` and `DEFAULT_TYPE` (what `--type` may say), `SUFFIX` (of the file that it writes; empty for a
directory), `write(material, out, kind)`, which writes to a path that nothing is at and returns remarks on what was done
otherwise than asked for, and `read_back(material, out)`, which gives the model that is there now.
"""

from ftkit.export._material import Material
from ftkit.export._publish import (
    Exported,
    Measured,
    adapter_beside,
    check_apart,
    check_calibration,
    export,
    measure,
    publish,
)

__all__ = [
    "Exported",
    "Material",
    "Measured",
    "adapter_beside",
    "check_apart",
    "check_calibration",
    "export",
    "measure",
    "publish",
]
