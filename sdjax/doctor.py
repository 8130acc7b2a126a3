"""One screen on whether this machine can run sdjax: versions, devices, libtpu, disk, memory, hub.

    python -m sdjax.main --config.mode=doctor [--config=FILE --workdir=DIR]

Each line is ok, a warning or a fault; the last two come with the remedy. Opens no ports, and stays
off the network when HF_HUB_OFFLINE=1. Exits with 1 when something is at fault.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sdjax.distributed.cluster import StartupError, detect, has_tpu_chips

OK, WARN, FAULT = "ok", "warning", "FAULT"
MIN_PYTHON = (3, 11)
MIN_VERSIONS = {
    "jax": "0.10.2",
    "flax": "0.12",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12",
    "transformers": "5.0",
}
PINNED = {"math-verify": "0.9.0"}
MIN_DISK_GB, MIN_MEMORY_GB = 20.0, 4.0
HUB_TIMEOUT_S = 5.0
DEVICES_TIMEOUT_S = 120.0
PROBE = "sdjax-devices"  # the thread that asks the accelerator


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was seen, and the remedy if any."""

    what: str
    state: str
    seen: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.what:<11} {self.state:<8} {self.seen}"
        return f"{line}\n{'':<20} -> {self.remedy}" if self.remedy else line


