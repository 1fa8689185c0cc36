"""What a run counts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Metrics:
    """Counts and seconds of one window, or of many added up.

    `prompt_tokens` are the rows' prompts end to end; `computed_prompt_tokens` those that went
    through the model (repeats after preemption included, `recomputed_tokens` says how many, of
    prompts and answers); `repeated_last_tokens` of them are the last tokens of prompts that other
    prompts continue or repeat, `window_repeated_tokens` those of prefixes that several windows
    share, and `division_repeated_tokens` those that several replicas share of a window.
    `output_tokens` are the rows' answers end to end, and `computed_output_tokens` those sampled
    (duplicates are answered once); beyond these, `vain_tokens` went through the model for answers
    that had just ended, where a step is planned before the one before it has told. `pool_shrinks`
    says how often memory ran out in a step and the KV pool was halved. `peak_kv_blocks` is a
    maximum, everything else a sum.
    """

    rows: int = 0
    failed: int = 0
    duplicate_rows: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    repeated_last_tokens: int = 0
    window_repeated_tokens: int = 0
    division_repeated_tokens: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    computed_output_tokens: int = 0
    vain_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    pool_shrinks: int = 0
    peak_kv_blocks: int = 0
    windows: int = 0
    prompt_seconds: float = 0.0
    plan_seconds: float = 0.0
    engine_seconds: float = 0.0

    def add(self, other: "Metrics") -> None:
        """Add another window's."""
        for name in _NAMES:
            mine, others = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, others) if name == "peak_kv_blocks" else mine + others)

    @classmethod
    def total(cls, windows: Sequence[Mapping[str, Any]]) -> "Metrics":
        """Add up what `as_dict` gave for each window; unknown keys are left out."""
        total = cls()
        for window in windows:
            total.add(cls(**{k: v for k, v in window.items() if k in _NAMES}))
        return total

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that sharing saved, 0 to 1."""
        if self.prompt_tokens == 0:
            return 0.0
        return max(0.0, 1 - self.computed_prompt_tokens / self.prompt_tokens)

    @property
    def window_lost_share(self) -> float:
        """Share that windows lose of what planning the whole table at once would save, 0 to 1."""
        saved = max(0, self.prompt_tokens - self.computed_prompt_tokens)
        return self.window_repeated_tokens / max(saved + self.window_repeated_tokens, 1)

    @property
    def division_lost_share(self) -> float:
        """Share that replicas lose of what one engine would save in the same windows, 0 to 1."""
        saved = max(0, self.prompt_tokens - self.computed_prompt_tokens)
        return self.division_repeated_tokens / max(saved + self.division_repeated_tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, seconds rounded to microseconds."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


_NAMES = frozenset(f.name for f in fields(Metrics))
