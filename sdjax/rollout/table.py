"""The host's book of the decode slots: which response sits where, and what it has got so far.

Plain NumPy. The device sees it as `programs.Slots`, built anew for every chunk.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sdjax.records import FINISH_EOS, FINISH_LENGTH, Completion, Request
from sdjax.rollout import programs, sampling

INTEGERS = ("token", "length", "generated", "budget", "top_k")
NAMES = ("seed", "request", "sample")
FLOATS = ("temperature", "top_p", "min_p")


@dataclasses.dataclass
class Response:
    """One response in the making: pieces of tokens and log-probabilities, one per chunk."""

    order: int
    request: Request
    index: int
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def finish(self, reason: str) -> Completion:
        """The response as the record that leaves the engine."""
        tokens, logp, truncated = (np.concatenate(p) for p in zip(*self.pieces, strict=True))
        return Completion(
            request_id=self.request.id,
            index=self.index,
            tokens=tokens.astype(np.int32),
            sampler_logp=logp.astype(np.float32),
            truncated_logp=truncated.astype(np.float32),
            finish_reason=reason,
        )


class Table:
    """Slots 0..rows-1; `responses[b]` is None where slot b is free."""

    def __init__(self, rows: int):
        self.responses: list[Response | None] = [None] * rows
        self.columns = {name: np.zeros(rows, np.int32) for name in INTEGERS}
        self.columns |= {name: np.zeros(rows, np.uint32) for name in NAMES}
        self.columns |= {name: np.zeros(rows, np.float32) for name in FLOATS}

    @property
    def rows(self) -> int:
        """Number of slots."""
        return len(self.responses)

    def free(self) -> list[int]:
        """Slots without a response."""
        return [b for b, response in enumerate(self.responses) if response is None]

    def live(self) -> list[int]:
        """Slots with a response."""
        return [b for b, response in enumerate(self.responses) if response is not None]

    def longest(self) -> int:
        """Cached tokens of the longest live row."""
        return max((int(self.columns["length"][b]) for b in self.live()), default=0)

    def admit(self, slot: int, response: Response) -> None:
        """Puts a response into a free slot; all but its prompt's last token are in the cache."""
        request, s = response.request, response.request.sampling
        values = dict(
            token=request.prompt_tokens[-1],
            length=len(request.prompt_tokens) - 1,
            generated=0,
            budget=s.max_new_tokens,
            seed=s.seed & 0xFFFFFFFF,
            request=request.id & 0xFFFFFFFF,
            sample=response.index,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        for name, value in values.items():
            self.columns[name][slot] = value
        self.responses[slot] = response

    def keep(self, slots: list[int]) -> None:
        """Reduces the table to these slots, in this order."""
        self.responses = [self.responses[b] for b in slots]
        self.columns = {name: column[slots] for name, column in self.columns.items()}

    def forced(self, chunk: int) -> np.ndarray:
        """Forced tokens of the next `chunk` steps, int32 [I, B]; -1 where the token is sampled."""
        forced_IB = np.full((chunk, self.rows), -1, np.int32)
        for b in self.live():
            start = int(self.columns["generated"][b])
            piece = self.responses[b].request.forced_prefix[start : start + chunk]
            forced_IB[: len(piece), b] = piece
        return forced_IB

    def slots(self, chunk: int) -> programs.Slots:
        """The table as the decode program takes it (copies: the device may still be reading)."""
        column = {name: values.copy() for name, values in self.columns.items()}
        settings = sampling.Settings(
            *(column.pop(n) for n in ("temperature", "top_k", "top_p", "min_p"))
        )
        return programs.Slots(**column, settings=settings, forced_IB=self.forced(chunk))

    def advance(
        self, chunk: programs.Chunk, forced_IB: np.ndarray, ends: frozenset[int]
    ) -> list[tuple[int, Response, np.ndarray, str | None]]:
        """Books a chunk: (slot, response, new tokens, finish reason or None) of each live slot."""
        booked = []
        for b in self.live():
            count = int(chunk.count_B[b])
            tokens = chunk.token_IB[:count, b]
            response = self.responses[b]
            response.pieces.append(
                (tokens, chunk.logp_IB[:count, b], chunk.truncated_logp_IB[:count, b])
            )
            self.columns["token"][b] = tokens[-1]
            self.columns["length"][b] += count
            self.columns["generated"][b] += count
            self.columns["budget"][b] -= count
            reason = None
            if int(tokens[-1]) in ends and forced_IB[count - 1, b] < 0:
                reason = FINISH_EOS
            elif self.columns["budget"][b] == 0:
                reason = FINISH_LENGTH
            if reason is not None:
                self.release(b)
            booked.append((b, response, tokens, reason))
        return booked

    def release(self, slot: int) -> None:
        """Frees a slot; its columns of the cache become garbage."""
        self.responses[slot] = None
        self.columns["budget"][slot] = 0
        self.columns["length"][slot] = 0
