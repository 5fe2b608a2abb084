"""What a user may call a model: a directory, a .gguf file, a run's name, a hub name."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import InputError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is."""

    path: Path
    """A directory of safetensors, or a .gguf file."""
    name: str
    """What to call it: as it was given."""
    adapter: Path | None = None
    """The adapter that a run brings with it."""
    run: Path | None = None
    """The run's directory."""
    quant: str | None = None
    """The scheme that the run's base was converted to; its adapter belongs to what that made of the weights."""


def resolve(name: str | Path, runs_dir: str | Path = "runs") -> Source:
    """Finds a model. A path that exists is taken first, then a run's name, then the hub.

    The hub is never asked about something that is a path or looks like one; what it gives comes from the local cache
    when HF_HUB_OFFLINE is set. Raises InputError when there is no such model.
    """
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir() and (path / "config.toml").is_file() and not (path / "config.json").exists():
        return _run(path, text)
    if text and path.exists():
        return Source(path=_model_path(path), name=text)
    if re.fullmatch(r"[^/\\]+", text) and (Path(runs_dir) / text).is_dir():
        return _run(Path(runs_dir) / text, text)
    if isinstance(name, Path) or text.endswith(".gguf") or not _HUB_NAME.fullmatch(text):
        raise InputError(
            f"model: expected a directory, a .gguf file, a hub name or a run in {runs_dir}, got {text!r}",
            "a hub name has the form owner/name; `ftkit runs list` shows the runs",
        )
    return Source(path=_download(text), name=text)


def _model_path(path: Path) -> Path:
    if path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path}: expected a directory of safetensors or a .gguf file, got another file")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path}: expected a model, got an adapter", "give its base model, and this as --adapter")
        raise InputError(f"{path}: expected a model with a config.json, got a directory without one")
    return path


def _run(folder: Path, name: str) -> Source:
    """A run: the base model of its configuration, and its adapter."""
    try:
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        source, quant = table["model"]["source"], str(table["model"].get("quant", "none"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.toml: expected a run's model.source, got: {error}") from None
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise InputError(f"{folder}: expected a finished run with an adapter, got one without", "resume it first")
    base = Path(str(source)).expanduser()
    if base.exists() and (base / "config.toml").is_file() and not (base / "config.json").exists():
        raise InputError(f"{folder}: expected a run on a base model, got one on the run {source!r}", "merge that first")
    found = resolve(base if base.exists() else str(source), folder.parent)
    converted = None if quant in ("none", "gguf") else quant
    return Source(path=found.path, name=name, adapter=adapter, run=folder, quant=converted)


def _download(name: str) -> Path:
    """The hub's snapshot of a model, from the cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except LocalEntryNotFoundError:
        raise InputError(
            f"model: expected {name!r} in the local hub cache, got nothing",
            "it was not downloaded before, and the hub can't be asked now (offline, or HF_HUB_OFFLINE is set)",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"model: expected to find {name!r} on the hub, got: {first.lower()}") from None
