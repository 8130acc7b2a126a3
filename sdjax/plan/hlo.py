"""Counts what an optimised HLO program does: FLOPs, bytes of memory traffic, bytes on the wire.

XLA's own cost analysis counts the body of a loop once; here each loop counts by its trip count. The
text is that of one device's program (`compiled.as_text()`), so all numbers are per device.

FLOPs are those of matrix products (dot, convolution), of the splash attention kernel (from the
shapes it is called with) and of kernels that declare theirs. Bytes are
what instructions outside fusions read from and write to main memory: buffers that XLA placed in
on-chip memory (layouts with S(1) and up) are free, a slice counts as what it takes, an update in
place as what it changes. Conditionals count as their most expensive branch. Collectives count what
a device sends in a ring.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

DTYPE_BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "token": 0,
}  # fmt: skip
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all iota partition-id replica-id "
    "opt-barrier copy-done slice-done all-gather-done all-reduce-done collective-permute-done "
    "async-done async-update send-done recv-done domain add-dependency".split()
)
COLLECTIVES = {
    "all-gather": "all-gather",
    "all-gather-start": "all-gather",
    "all-reduce": "all-reduce",
    "all-reduce-start": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-permute-start": "collective-permute",
}
SLICES = ("dynamic-slice", "gather", "slice")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: dtype, dimensions, and whether it lies in main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Size, without the padding of tiles."""
        return math.prod(self.dims) * DTYPE_BYTES.get(self.dtype, 4)

    @property
    def traffic(self) -> float:
        """Bytes that reading or writing it costs."""
        return self.bytes if self.in_hbm else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    literal: str  # what stands between the parentheses

    def called(self, attribute: str) -> str | None:
        """Name of the computation in calls=, body=, condition= ..."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass
class Costs:
    """Per device. `wire` maps (kind, channel) to (times executed, bytes sent)."""

    flops: float = 0.0
    bytes: float = 0.0
    wire: dict[tuple[str, str], tuple[float, float]] = dataclasses.field(default_factory=dict)

    def add(self, other: Costs, times: float = 1.0) -> None:
        """Adds `other`, executed `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for key, (count, sent) in other.wire.items():
            old = self.wire.get(key, (0.0, 0.0))
            self.wire[key] = (old[0] + times * count, old[1] + times * sent)

    def merge_channels(self, other: Costs) -> None:
        """Takes over collectives of a fusion: the parts of one collective share their channel."""
        for key, value in other.wire.items():
            self.wire[key] = max(self.wire.get(key, (0.0, 0.0)), value)

    def collectives(self) -> dict[str, tuple[float, float]]:
        """{kind: (times executed, bytes sent)}."""
        out: dict[str, tuple[float, float]] = {}
        for (kind, _), (count, sent) in self.wire.items():
            old = out.get(kind, (0.0, 0.0))
            out[kind] = (old[0] + count, old[1] + sent)
        return out


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(computations by name, name of the entry) of an HLO module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = _NAME.search(line) or re.search(r"(?:ENTRY )?([\w.\-]+)", line)
            current = computations.setdefault(name[1], [])
            entry = name[1] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":  # lines that go on after "}" continue a kernel's attributes
            current = None
        elif current is not None and (match := _LINE.match(line)):
            current.append(_instruction(line, match))
    if not entry:
        raise ValueError("the program's text has no ENTRY computation: pass compiled.as_text()")
    return computations, entry


def _instruction(line: str, match: re.Match) -> Instruction:
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else _end_of_shape(rest)
    opcode = _OPCODE.match(rest, end)
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shapes=tuple(_shapes(rest[:end])),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[close + 1 :],
        is_root=bool(match[1]),
        literal=inside,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _end_of_shape(text: str) -> int:
    """Where the shape at the start of `text` ends: layouts may hold parentheses."""
    match = _SHAPE.match(text)
    return match.end() if match else text.index(" ")


def _shapes(text: str) -> list[Shape]:
    out = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype not in DTYPE_BYTES:
            continue
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        out.append(Shape(dtype, sizes, not re.search(r"S\([1-9]\)", layout)))
    return out


class Counter:
    """Costs of each computation of a module. `unknown_trips(depth)` is asked for loops whose trip
    count is a run-time value; `depth` says how many such loops are around it."""

    def __init__(self, text: str, unknown_trips: Callable[[int], float] = lambda depth: 1.0):
        self._computations, self._entry = parse(text)
        self._tables = {
            name: {i.name: i for i in lines} for name, lines in self._computations.items()
        }
        self._unknown_trips = unknown_trips
        self._memo: dict[tuple[str, int, bool], Costs] = {}
        self.loops: list[tuple[str, float, bool]] = []  # (body, trips, known)

    def total(self) -> Costs:
        """Costs of one execution of the program."""
        return self._computation(self._entry, 0, fused=False)

    def _computation(self, name: str, depth: int, fused: bool) -> Costs:
        key = (name, depth, fused)
        if key not in self._memo:
            costs = Costs()
            for instruction in self._computations[name]:
                self._count(instruction, self._tables[name], costs, depth, fused)
            self._memo[key] = costs
        return self._memo[key]

    def _count(
        self,
        i: Instruction,
        table: Mapping[str, Instruction],
        costs: Costs,
        depth: int,
        fused: bool,
    ) -> None:
        """Adds one instruction to `costs`."""
        if i.opcode == "while":
            trips, known = self._trips(i, depth)
            self.loops.append((i.called("body"), trips, known))
            inner = depth if known else depth + 1
            costs.add(self._computation(i.called("body"), inner, fused=False), trips)
        elif i.opcode == "conditional":
            branches = [self._computation(b, depth, fused=False) for b in _branches(i)]
            costs.add(max(branches, key=lambda b: (b.flops, b.bytes)))
        elif i.opcode in ("call", "async-start"):
            called = i.called("to_apply") or i.called("calls")
            if called:
                costs.add(self._computation(called, depth, fused))
        elif i.opcode in COLLECTIVES:
            kind = COLLECTIVES[i.opcode]
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            sent = _sent(kind, i, table)
            part = Costs(wire={(kind, channel[1] if channel else i.name): (1.0, sent)})
            costs.merge_channels(part)
        elif i.opcode == "fusion":
            called = i.called("calls")
            inside = self._computation(called, depth, fused=True)
            costs.flops += inside.flops
            costs.merge_channels(_scattered(inside) if "reduce-scatter" in called else inside)
            costs.bytes += 0 if fused else self._fusion_bytes(i, table, called)
        elif i.opcode not in FREE:
            costs.flops += _flops(i, table)
            costs.bytes += 0 if fused else _plain_bytes(i, table)

    def _trips(self, i: Instruction, depth: int) -> tuple[float, bool]:
        """(trip count, whether the program fixes it) of a while loop."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes):
            return float(match[1]), True
        condition = self._computations[i.called("condition")]
        table = self._tables[i.called("condition")]
        root = next(x for x in condition if x.is_root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            bound = table.get(root.operands[1])
            if bound is not None and bound.opcode == "constant" and bound.literal.isdigit():
                return float(bound.literal), True
        return self._unknown_trips(depth), False

    def _fusion_bytes(self, i: Instruction, table: Mapping[str, Instruction], called: str) -> float:
        """Traffic of a fusion: its operands as far as they are used, and what it writes."""
        body = self._computations[called]
        parameters = {x.literal: x for x in body if x.opcode == "parameter"}
        total = 0.0
        for index, operand in enumerate(i.operands):
            if operand not in table:
                continue
            shape = _first(table[operand])
            parameter = parameters.get(str(index))
            total += _used_bytes(parameter, body, shape) if parameter else shape.traffic
        root = next(x for x in body if x.is_root)
        roots = [root] if root.opcode != "tuple" else [
            x for name in root.operands for x in body if x.name == name
        ]  # fmt: skip
        local = self._tables[called]
        for shape, part in zip(i.shapes, roots, strict=False):
            in_place = part.opcode == "dynamic-update-slice" and part.operands[1] in local
            written = _first(local[part.operands[1]]).bytes if in_place else shape.bytes
            total += written if shape.in_hbm else 0.0
        return total


def count(text: str, unknown_trips: Callable[[int], float] = lambda depth: 1.0) -> Costs:
    """Costs of one execution of a program, from its text."""
    return Counter(text, unknown_trips).total()


def _first(i: Instruction) -> Shape:
    return i.shapes[0] if i.shapes else Shape("token", (), False)


def _used_bytes(parameter: Instruction, body: list[Instruction], shape: Shape) -> float:
    """What a fusion reads of an operand: only the slice when it slices, nothing when it updates."""
    if not shape.in_hbm:
        return 0.0
    users = [x for x in body if parameter.name in x.operands]
    in_part = (*SLICES, "dynamic-update-slice")
    if users and all(x.opcode in in_part and x.operands[0] == parameter.name for x in users):
        return sum(_first(x).bytes for x in users if x.opcode in SLICES)
    return shape.bytes


def _plain_bytes(i: Instruction, table: Mapping[str, Instruction]) -> float:
    """Traffic of an instruction outside fusions."""
    operands = [_first(table[name]) for name in i.operands if name in table]
    if i.opcode in SLICES:
        return 2 * sum(s.traffic for s in i.shapes)
    if i.opcode in ("slice-start", "copy-start"):  # shapes: (source...), destination, context
        arrays = [s for s in i.shapes if len(s.dims) or s.bytes > 8]
        small = min((s.bytes for s in arrays), default=0.0)
        return small * sum(s.in_hbm for s in arrays[:2])
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1].traffic if len(operands) > 1 else 0.0
    if i.opcode == "custom-call" and "AllocateBuffer" in i.attributes:
        return 0.0
    return sum(s.traffic for s in operands) + sum(s.traffic for s in i.shapes)


def _branches(i: Instruction) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    if match:
        return _NAME.findall(match[1])
    return [i.called("true_computation"), i.called("false_computation")]


def _flops(i: Instruction, table: Mapping[str, Instruction]) -> float:
    if i.opcode == "dot":
        return _dot_flops(i, table)
    if i.opcode == "convolution":
        return _convolution_flops(i, table)
    if i.opcode == "custom-call" and i.name.startswith("splash"):
        return _splash_flops(i, table)
    if i.opcode == "custom-call":
        match = re.search(r'"?flops"?\s*:\s*"?(\d+)', i.attributes)
        return float(match[1]) if match else 0.0
    return 0.0


def _splash_flops(i: Instruction, table: Mapping[str, Instruction]) -> float:
    """Causal blockwise attention: two products forward, three for dq, four for dk and dv.

    Its first operands are the grid [heads or 1, query blocks, key blocks], narrower for a window
    (for dk and dv it is the query blocks that are fewer); then q [..., T, C] and k [..., S, C].
    Blocks are taken as square, and queries that are fewer than keys as the row's last.
    """
    operands = [_first(table[name]) for name in i.operands if name in table]
    grids = [s for s in operands if s.dtype.startswith("s") and len(s.dims) == 3]
    arrays = [s for s in operands if s.dtype in ("bf16", "f32", "f16") and len(s.dims) >= 3]
    if not grids or not arrays:
        return 0.0
    *heads, tokens, channels = arrays[0].dims
    keys = arrays[1].dims[-2]
    if "dkv" in i.name:
        width, count = grids[0].dims[1:]
        products, block, before = 4, keys / count, 0
    else:
        count, width = grids[0].dims[1:]
        products, block = 3 if "_dq" in i.name else 2, tokens / count
        before = round((keys - tokens) / block)
    blocks = sum(min(n + 1 + before, width) for n in range(count))
    return 2.0 * products * math.prod(heads) * blocks * block**2 * channels


def _dot_flops(i: Instruction, table: Mapping[str, Instruction]) -> float:
    lhs = _first(table[i.operands[0]])
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    contracted = [int(d) for d in match[1].split(",") if d] if match else []
    return 2.0 * math.prod(_first(i).dims) * math.prod(lhs.dims[d] for d in contracted)


def _convolution_flops(i: Instruction, table: Mapping[str, Instruction]) -> float:
    """Multiply-adds at valid positions, as XLA counts: TPU writes matrix products this way."""
    lhs, rhs, out = _first(table[i.operands[0]]), _first(table[i.operands[1]]), _first(i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    lhs_labels, rhs_labels, out_labels = labels[1], labels[2], labels[3]
    batch_groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    window = _window(i.attributes)
    valid = 1.0
    for n in range(sum(label.isdigit() for label in rhs_labels)):
        d = str(n)
        valid *= _valid_positions(
            lhs.dims[lhs_labels.index(d)],
            rhs.dims[rhs_labels.index(d)],
            out.dims[out_labels.index(d)],
            {name: values[n] for name, values in window.items()},
        )
    features_in = rhs.dims[rhs_labels.index("i")]  # of one group already
    features_out = out.dims[out_labels.index("f")]
    batch = lhs.dims[lhs_labels.index("b")] / (int(batch_groups[1]) if batch_groups else 1)
    return 2.0 * valid * features_in * features_out * batch


def _window(attributes: str) -> dict[str, list]:
    """The window of a convolution by spatial dimension, with defaults."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    size = [int(n) for n in fields.get("size", "").split("x") if n]
    ones = ["1"] * len(size)
    low = (
        [p.split("_")[0] for p in fields["pad"].split("x")]
        if "pad" in fields
        else ["0"] * len(size)
    )

    def numbers(name: str) -> list[int]:
        return [int(n) for n in (fields[name].split("x") if name in fields else ones)]

    return {
        "stride": numbers("stride"),
        "low": [int(n) for n in low],
        "lhs_dilate": numbers("lhs_dilate"),
        "rhs_dilate": numbers("rhs_dilate"),
    }


def _valid_positions(size: int, kernel: int, out: int, w: Mapping[str, int]) -> int:
    """Pairs (output, kernel position) that meet an element of the input and not its padding."""
    if kernel == 1 and w["stride"] == 1 and w["low"] == 0 and w["lhs_dilate"] == 1:
        return out
    span = (size - 1) * w["lhs_dilate"] + 1
    total = 0
    for k in range(kernel):
        for o in range(out):
            at = o * w["stride"] - w["low"] + k * w["rhs_dilate"]
            total += 0 <= at < span and at % w["lhs_dilate"] == 0
    return total


def _scattered(inside: Costs) -> Costs:
    """TPU writes a reduce-scatter as a fusion of an all-reduce with a slice: half the traffic."""
    wire = {}
    for (kind, channel), (times, sent) in inside.wire.items():
        if kind == "all-reduce":
            kind, sent = "reduce-scatter", sent / 2
        wire[(kind, channel)] = (times, sent)
    return Costs(wire=wire)


def _sent(kind: str, i: Instruction, table: Mapping[str, Instruction]) -> float:
    """Bytes that one device sends for a collective, by the ring algorithm."""
    size = sum(_first(table[name]).bytes for name in i.operands if name in table)
    n = _group_size(i.attributes)
    if kind == "collective-permute":
        return size
    if n <= 1:
        return 0.0
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return size * share.get(kind, (n - 1) / n)


def _group_size(attributes: str) -> int:
    """How many devices take part in one group, from any of three notations."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sides = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sides[name] for name, part in parts)
    return 1
