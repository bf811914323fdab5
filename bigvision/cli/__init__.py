"""Command line: parse, call one job, print."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the `bigvision` command."""
    app()
