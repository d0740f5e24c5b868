"""`python -m dheads.demo`: loads weights once and serves the page until Ctrl-C."""

from __future__ import annotations

from typing import Annotated

import typer

from dheads.cli.licences import ask_consent
from dheads.cli.options import Device
from dheads.cli.program import running
from dheads.errors import DheadsError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def demo(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets every computer of the network use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    weights: Annotated[
        str, typer.Option(help="Weights to generate with: a name in weights.toml, or the path of a checkpoint.")
    ] = "small",
    device: Device = "auto",
) -> None:
    """Serve a page that makes videos from a photo and a recording, one at a time. Its address goes to stdout."""
    try:
        from dheads.demo.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise DheadsError("the demo needs the package gradio: pip install 'dheads[demo]'") from error
    from dheads import load
    from dheads.media.photos import silence_pillow

    ask_consent(weights, accepted=False)
    silence_pillow()
    serve(load(weights, device), host, port)


if __name__ == "__main__":
    with running():
        app(prog_name="python -m dheads.demo")
