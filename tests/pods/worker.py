"""One process of a small run, started by the tests: worker.py INDEX COUNT PORT WHAT [FOLDER]."""

import os
import pathlib
import signal
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from sdjax import distributed, parallel
from sdjax.checkpoint import Checkpoints
from sdjax.types import TrainState

JOB = {"index": int(sys.argv[1]), "count": int(sys.argv[2]), "what": sys.argv[4]}
TICKS = 3000


def config() -> ConfigDict:
    """A config with the section that matters, and one field for processes to disagree on."""
    seed = 1 if JOB["what"] == "differ" and JOB["index"] == 1 else 0
    return ConfigDict(
        {
            "seed": seed,
            "distributed": {
                "method": "explicit",
                "coordinator": f"localhost:{sys.argv[3]}",
                "num_processes": JOB["count"],
                "process_id": JOB["index"],
                "startup_timeout_s": 4.0 if JOB["what"] == "absent" else 60.0,
                "heartbeat_timeout_s": 30.0,
            },
        }
    )


def exchange() -> None:
    """Every host collective once, with values that differ by process and in size."""
    index, count = JOB["index"], JOB["count"]
    assert jax.process_count() == count
    assert distributed.allgather_host([index, 1]).tolist() == [[i, 1] for i in range(count)]
    objects = distributed.allgather_objects("x" * index)
    assert objects == ["x" * i for i in range(count)], objects
    assert distributed.broadcast({"from": index}) == {"from": 0}
    assert distributed.agree_max([index, -index]) == [count - 1, 0]
    mine = {"count/a": 1.0, "top/b": float(index), "c": float(index), "d": 7.0}
    mine |= {"only": 5.0} if index else {}
    merged = distributed.merge_metrics(mine, summed=("count/",), largest=("top/",))
    mean = (count - 1) / 2
    expected = {"count/a": count, "top/b": count - 1, "c": mean, "d": 7.0, "only": 5.0}
    assert merged == expected, merged
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    batch = distributed.global_batch({"a": jax.numpy.full((2, 3), float(index))}, rows)
    assert batch["a"].shape == (2 * count, 3)
    total = float(jax.jit(jax.numpy.sum)(batch["a"]))
    assert total == 6 * sum(range(count)), total


def make_state(value: int) -> TrainState:
    """A state of which each process holds a half."""
    mesh = parallel.make_mesh(fsdp=JOB["count"])
    w = np.random.default_rng(value).standard_normal((64, 512), np.float32)
    place, whole = parallel.sharding(mesh, "DF"), parallel.replicated(mesh)
    split = lambda x: jax.make_array_from_callback(x.shape, place, lambda part: x[part])
    count = lambda: jax.make_array_from_callback((), whole, lambda _: np.int32(value))
    params = {"w": split(w)}
    return TrainState(count(), params, None, {"w": split(w + 1)}, ({"mu": split(w * 2)},), count())


def pass_over_a_damaged_checkpoint(folder: pathlib.Path) -> int:
    """Removes what process 1 wrote of the newest checkpoint, and returns the step restored."""
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    distributed.broadcast(None)
    if JOB["index"] == 0:
        for path in (folder / "checkpoints" / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
            path.unlink()
    distributed.broadcast(None)
    return int(Checkpoints(folder, keep=2).restore(make_state(0)).step)


def run_until_stopped(stop: distributed.StopSignal) -> int:
    """Collective steps until all agree to stop; process 1 gets the signal at step 2."""
    for step in range(TICKS):
        if step == 2 and JOB["index"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed():
            return step
    raise AssertionError("nobody stopped")


def main() -> None:
    """Does what the test asked for and prints one line."""
    what, index = JOB["what"], JOB["index"]
    with distributed.session(config(), workdir="here") as session:
        exchange()
        if what == "stop":
            print("stopped at", run_until_stopped(session.stop), flush=True)
        if what == "damaged":
            print("restored", pass_over_a_damaged_checkpoint(pathlib.Path(sys.argv[5])))
        if what == f"kill{index}":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail" and index == 1:
            raise RuntimeError("the disk is on fire")
        if what == "shapes":
            distributed.check_same("the packed shape", f"[4, {1024 * (1 + index)}]")
        if what.startswith("kill") or what == "fail":
            for _ in range(TICKS):
                distributed.allgather_host(index)
    print("done", flush=True)


if __name__ == "__main__":
    try:
        main()
    except distributed.StartupError as error:
        print("refused:", error, flush=True)
        sys.exit(2)
