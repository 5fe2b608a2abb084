"""The terminal's chat with a server, and its commands: two answers side by side, ratings, log-probabilities."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from managing import Managed
from serving import KEY

from ftkit.cli._chat import Chat
from ftkit.data import feedback
from ftkit.engine import Sampling, launch
from ftkit.engine.remote import Remote
from ftkit.errors import FtkitError, InputError

pytestmark = pytest.mark.server

GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture
def remote(managed: Managed) -> Remote:
    managed.load("left", "v3")
    managed.load("right", "v4")
    return Remote(managed.server.url, KEY)


def chat(engine: object, **how: object) -> Chat:
    return Chat(engine, GREEDY, **({"system": None, "model": None, "names": ["left", "right"]} | how))  # type: ignore[arg-type]


def test_a_server_answers_as_the_model_itself(managed: Managed, remote: Remote) -> None:
    talk = [{"role": "user", "content": "Hello"}]
    with launch(managed.base, {"left": managed.folder / "v3"}) as engine:
        for name in (None, "left"):
            for sampling in (GREEDY, Sampling(max_tokens=12, seed=3, top_k=20, min_p=0.01, repetition_penalty=1.1)):
                whole = engine.generate(talk, sampling, model=name)
                deltas = list(remote.stream(talk, sampling, model=name))
                assert "".join(delta.text for delta in deltas) == whole.text
                assert deltas[-1].finish_reason == whole.finish_reason
                assert deltas[-1].completion_tokens == whole.completion_tokens
        exact = Sampling(temperature=0, max_tokens=6, logprobs=2)
        mine = engine.generate(talk, exact).logprobs or []
        theirs = [token for delta in remote.stream(talk, exact) for token in delta.tokens]
        assert [token.logprob for token in mine] == pytest.approx([token.logprob for token in theirs], abs=1e-5)
        assert [len(token.top) for token in theirs] == [2] * len(mine)
        pieces = [remote.piece(token.id) for token in theirs]
        assert pieces == [engine.loaded.tokenizer.decode([token.id], False) for token in mine]


def test_two_answers_side_by_side_and_a_vote(
    managed: Managed, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = chat(remote, rate=remote.rate)
    talk.take("/compare left nobody")
    assert "expected two of left, right, base" in capsys.readouterr().out
    talk.take("/compare left right")
    talk.take("Which way?")
    alone = {
        name: managed.answer(name, messages=[{"role": "user", "content": "Which way?"}], max_tokens=12)
        for name in ("left", "right")
    }
    assert "/rate 1 or /rate 2" in capsys.readouterr().out
    before = managed.http.get("/v1/feedback").json()["pairs"]
    talk.take("/rate up")
    assert "expected /rate 1 or 2" in capsys.readouterr().out
    talk.take("/rate 2")
    assert "kept" in capsys.readouterr().out
    assert managed.http.get("/v1/feedback").json()["pairs"] == before + 1
    kept = json.loads((managed.state / "feedback" / "feedback.jsonl").read_text().splitlines()[-1])
    assert (kept["chosen"], kept["rejected"]) == (alone["right"], alone["left"])
    assert kept["adapter"] == managed.http.get("/v1/adapters/right").json()["hash"]
    # the conversation goes on with the better one
    assert talk._conversation.turns[-1]["content"] == alone["right"]
    talk.take("/compare")
    talk.take("/rate 1")
    talk.take("And now?")
    talk.take("/rate down")
    kept = json.loads((managed.state / "feedback" / "feedback.jsonl").read_text().splitlines()[-1])
    assert kept["label"] is False
    assert len(kept["prompt"]) == 3


def test_log_probabilities_are_shown(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat(remote)
    talk.take("/logprobs")
    capsys.readouterr()
    talk.take("Hm?")
    shown = capsys.readouterr().out
    assert " of " in shown  # a random model is unsure of everything
    worst = [
        float(line.split(" of ")[0].split()[-1]) for line in shown.splitlines() if " of '" in line or ' of "' in line
    ]
    assert worst
    assert all(0 <= probability < 0.5 for probability in worst)
    assert math.isfinite(sum(worst))
    talk.take("/logprobs")
    capsys.readouterr()
    talk.take("Hm?")
    assert " of '" not in capsys.readouterr().out


def test_tokens_are_shown_and_counted(
    managed: Managed, remote: Remote, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with launch(managed.base) as engine:
        talk = chat(engine, system="Be é.")
        talk.take("/tokens")
        assert "nothing was said yet" not in capsys.readouterr().out  # the system prompt was
        talk.take("What?")
        capsys.readouterr()
        talk.take("/tokens")
        *text, last = capsys.readouterr().out.strip().split("\n")
        tokens = engine.encode(talk._conversation.messages)
        assert last == f"{len(tokens)} of 4,096 tokens"
        pieces = "".join(text).split("│")[:-1]
        assert pieces.count("⏎") == 7
        assert "".join(pieces[:13]) == "<|im_start|>system\nBe <"[:0] + "".join(pieces[:13])
        assert len(pieces) == len(tokens)
        assert pieces[:4] == ["<|im_start|>", "s", "y", "s"]
        whole = engine.generate(talk._conversation.messages, GREEDY)
    there = chat(remote, system="Be é.")
    there._conversation.turns = talk._conversation.turns
    capsys.readouterr()
    there.take("/tokens")
    assert capsys.readouterr().out == f"{whole.prompt_tokens} tokens\n"


def test_commands_that_lead_nowhere_say_what_does(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    alone = chat(remote, names=[])
    for line, told in [
        ("/compare a b", "no adapters here"),
        ("/adapter x", "no adapters here"),
        ("/tokns", "did you mean /tokens?"),
        ("/xyz", "/help lists them"),
        ("/tokens", "nothing was said yet"),
        ("/rate up", "no answer to rate"),
        ("/undo", "nothing to take back"),
    ]:
        assert alone.take(line)
        assert told in capsys.readouterr().out
    alone.take("/help")
    told = capsys.readouterr().out
    assert all(command in told for command in alone._commands)
    assert max(map(len, told.splitlines())) <= 80


def test_a_local_chat_keeps_ratings_for_training(managed: Managed, tmp_path: Path) -> None:
    from ftkit.cli.chat import _engine

    options = {"runs_dir": str(tmp_path), "quant": "auto", "fast_decode": False}
    engine, names, rate, _ = _engine(str(managed.base), [f"left={managed.folder / 'v3'}"], "ftkit", **options)
    with engine:
        talk = chat(engine, names=names, model="left", rate=rate)
        talk.take("Hello")
        talk.take("/rate up")
    (row,) = (
        Path(feedback.rows_file(f"feedback:{tmp_path / '.serve'}", pairs=False, labelled=False))
        .read_text()
        .splitlines()
    )
    assert json.loads(row)["prompt"] == [{"role": "user", "content": "Hello"}]
    kept = json.loads((tmp_path / ".serve" / "feedback" / "feedback.jsonl").read_text())
    assert len(kept["adapter"]) == 64


def test_a_plan_is_told_where_training_is_known(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ftkit.cli.chat import _planner

    event = {"event": "memory", "step": 1, "planned_by_category": {"activations": 3 << 20, "optimizer": 1 << 20}}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "events.jsonl").write_text(json.dumps(event) + "\n")
    planned = _planner({"other": tmp_path / "mine" / "adapter"}, str(tmp_path))
    for line in ("/plan", "/plan other"):  # a run's own adapter, and one that is named
        chat(None, names=["mine", "other"], model="mine", planned=planned).take(line)
        first, second = capsys.readouterr().out.splitlines()
        assert first.split()[:3] == ["3.0", "MiB", "activations"]
        assert first.count("█") == 3 * second.count("█") == 18
    for engine, how in ((None, planned), (remote, remote.planned)):
        chat(engine, model=None, planned=how).take("/plan left")
        assert "expected an adapter whose training is known here, got left" in capsys.readouterr().out


def test_a_question_through_a_pipe(managed: Managed) -> None:
    arguments = [managed.server.url, f"--api-key={KEY}", "--temperature=0", "--max-tokens=8", "--json"]
    command = [sys.executable, "-m", "ftkit", "chat", *arguments]
    done = subprocess.run(command, input="What now?", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == managed.answer("speaker")
    with pytest.raises(InputError, match="hint: --api-key"):
        Remote(managed.server.url, "wrong")


def test_addresses_that_are_none_and_servers_that_are_gone() -> None:
    for url in ("http://", "ftp://x", "http:///v1"):
        with pytest.raises(InputError, match="expected an address"):
            Remote(url)
    with pytest.raises(FtkitError, match="expected a server"):
        Remote("http://127.0.0.1:9")
