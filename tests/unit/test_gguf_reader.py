"""What GgufFile reads is what the `gguf` package reads."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ftkit._core import GgufFile
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


def test_metadata_and_tensors_equal_the_gguf_package(smollm2: Path) -> None:
    theirs = gguf.GGUFReader(smollm2)
    ours = GgufFile(smollm2)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    assert list(ours.metadata) == list(expected)
    assert len(ours.metadata["tokenizer.ggml.tokens"]) == 49152
    assert ours.tensors == [
        (tensor.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name.lower())
        for tensor in theirs.tensors
    ]


def test_every_tensor_of_the_real_model_has_the_gguf_packages_values(smollm2: Path) -> None:
    ours = GgufFile(smollm2)
    for tensor in gguf.GGUFReader(smollm2).tensors[::23]:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = torch.empty(expected.shape)
        ours.read(tensor.name, values)
        assert np.array_equal(values.numpy(), expected)


def test_every_metadata_type_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.15625)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "grüß dich 🌍")
    writer.add_array("strings", ["", "a", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("halves", [0.5, -1.5])
    writer.add_array("truths", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GgufFile(tmp_path / "types.gguf").metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -100,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 0.15625,
        "f64": 0.1,
        "bool": True,
        "string": "grüß dich 🌍",
        "strings": ["", "a", "ü"],
        "numbers": [1, -2, 3],
        "halves": [0.5, -1.5],
        "truths": [True, False],
    }


def test_wrong_reads_say_what_was_expected(smollm2: Path) -> None:
    file = GgufFile(smollm2)
    with pytest.raises(InputError, match=r"expected a tensor 'nothing'|expected a tensor \"nothing\""):
        file.read("nothing", torch.empty(1))
    with pytest.raises(InputError, match=r"expected the shape \[577\], got \[576\]"):
        file.read("output_norm.weight", torch.empty(577))


def test_a_weight_that_is_nan_is_named(tmp_path: Path) -> None:
    values = np.zeros((3, 5), dtype=np.float32)
    values[1, 2] = np.nan
    writer = gguf.GGUFWriter(tmp_path / "nan.gguf", "llama")
    writer.add_tensor("broken", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r'tensor "broken": expected finite values, got NaN at index 7'):
        GgufFile(tmp_path / "nan.gguf").read("broken", torch.empty(3, 5))
