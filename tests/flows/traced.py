"""Publishes again and again, as it is told on standard input, each time in a process that is traced, and killed at a chosen call.

The kernel tells the tracer of each system call that changes something (seccomp's SECCOMP_RET_TRACE, ptrace), in this process
and in all that it starts. strace could inject a kill, too, but counts the calls of each process by itself.

| in, a line of JSON | |
|---|---|
| root, branch, decision | what to publish |
| at | the number of the call before which the kill comes; 0 for none |
| victims | "all" processes, "one" that calls, or "here": all but those that git runs for the remote |

Out comes a line of JSON: the names of the `calls` in their order, and the `code` with which the publish has ended.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
from pathlib import Path

from breedline.errors import BreedlineError
from flows.publish import commit
from flows.workspace import Workspace

CALLS = {  # of x86-64
    "write": 1,
    "pwrite64": 18,
    "writev": 20,
    "fsync": 74,
    "fdatasync": 75,
    "truncate": 76,
    "ftruncate": 77,
    "rename": 82,
    "renameat": 264,
    "renameat2": 316,
    "mkdir": 83,
    "mkdirat": 258,
    "rmdir": 84,
    "link": 86,
    "linkat": 265,
    "symlink": 88,
    "symlinkat": 266,
    "unlink": 87,
    "unlinkat": 263,
    "chmod": 90,
    "fchmod": 91,
    "fchmodat": 268,
    "connect": 42,
    "execve": 59,
    "clone": 56,
    "fork": 57,
    "vfork": 58,
    "clone3": 435,
}
CREATING = {"open": (2, 1), "openat": (257, 2)}
"""Which of their arguments says whether they may create a file."""
NAMES = {number: name for name, number in CALLS.items()} | {number: name for name, (number, _) in CREATING.items()}

LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, TRACE = 0x7FFF0000, 0x7FF00000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
TRACEME, CONT, SETOPTIONS, GETEVENTMSG = 0, 7, 0x4200, 0x4201
OPTIONS = 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000  # forks, vforks, clones, execs, seccomp; nobody outlives the tracer
EVENT_SECCOMP, WALL = 7, 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
libc.ptrace.restype = ctypes.c_long


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def _program() -> list[tuple[int, int, int, int]]:
    """Tell the tracer of the calls, with their number as the message."""
    lines = [(LOAD, 0, 0, 0)]  # the number of the call
    for number in CALLS.values():
        lines += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, TRACE | number)]
    for number, argument in CREATING.values():
        lines += [(JUMP_IF_EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), (JUMP_IF_SET, 0, 1, os.O_CREAT)]
        lines += [(RETURN, 0, 0, TRACE | number), (RETURN, 0, 0, ALLOW)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def _ptrace(request: int, process: int, value: int = 0) -> None:
    if libc.ptrace(request, process, 0, value) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _be_traced() -> None:
    """Stop, for the tracer to begin; from then on, it is told of the calls of this process and of all that it starts."""
    _ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    lines = _program()
    program = _Program(len(lines), (_Instruction * len(lines))(*lines))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) < 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def _publish(root: str, branch: str, decision: str) -> int:
    """The exit code of a publish: 0, or 1 and one line on standard error."""
    os.chdir(root)
    _be_traced()
    try:
        commit(Workspace(Path(root), branch), "ours", decision)
    except BreedlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _serves_the_remote(process: int) -> bool:
    """Whether git runs it for the remote, or it was started by one that does."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cwd").readlink().suffix == ".git"
    return False


def _trace(process: int, at: int, victims: str) -> tuple[list[str], int]:
    """The names of the calls of `process` and of what it starts, and its exit code, or minus the signal that ended it."""
    os.waitpid(process, 0)
    _ptrace(SETOPTIONS, process, OPTIONS)
    _ptrace(CONT, process)
    calls: list[str] = []
    living, code = {process}, 0
    while True:
        try:
            one, status = os.waitpid(-1, WALL)
        except ChildProcessError:
            return calls, code
        if not os.WIFSTOPPED(status):
            living.discard(one)
            code = os.waitstatus_to_exitcode(status) if one == process else code
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        if event == EVENT_SECCOMP:
            message = ctypes.c_ulong()
            libc.ptrace(GETEVENTMSG, one, 0, ctypes.addressof(message))
            calls.append(NAMES[message.value])
            if len(calls) == at:
                for each in {one} if victims == "one" else living:
                    if victims != "here" or not _serves_the_remote(each):
                        os.kill(each, signal.SIGKILL)
        new = one not in living
        living.add(one)
        try:
            _ptrace(CONT, one, 0 if event or new else number)  # the first stop of a new one is no signal of its own
        except OSError as error:
            if error.errno != errno.ESRCH:  # killed meanwhile
                raise


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            code = 70
            try:
                code = _publish(order["root"], order["branch"], order["decision"])
            finally:
                sys.stderr.flush()
                os._exit(code)
        calls, code = _trace(process, order["at"], order["victims"])
        print(json.dumps({"calls": calls, "code": code}), flush=True)


if __name__ == "__main__":
    main()
