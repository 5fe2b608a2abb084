"""A model's tokenizer and chat template, which need none of its weights."""

from pathlib import Path

from ftkit import _core


def tokenizer_of(path: Path) -> _core.Tokenizer:
    """The tokenizer of a model's directory or .gguf file."""
    return _core.Tokenizer.from_gguf(path) if path.is_file() else _core.Tokenizer.from_dir(path)


def template_of(path: Path) -> _core.ChatTemplate | None:
    """The chat template of a model's directory or .gguf file; None for a model without one."""
    return _core.ChatTemplate.from_gguf(path) if path.is_file() else _core.ChatTemplate.from_dir(path)
