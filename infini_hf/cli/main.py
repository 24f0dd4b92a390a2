"""The `infini-hf` command."""

import logging

import typer
from typer.core import TyperGroup

from ..version import __version__
from .ask import ask
from .demo import demo
from .errors import INTERRUPTED, run_script
from .passkey import passkey, tables
from .read import read

# Commands that keep what they have done: Ctrl-C loses nothing.
GO_ON = {"read": "; the same command begins again", "passkey": "; the same command goes on from the samples written"}


class Commands(TyperGroup):
    """The commands; Ctrl-C ends them with a sentence."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"\nstopped{GO_ON.get(ctx.invoked_subcommand, '')}", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help="Infini-attention for pretrained Llama and Gemma checkpoints: read without end, remember, ask.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(read)
app.command()(ask)
app.command()(passkey)
app.command()(tables)


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
    run_script(app)
