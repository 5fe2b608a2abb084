"""A GGUF file stays where it is: loading copies next to nothing, and processes share its pages."""

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
