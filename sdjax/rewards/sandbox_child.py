"""Locks its own process in, then runs the program of the current folder. Started by `sandbox`.

Stands alone (standard library only, no package import), because it runs isolated from the project.
In order: resource limits, no privileges, Landlock (reading below the installed Python and the
system's libraries only, writing below the current folder only), seccomp (no network, processes,
signals, tracing, changes of modes and owners). Where the kernel's Landlock is missing or too old to
stop truncation, seccomp refuses to open any file for writing instead. A failure of seccomp ends the
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
from typing import NamedTuple

NO_SANDBOX = 97
MAX_FILE_BYTES = 8 << 20
PR_SET_PDEATHSIG, SIGKILL = 1, 9
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CAPABILITY_VERSION_3 = 0x20080522
EPERM, ENOSYS = 1, 38
ALLOW, DENY, HIDE = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
CLONE_THREAD = 0x00010000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE without O_DIRECTORY
OPEN_TO_WRITE = 0x1 | 0x2 | 0x40 | 0x200 | 0x400000
FIRST_ARGUMENT, ARGUMENT_BYTES = 16, 8  # of a system call, in the data that a filter sees
# Landlock: rights to files by the version of the interface that has them
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
READING = EXECUTE | READ_FILE | READ_DIR
WRITING = 0b111111111110010 & ~READING  # version 3: with refer and truncate
LANDLOCK_VERSION = 3
SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/nix/store", "/proc/self", "/dev/urandom", "/dev/null")
SYSTEM_PATHS += ("/etc/ld.so.cache", "/etc/localtime")


class Architecture(NamedTuple):
    """System call numbers. `opening` has (number, which argument holds the flags)."""

    audit: int
    clone: int
    capset: int
    denied: tuple[int, ...]
    opening: tuple[tuple[int, int], ...]
    writing: tuple[int, ...]


CLONE3, OPENAT2 = 435, 437  # the C library does without when they seem to be missing
NEW = (424, 425, 426, 427, 434, 452, 463, 466, 469)  # pidfd, io_uring, chmod and attributes
X86_64 = Architecture(
    0xC000003E,
    56,
    126,
    # socket connect accept sendto recvfrom sendmsg recvmsg bind listen fork vfork execve kill
    (41, 42, 43, 44, 45, 46, 47, 49, 50, 57, 58, 59, 62)
    # ptrace tkill mount umount reboot setns unshare tgkill accept4 process_vm bpf execveat
    + (101, 200, 165, 166, 169, 308, 272, 234, 288, 310, 311, 321, 322)
    # keyctl perf_event_open userfaultfd prlimit64 setsid shmget semget msgget mq_open
    + (250, 298, 323, 302, 112, 29, 64, 68, 240)
    # truncate chmod fchmod chown fchown lchown fchownat fchmodat
    + (76, 90, 91, 92, 93, 94, 260, 268)
    # utime utimes futimesat utimensat setxattr removexattr and their kin
    + (132, 235, 261, 280, 188, 189, 190, 197, 198, 199)
    + NEW,
    ((2, 1), (257, 2)),
    # creat rename mkdir rmdir link unlink symlink mknod, then the same with ..at
    (85, 82, 83, 84, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316),
)
AARCH64 = Architecture(
    0xC00000B7,
    220,
    91,
    (198, 203, 202, 206, 207, 211, 212, 200, 201, 221, 129)
    + (117, 130, 40, 39, 142, 268, 97, 131, 242, 270, 271, 280, 281)
    + (219, 241, 282, 261, 157, 194, 190, 186, 180)
    + (45, 52, 53, 54, 55, 88, 5, 6, 7, 14, 15, 16)
    + NEW,
    ((56, 2),),
    (33, 34, 35, 36, 37, 38, 276),
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


def seccomp_program(machine: Architecture, may_write: bool) -> bytes:
    """A BPF filter: foreign architectures die, `denied` fail with EPERM, threads may be made."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        _instruction(load, 0, 0, 4),
        _instruction(equal, 1, 0, machine.audit),
        _instruction(give, 0, 0, 0x80000000),  # kill the process
        _instruction(load, 0, 0, 0),
        _instruction(at_least, 0, 1, 0x40000000),  # the x32 numbers would slip through
        _instruction(give, 0, 0, DENY),
    ]
    answers = [(CLONE3, HIDE), *((number, DENY) for number in machine.denied)]
    if not may_write:
        answers += [(OPENAT2, HIDE), *((number, DENY) for number in machine.writing)]
    for number, answer in answers:
        program += [_instruction(equal, 0, 1, number), _instruction(give, 0, 0, answer)]
    for number, argument in () if may_write else machine.opening:
        program += [
            _instruction(equal, 0, 4, number),
            _instruction(load, 0, 0, FIRST_ARGUMENT + ARGUMENT_BYTES * argument),
            _instruction(any_bit, 0, 1, OPEN_TO_WRITE),
            _instruction(give, 0, 0, DENY),
            _instruction(give, 0, 0, ALLOW),
        ]
    program += [
        _instruction(equal, 0, 3, machine.clone),
        _instruction(load, 0, 0, FIRST_ARGUMENT),  # low half of the flags
        _instruction(any_bit, 1, 0, CLONE_THREAD),
        _instruction(give, 0, 0, DENY),
        _instruction(give, 0, 0, ALLOW),
    ]
    return b"".join(program)


