"""The warm-up that all schedules begin with: the rate rises in equal parts, and reaches its height at its last step."""

from dataclasses import dataclass

from ftkit.config import option


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """How long the rate rises."""

    warmup_share: float = option(0.03, "part of all steps in which the rate rises", at_least=0, at_most=1)
    warmup_steps: int | None = option(None, "the same in steps; decides when given", at_least=0)

    def warmup_length(self, steps: int) -> int:
        """Steps of the warm-up in a run of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_share * steps)
