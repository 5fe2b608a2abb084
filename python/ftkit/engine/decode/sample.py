"""Draw each token from the model's distribution, bent by temperature, top-k, top-p, min-p and penalties.

The engine's own strategy; the core applies it to every row of logits. Here is the distribution that it draws from, for
strategies that weigh tokens themselves, and for tests.
"""

from collections.abc import Sequence

from torch import Tensor

from ftkit import _core
from ftkit.engine.sampling import Sampling


def probabilities(
    logits: Tensor, sampling: Sampling, *, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> dict[int, float]:
    """Token → probability of the tokens that may follow `generated`, for logits [vocabulary]; they sum to 1.

    Raises InputError for parameters out of bounds, FtkitError for logits that are no numbers.
    """
    return dict(_core.sampling_probabilities(logits.tolist(), sampling.to_json(), prompt, generated))
