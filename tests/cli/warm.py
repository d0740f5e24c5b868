"""A Python that starts at once, for tests of a process: a server loads dheads and PyTorch, and forks for every call.

python warm.py SOCKET               # serves; prints a line when it is ready
python warm.py SOCKET ARGUMENT...   # calls, with its own streams, environment and working folder

A call takes the arguments of `python`: -m MODULE, -c SOURCE or the path of a program, and what these are given. Its
process passes on the signals that end programs, and ends as the forked process does, which is killed if it is.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Thread

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")


def serve(address: str) -> None:
    import torch

    # What takes long to load; an optimiser imports torch._dynamo.
    import torch._dynamo

    import dheads.cli
    import dheads.sampling.lists
    import dheads.training.loop  # noqa: F401

    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            call, _ = listener.accept()
            if os.fork() == 0:
                answer(call)
            call.close()


def answer(call: socket.socket) -> None:
    """Run the call in a process whose number and exit status are sent; ends this process."""
    data, handles, _, _ = socket.recv_fds(call, 1 << 18, 4)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (number := os.fork()) == 0:
        run(*json.loads(data), handles)
    for handle in handles:
        os.close(handle)
    call.send(number.to_bytes(8, "little"))
    Thread(target=end_with, args=(call, number), daemon=True).start()
    _, status = os.waitpid(number, 0)
    call.send(status.to_bytes(8, "little"))
    os._exit(0)


def end_with(call: socket.socket, number: int) -> None:
    """Wait for the end of the caller, and kill the process."""
    call.recv(1)
    with suppress(ProcessLookupError):  # it has ended, too
        os.kill(number, signal.SIGKILL)


def run(args: list[str], environment: dict[str, str], handles: list[int]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what the server's environment said
    for number, handle in enumerate(handles[:3]):
        os.dup2(handle, number)
    os.fchdir(handles[3])
    for handle in handles:
        os.close(handle)
    code: int | str | None = 0
    try:
        execute(args)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(int(code or 0))


def execute(args: list[str]) -> None:
    """As `python` does with these arguments."""
    kind, *rest = args
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = args
        sys.path[0] = str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def call(address: str, args: list[str]) -> int:
    folder = os.open(".", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps([args, dict(os.environ)]).encode()], [0, 1, 2, folder])
        number = int.from_bytes(server.recv(8), "little")
        for name in PASSED_ON:
            signal.signal(getattr(signal, name), lambda passed, frame: os.kill(number, passed))
        code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(8), "little"))
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if len(sys.argv) == 2:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
        serve(sys.argv[1])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
