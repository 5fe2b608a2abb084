"""What a load takes: no more than the quantized model and two tensors.

The kernel is the judge. RLIMIT_DATA bounds what a process may have of private writable memory, so a load under it
either stays below or fails; nothing is sampled, and no peak can slip through. torch maps a file of weights privately,
which counts as its whole size from the beginning; the room is on top of that.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftkit import models
from ftkit.models._family import family_of_hf
from ftkit.nn.decoder import shapes

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux'"),
]

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SLACK = 4 << 20
"""Python's own objects. What is being converted, and the allocator's margins, must fit in the two tensors."""

LOAD = """
import resource, sys
from pathlib import Path
import torch
from ftkit import models

def data_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))

small, large, quant, room = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(2)
models.load(small, quant=quant)  # threads and modules are there from now on
torch.ones(1 << 20).sum()
limit = data_bytes() + Path(large, "model.safetensors").stat().st_size + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
loaded = models.load(large, quant=quant)
print(sum(linear.weight.nbytes for linear in loaded.model.linears().values()))
"""


def write(folder: Path, **changes: int) -> Path:
    """A model of random bfloat16 weights."""
    table = CONFIG | changes
    config = family_of_hf(table).from_hf(table)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for name, shape in shapes(config)
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    small = write(place / "small", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    return small, write(place / "large")


@pytest.mark.parametrize("quant", ["nf4", "int8", "int4_group"])
def test_a_load_takes_the_quantized_model_and_two_tensors(quant: str, folders: tuple[Path, Path]) -> None:
    small, large = folders
    quantized = sum(
        linear.weight.nbytes
        for linear in models.build(models.config_of(large), quant=quant, formats=models.formats(large, quant))
        .linears()
        .values()
    )
    tensor = 2 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]  # the largest, as it is stored
    room = quantized + 2 * tensor + SLACK
    assert room < (large / "model.safetensors").stat().st_size, "a load of the whole would not fit"
    words = [sys.executable, "-c", LOAD, str(small), str(large), quant, str(room)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == quantized
