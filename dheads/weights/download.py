"""Downloads: resumed where an earlier run stopped, one process at a time, checked before the file gets its name."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dheads.errors import DheadsError
from dheads.system.files import file_sha256, resumable
from dheads.system.locks import in_turn

_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT_SECONDS = 30


@contextmanager
def own_turn(folder: Path) -> Iterator[None]:
    """Run the block while no other process downloads into the folder, where unfinished files have fixed names.

    Raises DheadsError where the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another process, which is downloading to {folder}"
            stack.enter_context(in_turn(folder / ".lock", waiting))
        except OSError as error:
            advice = "set DHEADS_HOME to another folder"
            raise DheadsError(f"cannot write to {folder}: {error.strerror}; {advice}") from error
        yield


def download(url: str, path: Path, sha256: str, size: int, progress: bool = True) -> None:
    """Download a file of `size` bytes to `path`, where it appears only with the right hash.

    An unfinished download of an earlier run is continued. Raises DheadsError, which says how to go on.
    """
    by_hand = f"run again to go on, or put the file there by hand: {path}"
    with resumable(path) as unfinished:
        if size_of(unfinished) < size:
            receive(url, unfinished, size, by_hand, progress)
        if size_of(unfinished) < size:
            raise DheadsError(f"the download of {url} stopped early; {by_hand}")
        if size_of(unfinished) > size or file_sha256(unfinished) != sha256:
            unfinished.unlink()
            raise DheadsError(f"{url} is not the file that was expected (wrong size or sha256), so it was removed")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to permitted addresses only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]  # HTTPMessage


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise DheadsError(f"weights are downloaded over https only, not from {url}")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def receive(url: str, unfinished: Path, limit: int, by_hand: str, progress: bool) -> int | None:
    """Append to `unfinished` the bytes of `url` that it lacks, up to one byte beyond `limit`.

    Returns the length of the whole file, or None where the server does not send it. Raises DheadsError, which ends
    with `by_hand`.
    """
    _check_url(url)
    done = size_of(unfinished)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.build_opener(_CheckedRedirects).open(request, timeout=_TIMEOUT_SECONDS) as response:
            if response.headers.get_content_type() == "text/html":
                raise DheadsError(f"{url} gives a web page, not the file; {by_hand}")
            if response.status != http.client.PARTIAL_CONTENT:  # the server sends the whole file again
                done = 0
            length = response.headers["Content-Length"]
            total = None if length is None else done + int(length)
            bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=unfinished.stem, disable=not progress)
            with bar, unfinished.open("ab" if done else "wb") as file:
                while done <= limit and (chunk := response.read(min(_CHUNK, limit + 1 - done))):
                    file.write(chunk)
                    done += len(chunk)
                    bar.update(len(chunk))
            return total
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        if done and isinstance(error, urllib.error.HTTPError) and error.code == 416:
            return _total(error.headers["Content-Range"])  # the file is complete already
        raise DheadsError(f"cannot download {url} ({error}); {by_hand}") from error


def _total(content_range: str | None) -> int | None:
    """The file's length from the Content-Range of a 416 response, "range not satisfiable": bytes */length."""
    match = re.fullmatch(r"bytes \*/(\d+)", content_range or "")
    return int(match[1]) if match else None
