"""The `infini-hf` command."""

import logging

import typer

from ..version import __version__
from .ask import ask
from .demo import demo
from .passkey import passkey
from .read import read

app = typer.Typer(
    help="Infini-attention for pretrained Llama and Gemma checkpoints: read without end, remember, ask.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(read)
app.command()(ask)
app.command()(passkey)


def show_version(wanted: bool):
    if wanted:
        typer.echo(f"infini_hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Show the version."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say what is patched and loaded."),
):
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("infini_hf").setLevel(logging.INFO if verbose else logging.WARNING)


def main():
    """Run the command; a refusal is one sentence, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from error
