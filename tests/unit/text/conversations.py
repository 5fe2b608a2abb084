"""Conversations and templates that the tests of the text room share."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))

SYSTEM = {"role": "system", "content": " Be terse. "}
USER = {"role": "user", "content": 'Hi, "you"?\n  Ünïcödé 🙂 <b>&</b> '}
ANSWER = {"role": "assistant", "content": " Hello & goodbye "}
THEN = {"role": "user", "content": "And then?"}
LAST = {"role": "assistant", "content": "Nothing.\n\n1. one\n2. two"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather — "now"',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "a città"},
                    "days": {"type": "array", "items": {"type": "number"}},
                    "unit": {"type": "string", "enum": ["c", "f"]},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
]
_ARGUMENTS = {"city": "Zürich", "days": [1, 2.5, 1e20, 1e-7], "x": None, "y": True}
_CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": _ARGUMENTS}}]
CALL = {"role": "assistant", "content": "", "tool_calls": _CALLS}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": '{"t": 3}'}
THOUGHT = {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nyes", "reasoning_content": "hmm"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}

Messages = list[dict[str, Any]]
CONVERSATIONS: dict[str, tuple[Messages, Messages | None]] = {
    "nothing": ([], None),
    "user": ([USER], None),
    "system": ([SYSTEM, USER], None),
    "one turn": ([USER, ANSWER], None),
    "one turn, system": ([SYSTEM, USER, ANSWER], None),
    "next question": ([USER, ANSWER, THEN], None),
    "two turns": ([SYSTEM, USER, ANSWER, THEN, LAST], None),
    "tools": ([USER], TOOLS),
    "tools, system": ([SYSTEM, USER], TOOLS),
    "call": ([USER, CALL], TOOLS),
    "result": ([SYSTEM, USER, CALL, RESULT], TOOLS),
    "answer from result": ([SYSTEM, USER, CALL, RESULT, ANSWER], TOOLS),
    "question after result": ([USER, CALL, RESULT, ANSWER, THEN], TOOLS),
    "thought": ([USER, THOUGHT], None),
    "two thoughts": ([SYSTEM, USER, THOUGHT, THEN, THOUGHT], None),
    "roles that don't alternate": ([ANSWER, ANSWER], None),
    "parts": ([PARTS], None),
}
