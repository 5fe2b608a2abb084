"""Schemathesis against the server's document: whatever is sent, the answer is one that the document knows, and no 5xx.

What breaks a schema must be refused, too. A schema says less than the server wants (that a model is one that is there):
some requests are made to fit, so that answers are seen and not only refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from managing import Managed
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import KEY

pytestmark = pytest.mark.server

DOCUMENT = json.loads((Path(__file__).parents[2] / "src" / "serve" / "http" / "openapi.json").read_bytes())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]

FITTING: dict[str, Any] = {
    "model": "speaker",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
    "answer": "y",
    "rating": "up",
    "name": "given",
    "max_tokens": 4,
    "max_output_tokens": 4,
}
PLAIN = {"temperature", "top_p", "seed", "n", "logprobs", "stream", "verbose"}


def fit(case: Case) -> None:
    """Makes a request one that the server can answer; what is only looked at is there."""
    if isinstance(case.body, dict):
        content = DOCUMENT["paths"][case.path][case.method.lower()]["requestBody"]["content"]
        schema = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
        known = DOCUMENT["components"]["schemas"].get(schema, {}).get("properties", {})
        case.body = {name: value for name, value in case.body.items() if name in PLAIN}
        case.body |= {name: value for name, value in FITTING.items() if name in known}
        if "messages" in case.body:
            case.body.pop("prompt", None)
    if case.method == "GET":
        case.path_parameters = {name: FITTING.get(name, value) for name, value in case.path_parameters.items()}
        case.query = {}


def operations() -> list[Any]:
    """Each operation with data that fits its schemas, and with data that does not, where there can be such."""
    # that nobody gets in without a key is tested elsewhere
    without_keys = {name: value for name, value in DOCUMENT.items() if name != "security"}
    found = []
    for result in schemathesis.openapi.from_dict(without_keys).get_all_operations():
        one = result.ok()
        name = f"{one.method.upper()} {one.path}"
        found.append(pytest.param(one, GenerationMode.POSITIVE, id=name))
        body = one.definition.raw.get("requestBody", {}).get("content", {})
        if "application/json" in body or len(one.query):
            found.append(pytest.param(one, GenerationMode.NEGATIVE, id=f"{name} broken"))
    return found


@pytest.mark.parametrize(("operation", "mode"), operations())
def test_every_answer_is_one_of_the_document(managed: Managed, operation: Any, mode: GenerationMode) -> None:
    @seed(7)
    @settings(max_examples=6, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), fitting=st.booleans())
    def check(case: Case, fitting: bool) -> None:
        if fitting and mode is GenerationMode.POSITIVE:
            fit(case)
        answer = case.call(base_url=managed.server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        case.validate_response(answer, checks=CHECKS)

    check()
