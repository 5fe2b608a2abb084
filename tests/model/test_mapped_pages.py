"""A GGUF file stays where it is: loading copies next to nothing, and processes share its pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the pages of a process"),
]

HOLD = """
import sys, time
from pathlib import Path
import torch
from ftkit import models
from ftkit.nn.batch import RaggedBatch

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

before, start = anonymous(), time.process_time()
loaded = models.load(sys.argv[1], quant="gguf")
seconds, taken = time.process_time() - start, anonymous() - before
with torch.inference_mode():
    loaded.model.head(loaded.model(RaggedBatch.pack([[1, 2, 3]])))  # every block is read
print(seconds, taken, flush=True)
sys.stdin.read()
"""


def file_pages(process: int, path: Path) -> tuple[int, int]:
    """(resident, proportional) bytes of the file's pages in a process; a page of n processes counts 1/n for each."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in line.split()[0] and " " in line and not line.split()[0].endswith(":"):
            inside = line.endswith(path.name)
        elif inside and name in found:
            found[name] += int(rest.split()[0]) << 10
    return found["Rss"], found["Pss"]


def test_a_file_is_loaded_at_once_and_its_pages_are_shared(smollm2: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(smollm2)]
    held = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in held:
            assert process.stdout is not None
            seconds, taken = map(float, process.stdout.readline().split())
            print(f"loaded in {seconds:.3f} s of processor time, {taken / 1e6:.1f} MB of its own")
            assert taken < 0.25 * smollm2.stat().st_size
        for process in held:
            resident, proportional = file_pages(process.pid, smollm2)
            print(f"{resident / 1e6:.1f} MB of the file resident, {proportional / 1e6:.1f} MB by share")
            assert resident > 0.7 * smollm2.stat().st_size
            assert proportional < 0.6 * resident
    finally:
        for process in held:
            process.communicate("")


STREAM = """
import os, sys
import torch
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import sft
from ftkit.quant.gguf import stream
from test_mapped_pages import file_pages
from pathlib import Path

batch = RaggedBatch.pack([list(range(100, 150))], targets=[list(range(101, 151))], adapter=0)
found = []
for streamed in (False, True):
    model = models.load(sys.argv[1], quant="gguf").model
    adapters.attach(model, "lora", {}, 0, 0)
    model.train()
    if streamed:
        stream(linear.weight for linear in model.linears().values())
    loss = sft.loss(model, batch).sum.sum()
    loss.backward()
    gradients = [parameter.grad for parameter in adapters.trainable(model, 0).values()]
    found.append((float(loss), gradients, file_pages(os.getpid(), Path(sys.argv[1]))[0]))
    del model, loss
same = all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
print(found[0][0] == found[1][0] and same, found[0][2], found[1][2])
"""


def test_a_streamed_file_is_let_go_and_gives_the_same_bits(smollm2: Path) -> None:
    words = [sys.executable, "-c", STREAM, str(smollm2)]
    place = {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | place)
    same, held, streamed = done.stdout.split()
    assert same == "True"
    assert int(held) > 0.7 * smollm2.stat().st_size
    assert int(streamed) < 0.1 * smollm2.stat().st_size
