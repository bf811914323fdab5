"""The `bigvision` command: one file a command, each importing its job when called: `--help` is quick."""

import sys

import typer

from bigvision.cli import demo, export, face, ingest, plan, process, train
from bigvision.cli.signals import told_to_stop

app = typer.Typer(
    name="bigvision",
    help="CNNs that outgrow a device: huge rasters, and classification layers of millions of classes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("process")(process.process)
app.command("ingest")(ingest.ingest)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("demo")(demo.demo)
app.add_typer(face.app, name="face")


def main() -> None:
    """Run the command line; an error of the input or of the machine is one sentence and exit status 1."""
    try:
        with told_to_stop():
            app()
    except (ValueError, OSError) as error:
        from tiling.addresses import without_secrets

        sys.exit(f"bigvision: {without_secrets(str(error))}")
