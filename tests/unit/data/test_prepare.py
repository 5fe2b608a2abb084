"""From files to packed batches, with a small real tokenizer: formats, masks, packing, the cache, bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ftkit import _core, data
from ftkit.config import DataConfig
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALKS = [
    [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
    for a in range(4)
    for b in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template."""
    place = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(place)
    return place


@pytest.fixture
def texts(folder: Path) -> tuple[_core.Tokenizer, _core.ChatTemplate | None]:
    return _core.Tokenizer.from_dir(folder), _core.ChatTemplate.from_dir(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


Encode = Callable[..., _core.PreparedData]


@pytest.fixture
def encode(texts: tuple[_core.Tokenizer, _core.ChatTemplate | None]) -> Encode:
    return lambda path, **settings: data.encode(DataConfig(path=str(path), **settings), *texts)


def sequences(prepared: _core.PreparedData) -> list[tuple[list[int], list[bool]]]:
    return [prepared.sequence(index) for index in range(len(prepared))]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_format_holds_the_same_rows(encode: Encode, tmp_path: Path) -> None:
    rows = [{"messages": talk} for talk in TALKS]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    header = "prompt,completion\n"
    (tmp_path / "a.csv").write_text(header + "".join(f'"{q["content"]}",{a["content"]}\n' for q, a in TALKS))
    expected = sequences(encode(tmp_path / "a.jsonl"))
    assert len(expected) == len(TALKS)
    for name in ("a.json", "b.json", "a.parquet", "a.csv"):
        assert sequences(encode(tmp_path / name)) == expected, name


def test_a_directory_is_its_files_in_order(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "b.jsonl", [{"messages": TALKS[1]}])
    write_lines(tmp_path / "sub" / "c.jsonl", [{"messages": TALKS[2]}])
    (tmp_path / "a.json").write_text(json.dumps([{"messages": TALKS[0]}]))
    (tmp_path / "README.md").write_text("no rows")
    one = write_lines(tmp_path.parent / f"{tmp_path.name}-all.jsonl", [{"messages": talk} for talk in TALKS[:3]])
    assert sequences(encode(tmp_path)) == sequences(encode(one))


def test_answers_and_their_end_are_trained_and_nothing_else(encode: Encode, tmp_path: Path, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    talk = [*TALKS[0], *TALKS[1]]
    ids, trained = encode(write_lines(tmp_path / "a.jsonl", [{"messages": talk}])).sequence(0)
    assert ids == tokenizer.apply_chat_template(talk, return_dict=False)
    learned = tokenizer.decode([token for token, yes in zip(ids, trained, strict=True) if yes])
    assert learned == "It is 0.<|im_end|>It is 1.<|im_end|>"


def test_prompt_messages_are_not_trained_even_if_they_are_answers(encode: Encode, tmp_path: Path) -> None:
    row = {"prompt": [*TALKS[0], TALKS[1][0]], "completion": [TALKS[1][1]]}
    ids, trained = encode(write_lines(tmp_path / "a.jsonl", [row])).sequence(0)
    whole, both = encode(write_lines(tmp_path / "b.jsonl", [{"messages": [*TALKS[0], *TALKS[1]]}])).sequence(0)
    assert ids == whole
    assert 0 < sum(trained) < sum(both)


def test_preferences_become_pairs(tmp_path: Path, texts: tuple[_core.Tokenizer, _core.ChatTemplate | None]) -> None:
    rows = [{"prompt": f"Is {n} even?", "chosen": "yes" * (n + 1), "rejected": "no"} for n in range(3)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    dataset, _ = data.prepare(DataConfig(path=str(path), max_tokens=400), *texts, seed=0, pairs=True)
    batch = dataset.batch(list(range(len(dataset))))
    assert batch.group is not None
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.task is not None
    assert batch.task.tolist() == [0, 1, 0, 1, 0, 1]
    counts = dataset.statistics
    assert (counts["pairs"], counts["chosen_tokens"] - counts["rejected_tokens"]) == (3, 3 + 6 + 9 - 6)


def test_neighbours_stay_together_however_they_are_packed(
    tmp_path: Path, texts: tuple[_core.Tokenizer, _core.ChatTemplate | None]
) -> None:
    rows = [{"prompt": f"Is {n} even?", "completion": "yes" * (n + 1), "label": n % 2 == 0} for n in range(9)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    groups = []
    for seed, room in ((0, 64), (1, 400), (2, 4000)):
        config = DataConfig(path=str(path), max_tokens=room)
        dataset, _ = data.prepare(config, *texts, seed=seed, pairs=True, labelled=True, together=4)
        batch = dataset.batch(list(range(len(dataset))))
        assert batch.task is not None
        members: dict[int, list[tuple[int, int]]] = {}
        for group, task, length in zip(batch.groups, batch.task.tolist(), batch.lengths, strict=True):
            members.setdefault(group, []).append((length, task))
        groups.append(sorted(members.values()))
    assert groups[0] == groups[1] == groups[2]
    assert sorted(map(len, groups[0])) == [2, 3, 4]
    assert sorted(task for group in groups[0] for _, task in group) == [0] * 5 + [1] * 4
    assert dataset.statistics["labelled"] == 9
    assert dataset.statistics["wanted"] == 5


def test_text_is_trained_to_its_end(encode: Encode, tmp_path: Path, texts: tuple[_core.Tokenizer, Any]) -> None:
    ids, trained = encode(write_lines(tmp_path / "a.jsonl", [{"text": "a <|im_end|> b"}])).sequence(0)
    assert all(trained)
    assert ids.count(texts[0].eos_id or -1) == 1, "the text's own <|im_end|> is text"
    assert texts[0].decode(ids, skip_special=False) == "a <|im_end|> b<|im_end|>"


def test_batches_hold_every_sequence_once_with_shifted_targets(
    encode: Encode, tmp_path: Path, texts: tuple[_core.Tokenizer, Any]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    config = DataConfig(path=str(path), max_tokens=128)
    dataset, _ = data.prepare(config, *texts, seed=3)
    found = []
    for batch in dataset.batches(2, passes=1):
        assert batch.targets is not None
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            ids, targets = batch.tokens[start:end].tolist(), batch.targets[start:end].tolist()
            assert batch.positions[start:end].tolist() == list(range(end - start))
            assert targets[-1] == -100
            found.append((ids, [False] + [target != -100 for target in targets[:-1]]))
            assert all(target in (-100, token) for target, token in zip(targets, ids[1:], strict=False))
    assert sorted(found) == sorted(sequences(encode(path, max_tokens=128)))


def test_a_feed_goes_on_from_any_batch(tmp_path: Path, texts: tuple[_core.Tokenizer, Any]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    dataset, _ = data.prepare(DataConfig(path=str(path), max_tokens=96), *texts, seed=3)
    whole = [batch.tokens for batch in dataset.batches(3, passes=3)]
    assert len(whole) == 3 * -(-len(dataset) // 3)
    assert [t.tolist() for t in whole[: len(whole) // 3]] != [
        t.tolist() for t in whole[len(whole) // 3 :][: len(whole) // 3]
    ]
    for start in range(len(whole)):
        rest = [batch.tokens for batch in dataset.batches(3, start=start, passes=3)]
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_what_is_held_out_is_not_trained_on_and_twins_stay_together(
    tmp_path: Path, texts: tuple[_core.Tokenizer, Any]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS * 2])
    training, held_out = data.prepare(DataConfig(path=str(path), max_tokens=128), *texts, seed=1, split=0.25)
    assert held_out is not None
    assert training.statistics["duplicate_rows"] == len(TALKS)

    def texts_of(dataset: data.Dataset) -> list[tuple[int, ...]]:
        batches = list(dataset.batches(1, passes=1))
        return [tuple(part.tolist()) for batch in batches for part in batch.tokens.split(list(batch.lengths))]

    kept, held = texts_of(training), texts_of(held_out)
    assert len(kept) + len(held) == 2 * len(TALKS)
    assert not set(kept) & set(held)
    assert 4 <= len(held) <= 16


def test_long_rows_lose_whole_turns_or_are_split(encode: Encode, tmp_path: Path) -> None:
    long = [turn for talk in TALKS[:6] for turn in talk]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": long}, {"messages": TALKS[0]}])
    full = encode(path, max_tokens=4096).sequence(0)
    cut = encode(path, max_tokens=150)
    assert (cut.statistics["truncated_rows"], cut.statistics["longest_row"]) == (1, len(full[0]))
    ids, trained = cut.sequence(0)
    assert len(ids) <= 150
    assert (ids, trained) == (full[0][: len(ids)], full[1][: len(ids)])
    assert trained[-1], "it ends with an answer's end"
    split = encode(path, max_tokens=150, long_rows="split")
    pieces = [split.sequence(index)[0] for index in range(len(split) - 1)]
    assert [token for piece in pieces for token in piece] == full[0]
    assert split.statistics["split_rows"] == 1


def test_rows_with_nothing_to_train_on_are_counted_and_left_out(encode: Encode, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALKS[0]}, {"messages": TALKS[1][:1]}])
    prepared = encode(path)
    assert (len(prepared), prepared.statistics["masked_rows"]) == (1, 1)


def test_all_bad_rows_are_reported_together(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": TALKS[0]})
    path.write_text(f'{good}\n{{"messages": [}}\n{good}\n{{"messages": [{{"role": "user"}}]}}\n{{"other": 1}}\n')
    with pytest.raises(InputError) as caught:
        encode(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "expected at most 0 bad rows, got 3 of 5:"
    assert [line.split(":")[1] for line in lines[1:4]] == ["2", "4", "5"]
    assert lines[-1] == "hint: mend them, or leave them out with --skip-bad-rows 3"
    prepared = encode(path, skip_bad_rows=3)
    assert (len(prepared), prepared.statistics["bad_rows"], len(prepared.problems)) == (2, 3, 3)
    with pytest.raises(InputError):
        encode(path, skip_bad_rows=2)


def test_bad_rows_are_told_in_the_order_of_the_file(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = json.dumps({"messages": TALKS[0]})
    path.write_text(f'[\n{good},\n{{"other": 1}},\n7,\n{{"messages": []}}]')
    with pytest.raises(InputError) as caught:
        encode(path)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()[1:4]] == ["3", "4", "5"]


def test_a_column_that_no_row_has_is_an_error(encode: Encode, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"talk": TALKS[0]}, {"messages": TALKS[1]}])
    assert len(encode(path, columns={"messages": "talk"})) == 2
    with pytest.raises(InputError, match="column tools: expected functions in the data"):
        encode(path, columns={"messages": "talk", "tools": "functions"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x00\x01\x02", "binary"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
        (b'{"text": "a\xff"}\n', "UTF-8"),
        (b'[{"text": "a"}, {"tex', "EOF"),
        (b'{"text": "a"}\n{"text": ', "EOF"),
        (b"PAR1 but not really", "Parquet"),
        (b'{"text": ""}\n', "none"),
    ],
)
def test_bad_files_get_a_clear_error(encode: Encode, tmp_path: Path, cache: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        encode(path)
    assert not [left for left in cache.rglob("*") if left.is_file()], "nothing half-written stays"


def test_a_text_is_a_row_and_its_pieces_are_the_whole_of_it(encode: Encode, tmp_path: Path) -> None:
    text = "One line.\n\nAnother, after a gap.\n"
    (tmp_path / "a.txt").write_text(text)
    ((ids, trained),) = sequences(encode(tmp_path / "a.txt"))
    assert all(trained)
    assert encode(tmp_path / "a.txt").statistics["rows"] == 1
    pieces = sequences(encode(tmp_path / "a.txt", max_tokens=10, long_rows="split"))
    assert [token for piece, _ in pieces for token in piece] == ids
    assert max(len(piece) for piece, _ in pieces) == 10
    assert encode(tmp_path / "a.txt", max_tokens=10).statistics["truncated_rows"] == 1


def test_texts_of_a_folder_are_rows_unless_they_lie_beside_rows(encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.txt", "LICENSE.txt"):
        (folder / name).write_text("Words of " + name)
    assert len(encode(folder)) == 2
    write_lines(folder / "rows.jsonl", [{"messages": talk} for talk in TALKS])
    assert len(encode(folder)) == len(TALKS)


def test_a_table_of_headings_only_has_no_rows(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n")
    with pytest.raises(InputError, match="files without any"):
        encode(path)


def test_a_gigantic_line_is_one_bad_row(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"text": "before"}) + "\n")
        file.write('{"text": "' + "x" * (65 << 20) + '"}\n')
        file.write(json.dumps({"text": "after"}) + "\n")
    prepared = encode(path, skip_bad_rows=1)
    assert len(prepared) == 2
    assert "at most 64 MiB" in prepared.problems[0]


def test_the_second_time_comes_from_the_cache_and_a_damaged_cache_is_made_anew(
    encode: Encode, tmp_path: Path, cache: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    first = encode(path)
    expected = sequences(first)
    (tokens,) = cache.rglob("tokens.bin")
    before = tokens.stat().st_mtime_ns
    assert sequences(encode(path)) == expected
    assert tokens.stat().st_mtime_ns == before
    content = bytearray(tokens.read_bytes())
    content[10] ^= 1
    tokens.write_bytes(content)
    assert sequences(encode(path)) == expected
    assert tokens.stat().st_mtime_ns != before
    assert encode(path, train_on="all").fingerprint != first.fingerprint


def test_the_number_of_threads_changes_nothing(tmp_path: Path, folder: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS * 200])
    code = (
        "import hashlib, sys; from ftkit import _core, data; from ftkit.config import DataConfig\n"
        "texts = _core.Tokenizer.from_dir(sys.argv[2]), _core.ChatTemplate.from_dir(sys.argv[2])\n"
        "dataset, _ = data.prepare(DataConfig(path=sys.argv[1]), *texts, seed=5)\n"
        "print(hashlib.sha256(b''.join(b.tokens.numpy().tobytes() for b in dataset.batches(1, passes=2))).hexdigest())"
    )
    digests = set()
    for threads in ("1", "2", "5"):
        environment = {"RAYON_NUM_THREADS": threads, "FTKIT_CACHE": str(tmp_path / threads), "PATH": "/usr/bin:/bin"}
        arguments = [sys.executable, "-c", code, str(path), str(folder)]
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_standard_input(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ftkit import _core, data; from ftkit.config import DataConfig\n"
        "texts = _core.Tokenizer.from_dir(sys.argv[1]), _core.ChatTemplate.from_dir(sys.argv[1])\n"
        "print(len(data.encode(DataConfig(path='-'), *texts)))"
    )
    rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS)
    environment = {"FTKIT_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    arguments = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(arguments, env=environment, input=rows, capture_output=True, text=True, check=True)
    assert int(run.stdout) == len(TALKS)


def test_an_unwritable_cache_is_an_error(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    monkeypatch.setenv("FTKIT_CACHE", str(blocked))
    with pytest.raises(InputError, match="blocked"):
        encode(write_lines(tmp_path / "a.jsonl", [{"messages": TALKS[0]}]))


def test_an_interrupt_leaves_nothing(texts: tuple[_core.Tokenizer, Any], tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS * 100])

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.encode(DataConfig(path=str(path)), *texts, progress=stop)
    assert not [left for left in cache.rglob("*") if left.is_file()]
