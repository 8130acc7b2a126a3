"""From counts to seconds: the least time in which a chip's published peaks allow a program.

Three clocks run at once, for arithmetic, memory and interconnect; the slowest one is the time. The
wire is taken as one ring that uses both directions of one torus axis. Real programs take longer:
the number is a floor, useful for comparing settings and slices.
"""

from __future__ import annotations

import dataclasses

from sdjax.plan.chips import Chip
from sdjax.plan.hlo import Costs

RING_LINKS = 2  # both directions of one torus axis


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program, run `times` times per training batch."""

    name: str
    times: float
    flops: float
    bytes: float
    wire: float
    collectives: dict[str, tuple[float, float]]
    chip: Chip

    @classmethod
    def of(cls, name: str, times: float, costs: Costs, chip: Chip, share: float = 1.0) -> Phase:
        """From the costs of a program, of which `share` is executed."""
        kinds = {k: (share * n, share * b) for k, (n, b) in costs.collectives().items()}
        wire = sum(sent for _, sent in kinds.values())
        return cls(name, times, share * costs.flops, share * costs.bytes, wire, kinds, chip)

    @property
    def clocks(self) -> dict[str, float]:
        """Seconds of one execution by what limits it."""
        return {
            "compute": self.flops / self.chip.flops,
            "memory": self.bytes / self.chip.hbm_bytes_s,
            "wire": self.wire / (RING_LINKS * self.chip.link_bytes_s),
        }

    @property
    def seconds(self) -> float:
        """Least time of one execution."""
        return max(self.clocks.values())

    @property
    def bound(self) -> str:
        """What limits it."""
        return max(self.clocks, key=self.clocks.get)

    @property
    def total_seconds(self) -> float:
        """Least time per training batch."""
        return self.times * self.seconds
