"""Finds out which processes make up this run: how many, which one this is, where process 0 lives.

Reads environment variables and, on a TPU VM, the metadata server. Starts nothing and never imports
jax, so it is testable with a dictionary.
"""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping

METHODS = ("auto", "single", "explicit", "slurm", "tpu")
TPU_PORT = 8482  # the port that jax itself uses on TPU pods
GOOGLE_PCI_VENDOR = "0x1ae0"
METADATA_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class StartupError(ValueError):
    """The processes of a run did not find each other, or disagree; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of this run. `coordinator` is host:port of process 0, empty when alone."""

    process_index: int = 0
    process_count: int = 1
    coordinator: str = ""
    method: str = "single"
    hosts: tuple[str, ...] = ()  # host of each process, where it is known before the start
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of this host

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.process_count == 1

    def name(self, process: int) -> str:
        """How messages call a process: its number, with its host where known."""
        host = self.hosts[process] if process < len(self.hosts) else ""
        return f"{process} ({host})" if host else str(process)


def detect(
    method: str,
    coordinator: str,
    num_processes: int,
    process_id: int,
    env: Mapping[str, str],
    metadata: Callable[[str], str] | None = None,
    on_tpu_vm: Callable[[], bool] | None = None,
) -> Cluster:
    """The cluster described by config.distributed, else by the environment, else a single process.

    Order of "auto": explicit settings (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), SLURM with several tasks, TPU pod, alone. Raises StartupError when the method
    asked for is not there or half described.
    """
    if method not in METHODS:
        raise StartupError(
            f"config.distributed.method={method!r} is unknown: use one of {', '.join(METHODS)}"
        )
    if method == "single":
        return Cluster()
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    if method == "explicit" or (method == "auto" and coordinator):
        return _explicit(coordinator, num_processes, process_id, env)
    if method == "slurm" or (method == "auto" and _several_slurm_tasks(env)):
        return _slurm(env)
    on_tpu_vm = on_tpu_vm or has_tpu_chips
    wants_cpu = env.get("JAX_PLATFORMS", "").startswith("cpu")
    if method == "tpu" or (method == "auto" and not wants_cpu and on_tpu_vm()):
        return _tpu(env, metadata or read_metadata)
    return Cluster()


def _explicit(
    coordinator: str, num_processes: int, process_id: int, env: Mapping[str, str]
) -> Cluster:
    """Coordinator, count and index from config or JAX_* variables."""
    count = num_processes or _integer(env, "JAX_NUM_PROCESSES", 0)
    index = process_id if process_id >= 0 else _integer(env, "JAX_PROCESS_ID", -1)
    if ":" not in coordinator or not coordinator.rsplit(":", 1)[1].isdigit():
        raise StartupError(
            f"config.distributed.coordinator={coordinator!r} is not host:port: name process 0's "
            "address, for example 10.0.0.2:8482 (or set JAX_COORDINATOR_ADDRESS)"
        )
    if count < 1:
        raise StartupError(
            "config.distributed.coordinator is set but the number of processes is not: set "
            "config.distributed.num_processes or JAX_NUM_PROCESSES"
        )
    if not 0 <= index < count:
        raise StartupError(
            f"process id {index} is not within 0..{count - 1}: set config.distributed.process_id "
            "or JAX_PROCESS_ID, a different one for every process"
        )
    return Cluster(index, count, coordinator, "explicit")


def _several_slurm_tasks(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks."""
    return (
        "SLURM_PROCID" in env
        and "SLURM_STEP_NODELIST" in env
        and env.get("SLURM_NTASKS", "1") != "1"
    )


def _slurm(env: Mapping[str, str]) -> Cluster:
    """One process per srun task; the port comes from the job id, as in jax's own detection."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    missing = [name for name in needed if name not in env]
    if missing:
        raise StartupError(
            f"config.distributed.method='slurm' needs {', '.join(missing)} in the environment: "
            "start the processes with srun (launch/slurm.sh does)"
        )
    nodes = expand_nodelist(env["SLURM_STEP_NODELIST"])
    port = _integer(env, "SLURM_JOB_ID", 0) % 4096 + 61440
    count = _integer(env, "SLURM_NTASKS", 1)
    tasks_per_node = -(-count // len(nodes))
    one_gpu_visible = len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    share_node = tasks_per_node > 1 and not one_gpu_visible
    hosts = tuple(nodes[i // tasks_per_node] for i in range(count))
    return Cluster(
        process_index=_integer(env, "SLURM_PROCID", 0),
        process_count=count,
        coordinator=f"{nodes[0]}:{port}" if count > 1 else "",
        method="slurm",
        hosts=hosts,
        local_device_ids=(_integer(env, "SLURM_LOCALID", 0),) if share_node else None,
    )


def expand_nodelist(text: str) -> list[str]:
    """SLURM's short form of host names: "a[1-2,05],b" is a1, a2, a05, b."""
    nodes: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not ranges:
            nodes.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            width = len(first)
            for number in range(int(first), int(last or first) + 1):
                nodes.append(f"{prefix}{number:0{width}d}{suffix}")
    return nodes


def _tpu(env: Mapping[str, str], metadata: Callable[[str], str]) -> Cluster:
    """One process per TPU host, of one slice or (MEGASCALE_*) of several."""
    listed = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if listed and "TPU_WORKER_ID" in env and not listed.startswith("WARNING"):  # libtpu's excuse
        workers = [worker.split(":")[0] for worker in listed.split(",")]
        index = _integer(env, "TPU_WORKER_ID", 0)
    else:
        # Either a list of host names, or name:id:address triples.
        entries = metadata("worker-network-endpoints").split(",")
        workers = [entry.split(":")[2] if entry.count(":") == 2 else entry for entry in entries]
        index = int(metadata("agent-worker-number"))
    slices = _integer(env, "MEGASCALE_NUM_SLICES", 1)
    if slices > 1:
        index += _integer(env, "MEGASCALE_SLICE_ID", 0) * len(workers)
        first = env.get("MEGASCALE_COORDINATOR_ADDRESS", workers[0]).split(":")[0]
        return Cluster(index, slices * len(workers), f"{first}:{TPU_PORT}", "tpu")
    if len(workers) == 1:
        return Cluster(method="tpu")
    return Cluster(index, len(workers), f"{workers[0]}:{TPU_PORT}", "tpu", tuple(workers))


def has_tpu_chips() -> bool:
    """Whether a Google accelerator sits on this machine's PCI bus."""
    return any(
        pathlib.Path(path).read_text().strip() == GOOGLE_PCI_VENDOR
        for path in glob.glob("/sys/bus/pci/devices/*/vendor")
    )


def read_metadata(key: str) -> str:
    """One attribute of this TPU VM from the metadata server; StartupError without an answer."""
    request = urllib.request.Request(METADATA_URL + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except OSError as error:
        raise StartupError(
            f"the metadata server did not tell {key} ({error}): on a machine that is not a TPU VM "
            "set config.distributed.method=single"
        ) from error


def this_host() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    """An integer environment variable; StartupError when it is not one."""
    text = env.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise StartupError(f"{name}={text!r} is not a number: correct it or unset it") from error
