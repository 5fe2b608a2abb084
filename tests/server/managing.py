"""A server that loads adapters when it is told to, and how to ask it."""

from pathlib import Path
from typing import Any

import openai
import torch
from serving import KEY, Answer, Http, Server

from ftkit import adapters, models

QUESTION: list[Any] = [{"role": "user", "content": "What now?"}]
GREEDY: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """A random adapter on the base, large enough to change answers."""
    loaded = models.load(base)
    adapters.attach(loaded.model, "lora", {"rank": 3}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapters.save(loaded.model, 0, folder, loaded.fingerprint, "speaker")
    return folder


class Managed:
    """A server with a directory of adapters, and how to ask it."""

    def __init__(self, server: Server, folder: Path, base: Path, state: Path) -> None:
        self.server, self.folder, self.base, self.state = server, folder, base, state
        self.http = Http(server.url)
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def answer(self, model: str, **how: Any) -> str:
        return self.client.chat.completions.create(model=model, **(GREEDY | how)).choices[0].message.content or ""

    def load(self, name: str, path: str) -> Answer:
        return self.http.post("/v1/adapters", json={"name": name, "path": path})
