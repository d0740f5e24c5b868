"""A dheads for shells that starts at once: a server loads PyTorch, and forks for every call.

python warm.py SOCKET               # serves; prints a line when it is ready
python warm.py SOCKET ARGUMENT...   # calls, with its own streams and working folder
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def serve(address: str) -> None:
    import torch

    import dheads.sampling.lists  # noqa: F401  (what takes long to load)
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
    """Run the call in this process, and end it."""
    data, handles, _, _ = socket.recv_fds(call, 1 << 16, 4)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, handle in enumerate(handles[:3]):
        os.dup2(handle, number)
    os.fchdir(handles[3])
    try:
        app(json.loads(data), prog_name="dheads")  # type: ignore[operator]
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    call.send(bytes([int(code)]))
    os._exit(0)


def call(address: str, args: list[str]) -> int:
    folder = os.open(".", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(args).encode()], [0, 1, 2, folder])
        return (server.recv(1) or b"\x01")[0]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
        serve(sys.argv[1])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
