"""The mesh and the one table that maps axis letters to mesh axes.

A mesh is always (data, fsdp, tensor, context). Parameters and activations are described by axis
letters (see `sdjax.types`); `spec` turns letters into a PartitionSpec and refuses two letters on
one mesh axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

PARAM_RULES = {"D": "fsdp", "H": "tensor", "N": "tensor", "F": "tensor", "V": "tensor"}
ACT_RULES = {
    "B": ("data", "fsdp"),
    "T": "context",
    "H": "tensor",
    "N": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the (data, fsdp, tensor, context) mesh; `data=-1` takes all the devices that are left.

    The devices keep jax's order, which lists each host's together. Raises ValueError when the sizes
    do not multiply to the number of devices, or when one row would lie on several hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    fixed = fsdp * tensor * context
    if data == -1:
        data = max(1, len(devices) // fixed)
    if data * fixed != len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} x context={context} needs "
            f"{data * fixed} devices, but there are {len(devices)}: change config.mesh"
        )
    grid = np.asarray(devices, dtype=object).reshape(data, fsdp, tensor, context)
    for group in grid.reshape(-1, tensor * context):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(
                f"mesh tensor={tensor} x context={context} spans hosts, but each host packs its "
                "own rows: choose a product in config.mesh that divides a host's number of devices"
            )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device, so that the same code runs everywhere."""
    return make_mesh(devices=[device or jax.local_devices()[0]])


def spec(letters: str, rules: Mapping[str, Any]) -> PartitionSpec:
    """PartitionSpec of an array with axes named by `letters`; unknown letters are not split.

    Raises ValueError when two letters would land on one mesh axis.
    """
    entries = [rules.get(letter) for letter in letters]
    used: dict[str, str] = {}
    for letter, entry in zip(letters, entries, strict=True):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in used:
                raise ValueError(f"axes {used[axis]} and {letter} of {letters} both map to {axis}")
            used[axis] = letter
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, letters: str, rules: Mapping[str, Any] = PARAM_RULES) -> NamedSharding:
    """NamedSharding of an array whose axes are named by `letters`."""
    return NamedSharding(mesh, spec(letters, rules))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins an activation to its place in ACT_RULES; does nothing outside a mesh.

    The mesh is the one entered with `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, ACT_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def process_copies_mesh(local_mesh: Mesh) -> Mesh:
    """The mesh on which every process holds one whole copy, laid out as its own `local_mesh`.

    Axes ("process", data, fsdp, tensor, context); raises ValueError when processes have different
    numbers of devices.
    """
    count = jax.process_count()
    shape = tuple(local_mesh.shape[axis] for axis in MESH_AXES)
    if jax.device_count() != count * local_mesh.size:
        raise ValueError(
            f"{jax.device_count()} devices do not split evenly over {count} processes, so rollouts "
            "cannot run in each: use hosts with the same number of devices"
        )
    by_process = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    grid = np.asarray(by_process, dtype=object).reshape(count, *shape)
    return Mesh(grid, ("process", *MESH_AXES), axis_types=(AxisType.Auto,) * (len(shape) + 1))


def to_process(tree: Any, specs: Any, local_mesh: Mesh) -> Any:
    """Copies a tree of global arrays onto each process's `local_mesh`, device to device.

    `specs` is a tree of PartitionSpecs on the local axes. Alone this is a plain reshard. On several
    processes it is a collective: all of them must call it.
    """
    shardings = jax.tree.map(lambda s: NamedSharding(local_mesh, s), specs, is_leaf=_is_spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    copies = process_copies_mesh(local_mesh)
    spread = jax.tree.map(lambda s: NamedSharding(copies, s), specs, is_leaf=_is_spec)
    tree = jax.jit(lambda x: x, out_shardings=spread)(tree)

    def mine(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(mine, tree, shardings)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