def run(c: Any, workdir: str) -> None:
    """Prints the examination; SystemExit(1) when something is at fault."""
    findings = examine(c, workdir)
    for finding in findings:
        print(finding)
    faults = sum(f.state == FAULT for f in findings)
    warnings = sum(f.state == WARN for f in findings)
    print(f"\n{faults} fault(s), {warnings} warning(s)")
    if any(thread.name == PROBE for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(1)  # jax's own end would wait for the thread that waits for the accelerator
    if faults:
        sys.exit(1)


def examine(c: Any, workdir: str) -> list[Finding]:
    """All checks, in the order in which they are shown."""
    return [
        check_python(),
        *check_versions(),
        check_devices(c),
        check_tpu_library(),
        check_processes(c),
        check_workdir(workdir),
        check_disk(workdir),
        check_memory(),
        check_model(c),
        check_hub(),
    ]


def check_python() -> Finding:
    """The interpreter."""
    seen = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", FAULT, seen, "launch/bootstrap.sh brings a newer one by uv")
    return Finding("python", OK, seen)


def check_versions() -> list[Finding]:
    """The packages that numbers and formats depend on; one line unless something is wrong."""
    seen, wrong = [], []
    for package, least in {**MIN_VERSIONS, **PINNED}.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Finding(package, FAULT, "not installed", f"pip install '{package}'"))
            continue
        seen.append(f"{package} {version}")
        if package in PINNED and version != least:
            wrong.append(Finding(package, WARN, version, f"pip install '{package}=={least}'"))
        elif package not in PINNED and _numbers(version) < _numbers(least):
            wrong.append(Finding(package, FAULT, version, f"pip install '{package}>={least}'"))
    return [Finding("packages", OK, ", ".join(seen)), *wrong]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    parts = []
    for part in version.split("."):
        digits = "".join(ch for ch in part if ch.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def check_devices(c: Any) -> Finding:
    """Whether jax finds the accelerator and can compute on it, within DEVICES_TIMEOUT_S."""
    found: list[Finding] = []
    probe = threading.Thread(
        target=lambda: found.append(_probe_devices(c)), name=PROBE, daemon=True
    )
    probe.start()
    probe.join(DEVICES_TIMEOUT_S)
    if found:
        return found[0]
    remedy = (
        "one host of a pod waits for the others: start the doctor on all hosts at once "
        "(launch/tpu_vm.sh bootstrap does); else end what holds the accelerator"
    )
    return Finding("devices", FAULT, f"no answer within {DEVICES_TIMEOUT_S:g} s", remedy)


def _probe_devices(c: Any) -> Finding:
    try:
        devices = jax.local_devices()
        answer = float(jnp.ones((8, 8)).sum())
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return Finding("devices", FAULT, first, "is another process using the accelerator?")
    seen = f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
    if answer != 64:
        return Finding("devices", FAULT, f"{seen} computed {answer} for 64", "replace the host")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        seen += f", {limit / 2**30:.1f} GiB each"
    if jax.default_backend() == "cpu" and has_tpu_chips():
        remedy = "pip install 'sdjax[tpu]', unset JAX_PLATFORMS, end other users of the chips"
        return Finding("devices", FAULT, f"{seen}, but TPU chips are on the bus", remedy)
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        remedy = "pip install 'sdjax[cuda]' and unset JAX_PLATFORMS"
        return Finding("devices", WARN, f"{seen}, but nvidia-smi is here", remedy)
    fixed = c.mesh.fsdp * c.mesh.tensor * c.mesh.context
    if len(devices) % fixed and jax.process_count() == 1:
        remedy = f"config.mesh needs a multiple of {fixed} devices: change it, or run on all hosts"
        return Finding("devices", WARN, seen, remedy)
    return Finding("devices", OK, seen)


def check_tpu_library() -> Finding:
    """libtpu: needed on TPUs, and for mode=plan anywhere."""
    if importlib.util.find_spec("libtpu") is None:
        state = FAULT if has_tpu_chips() else OK
        remedy = "pip install 'sdjax[tpu]'" if has_tpu_chips() else ""
        return Finding("libtpu", state, "not installed (mode=plan needs it)", remedy)
    installed, wanted = importlib.metadata.version("libtpu"), wanted_libtpu()
    if wanted is not None and installed not in wanted:
        seen = f"{installed}, while this jax is built for {wanted}"
        remedy = "pip install 'sdjax[tpu]': jax cannot read every program of another"
        return Finding("libtpu", WARN, seen, remedy)
    return Finding("libtpu", OK, installed)


def wanted_libtpu() -> SpecifierSet | None:
    """The libtpu versions that the installed jax asks for in its own tpu extra."""
    for line in importlib.metadata.requires("jax") or []:
        requirement = Requirement(line)
        if requirement.name == "libtpu":
            return requirement.specifier
    return None


def check_processes(c: Any) -> Finding:
    """Which run this process would join. Contacts nobody but the TPU's metadata server."""
    d = c.distributed
    try:
        cluster = detect(d.method, d.coordinator, d.num_processes, d.process_id, os.environ)
    except StartupError as error:
        return Finding("processes", FAULT, "cannot tell", str(error))
    if cluster.alone:
        return Finding("processes", OK, "this one only")
    seen = f"{cluster.process_index} of {cluster.process_count} by {cluster.method}"
    host = cluster.coordinator.rsplit(":", 1)[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return Finding("processes", FAULT, seen, f"the coordinator's name {host} does not resolve")
    return Finding("processes", OK, f"{seen}, coordinator {cluster.coordinator}")


def check_workdir(workdir: str) -> Finding:
    """Whether the workdir, local or in a bucket, can be written."""
    folder = epath.Path(workdir)
    probe = folder / f".doctor-{os.getpid()}"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
        if made:
            folder.rmdir()
    except Exception as error:  # each storage has its own; all mean that saving would fail
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding("workdir", FAULT, f"{workdir}: {first}", "choose another --workdir")
    return Finding("workdir", OK, f"{workdir} can be written")


def check_disk(workdir: str) -> Finding:
    """Free space where the run and the hub's cache live."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    places = {"cache": Path(home).expanduser()}
    if "://" not in workdir:
        places["workdir"] = Path(workdir)
    free = {name: shutil.disk_usage(_existing(path)).free / 1e9 for name, path in places.items()}
    seen = ", ".join(f"{gb:.0f} GB free for the {name}" for name, gb in free.items())
    if min(free.values()) < MIN_DISK_GB:
        remedy = f"free {MIN_DISK_GB:.0f} GB (an 8 B model is 16 GB, its checkpoint 100 GB)"
        return Finding("disk", WARN, seen, remedy)
    return Finding("disk", OK, seen)


def _existing(path: Path) -> Path:
    """The nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_memory() -> Finding:
    """Free host memory, where the system tells it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Finding("memory", OK, "unknown on this system")
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kilobytes["MemAvailable"] / 1e6, kilobytes["MemTotal"] / 1e6
    seen = f"{free:.0f} of {total:.0f} GB free, {os.cpu_count()} processors"
    if free < MIN_MEMORY_GB:
        return Finding(
            "memory", WARN, seen, f"end other processes: {MIN_MEMORY_GB:g} GB are little"
        )
    return Finding("memory", OK, seen)


def check_model(c: Any) -> Finding:
    """Whether config.model.path is here already."""
    path = c.model.path
    if path == "tiny" or Path(path).is_dir():
        return Finding("model", OK, f"{path} is here")
    if "://" in path:
        return Finding("model", OK, f"{path} will be read from the bucket")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    if (cache / f"models--{path.replace('/', '--')}").is_dir():
        return Finding("model", OK, f"{path} is in the hub's cache")
    if _offline():
        remedy = "unset HF_HUB_OFFLINE, or set config.model.path to a local folder"
        return Finding("model", FAULT, f"{path} is not in the cache, and offline", remedy)
    return Finding("model", OK, f"{path} will be downloaded")


def check_hub() -> Finding:
    """Whether the Hugging Face hub answers; a token is only needed for gated models."""
    token = "with a token" if _has_token() else "without a token (gated models need HF_TOKEN)"
    if _offline():
        return Finding("hub", OK, "offline as HF_HUB_OFFLINE says: not asked")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S
        ):
            return Finding("hub", OK, f"{address} answers, {token}")
    except urllib.error.HTTPError:
        return Finding("hub", OK, f"{address} answers, {token}")
    except OSError as error:
        remedy = "check the network or proxy; HF_HUB_OFFLINE=1 uses what is in the cache"
        return Finding("hub", WARN, f"{address}: {error}", remedy)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false")


def _has_token() -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
