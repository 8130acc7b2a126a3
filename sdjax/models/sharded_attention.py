"""Attention on a mesh: each device attends with its own queries and heads.

The compiler cannot split a Pallas kernel, and splits a scan over blocks badly, so both run under
`shard_map`: rows over (data, fsdp), heads over tensor, queries over context, where each device
first gathers the keys and values of the whole row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from sdjax.parallel import ACT_RULES, spec
from sdjax.types import Array

# local(q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset) -> out_BTHC
Local = Callable[..., Array]


def sharded(local: Local, static_offset: bool = False) -> Callable[..., Array]:
    """`local` as a function (q_BTHC, k_BTNC, v_BTNC, segment_ids_BT) of whole arrays on the mesh.

    The mesh is the one entered with `jax.set_mesh`. `static_offset` says that `local` wants
    `q_offset` as a Python int: then one version is compiled per shard of the context axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return lambda q, k, v, segment_ids: local(q, k, v, segment_ids, segment_ids, 0)
    specs = [spec(letters, ACT_RULES) for letters in ("BTHC", "BTNC", "BTNC", "BT")]
    context = mesh.shape["context"]

    def on_device(q, k, v, q_segment_ids):
        if context == 1:
            return local(q, k, v, q_segment_ids, q_segment_ids, 0)
        gather = functools.partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
        args = (q, gather(k), gather(v), q_segment_ids, gather(q_segment_ids))
        shard, T = jax.lax.axis_index("context"), q.shape[1]
        if not static_offset:
            return local(*args, shard * T)
        versions = [functools.partial(local, q_offset=i * T) for i in range(context)]
        return jax.lax.switch(shard, versions, *args)

    return jax.shard_map(
        on_device, in_specs=tuple(specs), out_specs=PartitionSpec(*specs[0]), check_vma=False
    )
