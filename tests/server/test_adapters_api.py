"""Adapters by name: loaded from an allowed directory, replaced under running requests, rolled back, shared."""

import concurrent.futures
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from managing import GREEDY, QUESTION, Managed
from safetensors.torch import load_file, save_file
from serving import KEY, start, stop

from ftkit.data import feedback

pytestmark = pytest.mark.server


def test_an_adapter_is_loaded_and_answers(managed: Managed) -> None:
    loaded = managed.load("fresh", "v3").json()
    assert (loaded["id"], loaded["object"], loaded["generation"], loaded["method"]) == ("fresh", "adapter", 1, "lora")
    assert len(loaded["hash"]) == 64
    assert loaded["lineage"]["base"]
    assert "fresh" in [model.id for model in managed.client.models.list()]
    whole = managed.client.chat.completions.create(model="fresh", **GREEDY)
    assert (whole.model, whole.system_fingerprint) == ("fresh", f"adapter-{loaded['hash'][:16]}")
    texts = {managed.answer(name) for name in ("fresh", "given", "speaker")}
    assert len(texts) == 3
    assert managed.http.get("/v1/adapters/fresh").json()["traffic"]["requests"] == 2
    listed = managed.http.get("/v1/adapters").json()["data"]
    assert {"fresh", "given"} <= {one["id"] for one in listed}
    assert managed.http.delete("/v1/adapters/fresh").json() == {"id": "fresh", "object": "adapter", "deleted": True}
    assert managed.http.get("/v1/adapters/fresh").status_code == 404
    with pytest.raises(openai.NotFoundError):
        managed.answer("fresh")


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "v3/../../outside",
        "/etc",
        "{home}/outside",
        "link",
        "linked-weights",
        ".",
        "",
        "v3\x00",
        "..\\outside",
        "%2e%2e/outside",
        "nothing",
        "v3/adapter_model.safetensors",
        "a" * 5000,
        ".hidden",
        "~",
    ],
)
def test_no_path_leads_out_of_the_allowed_directory(managed: Managed, path: str) -> None:
    refused = managed.load("tricky", path.format(home=managed.folder.parent))
    assert refused.status_code == 400, refused.text
    assert str(managed.folder) not in refused.text.replace(path, "")
    assert "tricky" not in [model.id for model in managed.client.models.list()]


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a@b", "x" * 101, " a", "a\n", "speaker", 3, None])
def test_bad_names_are_refused(managed: Managed, name: Any) -> None:
    refused = managed.http.post("/v1/adapters", json={"name": name, "path": "v3"})
    assert refused.status_code == (409 if name == "speaker" else 400)
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(managed: Managed) -> None:
    managed.load("fits", "v3")
    before = managed.answer("fits")
    weights = (managed.folder / "v4" / "adapter_model.safetensors").read_bytes()
    head = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    tensors = [name for name in head if name != "__metadata__"]
    # NaN in a weight, half of a file, and a shape that reaches beyond the matrix
    bad: dict[str, bytes] = {"nan": bytearray(weights), "cut": weights[: len(weights) // 2]}  # type: ignore[dict-item]
    at = 8 + int.from_bytes(weights[:8], "little") + head[tensors[0]]["data_offsets"][0]
    bad["nan"][at : at + 4] = b"\x00\x00\xc0\x7f"  # type: ignore[index]
    wider = json.dumps(head).replace('"shape": [3, 32]', '"shape": [32, 3]').encode()
    bad["shape"] = len(wider).to_bytes(8, "little") + wider + weights[8 + int.from_bytes(weights[:8], "little") :]
    for name, content in bad.items():
        shutil.copytree(managed.folder / "v4", managed.folder / f"bad-{name}")
        (managed.folder / f"bad-{name}" / "adapter_model.safetensors").write_bytes(content)
        refused = managed.load("fits", f"bad-{name}")
        assert refused.status_code == 400, (name, refused.text)
        assert "NaN" in refused.text or name != "nan"
        assert str(managed.state) not in refused.text
    assert managed.answer("fits") == before
    assert managed.http.get("/v1/adapters/fits").json()["generation"] == 1


def test_an_adapter_whose_answers_are_no_numbers_is_named_and_harms_nobody(managed: Managed) -> None:
    managed.load("sound", "v3")
    before = managed.answer("sound")
    shutil.copytree(managed.folder / "v4", managed.folder / "loud")
    file = managed.folder / "loud" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(file).items()}, file)
    assert managed.load("loud", "loud").status_code == 200  # each of its numbers is one
    ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    refused = managed.http.post("/v1/chat/completions", ask | {"model": "loud"})
    assert refused.status_code == 500
    assert "loud: the model's logits are not finite" in refused.json()["error"]["message"]
    assert managed.answer("sound") == before
    assert managed.server.metric("blocks_used") == 0