def lock_in(folder: str) -> None:
    """No privileges, Landlock if there, seccomp or the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    machine = ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        sys.stderr.write("seccomp needs Linux on x86_64 or aarch64\n")
        os._exit(NO_SANDBOX)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities(libc, machine)
    confined = confine_files(libc, folder)
    program = seccomp_program(machine, may_write=confined)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0) != 0:
        sys.stderr.write(f"seccomp refused: errno {ctypes.get_errno()}\n")
        os._exit(NO_SANDBOX)


def drop_capabilities(libc, machine: Architecture) -> None:
    """Root without privileges: it cannot look into the processes that started it."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    libc.syscall(machine.capset, ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def confine_files(libc, folder: str) -> bool:
    """Landlock: read below `readable_paths`, write below `folder`; whether the kernel can."""
    create, restrict = 444, 446
    if libc.syscall(create, None, ctypes.c_size_t(0), 1) < LANDLOCK_VERSION:
        return False
    attributes = struct.pack("Q", READING | WRITING)
    ruleset = libc.syscall(create, ctypes.c_char_p(attributes), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    for path in readable_paths():
        _allow(libc, ruleset, path, READING if os.path.isdir(path) else EXECUTE | READ_FILE)
    _allow(libc, ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    _allow(libc, ruleset, folder, READING | WRITING)
    confined = libc.syscall(restrict, ruleset, 0) == 0
    os.close(ruleset)
    return confined


def readable_paths() -> list[str]:
    """Where Python and the libraries that it has loaded live, and the system's."""
    paths = {*SYSTEM_PATHS, sys.prefix, sys.base_prefix, sys.exec_prefix}
    with open("/proc/self/maps") as file:
        files = [line.split(None, 5)[-1].strip() for line in file]
    paths |= {os.path.dirname(path) for path in files if path.startswith("/")}
    return sorted(path for path in paths - {"/"} if os.path.exists(path))


def _allow(libc, ruleset: int, path: str, rights: int) -> None:
    add_rule, beneath = 445, 1
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, parent)
    libc.syscall(add_rule, ruleset, beneath, ctypes.c_char_p(rule), 0)
    os.close(parent)


def run(result) -> None:
    """Run the program, and in mode "call" write what its function returns to the file `result`."""
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
        json.dump(value, result, default=list)
        result.flush()


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
    result = open("result.json", "w")  # now: later nothing may be opened where Landlock is missing
    lock_in(folder)
    try:
        run(result)
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
