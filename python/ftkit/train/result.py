"""What a run returns: the keys of `ftkit train --json`."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a finished run."""

    run: str
    adapter: str
    adapter_sha256: str
    steps: int
    final_loss: float | None
    """Of the last step that counted."""
    eval_loss: float | None
    """The lowest held-out loss, which is the adapter's; None when nothing was held out."""
    real_tokens_per_second: float
    peak_bytes: int
    planned_peak_bytes: int | None
    peak_rss_bytes: int
    planned_peak_rss_bytes: int | None
    seconds: float
    tokens: int
    trained_tokens: int
    bad_steps: int
    report: str

    def table(self) -> dict[str, Any]:
        """The result as one JSON document."""
        return dataclasses.asdict(self)


def sha256_of(folder: Path) -> str:
    """The hash of a folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
