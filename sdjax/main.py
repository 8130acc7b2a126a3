"""The one entry point: reads a config, checks it, runs its mode.

    python -m sdjax.main --config=FILE[:variant] [--config.field=value ...] [--workdir=DIR]

Deliberately short: what the modes do stands in the modules that they name.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from sdjax import config, distributed, profiling
from sdjax.objectives.guards import HealthError

MODULES = {
    "train": "sdjax.train",
    "sft": "sdjax.sft",
    "evaluate": "sdjax.evaluate",
    "generate": "sdjax.rollout.generate",
    "analyze": "sdjax.analysis.report",
    "plan": "sdjax.plan",
    "doctor": "sdjax.doctor",
    "check_rewards": "sdjax.data.check",
}

TOGETHER = ("train", "sft", "evaluate")  # modes that all hosts of a slice run as one

BASE_CONFIG = str(Path(config.__file__))
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "config file with get_config(), variants after a colon; default: the base config",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run, resumed if it exists; default runs/<config>[-<variant>]"
)


def default_workdir(config_flag: str) -> str:
    """runs/<config file>[-<variant>], from the text of the --config flag."""
    path, _, variant = config_flag.partition(":")
    name = Path(path).stem + (f"-{variant.replace(',', '-')}" if variant else "")
    return str(Path("runs") / name)


def _config_flag(argv: list[str]) -> str | None:
    """The text of --config=TEXT, None when it is not given."""
    return next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), None)


def _read_config(argv: list[str]) -> ConfigDict:
    """The config of the command line; a mistake in it ends the process with one sentence."""
    flag = _config_flag(argv)
    flag = BASE_CONFIG if flag is None else flag
    others = [arg for arg in argv[1:] if not arg.startswith("--config=")]
    argv = [argv[0], f"--config={flag}", *others]  # first: config_flags reads it before its fields
    path = flag.partition(":")[0]
    if not Path(path).is_file():
        _fail(f"--config={path}: there is no such file; the configs stand in configs/")
    try:
        sys.argv = argv  # where config_flags looks for the overridden fields
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"unknown argument {rest[1]!r}: fields are set by --config.name=value")
        return _CONFIG.value
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        _fail(_one_sentence(error))


def _one_sentence(error: BaseException) -> str:
    """The message of an error, without the traceback that config_flags puts into it."""
    text = str(error).replace("\\n", " ").replace("\\'", "'")
    if isinstance(error, AttributeError | KeyError):
        return f"there is no config field {text.replace(chr(39), '').strip(chr(34))}"
    if "Traceback" in text:
        text = text.splitlines()[-1].partition("Error: ")[2]
    return " ".join(text.split())


def _fail(message: str) -> NoReturn:
    print(f"sdjax: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    """Runs the mode of the config; what a user can mend is told in one sentence."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("sdjax").setLevel(logging.INFO)  # other libraries only warn
    c = _read_config(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workdir = _WORKDIR.value or default_workdir(_config_flag(argv) or "base")
    try:
        config.check(c)
        run = importlib.import_module(MODULES[c.mode]).run
        if c.mode in TOGETHER:
            profiling.prepare(c, workdir)
            with distributed.session(c, workdir=workdir) as session:
                run(c, workdir, session.stop)
        else:
            run(c, workdir)
    except (ValueError, FileNotFoundError, FloatingPointError, HealthError) as error:
        if os.environ.get("SDJAX_DEBUG"):
            raise
        _fail(f"{error} (SDJAX_DEBUG=1 shows the traceback)")


if __name__ == "__main__":
    main(sys.argv)
