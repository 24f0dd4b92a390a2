"""What the commands of an evaluation say at their end."""

import typer

from ..evaluation.needles.report import write_report


def echo_report(samples, output, title):
    """Write tables and figure beside `output`, and print the tables."""
    lines, note = write_report(samples, output, title)
    typer.echo("\n".join(lines))
    typer.echo(note)
