"""The engine's settings and the short lists of shapes that follow from them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sdjax.parallel import PARAM_RULES, sharding
from sdjax.records import Request

DECODE_RULES = PARAM_RULES | {"D": None}  # weights whole over fsdp while decoding
ON_LONG_PROMPT = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of the sampling engine.

    `slots` responses are decoded at once, `chunk` steps per call from the host at most; a call ends
    early when `refill_fraction` of the slots are free and something waits. Prompts longer than
    `max_prompt_len` are dropped or cut on the left (`on_long_prompt`). The cache starts with
    `first_length` columns and doubles; when nothing waits, slots are halved up to `row_halvings`
    times. `prefill_tokens` bounds a prefill batch (prompts times padded length). `cache_dtype` is
    "auto" (the compute dtype), "float32", "bfloat16" or "int8"; `candidates` the number of logits
    that truncation looks at before its exact fallback. `cache_layout` is "rows", "pages", or
    "auto": pages on TPUs where the kernel takes the model.
    """

    slots: int = 64
    max_prompt_len: int = 1024
    max_new_tokens: int = 1024
    chunk: int = 32
    compute_dtype: str = "float32"
    cache_dtype: str = "auto"
    cache_layout: str = "auto"
    on_long_prompt: str = "drop"
    refill_fraction: float = 0.125
    first_length: int = 128
    row_halvings: int = 3
    prefill_tokens: int = 4096
    candidates: int = 128

    def __post_init__(self):
        for name in ("slots", "max_prompt_len", "max_new_tokens", "chunk", "first_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout {name}={getattr(self, name)}: it must be at least 1")
        if self.on_long_prompt not in ON_LONG_PROMPT:
            raise ValueError(
                f"rollout on_long_prompt={self.on_long_prompt!r}: choose from {ON_LONG_PROMPT}"
            )

    @classmethod
    def from_config(cls, c: Any) -> EngineConfig:
        """The settings of `c.rollout`, with the limits of `c.data` and `c.sampling`."""
        compute = c.model.compute_dtype
        if compute == "auto":
            compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return cls(
            slots=c.rollout.slots,
            max_prompt_len=c.data.max_prompt_len,
            max_new_tokens=max(c.sampling.max_new_tokens, c.eval.max_new_tokens),
            chunk=c.rollout.chunk,
            compute_dtype=compute,
            cache_dtype=c.rollout.cache_dtype,
            on_long_prompt=c.data.on_long_prompt,
            first_length=c.rollout.first_length,
            row_halvings=c.rollout.row_halvings,
        )

    @property
    def cache_dtype_name(self) -> str:
        """The cache's dtype with "auto" resolved."""
        return self.compute_dtype if self.cache_dtype == "auto" else self.cache_dtype

    @property
    def max_length(self) -> int:
        """Columns the longest possible row needs; a chunk may write past a row's last token."""
        return self.max_prompt_len + self.max_new_tokens + self.chunk

    def is_cut(self, request: Request) -> bool:
        """Whether the request's prompt has to lose tokens."""
        return len(request.prompt_tokens) > self.max_prompt_len

    def fitted(self, prompt_tokens: Any) -> Any:
        """The prompt as it is sampled from: without its first tokens where it is too long."""
        return prompt_tokens[-self.max_prompt_len :]

    def check(self, request: Request) -> Request | None:
        """The request, or None when it is to be dropped. ValueError when it can never run."""
        s, name = request.sampling, f"request {request.id}"
        if request.n < 1:
            raise ValueError(f"{name} asks for n={request.n} responses: it must be at least 1")
        if not request.prompt_tokens:
            raise ValueError(f"{name} has an empty prompt: give it at least one token (bos)")
        if not 1 <= s.max_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"{name} asks for {s.max_new_tokens:,} new tokens, the engine was built for 1 to "
                f"{self.max_new_tokens:,}: change sampling.max_new_tokens"
            )
        if len(request.forced_prefix) > s.max_new_tokens:
            raise ValueError(
                f"{name} forces {len(request.forced_prefix)} tokens but may have only "
                f"{s.max_new_tokens}: raise sampling.max_new_tokens"
            )
        fine = 0 <= s.temperature < math.inf and 0 <= s.top_p <= 1 and 0 <= s.min_p <= 1
        if not fine or not 0 <= s.top_k < 2**31:
            raise ValueError(f"{name} has impossible settings: {s}")
        return None if self.is_cut(request) and self.on_long_prompt == "drop" else request

    def buckets(self, shards: int = 1) -> Buckets:
        """The shapes that this engine compiles; rows split over `shards` devices."""
        if self.slots % shards:
            below = self.slots // shards * shards
            raise ValueError(
                f"rollout.slots={self.slots} do not split over data x fsdp = {shards} devices: "
                f"nearest are {below or shards} and {below + shards}"
            )
        rows, halvings = [self.slots], 0
        while halvings < self.row_halvings and rows[0] % (2 * shards) == 0:
            rows.insert(0, rows[0] // 2)
            halvings += 1
        lengths = [_round_up(min(self.first_length, self.max_length), 32)]
        while lengths[-1] < self.max_length:
            lengths.append(min(2 * lengths[-1], _round_up(self.max_length, 32)))
        longest_prompt = max(1, self.max_prompt_len - 1)
        prompts = [min(32, _round_up(longest_prompt, 8))]
        while prompts[-1] < longest_prompt:  # 32, 48, 64, 96, 128, ...: at most a third is padding
            halfway = prompts[-1] % 3 != 0
            longer = prompts[-1] * 3 // 2 if halfway else prompts[-1] * 4 // 3
            prompts.append(min(longer, _round_up(longest_prompt, 16)))
        prompts = [min(p, lengths[-1]) for p in prompts]
        return Buckets(tuple(rows), tuple(lengths), tuple(prompts), self.prefill_tokens, shards)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending lists of slot counts, cache lengths and padded prompt lengths."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    prefill_tokens: int
    shards: int

    def rows_for(self, responses: int) -> int:
        """The fewest slots that hold `responses`, or all there are."""
        return next((r for r in self.rows if r >= responses), self.rows[-1])

    def prompt_for(self, tokens: int) -> int:
        """The padded length of a prompt."""
        return next(p for p in self.prompts if p >= tokens)

    def prefill_rows(self, padded: int) -> int:
        """Prompts in the largest prefill batch at this padded length."""
        return _round_up(min(max(1, self.prefill_tokens // padded), self.rows[-1]), self.shards)

    def prefill_sizes(self, padded: int) -> tuple[int, ...]:
        """Batch sizes compiled at this length: a small one for latecomers, and a full one."""
        full = self.prefill_rows(padded)
        small = _round_up(max(1, full // 8), self.shards)
        return (small, full) if small < full else (full,)

    def prefill_size(self, prompts: int, padded: int) -> int:
        """The batch size for so many prompts: full ones while they last, then small ones."""
        return max(
            (size for size in self.prefill_sizes(padded) if size <= prompts),
            default=self.prefill_sizes(padded)[0],
        )

    def prefills(self) -> list[tuple[int, int]]:
        """All (rows, padded length) of prefill."""
        return [(size, p) for p in self.prompts for size in self.prefill_sizes(p)]

    def longer(self, length: int) -> int:
        """The next cache length."""
        return self.lengths[self.lengths.index(length) + 1]

    def shorter(self, length: int) -> int:
        """The cache length before."""
        return self.lengths[self.lengths.index(length) - 1]

    def fewer(self, rows: int) -> int:
        """The next smaller number of slots."""
        return self.rows[self.rows.index(rows) - 1]

    def neighbours(self, rows: int, length: int) -> list[tuple[int, int]]:
        """Where the cache may go from here in one resize."""
        i = self.lengths.index(length)
        out = [(rows, self.lengths[j]) for j in (i - 1, i + 1) if 0 <= j < len(self.lengths)]
        if rows > self.rows[0]:
            out.append((self.fewer(rows), length))
        return out

    def decodes(self) -> list[tuple[int, int]]:
        """All (rows, length) of decode."""
        return list(itertools.product(self.rows, self.lengths))

    def weight_sharding(self, mesh: Mesh, letters: Any) -> NamedSharding:
        """Where a weight lives while decoding."""
        return sharding(mesh, letters, DECODE_RULES)
