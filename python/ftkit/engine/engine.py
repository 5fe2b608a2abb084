"""The engine, as Python sees it: prompts in, answers out; the scheduling is the core's."""

import os
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch

from ftkit import _core, models
from ftkit.engine import _draft
from ftkit.engine._shelf import shelved
from ftkit.engine._step import ModelStep
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.models import LoadedModel
from ftkit.nn.paged_cache import PagedCache
from ftkit.quant._packed import round_activations

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A raw text (special tokens are parsed), token ids, or the messages of a conversation."""

DEFAULT = Sampling()

KV_CACHES = ("full", "int8")
"""How keys and values are kept: in the model's dtype, or in codes of 8 bits with scales."""


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    logprob: float | None
    """Under the model, before any sampling; when asked for."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities; when asked for."""


@dataclass(frozen=True)
class Delta:
    """What became visible of an answer. The last one has a finish reason."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None
    """`stop` (an end token or a stop string) or `length`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt: their keys and values were in the pool already."""
    completion_tokens: int = 0
    """Generated, the end token included; all three are in the last delta only."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: list[int] = field(repr=False)
    """The ids that make the text: without an end token, and without tokens that a stop string took away."""
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt: their keys and values were in the pool already, from another request or an earlier turn."""
    completion_tokens: int
    logprobs: list[Token] | None = field(default=None, repr=False)


class Engine:
    """Generates text with a model, for many callers at once."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        pool_bytes: int | None = None,
        block_tokens: int = 16,
        max_batch_tokens: int = 512,
        max_sequences: int = 32,
        max_waiting: int = 256,
        context_tokens: int | None = None,
        draft_tokens: int | None = None,
        draft: LoadedModel | None = None,
        kv_cache: str = "full",
        name: str | None = None,
    ) -> None:
        """An engine for `loaded`, known to requests as `name` (its file's name when not given).

        `pool_bytes`: memory for keys and values, touched only as it comes into use; room for four full contexts or a
        quarter of the machine's memory, whichever is less, when not given. `max_batch_tokens` and `max_sequences` bound
        a step, `max_waiting` the queue. `draft_tokens`: up to so many tokens that probably come next are guessed and
        computed in one step; answers stay the same. They are looked up in what was said before, which helps where
        answers quote, or come from a smaller model `draft` with the same tokens (then up to 4 when not given).
        `kv_cache`: `full` keeps keys and values in the model's dtype, `int8` in codes of 8 bits with scales, 3.6 times
        smaller, for answers that differ a little. Raises InputError when the pool is too small for anything, or `draft`
        is not such a model.
        """
        model, config = loaded.model, loaded.config
        context = min(context_tokens or config.context_length, config.context_length)
        if kv_cache not in KV_CACHES:
            raise InputError(f"kv_cache: expected {' or '.join(KV_CACHES)}, got {kv_cache!r}")
        sizes: dict[str, Any] = {
            "layers": config.layers,
            "key_value_heads": config.key_value_heads,
            "head_dim": config.head_dim,
            "block_tokens": block_tokens,
            "dtype": model.dtype if kv_cache == "full" else torch.int8,
        }
        page_bytes = PagedCache.page_bytes(**sizes)
        context_pages = -(-context // block_tokens)
        if pool_bytes is None:
            pool_bytes = min(4 * context_pages * page_bytes, _memory(model.device) // 4)
        pages = min(pool_bytes // page_bytes, max_sequences * context_pages)
        if pages < 1:
            raise InputError(f"pool: expected at least {page_bytes} bytes, one page, got {pool_bytes}")
        self.loaded = loaded
        self.name = name or _short(loaded)
        self.default = self.name
        """The name that is meant where a user gives none: a run's, if this engine was launched with one."""
        self.max_waiting = max_waiting
        self.context_tokens = context
        """Most tokens of a prompt and its answer."""
        self.longest = min(context, pages * block_tokens)
        """The same, by what the pool holds, too."""
        cache = PagedCache(page_count=pages, device=model.device, **sizes)
        blocks = min(context_pages, pages)
        drafter = None
        if draft is not None:
            _draft.check(loaded, draft, context)
            cache_dtype = draft.model.dtype if kv_cache == "full" else torch.int8
            drafter = _draft.Drafter(draft, pages=pages, block_tokens=block_tokens, dtype=cache_dtype)
        if draft_tokens is None:
            draft_tokens = 0 if draft is None else _draft.TOKENS
        room = {"tokens": max_batch_tokens, "sequences": max_sequences, "blocks": blocks}
        self._step = ModelStep(model, cache, **room, drafter=drafter)
        self._core = _core.Engine(
            loaded.tokenizer,
            loaded.template,
            self._step,
            self._step.workspace,
            name=self.name,
            content=model.fingerprint or self.name,
            batch_tokens=max_batch_tokens,
            sequences=max_sequences,
            waiting=max_waiting,
            block_tokens=block_tokens,
            pages=pages,
            page_bytes=page_bytes,
            context_tokens=context,
            draft_tokens=draft_tokens,
            draft_model=draft is not None,
            vocabulary=config.vocab_size,
        )
        # Also at the end of the program: the thread must be gone before the interpreter is.
        self._end = weakref.finalize(self, _close, self._core, self._step)
        self._own: set[int] = set()

    @property
    def models(self) -> list[str]:
        """The names that requests may ask for, the base model's first."""
        return self._core.models

    @property
    def metrics(self) -> dict[str, int]:
        """What the engine has counted: `requests_running`, `blocks_used`, `generated_tokens_total` and so on."""
        return self._core.metrics()

    def encode(self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The prompt's tokens; a conversation's end with what asks for the assistant's next message."""
        if isinstance(prompt, str):
            return self.loaded.tokenizer.encode_prompt(prompt)
        first = next(iter(prompt), None)
        if first is None or isinstance(first, int):
            return list(prompt)  # type: ignore[arg-type]
        template = self.loaded.template
        if template is None:
            raise InputError("messages: expected a model with a chat template, got one without", "give it plain text")
        messages: Any = list(prompt)
        return _core.encode_prompt(template, self.loaded.tokenizer, messages, tools)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: int = 0,
        first_token_seconds: float | None = None,
        answered: int = 0,
    ) -> Iterator[Delta]:
        """An answer as it grows. Asked for at once; closing the iterator cancels it.

        `model`: the name of an adapter; the base model answers when not given. `priority`: −8 to 8, each step doubles
        the share among the requests that wait. `first_token_seconds`: the answer fails as soon as its first token
        cannot be there by then. `answered`: so many of the prompt's last tokens are of the answer already, and
        penalties count them as such. Raises InputError for a prompt or parameters that can't be answered, FtkitError
        when the queue is full or the step fails.
        """
        return deltas(self._submit(prompt, sampling, model, tools, priority, first_token_seconds, answered))

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: int = 0,
        first_token_seconds: float | None = None,
    ) -> Completion:
        """A whole answer; arguments and errors as for `stream`."""
        return _whole(self._submit(prompt, sampling, model, tools, priority, first_token_seconds), sampling)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] = DEFAULT,
        *,
        model: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Answers to many prompts, in order, computed together. `sampling` and `model`: one for all, or one each."""
        asked = list(prompts)
        samplings = [sampling] * len(asked) if isinstance(sampling, Sampling) else list(sampling)
        names = [model] * len(asked) if model is None or isinstance(model, str) else list(model)
        window: deque[tuple[_core.Stream, Sampling]] = deque()
        answers: list[Completion] = []
        for prompt, how, name in zip(asked, samplings, names, strict=True):
            # Half of the queue stays free for other callers.
            if len(window) >= max(1, self.max_waiting // 2):
                answers.append(_whole(*window.popleft()))
            window.append((self._submit(prompt, how, name, None), how))
        answers.extend(_whole(*pair) for pair in window)
        return answers

    def add_adapter(self, name: str, adapter: str | Path | int, *, replace: bool = False, unread: bool = False) -> None:
        """Lets requests ask for an adapter by `name`: a directory, or the id of one that is on the model.

        A directory's weights take pages of the pool while requests use them, and are read again when they are needed
        again. `replace`: a name in use means this adapter from now on; requests under way keep the one that they began
        with. `unread`: the directory is not looked at before a request needs it, so that thousands can be added at
        once. Raises InputError when the name is in use, or the adapter is not for this model.
        """
        if isinstance(adapter, int):
            self._core.add_adapter(name, adapter)
            return
        known = name in self.models
        if known and not replace:
            raise InputError(f"adapter name: expected one not in use, got {name!r}")
        with self._step.lock:
            # never one that was used before: pages of keys and values, and requests under way, go by it
            number = self.loaded.model.attached.fresh()
        shelf = self._step.shelf
        shelf.put(number, Path(adapter))
        try:
            if not unread:
                shelf.check(number)
            self._core.know(number)
            before = self._core.replace_adapter(name, number) if known else None
            if before is None:
                self._core.add_adapter(name, number)
        except InputError:
            self._core.forget(number)
            raise
        self._own.add(number)
        if before is not None:
            self._let_go(before)

    def remove_adapter(self, name: str) -> None:
        """Takes a name away. Requests under way end with its adapter."""
        self._let_go(self._core.remove_adapter(name))

    def _let_go(self, adapter: int) -> None:
        if adapter in self._own:
            while self._core.held(adapter):  # who found it may not have asked the engine for it yet
                time.sleep(0.01)
            self._own.remove(adapter)
            self._core.forget(adapter)

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        found = self._core.metrics()
        return found["requests_running"] + found["requests_waiting"] > 0

    def set_alias(self, name: str, targets: Sequence[tuple[str, int]]) -> None:
        """Lets requests over HTTP ask for `name`, which leads to models, each with its weight."""
        self._core.set_alias(name, list(targets))

    def remove_alias(self, name: str) -> bool:
        """Takes an alias away; whether there was one."""
        return self._core.remove_alias(name)

    def set_keys(self, keys: str) -> None:
        """The keys that requests over HTTP may bring from now on, as `ftkit.serve.keys` reads them; one that stays as
        it was goes on with its limits where it is. Raises InputError for what is no list of keys, and keeps the old."""
        self._core.set_keys(keys)

    def describe(self, model: str, fingerprint: str | None) -> None:
        """Notes what a model is made of; answers over HTTP carry it."""
        self._core.describe(model, fingerprint)

    def traffic(self, model: str) -> tuple[int, int, int]:
        """What was asked of a model over HTTP: requests, tokens of prompts, tokens of answers."""
        return self._core.traffic(model)

    def serve(
        self,
        listener: _core.Listener,
        ready: Callable[[], object],
        *,
        api_key: str | None = None,
        keys: str | None = None,
        desk: Callable[[str, str], str] | None = None,
        author: Callable[[str, str, _core.Pen], None] | None = None,
        access_log: str | Path | None = None,
        body_bytes: int | None = None,
        first_token_seconds: float | None = None,
        upload_bytes: int = 512 << 20,
        stuck_seconds: float = 60,
    ) -> None:
        """Serves over HTTP until SIGINT or SIGTERM, then until answers under way are done; a second signal drops them.

        `ready` is called when requests are taken. `keys`: more keys, as `ftkit.serve.keys` reads them. `desk` does what
        is asked besides answers; see `ftkit.serve`. `author` writes answers to conversations. `body_bytes` bounds a
        request: 256 KiB and 32 bytes for each token of the context when not given, since texts are encoded before they
        are known to be too long. `upload_bytes` bounds a file. `first_token_seconds`: a request whose first token
        cannot come within it is refused with 503, before it costs more. After `stuck_seconds` without the end of a step
        the server says that it is not well. For the main thread.
        """
        if body_bytes is None:
            body_bytes = (256 << 10) + 32 * self.context_tokens
        if keys is not None:
            self.set_keys(keys)
        # The core notes the signals; Python's own handler must not interrupt the answers under way.
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: None) for number in signals}
        try:
            self._core.serve(
                listener,
                ready,
                self.default,
                api_key=api_key,
                desk=desk,
                author=author,
                access_log=access_log,
                body_bytes=body_bytes,
                first_token_seconds=first_token_seconds,
                upload_bytes=upload_bytes,
                stuck_seconds=stuck_seconds,
            )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Fails what is under way and ends the thread. Does nothing the second time."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        model: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        priority: int = 0,
        first_token_seconds: float | None = None,
        answered: int = 0,
    ) -> _core.Stream:
        tokens = self.encode(prompt, tools=tools)
        return self._core.submit(tokens, sampling.to_json(), model, priority, first_token_seconds, answered)


def launch(
    model: str | Path,
    with_adapters: Mapping[str, str | Path] | None = None,
    *,
    folder: Path | None = None,
    runs_dir: str | Path = "runs",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: str = "auto",
    fast_decode: bool = False,
    draft: str | Path | None = None,
    **options: Any,
) -> Engine:
    """An engine for what a user calls a model, with adapters by name. A run's name brings its adapter, and is then the
    default; the base model keeps its own name. `quant` is how its matrices are held: `auto` is the scheme that a run's
    base was converted to, and else leaves those of a GGUF file in their blocks where the core multiplies with blocks,
    which answers the same to the bit. `folder`: every adapter in it is there under its directory's name, and is read
    when a request needs it; of a run, its adapter. `fast_decode`: activations are rounded to 8 bits where the matrices
    are whole numbers, which is faster and answers a little otherwise. `draft`: a smaller model that makes drafts, in
    its file's blocks where it has them. `options`: of `Engine`.
    """
    source = models.resolve(model, runs_dir)
    if quant == "auto":
        quant = models.scheme_at_rest(source, device, dtype)
    _core.set_threads(torch.get_num_threads())
    loaded = models.load(source, dtype=dtype, device=device, quant=quant)
    if fast_decode:
        round_activations(loaded.model)
    drafting = None if draft is None else _load_draft(draft, runs_dir, dtype, device)
    engine = Engine(loaded, name=source.path.stem, draft=drafting, **options)
    try:
        if source.adapter is not None:
            engine.add_adapter(source.name, source.adapter)
            engine.default = source.name
        for name, path in (with_adapters or {}).items():
            engine.add_adapter(name, path)
        for name, path in shelved(folder) if folder is not None else ():
            if name not in engine.models:
                engine.add_adapter(name, path, unread=True)
    except BaseException:
        engine.close()
        raise
    return engine


def _load_draft(draft: str | Path, runs_dir: str | Path, dtype: torch.dtype, device: torch.device | str) -> LoadedModel:
    """A model for drafts, held as `auto` would. Raises InputError for a run whose adapter it would have to wear."""
    source = models.resolve(draft, runs_dir)
    if source.adapter is not None:
        raise InputError(f"draft: expected a model, got the run {source.name} with an adapter", "merge it first")
    return models.load(source, dtype=dtype, device=device, quant=models.scheme_at_rest(source, device, dtype))


def _close(core: _core.Engine, step: ModelStep) -> None:
    core.close()
    step.shelf.clear()


def deltas(stream: _core.Stream) -> Iterator[Delta]:
    """A stream of the core's; closing the iterator cancels it."""
    try:
        for text, tokens, reason, usage in stream:
            yield Delta(text, _tokens(tokens), reason, *(usage or (0, 0, 0)))
            if reason is not None:
                return
    finally:
        stream.cancel()


def _whole(stream: _core.Stream, sampling: Sampling) -> Completion:
    try:
        text, found, reason, usage = stream.rest()
    finally:
        stream.cancel()
    tokens, (prompt_tokens, cached_tokens, completion_tokens) = _tokens(found), usage or (0, 0, 0)
    return Completion(
        text=text,
        tokens=[token.id for token in tokens],
        finish_reason=reason or "stop",
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        logprobs=None if sampling.logprobs is None else list(tokens),
    )


def _tokens(found: list[tuple[int, float | None, list[tuple[int, float]]]]) -> tuple[Token, ...]:
    return tuple(Token(id, logprob, tuple(top)) for id, logprob, top in found)


def _short(loaded: LoadedModel) -> str:
    """A model's name without its directories."""
    return loaded.path.stem if loaded.path.suffix == ".gguf" else loaded.path.name


def _memory(device: torch.device) -> int:
    """Bytes of memory of the device: all of a machine's, what is free of a GPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
