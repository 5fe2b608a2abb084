"""Asks a model one question from Python: `python examples/ask.py MODEL QUESTION`."""

import sys

from ftkit.engine import Sampling, launch


def ask(model: str, question: str) -> str:
    """The model's answer, the likeliest token at each step."""
    with launch(model) as engine:
        talk = [{"role": "user", "content": question}]
        return engine.generate(talk, Sampling(temperature=0.0, max_tokens=64)).text


if __name__ == "__main__":
    print(ask(*sys.argv[1:]))
