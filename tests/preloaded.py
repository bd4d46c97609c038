"""Stage processes that start at once: a `python` for PATH asks a server to fork, which has imported torch already.

The server, which the fixture `preloaded` starts, has imported the libraries but nothing of this project: each fork
imports that from where it starts. A fork has the folder, the environment, the process group and the three streams of
the `python` that asked, which passes SIGTERM on to it, ends it when killed, and ends as it has ended. Two things differ
from a start of its own: the seed of hashes is that of the server, and the dvc that started it is its parent for psutil
only. A test that is about either uses the real thing.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings

LIBRARIES = (
    *("torch", "torchvision", "fastai.vision.all", "timm", "dvclive", "sklearn.metrics", "pandas", "httpx", "pydantic"),
    *(
        "altair",
        "vl_convert",
        "cleanlab",
        "onnxruntime",
        "onnxscript",
        "torch.onnx._internal.exporter._core",
        "dvc.repo",
    ),
)


def serve(listener: socket.socket, owner: int) -> None:
    """Fork, in the background, a process for each one that asks; until `owner` has ended."""
    if os.fork():
        os._exit(0)
    with warnings.catch_warnings(action="ignore"):
        for library in LIBRARIES:
            importlib.import_module(library)
    gc.freeze()  # or each fork would copy what its garbage collector looks at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    ended = os.pidfd_open(owner)
    while ended not in select.select([listener, ended], [], [])[0]:
        client, _ = listener.accept()
        with client:
            if not os.fork():
                _start(client)
                return


def _start(client: socket.socket) -> None:
    """Fork what the client asks for, and stand between the two until it has ended."""
    message, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        client.close()
        _run(streams, **json.loads(message))
        return
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # the fork, or who asked, has ended meanwhile
        while ended not in (ready := select.select([client, ended], [], [])[0]):
            if client in ready:
                wanted = client.recv(1)
                signal.pidfd_send_signal(ended, wanted[0] if wanted else signal.SIGKILL)
                if not wanted:
                    os._exit(0)
        client.send(b"%d" % os.waitpid(pid, 0)[1])
    os._exit(0)


def _run(
    streams: list[int],
    module: str,
    arguments: list[str],
    parent: int,
    group: int,
    folder: str,
    environment: dict[str, str],
) -> None:
    """Be `python -m MODULE ARGUMENTS`, a child of `parent`."""
    import psutil  # the server has it; not for the one who asks, which has to be quick

    os.setpgid(0, group)
    this, ppid = os.getpid(), psutil.Process.ppid
    psutil.Process.ppid = lambda process: parent if process.pid == this else ppid(process)  # type: ignore[method-assign]
    os.chdir(folder)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["", *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        # Python's own end would wait for threads of the server, which a fork does not have
        traceback.print_exc()
        code = 1
    # as a fork of multiprocessing ends: to clear all that was imported takes seconds
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ask(path: str, arguments: list[str]) -> None:
    """Be the process that was asked for, as far as its starter can see; the real one, unless it is a stage."""
    if len(arguments) < 2 or arguments[0] != "-m" or not arguments[1].startswith("stages."):
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - there is no shell to need
    request = {"module": arguments[1], "arguments": arguments[2:], "parent": os.getppid(), "group": os.getpgrp()}
    request |= {"folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109 - pathlib takes as long to import as the rest
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the fork, too
        signal.signal(signal.SIGTERM, lambda number, _: server.send(bytes([number])))
        code = os.waitstatus_to_exitcode(int(server.recv(16)))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    else:
        serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
