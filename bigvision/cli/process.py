"""`bigvision process`: a trained network over georeferenced scenes of any size."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """What is written for each pixel."""

    classes = "classes"
    probabilities = "probabilities"
    logits = "logits"


class Activation(StrEnum):
    """What turns the network's output into probabilities."""

    auto = "auto"
    none = "none"
    sigmoid = "sigmoid"
    softmax = "softmax"


class Format(StrEnum):
    """The container of the result."""

    cog = "cog"
    zarr = "zarr"


class Engine(StrEnum):
    """How the network passes over the scene."""

    auto = "auto"
    tiles = "tiles"
    stream = "stream"


class DType(StrEnum):
    """The arithmetic of the network."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where the network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """`1,2.5` as (1.0, 2.5); what can't be read so is refused by the option's name."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of numbers", param_hint=option
        ) from None


def band_numbers(text: str | None) -> tuple[int, ...] | None:
    """`4,1,2` as (4, 1, 2)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of band numbers", param_hint="--bands"
        ) from None


def process(
    scenes: Annotated[list[str], typer.Argument(metavar="SCENE...", help="Rasters, globs or directories.")],
    model: Annotated[
        str,
        typer.Option(
            help="torchvision:NAME, package.module:factory or file.py:factory, each with ?key=value&..., "
            "or a .pt2 of torch.export; #name behind it says which of several outputs counts."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go, by the scenes' names.")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors or .pth state dict.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands to read, from 1, in order: 1,2,3.")] = None,
    stack: Annotated[bool, typer.Option("--stack", help="The SCENEs are the bands of one scene.")] = False,
    unscale: Annotated[
        bool, typer.Option(help="Apply the scale and offset that the file's bands carry.")
    ] = False,
    resolution: Annotated[float | None, typer.Option(help="Resample to this pixel size (CRS units).")] = None,
    aoi: Annotated[Path | None, typer.Option(help="GeoJSON area of interest: what is written.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of each band, subtracted after --scale.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each band.")] = None,
    scale: Annotated[float, typer.Option(help="Divide the values by this first.")] = 1.0,
    output: Annotated[Output, typer.Option(help="What to write.")] = Output.classes,
    activation: Annotated[
        Activation,
        typer.Option(help="Makes probabilities of the output; none: it gives them. auto looks at a trial."),
    ] = Activation.auto,
    threshold: Annotated[float, typer.Option(help="Of the probability of a one-channel output.")] = 0.5,
    format: Annotated[Format, typer.Option(help="Container of the result.")] = Format.cog,
    engine: Annotated[Engine, typer.Option(help="How the network passes over the scene.")] = Engine.auto,
    tile: Annotated[
        int | None, typer.Option(help="Side of a tile's core in pixels (default: planned).")
    ] = None,
    halo: Annotated[
        int | None,
        typer.Option(help="Accept an approximate halo of N pixels where no exact one exists."),
    ] = None,
    memory: Annotated[str, typer.Option(help="Peak memory of the whole job.")] = "4GiB",
    scratch_limit: Annotated[
        str, typer.Option(help="Disk beside the result that passes over a scene may keep values in; 0: none.")
    ] = "40GiB",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network (long jobs).")] = False,
    dtype: Annotated[DType, typer.Option(help="auto: bfloat16 where the classes agree.")] = DType.auto,
    min_agreement: Annotated[float, typer.Option(help="Classes that must agree for bfloat16.")] = 0.999,
    device: Annotated[Device, typer.Option(help="Where the network runs.")] = Device.auto,
    workers: Annotated[int | None, typer.Option(help="Local worker processes.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A dask scheduler: tcp://HOST:PORT.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs of other commands.")
    ] = False,
    route: Annotated[
        Path | None, typer.Option(metavar="ROUTE.toml", help="A cheap network, and this one where it pays.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Earlier output whose unchanged tiles are copied.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="With --previous: a band's largest difference that counts as no change.")
    ] = 0.0,
    resample_previous: Annotated[
        bool, typer.Option("--resample-previous", help="With --previous: bring it onto this grid if need be.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="REPORT", help="Write a report for programs.")] = None,
    trust_model: Annotated[
        bool, typer.Option("--trust-model", help="Load a .pt2, which can carry pickled code.")
    ] = False,
) -> None:
    """Run a network over georeferenced scenes; results have the scenes' grid and are exact.

    Interrupted at any moment, the same command goes on from what was finished.
    """
    from bigvision.jobs.process import Options, process_scenes

    options = Options(
        model=model,
        weights=weights,
        trust_model=trust_model,
        bands=band_numbers(bands),
        stack=stack,
        resolution=resolution,
        unscale=unscale,
        aoi=aoi,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        scale=scale,
        output=output.value,
        activation=activation.value,
        threshold=threshold,
        format=format.value,
        engine=engine.value,
        tile=tile,
        halo=halo,
        memory=memory,
        scratch_limit=scratch_limit,
        compile=compile,
        dtype=dtype.value,
        min_agreement=min_agreement,
        device=device.value,
        workers=workers,
        scheduler=scheduler,
        overwrite=overwrite,
        route=route,
        previous=previous,
        tolerance=tolerance,
        resample_previous=resample_previous,
    )
    if not process_scenes(scenes, out, options, report=json):
        raise typer.Exit(1)
