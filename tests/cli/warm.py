"""A dheads that starts at once, for tests of a process: a server loads PyTorch, and forks for every call.

python warm.py SOCKET               # serves; prints a line when it is ready
python warm.py SOCKET ARGUMENT...   # calls, with its own streams, environment and working folder

The process of a call passes on the signals that end programs, and ends as the forked process does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")


def serve(address: str) -> None:
    import torch

    # What takes long to load; an optimiser imports torch._dynamo.
    import torch._dynamo

    import dheads.sampling.lists
    import dheads.training.loop  # noqa: F401
    from dheads.cli import app

    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            call, _ = listener.accept()
            if os.fork() == 0:
                answer(call, app)
            call.close()


def answer(call: socket.socket, app: object) -> None:
    """Run the call in a process whose number and exit status are sent; ends this process."""
    data, handles, _, _ = socket.recv_fds(call, 1 << 18, 4)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (number := os.fork()) == 0:
        run(app, *json.loads(data), handles)
    for handle in handles:
        os.close(handle)
    call.send(number.to_bytes(8, "little"))
    _, status = os.waitpid(number, 0)
    call.send(status.to_bytes(8, "little"))
    os._exit(0)


def run(app: object, args: list[str], environment: dict[str, str], handles: list[int]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what the server's environment said
    for number, handle in enumerate(handles[:3]):
        os.dup2(handle, number)
    os.fchdir(handles[3])
    for handle in handles:
        os.close(handle)
    code: int | str | None = 1
    try:
        app(args, prog_name="dheads")  # type: ignore[operator]
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    os._exit(int(code or 0))


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
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if len(sys.argv) == 2:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
        serve(sys.argv[1])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
