"""One step over a ragged batch, and what generates text with it.

    engine = Engine(models.load("model.gguf"))
    engine.generate([{"role": "user", "content": "Hi"}], GREEDY).text
    for delta in engine.stream("Once upon", Sampling(max_tokens=20)): ...
    engine.generate_many(prompts, GREEDY)                       one batch after another, answers in order
    engine.add_adapter("mine", Path("runs/mine/adapter"))
    engine.generate("Hi", model="mine")

Requests of all callers and adapters run in the same batches, on one thread of the core, until `close` (or the end of a
`with`, or the end of the program). The model is used as it is: whoever trains it puts it in evaluation mode first.
"""

from ftkit.engine.engine import Completion, Delta, Engine, Prompt, Token, launch
from ftkit.engine.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Completion", "Delta", "Engine", "Prompt", "Sampling", "Token", "launch"]
