"""As much of JSON Schema as the server's OpenAPI document uses. A word that is not known here is an error."""

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}
_WORDS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "const",
    "anyOf",
    "minimum",
    "maximum",
}
_SILENT = {"description", "format"}


def problems(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], where: str = "$") -> list[str]:
    """What of `value` is not as `schema` says."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].removeprefix("#/components/schemas/")]
    unknown = set(schema) - _WORDS - _SILENT
    assert not unknown, f"{where}: words that are not checked: {unknown}"
    found: list[str] = []
    if "anyOf" in schema:
        each = [problems(value, one, document, where) for one in schema["anyOf"]]
        found += [] if any(not one for one in each) else [f"{where}: none of {schema['anyOf']}: {value!r}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{where}: {value!r} is not {schema['const']!r}")
    if "type" in schema:
        kind = schema["type"]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return [*found, f"{where}: expected {kind}, got {value!r}"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        found += [] if low <= value <= high else [f"{where}: {value} is not from {low} to {high}"]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{where}.{name}: missing" for name in schema.get("required", []) if name not in value]
        if schema.get("additionalProperties") is False:
            found += [f"{where}.{name}: not in the document" for name in value if name not in known]
        for name, inner in known.items():
            if name in value:
                found += problems(value[name], inner, document, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            found += problems(item, schema["items"], document, f"{where}[{number}]")
    return found
