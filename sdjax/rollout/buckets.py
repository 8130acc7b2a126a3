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
PROMPTS_PER_ROW = 4  # of the longest, at most: a shared row is filled well, attention grows with it
PREFILL_PARTS = (32, 8, 1)  # of a full prefill batch: for what is left, and for a prompt alone


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of the sampling engine.

    `slots` responses are decoded at once, `chunk` steps per call from the host at most; a call ends
    early when `refill_fraction` of the slots are free and something waits. Prompts longer than
    `max_prompt_len` are dropped or cut on the left (`on_long_prompt`). The cache starts with
    `first_length` columns and doubles; when nothing waits, slots are halved up to `row_halvings`
    times. `prefill_tokens` bounds a prefill batch (rows of packed prompts times their length),
    unless one prompt alone is longer. `cache_dtype` is "auto" (the compute dtype), "float32",
    "bfloat16" or "int8"; `candidates` the number of logits that truncation looks at before its
    exact fallback. `cache_layout` is "rows", "pages", or "auto": pages on TPUs where the kernel
    takes the model.
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
        return Buckets(tuple(rows), tuple(lengths), self._prefills(shards), shards)

    def _prefills(self, shards: int) -> tuple[tuple[int, int], ...]:
        """All (rows, columns) of a prefill, for any length of prompts: full ones, and parts."""
        longest = max(1, self.max_prompt_len - 1)
        most = max(longest, min(PROMPTS_PER_ROW * longest, self.prefill_tokens // shards))
        columns = [min(64, _round_up(longest, 8))]
        while columns[-1] < most:
            columns.append(min(2 * columns[-1], _round_up(most, 16)))
        shapes = []
        for length in columns:
            full = _round_up(min(max(1, self.prefill_tokens // length), self.slots), shards)
            sizes = {_round_up(max(1, full // parts), shards) for parts in PREFILL_PARTS}
            shapes += [(rows, length) for rows in sorted(sizes)]
        return tuple(shapes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending slot counts and cache lengths, and the (rows, columns) of prefill."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]
    shards: int

    def rows_for(self, responses: int) -> int:
        """The fewest slots that hold `responses`, or all there are."""
        return next((r for r in self.rows if r >= responses), self.rows[-1])

    @property
    def largest_prefill(self) -> tuple[int, int]:
        """The (rows, columns) with the most tokens, of these the longest rows."""
        return max(self.prefills, key=lambda shape: (shape[0] * shape[1], shape[1]))

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
