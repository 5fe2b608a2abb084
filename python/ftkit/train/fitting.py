"""Finds the fastest way to a run's update that its memory allows, and, where there is none, what else would fit.

Cutting batches apart costs least: rows that are long enough multiply at the same speed one by one. Then layers are
recomputed, as few as it takes. Then batches are cut inside their rows, as far as sequences (or pairs) go. Then, on a
CPU, the inputs of recomputed layers go to disk, or the optimizer's state, whichever is faster by the plan; the former
are written and read with each batch, the latter once a step. Then both do. At last the matrices of a GGUF file are not
kept in memory, but read for each product.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.plan.budget import written
from ftkit.train.planned import LATER_BYTES, Case, Plan, Way

_TRIES = 4
"""Numbers of layers that are traced between too few and enough."""


def fit(case: Case, room: int) -> list[Plan]:
    """The ways that were tried, the fastest first, up to the one that takes at most `room` bytes; the last does not
    where none does."""
    asked = case.config.training.offload
    state, inputs = case.can_offload("optimizer"), case.can_offload("activations") and _layers(case)[1] > 0
    start = Way(state_on_disk=state and asked == "optimizer", activations_on_disk=inputs and asked == "activations")
    tried = _divided(case, room, start)
    least = dataclasses.replace(tried[-1].way, state_on_disk=state, activations_on_disk=inputs)
    if tried[-1].needed_bytes > room and least != tried[-1].way:
        smallest = case.plan(least)
        if smallest.needed_bytes <= room:  # and maybe in a faster way
            tried += _on_disk(case, room, least)
        elif smallest.needed_bytes < tried[-1].needed_bytes:
            tried.append(smallest)
    if tried[-1].needed_bytes > room and case.can_stream:
        tried.append(case.plan(dataclasses.replace(tried[-1].way, streamed=True)))
    return tried


def _on_disk(case: Case, room: int, least: Way) -> list[Plan]:
    """As `fit`, of ways with something on disk; `least`, with all of it there, fits."""
    found = []
    if least.state_on_disk and least.activations_on_disk:
        for one in ({"state_on_disk": False}, {"activations_on_disk": False}):
            way = dataclasses.replace(least, **one)
            if case.plan(way).needed_bytes <= room:
                found.append(_divided(case, room, dataclasses.replace(way, recomputed=0, parts=1)))
    if found:
        return min(found, key=lambda tried: tried[-1].seconds_per_step or 0.0)
    return _divided(case, room, dataclasses.replace(least, recomputed=0, parts=1))


def _divided(case: Case, room: int, start: Way) -> list[Plan]:
    """As `fit`, of ways to divide and recompute a batch, from `start` on. Where inputs of recomputed layers go to disk,
    as many layers are recomputed as may be: another one's activations take more memory than its input."""
    rows, (fewest, most) = case.config.training.batch_rows, _layers(case)
    fewest = most if start.activations_on_disk else fewest
    tried: list[Plan] = []
    for parts in dict.fromkeys((1, min(rows, case.most_parts))):
        tried.append(case.plan(dataclasses.replace(start, recomputed=fewest, parts=parts)))
        if tried[-1].needed_bytes <= room:
            return tried
    if most > fewest:
        all_layers = case.plan(dataclasses.replace(tried[-1].way, recomputed=most))
        found = _fewest(case, room, tried[-1], all_layers)
        tried.append(found)
        if found.needed_bytes <= room:
            return tried
    finest = case.most_parts
    if finest > tried[-1].way.parts:
        smallest = case.plan(dataclasses.replace(start, recomputed=most, parts=finest))
        parts = 2 * tried[-1].way.parts
        while parts < finest and smallest.needed_bytes <= room:
            tried.append(case.plan(dataclasses.replace(start, recomputed=most, parts=parts)))
            if tried[-1].needed_bytes <= room:
                return tried
            parts *= 2
        tried.append(smallest)
    return tried


def fastest(case: Case, room: int) -> Plan:
    """The fastest way that the memory allows. Raises InputError, with what would fit, where none does."""
    plan = fit(case, room)[-1]
    if plan.needed_bytes <= room:
        return plan

    def case_of(config: RunConfig) -> Case:
        return dataclasses.replace(Case.of_configuration(config, case.gpu), started_bytes=case.started_bytes)

    near = others(case.config, room, case_of)
    raise InputError(
        f"training.budget: expected {written(plan.needed_bytes)} for this run at the least, got {written(room)}",
        _hint(near),
    )


