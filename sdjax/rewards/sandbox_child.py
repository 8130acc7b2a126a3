"""Locks its own process in, then runs the program of the current folder. Started by `sandbox`.

Stands alone (standard library only, no package import), because it runs isolated from the project.
In order: resource limits, no new privileges, Landlock (writing only below the current folder, where
the kernel has it), seccomp (no network, processes, signals, tracing). A failure of seccomp ends the
process with status 97 before the program is read.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback

NO_SANDBOX = 97
MAX_FILE_BYTES = 8 << 20
PR_SET_PDEATHSIG, SIGKILL = 1, 9
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
EPERM, ENOSYS = 1, 38
ALLOW, DENY, HIDE = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
CLONE_THREAD = 0x00010000
# audit architecture, clone, clone3, and what nobody needs for computing
X86_64 = (
    0xC000003E,
    56,
    435,
    # socket connect accept sendto recvfrom sendmsg recvmsg bind listen fork vfork execve kill
    (41, 42, 43, 44, 45, 46, 47, 49, 50, 57, 58, 59, 62)
    # ptrace tkill mount umount reboot setns unshare tgkill accept4 process_vm bpf execveat
    + (101, 200, 165, 166, 169, 308, 272, 234, 288, 310, 311, 321, 322)
    # keyctl perf_event_open io_uring pidfd_send_signal pidfd_open userfaultfd prlimit64 setsid
    + (250, 298, 425, 426, 427, 424, 434, 323, 302, 112),
)
AARCH64 = (
    0xC00000B7,
    220,
    435,
    (198, 203, 202, 206, 207, 211, 212, 200, 201, 221, 129)
    + (117, 130, 40, 39, 142, 268, 97, 131, 242, 270, 271, 280, 281)
    + (219, 241, 425, 426, 427, 424, 434, 282, 261, 157),
)
ARCHITECTURES = {"x86_64": X86_64, "aarch64": AARCH64}


def limit(seconds: int, memory_mb: int) -> None:
    """CPU time, memory, file size, open files, no core."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _instruction(code: int, if_true: int, if_false: int, k: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, k)


def seccomp_program(architecture: int, clone: int, clone3: int, denied: tuple) -> bytes:
    """A BPF filter: foreign architectures die, `denied` fail with EPERM, threads may be made."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        _instruction(load, 0, 0, 4),
        _instruction(equal, 1, 0, architecture),
        _instruction(give, 0, 0, 0x80000000),  # kill the process
        _instruction(load, 0, 0, 0),
        _instruction(at_least, 0, 1, 0x40000000),  # the x32 numbers would slip through
        _instruction(give, 0, 0, DENY),
        _instruction(equal, 0, 1, clone3),
        _instruction(give, 0, 0, HIDE),  # the C library falls back to clone
    ]
    for number in denied:
        program += [_instruction(equal, 0, 1, number), _instruction(give, 0, 0, DENY)]
    program += [
        _instruction(equal, 0, 3, clone),
        _instruction(load, 0, 0, 16),  # low half of the flags
        _instruction(any_bit, 1, 0, CLONE_THREAD),
        _instruction(give, 0, 0, DENY),
        _instruction(give, 0, 0, ALLOW),
    ]
    return b"".join(program)


def lock_in(folder: str) -> None:
    """No new privileges, Landlock if there, seccomp or the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    machine = ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        sys.stderr.write("seccomp needs Linux on x86_64 or aarch64\n")
        os._exit(NO_SANDBOX)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    confine_writing(libc, folder)
    program = seccomp_program(*machine)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0) != 0:
        sys.stderr.write(f"seccomp refused: errno {ctypes.get_errno()}\n")
        os._exit(NO_SANDBOX)


def confine_writing(libc, folder: str) -> None:
    """Landlock: write, create and remove only below `folder`; older kernels do without."""
    create, add_rule, restrict = 444, 445, 446
    writing = 0b1111111110010  # every right of version 1 but execute, read_file and read_dir
    attributes = struct.pack("Q", writing)
    ruleset = libc.syscall(create, ctypes.c_char_p(attributes), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return
    parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", writing, parent)
    libc.syscall(add_rule, ruleset, 1, ctypes.c_char_p(rule), 0)
    libc.syscall(restrict, ruleset, 0)
    os.close(ruleset)
    os.close(parent)


def run() -> None:
    """Run the program, and in mode "call" write what its function returns to result.json."""
    with open("task.json") as file:
        task = json.load(file)
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    if task["mode"] == "call":
        names["__name__"] = "solution"
        exec(PRELUDE, names)
    exec(compile(source, "program.py", "exec"), names)
    if task["mode"] == "call":
        owner = names.get("Solution")
        function = getattr(owner(), task["name"]) if owner else names[task["name"]]
        value = function(*task["arguments"])
        with open("result.json", "w") as file:
            json.dump(value, file, default=list)


PRELUDE = """
import collections, functools, heapq, itertools, math, string, bisect, re, random
from typing import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from bisect import *
"""


def main() -> None:
    """Confines this process, then runs the folder's program; argv: CPU seconds, megabytes."""
    seconds, memory_mb = int(sys.argv[1]), int(sys.argv[2])
    folder = os.getcwd()
    limit(seconds, memory_mb)
    sys.setrecursionlimit(20_000)
    lock_in(folder)
    try:
        run()
    except Exception as error:
        complain(error)
        sys.exit(1)


def complain(error: BaseException) -> None:
    """The traceback as the program's author should see it: without our own frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != "program.py":
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace, limit=8)


if __name__ == "__main__":
    main()
