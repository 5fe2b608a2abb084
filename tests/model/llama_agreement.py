"""How often llama.cpp and we think the same token the likeliest."""

from pathlib import Path

import numpy as np
import torch

from ftkit import models
from ftkit.engine.llama_cpp import open_model
from ftkit.nn.batch import RaggedBatch


def with_llama_cpp(path: Path) -> float:
    """The share of 1,024 positions of a text whose likeliest token is the same; its activations are rounded to 8 bits,
    ours are not. A standard error of such a share is 0.4 %."""
    text = (Path(__file__).parent.parent.parent / "bench/held_out.txt").read_text(encoding="utf-8")
    ours = models.load(path, quant="gguf")
    pieces = [ours.tokenizer.encode(text)[start : start + 256] for start in range(0, 1024, 256)]
    theirs = open_model(path, n_ctx=256, n_threads=2, n_batch=256, logits_all=True)
    same = []
    for tokens in pieces:
        theirs.reset()
        theirs.eval(tokens)
        with torch.inference_mode():
            mine = ours.model.head(ours.model(RaggedBatch.pack([tokens]))).argmax(-1).numpy()
        same.append(np.array(theirs.scores[: len(tokens)]).argmax(-1) == mine)
    theirs.close()
    return float(np.concatenate(same).mean())
