"""Which problems a training batch holds: a pure function of the step, the seed and the process.

Nothing is carried from step to step, so a resumed run sees exactly what an uninterrupted one would,
and every process of a pod can work out its own share alone. Does not load or filter problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdjax.records import Problem

_SUBSET, _EPOCH = 1, 2  # separate streams of one seed


class ProblemSampler:
    """Deals out problems epoch by epoch, each epoch in a seeded order of its own.

    Positions run on without a gap: batch `s` holds draws s*B ... s*B+B-1 of the endless stream, so
    within an epoch every problem occurs exactly once and a batch larger than the set repeats it
    (METHODS 6.6: one question fills a batch of 64 with 64 groups of its own). `subset_size` keeps a
    seeded |D| of the problems; for one seed the subsets are nested.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        batch_size: int,
        seed: int,
        subset_size: int | None = None,
    ):
        if not problems:
            raise ValueError("no problems to sample from: check config.data (name, path, filters)")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        if subset_size is not None and not 1 <= subset_size <= len(problems):
            raise ValueError(
                f"config.data.subset_size is {subset_size}, but the source has {len(problems)} "
                f"problems: choose 1 to {len(problems)}, or None for all"
            )
        self.batch_size, self.seed = batch_size, seed
        self.problems = list(problems)
        if subset_size is not None:
            order = np.random.default_rng((seed, _SUBSET)).permutation(len(problems))
            self.problems = [problems[i] for i in order[:subset_size]]

    def indices(self, step: int) -> list[int]:
        """Positions in `problems` of the whole batch of `step`, over all processes."""
        size = len(self.problems)
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {draw // size for draw in draws}}
        return [int(orders[draw // size][draw % size]) for draw in draws]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> list[Problem]:
        """The problems of `step` for one process; all processes' lists joined are the batch."""
        if self.batch_size % process_count:
            raise ValueError(
                f"config.batch.prompts={self.batch_size} does not split over {process_count} "
                f"processes: choose a multiple of {process_count}"
            )
        share = self.batch_size // process_count
        mine = self.indices(step)[process_index * share : (process_index + 1) * share]
        return [self.problems[i] for i in mine]

    def epoch(self, step: int) -> float:
        """How many times the set has been gone through before `step`."""
        return step * self.batch_size / len(self.problems)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, _EPOCH, epoch)).permutation(len(self.problems))
