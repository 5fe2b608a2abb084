"""A tokenizer as GGUF metadata, from `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

llama.cpp knows two kinds that matter here: `gpt2` (byte-level BPE: tokens, merges, and the name of the rule that cuts
text into words) and `llama` (SentencePiece's BPE: tokens with scores). The word rule has only a name in GGUF, so a rule
without one cannot be exported: that is an error, since another rule would silently give other ids.
"""

import json
from pathlib import Path
from typing import Any

from ftkit.errors import InputError

Entry = tuple[str, str, Any]

# token types of GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CASELESS_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SYMBOLS, _SYMBOLS_OR_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# llama.cpp's name of each rule: the steps of `pre_tokenizer`, where a word stands for a step without a pattern
_RULES: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (r"\p{N}", "gpt2"): "smollm",  # as ftkit writes that rule when it comes from a GGUF file
    (f"{_CASELESS_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",): "llama-bpe",
    (f"{_CASELESS_ENDINGS}|{_WORDS}|\\p{{N}}|{_SYMBOLS}|{_SPACES}",): "qwen2",
    (f"{_CASED_WORDS[0]}|{_CASED_WORDS[1]}|\\p{{N}}|{_SYMBOLS_OR_PATHS}|{_SPACES}",): "tekken",
    (
        f"{_CASED_WORDS[0]}{_CASELESS_ENDINGS}?|{_CASED_WORDS[1]}{_CASELESS_ENDINGS}?|\\p{{N}}{{1,3}}"
        f"|{_SYMBOLS_OR_PATHS}|{_SPACES}",
    ): "gpt-4o",
}


def entries(folder: Path, vocabulary: int, template: str | None) -> list[Entry]:
    """The metadata of the tokenizer in `folder`, for a model with `vocabulary` rows of embeddings.

    Rows beyond the tokenizer's tokens become unused tokens. Raises InputError for a tokenizer that GGUF can't describe.
    """
    document = _read(folder / "tokenizer.json")
    configuration = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = document.get("model", {})
    if model.get("type") != "BPE":
        raise InputError(
            f"{folder / 'tokenizer.json'}: expected a tokenizer of the type BPE, got {model.get('type')!r}",
            "llama.cpp's other kinds are not written by ftkit",
        )
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(folder, document, vocabulary)
    found: list[Entry] = [("tokenizer.ggml.model", "string", "llama" if sentencepiece else "gpt2")]
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    if sentencepiece:
        found += [
            ("tokenizer.ggml.pre", "string", "default"),
            ("tokenizer.ggml.scores", "[f32]", _scores(tokens, pairs)),
            ("tokenizer.ggml.add_space_prefix", "bool", _prefixes_space(document)),
        ]
    else:
        found += [
            ("tokenizer.ggml.pre", "string", word_rule(document, folder)),
            ("tokenizer.ggml.merges", "[string]", [f"{left} {right}" for left, right in pairs]),
            ("tokenizer.ggml.add_space_prefix", "bool", False),
        ]
    found += [("tokenizer.ggml.tokens", "[string]", tokens), ("tokenizer.ggml.token_type", "[i32]", kinds)]
    found += _special(folder, configuration, document, tokens)
    if template is not None:
        found.append(("tokenizer.chat_template", "string", template))
    return found


def word_rule(document: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the rule by which a byte-level `tokenizer.json` cuts text into words."""
    steps: list[str] = []
    top = document.get("pre_tokenizer") or {}
    for step in top.get("pretokenizers", [top]):
        match step.get("type"):
            case "Split":
                steps.append(step["pattern"].get("Regex", str(step["pattern"])))
            case "Digits" if step.get("individual_digits"):
                steps.append("digits")
            case "ByteLevel":
                steps += ["gpt2"] if step.get("use_regex", True) else []
            case other:
                steps.append(f"a step of the type {other}")
    name = _RULES.get(tuple(steps))
    if name is None:
        raise InputError(
            f"{folder / 'tokenizer.json'}: expected a word rule that llama.cpp has a name for "
            f"({', '.join(sorted(_RULES.values()))}), got {steps}",
            "--to safetensors keeps the tokenizer as it is",
        )
    return name


def _tokens(folder: Path, document: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """The token and its type of each row of the embeddings."""
    model = document["model"]
    tokens: list[str | None] = [None] * vocabulary
    kinds = [UNUSED] * vocabulary

    def put(token: str, number: int, kind: int) -> None:
        if not 0 <= number < vocabulary:
            raise InputError(
                f"{folder / 'tokenizer.json'}: expected ids below the model's {vocabulary} embeddings, "
                f"got {number} for {token!r}"
            )
        tokens[number], kinds[number] = token, kind

    for token, number in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        put(token, number, BYTE if is_byte else UNKNOWN if token == model.get("unk_token") else NORMAL)
    for added in document.get("added_tokens", []):
        known = kinds[added["id"]] if 0 <= added["id"] < vocabulary else UNUSED
        put(added["content"], added["id"], known if known == UNKNOWN else CONTROL if added["special"] else USER_DEFINED)
    return [f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)], kinds


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """Scores under which SentencePiece joins pairs in the order of the merges: minus the rank of the first merge."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else -float(len(pairs)) for token in tokens]


def _prefixes_space(document: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a normalizer, or by the step that marks spaces."""
    top = document.get("normalizer") or {}
    if any(step.get("type") == "Prepend" for step in top.get("normalizers", [top])):
        return True
    top = document.get("pre_tokenizer") or {}
    steps = [step for step in top.get("pretokenizers", [top]) if step.get("type") == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in steps)


def _special(folder: Path, configuration: dict[str, Any], document: dict[str, Any], tokens: list[str]) -> list[Entry]:
    """The ids of the special tokens and whether they are added around a text."""
    ids = {token: number for number, token in enumerate(tokens)}
    found: list[Entry] = []
    special: dict[str, int] = {}
    for name, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]:
        token = configuration.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            continue
        if content not in ids:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: expected {name}_token among the tokens, got {content!r}"
            )
        special[name] = ids[content]
        found.append((f"tokenizer.ggml.{key}_token_id", "u32", ids[content]))
    generation = folder / "generation_config.json"
    ends = _read(generation).get("eos_token_id", []) if generation.exists() else []
    for number in ends if isinstance(ends, list) else [ends]:
        if "eos" in special and number != special["eos"]:  # a second end: that of a turn
            found.append(("tokenizer.ggml.eot_token_id", "u32", number))
            break
    for name in ("bos", "eos"):
        adds = _adds(document, name, tokens[special[name]] if name in special else None)
        found.append(
            (
                f"tokenizer.ggml.add_{name}_token",
                "bool",
                bool(configuration.get(f"add_{name}_token")) if adds is None else adds,
            )
        )
    return found


def _adds(document: dict[str, Any], name: str, token: str | None) -> bool | None:
    """Whether the post-processor puts `token` before (bos) or after (eos) a text; None when there is no such step."""
    top = document.get("post_processor") or {}
    steps = [step for step in top.get("processors", [top]) if step.get("type") == "TemplateProcessing"]
    if not steps:
        return None
    single = steps[-1].get("single", [])
    edge = single[:1] if name == "bos" else single[-1:]
    return any(piece.get("SpecialToken", {}).get("id") == token for piece in edge)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a file, got none") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document
