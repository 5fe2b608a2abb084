"""Every mutant of every kernel is killed: by a wrong number, or by a fault that the emulator finds."""

from collections.abc import Callable

import pytest
import torch
from tests.unit.cuda import (
    mutants,
    mutants_ragged,
    test_cuda_attention,
    test_cuda_int4,
    test_cuda_lora,
    test_cuda_prefill,
)
from tests.unit.cuda import test_cuda_kernels as tests
from tests.unit.cuda.emulated import Emulated, Kit
from tests.unit.cuda.mutants import Mutant

from ftkit.cuda import launches, source
from ftkit.cuda.on_cpu import Library, build
from ftkit.cuda.source import Variant
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

MUTANTS = mutants.MUTANTS | mutants_ragged.MUTANTS
F32, BF16 = torch.float32, torch.bfloat16
# What is tried on the mutants of a source, in this order, until one fails.
TRIALS: dict[str, list[Callable[[Kit, int], None]]] = {
    "dequant_coded": [
        lambda kit, s: tests.test_dequant_coded_has_the_bits_of_the_cpu(kit, "nf4", (37, 448), F32, s),
        lambda kit, s: tests.test_dequant_coded_has_the_bits_of_the_cpu(kit, "nf4", (3, 35), F32, s),
        lambda kit, s: tests.test_dequant_coded_has_the_bits_of_the_cpu(kit, "int4_group:32", (7, 96), F32, s),
        lambda kit, s: tests.test_dequant_coded_has_the_bits_of_the_cpu(kit, "int8", (5, 40), F32, s),
    ],
    "dequant_blocks": [
        *(
            lambda kit, s, kind=kind: tests.test_dequant_blocks_has_the_bits_of_the_cpu(kit, kind, s)
            for kind in launches.BLOCK_FORMATS
        )
    ],
    "coded_gemv": [
        lambda kit, s: tests.test_gemv(kit, 3, 9, 320, s),
        lambda kit, _: tests.test_gemv_of_groups_with_offsets(kit),
    ],
    "coded_decode": [
        lambda kit, s: tests.test_decode(kit, "nf4", 5, 72, 192, s),
        lambda kit, s: tests.test_decode(kit, "nf4", 16, 40, 576, s),
        lambda kit, s: tests.test_decode(kit, "nf4", 9, 8, 2368, s),
        lambda kit, s: test_cuda_int4.test_decode(kit, 32, 13, 72, 192, s),
        lambda kit, s: test_cuda_int4.test_decode(kit, 128, 7, 24, 256, s),
    ],
    "coded_forward": [
        lambda kit, s: tests.test_forward(kit, "nf4", 17, 8, 64, 16, s),
        lambda kit, s: tests.test_forward(kit, "nf4", 140, 136, 320, 32, s),
        lambda kit, s: tests.test_forward(kit, "nf4", 17, 264, 64, 16, s),
    ],
    "coded_dx": [
        lambda kit, s: tests.test_dx(kit, "nf4", 3, 200, 192, 16, s),
        lambda kit, s: tests.test_dx(kit, "nf4", 140, 136, 192, 80, s),
        lambda kit, s: test_cuda_int4.test_dx(kit, 32, 3, 200, 192, s),
    ],
    "rms_norm": [
        lambda kit, s: tests.test_rms_norm(kit, 3, 2056, F32, s),
        lambda kit, s: tests.test_rms_norm(kit, 9, 72, BF16, s),
    ],
    "swiglu": [lambda kit, s: tests.test_swiglu(kit, (2, 1031), F32, s)],
    "rope": [
        lambda kit, s: tests.test_rope(kit, 5, 9, 48, F32, s),
        lambda kit, s: tests.test_rope(kit, 7, 3, 64, BF16, s),
    ],
    "cross_entropy": [
        lambda kit, s: tests.test_cross_entropy(kit, 3, 97, F32, True, s),
        lambda kit, _: tests.test_a_target_that_is_no_token_gives_nan(kit),
        lambda kit, _: tests.test_tokens_that_are_ruled_out(kit),
    ],
    "paged_attention": [
        lambda kit, s: tests.test_paged_attention(kit, 64, 5, s),
        lambda kit, s: tests.test_paged_attention(kit, 128, None, s),
    ],
    "adamw_8bit": [lambda kit, s: tests.test_adamw_8bit(kit, 700, s)],
    "lora_bgmv": [lambda kit, s: test_cuda_lora.test_rows_by_themselves(kit, BF16, s)],
    "lora_sgmv": [
        lambda kit, s: test_cuda_lora.test_segments_of_many_rows(kit, (48, 12), s),
        lambda kit, s: test_cuda_lora.test_segments_of_many_rows(kit, (528, 132), s),
    ],
    "lora_gradient": [lambda kit, s: test_cuda_lora.test_gradient(kit, s)],
    "paged_prefill": [
        lambda kit, s: test_cuda_prefill.test_a_short_prompt_and_a_chunk(kit, s),
        lambda kit, s: test_cuda_prefill.test_prompts_and_chunks(kit, 80, 7, s),
        lambda kit, s: test_cuda_prefill.test_prompts_and_chunks(kit, 80, None, s),
    ],
}
TRIALS["attention"] = [
    lambda kit, s, case=case: test_cuda_attention.trial(kit, s, *case)
    for case in (((80,), (1, 1), 64, 9), ((7, 66), (4, 2), 64, None))
]
SCHEDULES = (2, 1, 0)


def test_every_kernel_has_mutants() -> None:
    assert set(MUTANTS) == set(TRIALS) == set(source.names())


@pytest.mark.parametrize("name", MUTANTS)
def test_all_mutants_are_killed(kit: Emulated, name: str) -> None:
    """A trial's variants are compiled for those alone that the trials before left alive."""
    alive, built = list(MUTANTS[name]), dict[tuple[Mutant, Variant], Library]()
    for trial in TRIALS[name]:
        used = Emulated(dict(kit.libraries), noted=[])
        assert killed(trial, used) is None, "unbroken, it passes"
        pairs = [(mutant, one) for mutant in alive for one in dict.fromkeys(used.noted or [])]
        missing = [pair for pair in pairs if pair not in built]
        broken = [Variant(name, one.macros, changed(mutant, name)) for mutant, one in missing]
        built |= zip(missing, build(broken), strict=True)
        for mutant in list(alive):
            killer = killed(trial, Emulated({one: built[which, one] for which, one in pairs if which == mutant}))
            if killer is not None:
                print(f"{name}: {mutant[1]} ({mutant[0]}): {killer}")
                alive.remove(mutant)
    assert not alive, "survivors"


def changed(mutant: Mutant, name: str) -> tuple[tuple[str, str], ...]:
    """The file with the change."""
    file, _, old, new = mutant
    text = source.headers()[file] if file.endswith(".cuh") else source.read(file)
    assert old in text, f"{name}: no {old!r} in {file}"
    return ((file, text.replace(old, new, 1)),)


def killed(trial: Callable[[Kit, int], None], kit: Kit) -> str | None:
    """What killed the mutant: the first line of what the trial says; None where it lives."""
    for schedule in SCHEDULES:
        try:
            trial(kit, schedule)
        except (AssertionError, InputError) as error:
            return str(error).strip().splitlines()[0][:110]
    return None
