"""Files that GgufWriter makes: read back the same by us and by the `gguf` package, and whole or not there."""

import os
import stat
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ftkit._core import GgufFile, GgufWriter
from ftkit.errors import FtkitError, InputError

pytestmark = pytest.mark.unit

METADATA: list[tuple[str, str, Any]] = [
    ("general.architecture", "string", "llama"),
    ("a.u8", "u8", 200),
    ("a.i8", "i8", -100),
    ("a.u16", "u16", 60_000),
    ("a.i16", "i16", -30_000),
    ("a.u32", "u32", 4_000_000_000),
    ("a.i32", "i32", -2_000_000_000),
    ("a.u64", "u64", 2**64 - 1),
    ("a.i64", "i64", -(2**63)),
    ("a.f32", "f32", 0.15625),
    ("a.f64", "f64", 0.1),
    ("a.bool", "bool", True),
    ("a.string", "string", "grüß dich 🌍"),
    ("a.strings", "[string]", ["", "a", "ü"]),
    ("a.numbers", "[i32]", [1, -2, 3]),
    ("a.bytes", "[u8]", [0, 255]),
    ("a.halves", "[f32]", [0.5, -1.5]),
    ("a.truths", "[bool]", [True, False]),
    ("a.nothing", "[string]", []),
]
SHAPES = {"first": ((3, 64), "q4_0"), "odd": ((5, 7), "f32"), "empty": ((0, 32), "q8_0"), "last": ((11,), "f16")}


def write(path: Path, overwrite: bool = False) -> dict[str, torch.Tensor]:
    """A file with a tensor of each of `SHAPES`; returns their values."""
    generator = torch.Generator().manual_seed(11)
    values = {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}
    entries = [(name, shape, kind) for name, (shape, kind) in SHAPES.items()]
    writer = GgufWriter(path, METADATA, entries, overwrite)
    for name, tensor in values.items():
        writer.write(name, tensor)
    assert writer.finish() == path.stat().st_size
    return values


def test_metadata_and_tensors_come_back(tmp_path: Path) -> None:
    values = write(tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    assert file.metadata == {key: value for key, _, value in METADATA}
    assert file.metadata_types == {key: kind for key, kind, _ in METADATA}
    assert file.tensors == [(name, shape, kind) for name, (shape, kind) in SHAPES.items()]
    for name, tensor in values.items():
        read = torch.empty(tensor.shape)
        file.read(name, read)
        torch.testing.assert_close(read, tensor, atol={"first": 0.3, "last": 1e-3}.get(name, 0), rtol=0)


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    theirs, ours = gguf.GGUFReader(tmp_path / "model.gguf"), GgufFile(tmp_path / "model.gguf")
    contents = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: value for key, value in contents.items() if value != []} == {
        key: value for key, value in ours.metadata.items() if value != []
    }
    for tensor in theirs.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = torch.empty(shape)
        ours.read(tensor.name, values)
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape), values.numpy())
        assert tensor.data_offset % 32 == 0


def test_a_writer_that_stops_leaves_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    write(target)
    before = target.read_bytes()
    writer = GgufWriter(target, [], [("a", (4,), "f32")], overwrite=True)
    writer.abandon()
    with pytest.raises(FtkitError, match='expected 16 bytes of tensor "a", got 0'):
        GgufWriter(target, [], [("a", (4,), "f32")], overwrite=True).finish()
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_file_that_exists_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="one that exists\nhint: --overwrite replaces it"):
        write(tmp_path / "model.gguf")
    write(tmp_path / "model.gguf", overwrite=True)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    writer = GgufWriter(target, [], [])
    target.write_text("another's")
    with pytest.raises(InputError, match="one that exists"):
        writer.finish()
    assert target.read_text() == "another's"
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "model.gguf").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([("a", "u32", 1), ("a", "u32", 2)], [], 'metadata "a": expected the name once'),
        ([("a", "u8", 256)], [], 'metadata "a": expected a value of the type u8, got 256'),
        ([("a", "u9", 1)], [], 'metadata "a": expected a type such as u32'),
        ([], [("a", (4,), "f32"), ("a", (4,), "f32")], 'tensor "a": expected the name once'),
        ([], [("a", (4, 33), "q4_0")], 'tensor "a": expected rows of a multiple of 32 values for q4_0, got 33'),
        ([], [("a", (1, 1, 1, 1, 1), "f32")], 'tensor "a": expected at most 4 dimensions, got 5'),
        ([], [("a", (2**40, 2**40), "f32")], 'tensor "a": expected a size below'),
        ([], [("a", (4,), "q9")], "expected a block format"),
    ],
)
def test_wrong_declarations_are_refused(
    tmp_path: Path, metadata: list[tuple[str, str, Any]], tensors: list[tuple[str, tuple[int, ...], str]], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        GgufWriter(tmp_path / "model.gguf", metadata, tensors)
    assert message in str(caught.value)
    assert not os.listdir(tmp_path)


def test_an_unwritable_place_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        GgufWriter(tmp_path / "missing" / "model.gguf", [], [])


def test_the_order_of_tensors_is_kept(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "model.gguf", [], [("a", (4,), "f32"), ("b", (4,), "f32")])
    with pytest.raises(FtkitError, match='expected at most 16 bytes of tensor "a", got 16 of "b"'):
        writer.write("b", torch.zeros(4))