class Payload:
    """Leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


def test_a_pickle_is_never_opened(managed: Managed, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for kept in (True, False):
        folder = managed.folder / f"pickled-{kept}"
        shutil.copytree(managed.folder / "v3", folder)
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
        if not kept:
            (folder / "adapter_model.safetensors").unlink()
        assert managed.load("pickled", folder.name).status_code == (200 if kept else 400)
    assert managed.answer("pickled") == managed.answer("pickled")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_a_replaced_adapter_stays_with_the_requests_that_began_with_it(managed: Managed) -> None:
    managed.load("moving", "v3")
    how: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    old = managed.answer("moving", **how)
    stream = managed.client.chat.completions.create(model="moving", stream=True, **(GREEDY | how))
    text = next(stream).choices[0].delta.content or ""
    assert managed.load("moving", "v4").json()["generation"] == 2
    new = managed.answer("moving", **how)
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == old
    assert new != old
    # the same content again is no new generation; a roll back is one, and answers as before
    assert managed.load("moving", "v4").json()["generation"] == 2
    back = managed.http.post("/v1/adapters/moving/rollback").json()
    assert (back["generation"], back["generations"][-1]["back_to"]) == (3, 1)
    assert managed.answer("moving", **how) == old
    assert managed.http.post("/v1/adapters/moving/rollback", json={"generation": 2}).json()["generation"] == 4
    assert managed.answer("moving", **how) == new
    assert managed.http.post("/v1/adapters/moving/rollback", json={"generation": 77}).status_code == 409


def test_an_adapter_of_the_command_line_is_replaced_and_rolled_back(managed: Managed) -> None:
    before = managed.answer("given")
    managed.load("given", "v4")
    assert managed.answer("given") != before
    managed.http.post("/v1/adapters/given/rollback")
    assert managed.answer("given") == before


def test_an_alias_shares_requests_by_weight_and_says_who_answered(managed: Managed) -> None:
    managed.load("a3", "v3")
    managed.load("a4", "v4")
    targets = [{"model": "a3", "weight": 80}, {"model": "a4", "weight": 20}]
    made = managed.http.post("/v1/aliases", json={"name": "support", "targets": targets}).json()
    assert made == {"id": "support", "object": "alias", "targets": targets}
    alone = {name: managed.answer(name) for name in ("a3", "a4")}

    def ask(_: int) -> str:
        whole = managed.client.chat.completions.create(model="support", **GREEDY)
        assert whole.choices[0].message.content == alone[whole.model]
        return whole.model

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        drawn = Counter(pool.map(ask, range(150)))
    # binomial, 150 at 1/5: beyond these with a chance of 1e-9
    assert 5 < drawn["a4"] < 64
    assert managed.http.delete("/v1/adapters/a3").status_code == 409
    for body in (
        {"name": "support2", "targets": []},
        {"name": "support2", "targets": [{"model": "nobody", "weight": 1}]},
        {"name": "support2", "targets": [{"model": "a3", "weight": 0}]},
        {"name": "support2", "targets": [{"model": "support", "weight": 1}]},
        {"name": "a3", "targets": targets},
    ):
        assert managed.http.post("/v1/aliases", json=body).status_code in (400, 409), body
    assert managed.http.delete("/v1/aliases/support").json()["deleted"] is True
    assert managed.http.delete("/v1/aliases/support").status_code == 404


def test_replacing_under_load_gives_no_wrong_answer(managed: Managed) -> None:
    managed.load("busy", "v3")
    right = {managed.answer("busy")}
    managed.load("busy", "v4")
    right.add(managed.answer("busy"))
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(managed.answer, "busy") for _ in range(80)]
        for number in range(12):
            assert managed.load("busy", "v3" if number % 2 else "v4").status_code == 200
        assert {future.result() for future in asked} == right
    managed.server.until(lambda: managed.server.metric("blocks_used") == 0)


def test_a_restarted_server_finds_its_adapters(managed: Managed, tmp_path: Path) -> None:
    managed.load("kept", "v3")
    managed.load("kept", "v4")
    managed.http.post("/v1/aliases", json={"name": "alias", "targets": [{"model": "kept", "weight": 1}]})
    expected = managed.answer("kept")
    shutil.copytree(managed.state, tmp_path / "state")
    other = start(str(managed.base), "--port=0", f"--api-key={KEY}", f"--state-dir={tmp_path / 'state'}")
    again = Managed(other, managed.folder, managed.base, tmp_path / "state")
    assert again.answer("kept") == again.answer("alias") == expected
    assert again.http.post("/v1/adapters/kept/rollback").json()["generation"] == 3
    assert stop(other) == 0


def test_feedback_is_kept_with_what_answered(managed: Managed) -> None:
    hash_now = managed.load("rated", "v3").json()["hash"]
    whole = managed.client.chat.completions.create(model="rated", **GREEDY)
    answer = whole.choices[0].message.content
    rated = {"model": "rated", "messages": QUESTION, "answer": answer, "id": whole.id}
    before = managed.http.get("/v1/feedback").json()
    kept = managed.http.post("/v1/feedback", rated | {"rating": "up"}).json()
    assert (kept["object"], kept["kind"], kept["adapter"]) == ("feedback", "rating", hash_now)
    assert managed.http.post("/v1/feedback", rated | {"rating": -1}).status_code == 200
    other = {"rejected": "worse", "rejected_model": "speaker"}
    assert managed.http.post("/v1/feedback", rated | other).json()["kind"] == "pair"
    after = managed.http.get("/v1/feedback").json()
    assert {name: after[name] - before[name] for name in ("pairs", "up", "down")} == {"pairs": 1, "up": 1, "down": 1}
    rows = Path(feedback.rows_file(f"feedback:{managed.state}", pairs=True, labelled=True)).read_text().splitlines()
    assert {"prompt": QUESTION, "completion": "worse", "label": False} in map(json.loads, rows)
    for bad in (
        rated,
        rated | {"rating": "up"} | other,
        rated | {"rating": 7},
        rated | {"rating": True},
        rated | {"rejected": answer},
        {"answer": "x", "rating": "up"},
        rated | {"messages": [], "rating": "up"},
        rated | {"messages": [{"role": "king", "content": "x"}], "rating": "up"},
        rated | {"rating": "up", "path": "/etc/passwd"},
    ):
        assert managed.http.post("/v1/feedback", bad).status_code == 400, bad
    assert managed.http.get("/v1/feedback").json() == after


def test_a_line_that_a_kill_cut_off_spoils_no_other(managed: Managed) -> None:
    path = managed.state / "feedback" / "feedback.jsonl"
    managed.http.post("/v1/feedback", {"prompt": "a", "answer": "b", "rating": "up"})
    before = path.read_bytes()
    path.write_bytes(before + b'{"prompt": "ha')
    managed.http.post("/v1/feedback", {"prompt": "c", "answer": "d", "rating": "down"})
    after = path.read_bytes()
    assert after.startswith(before)
    assert json.loads(after[len(before) :])["prompt"] == "c"