def _layers(case: Case) -> tuple[int, int]:
    """The fewest and the most layers that may be recomputed."""
    wanted, layers = case.config.training.activation_checkpointing, case.architecture.layers
    if wanted == "auto":
        return 0, layers
    asked = layers if wanted is True else min(int(wanted), layers)
    return asked, asked


def _fewest(case: Case, room: int, low: Plan, high: Plan) -> Plan:
    """The plan with the fewest recomputed layers that fits, between one with too few and one with enough (or all)."""
    if high.needed_bytes > room:
        return high
    for _ in range(_TRIES):
        first, last = low.way.recomputed, high.way.recomputed
        if last - first < 2:
            break
        # memory falls about evenly from layer to layer
        share = (low.needed_bytes - room) / max(low.needed_bytes - high.needed_bytes, 1)
        guess = min(max(first + int(share * (last - first)) + 1, first + 1), last - 1)
        plan = case.plan(dataclasses.replace(low.way, recomputed=guess))
        low, high = (low, plan) if plan.needed_bytes <= room else (plan, high)
    return high


@dataclass(frozen=True, kw_only=True)
class Other:
    """Another run that would fit: its update is another one, so that people must ask for it."""

    settings: Mapping[str, object]
    """What differs, by key."""
    plan: Plan
    """In the way that takes least memory."""


def others(config: RunConfig, room: int, case_of: Callable[[RunConfig], Case]) -> list[Other]:
    """Runs near this one that take at most `room` bytes: those that change one thing, or else the first that changes
    several."""
    if room <= LATER_BYTES:
        return []  # no model at all would fit
    alone: list[Other] = []
    together: dict[str, object] = {}
    for settings in _changes(config):
        found = _other(config, settings, room, case_of)
        if found is not None:
            alone.append(found)
    if alone:
        return alone
    for settings in _changes(config):
        together |= settings
        found = _other(config, together, room, case_of)
        if found is not None:
            return [found]
    return []


def _other(
    config: RunConfig, settings: Mapping[str, object], room: int, case_of: Callable[[RunConfig], Case]
) -> Other | None:
    try:
        case = case_of(config.changed(settings))
        layers = _layers(case)[1]
        way = Way(
            recomputed=layers,
            parts=case.most_parts,
            streamed=case.can_stream,
            state_on_disk=case.can_offload("optimizer"),
            activations_on_disk=case.can_offload("activations") and layers > 0,
        )
        plan = case.plan(way)
    except InputError:  # these settings do not go together
        return None
    return Other(settings=dict(settings), plan=plan) if plan.needed_bytes <= room else None


def _changes(config: RunConfig) -> Iterator[dict[str, object]]:
    """What takes less memory, by how little it changes what is learned."""
    training = config.training
    if not training.optimizer_in_backward and training.gradient_accumulation_steps == 1:
        yield {"training.optimizer_in_backward": True, "training.max_gradient_norm": 0.0}
    if config.optimizer.name == "adamw":
        yield {"optimizer.name": "adamw8bit"}
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.model.quant == "none" and config.method.name != "full" and config.model.source.endswith(".gguf"):
        yield {"model.quant": "gguf"}
    if config.model.quant == "none" and config.method.name != "full":
        yield {"model.quant": "nf4"}
    if config.method.name == "full":
        yield {"method": "lora"}
    if config.data.max_tokens > 256:
        yield {"data.max_tokens": config.data.max_tokens // 2}
        yield {"data.max_tokens": config.data.max_tokens // 4}


def described(way: Way) -> str:
    """How an update is computed, for people."""
    parts = f"batches are cut into {way.parts} parts" if way.parts > 1 else ""
    recomputed = f"{way.recomputed} layers are recomputed in the backward pass" if way.recomputed else ""
    streamed = "matrices are read from their file for each product" if way.streamed else ""
    inputs = "whose inputs wait for it on disk" if way.activations_on_disk else ""
    state = "the optimizer's state lies on disk between updates" if way.state_on_disk else ""
    return ", ".join(words for words in (parts, recomputed, inputs, state, streamed) if words) or "as it is"


def _hint(near: list[Other]) -> str:
    """What people can do where a run does not fit."""
    words = [written_settings(other.settings) for other in near]
    return "these fit: " + ", or ".join(words) if words else "a smaller model, or one in blocks of 4 bits, takes less"


def written_settings(settings: Mapping[str, object]) -> str:
    """Settings as a command line takes them."""
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    return " ".join(f"--set {key}={text}" for key, text in texts.items())
