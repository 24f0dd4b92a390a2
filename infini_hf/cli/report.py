"""What the commands of an evaluation say at their end."""

import typer

from ..evaluation.needles.report import write_report


def echo_report(samples, output, title, about):
    """Write tables and figure beside `output`, and print the tables; `about` is what the samples' file begins with."""
    lines, note = write_report(samples, output, title, about)
    typer.echo("\n".join(lines))
    typer.echo(note)
