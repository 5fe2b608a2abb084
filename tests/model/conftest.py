"""The real model as transformers has it, read once for all tests of a process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def peer(smollm2: Path) -> Any:
    """SmolLM2 in float32; whoever changes it takes a copy."""
    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
