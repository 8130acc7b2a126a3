"""What a TPU chip can do, and how the names of slices translate. No jax.

Peaks are the published ones: Cloud TPU documentation, "System architecture" pages of each version
(https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x), and for the speed of one
interconnect link the table of "How to Scale Your Model" (https://jax-ml.github.io/scaling-book).
`hbm_bytes` is what XLA's compiler allows a program, a little less than what is on the chip: the
limit in its out-of-memory message, which a test compares.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one jax device. tpu7x chips are two devices each, the others one."""

    name: str
    flops: float  # bfloat16 per second
    hbm_bytes: int
    hbm_bytes_s: float
    link_bytes_s: float  # one interconnect link, one way
    dims: int  # of the torus
    product: str  # prefix of the slice's product name
    cores_per_chip: int  # what the number in the product name counts
    devices_per_chip: int = 1
    options: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            hbm_bytes=int(30.75 * GIB),
            hbm_bytes_s=1.228e12,
            link_bytes_s=4.5e10,
            dims=3,
            product="v4",
            cores_per_chip=2,
            options={"chip_config_name": "megacore"},
        ),
        Chip("v5e", 197e12, int(15.75 * GIB), 8.19e11, 4.5e10, 2, "v5litepod", 1),
        Chip("v5p", 459e12, int(95.73 * GIB), 2.765e12, 9e10, 3, "v5p", 2),
        Chip("v6e", 918e12, int(31.24 * GIB), 1.64e12, 9e10, 2, "v6e", 1),
        Chip(
            name="tpu7x",
            flops=2307e12 / 2,
            hbm_bytes=int(94.74 * GIB),
            hbm_bytes_s=7.38e12 / 2,
            link_bytes_s=9e10,
            dims=3,
            product="tpu7x",
            cores_per_chip=2,
            devices_per_chip=2,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chip and its size in chips, such as v5p:4x4x4."""

    chip: Chip
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        """As libtpu and config.plan.topology spell it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        """jax devices of the slice."""
        return self.chips * self.chip.devices_per_chip

    @property
    def host(self) -> Topology:
        """The part of the slice that is one usual host: 2 x 2 chips, or the slice if smaller."""
        return Topology(self.chip, tuple(map(min, self.sides, (2, 2, 1))))

    @property
    def options(self) -> dict[str, Any]:
        """What libtpu must be told beside the name: one chip is less than its usual host."""
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {}
        return {**self.chip.options, **bounds}

    @property
    def product(self) -> str:
        """What one asks Google for, such as v5p-128."""
        return f"{self.chip.product}-{self.chips * self.chip.cores_per_chip}"


# Cube-like shapes first tried for product names, in chips.
SIDES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
        *("8x16x16", "16x16x16"),
    ),
}


def parse(text: str) -> Topology:
    """Reads "v5p:4x4x4" or a product name such as "v5p-128" (then in its usual shape).

    Raises ValueError naming config.plan.topology.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text):
        chip = CHIPS.get(match[1])
        sides = tuple(int(n) for n in match[2].split("x"))
        if chip and len(sides) == chip.dims and all(sides):
            return Topology(chip, sides)
    if match := re.fullmatch(r"(\w+)-(\d+)", text):
        for topology in usual(match[1]):
            if topology.product == text:
                return topology
    raise ValueError(
        f"config.plan.topology={text!r} is not a slice: write chip:XxY (v5e, v6e) or chip:XxYxZ "
        "(v4, v5p, tpu7x), for example v5e:2x4 or v5p:4x4x4, or a product such as v5p-128"
    )


def usual(name: str) -> list[Topology]:
    """The usual slices of a chip (or of its product's prefix), smallest first."""
    chips = [chip for chip in CHIPS.values() if name in (chip.name, chip.product)]
    return [
        Topology(chip, tuple(int(n) for n in sides.split("x")))
        for chip in chips
        for sides in SIDES[chip.dims]
    ]
