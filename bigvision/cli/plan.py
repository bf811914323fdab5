"""`bigvision plan`: what a network over a scene would take, before any work."""

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigvision.cli.process import DType, Engine, Output, band_numbers, numbers

if TYPE_CHECKING:
    from bigvision.jobs.plan import RasterPlan
    from bigvision.jobs.process.route_forecast import RouteForecast


def plan(
    scene: Annotated[str, typer.Argument(help="A raster; its header, and at most a few regions, are read.")],
    model: Annotated[str, typer.Option(help="As for bigvision process.")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors or .pth state dict.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands to read, from 1, in order: 1,2,3.")] = None,
    unscale: Annotated[
        bool, typer.Option(help="Apply the scale and offset that the file's bands carry.")
    ] = False,
    resolution: Annotated[float | None, typer.Option(help="Resample to this pixel size (CRS units).")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of each band, subtracted after --scale.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each band.")] = None,
    scale: Annotated[float, typer.Option(help="Divide the values by this first.")] = 1.0,
    output: Annotated[Output, typer.Option(help="What would be written.")] = Output.classes,
    engine: Annotated[Engine, typer.Option(help="How the network would pass over the scene.")] = Engine.auto,
    tile: Annotated[int | None, typer.Option(help="Side of a tile's core in pixels.")] = None,
    halo: Annotated[int | None, typer.Option(help="An approximate halo.")] = None,
    memory: Annotated[str, typer.Option(help="Peak memory of the job, and of a training step.")] = "4GiB",
    scratch_limit: Annotated[
        str | None,
        typer.Option(help="Disk for values between passes and for the states of a training step."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="auto: bfloat16 where the classes agree.")] = DType.auto,
    workers: Annotated[int | None, typer.Option(help="Local worker processes.")] = None,
    route: Annotated[
        Path | None, typer.Option(metavar="ROUTE.toml", help="Predict the cost of this route, too.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="REPORT", help="Write the plan for programs.")] = None,
    trust_model: Annotated[bool, typer.Option("--trust-model", help="Load a .pt2.")] = False,
) -> None:
    """Say what a network over a scene takes: compute, memory and time; whole, in tiles, streamed, trained."""
    from bigvision.jobs.plan import plan as job
    from bigvision.jobs.process.options import Options

    options = Options(
        model=model,
        weights=weights,
        bands=band_numbers(bands),
        resolution=resolution,
        unscale=unscale,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        scale=scale,
        output=output.value,
        engine=engine.value,
        tile=tile,
        halo=halo,
        memory=memory,
        scratch_limit=scratch_limit or Options.scratch_limit,
        dtype=dtype.value,
        workers=workers,
        trust_model=trust_model,
    )
    found = job(scene, options, scratch_limit=0 if scratch_limit is None else options.scratch_bytes)
    typer.echo(text(found))
    record = found.record()
    if route is not None:
        from bigvision.jobs.process.route_forecast import forecast_route

        alone = replace(options, route=route, tile=None, halo=None, workers=None, engine="auto")
        forecast = forecast_route(scene, alone)
        typer.echo(_route_lines(forecast, found))
        record["route"] = forecast.record()
    if json is not None:
        json.write_text(json_format.dumps(record, indent=1) + "\n")


def _route_lines(forecast: "RouteForecast", found: "RasterPlan") -> str:
    """What `bigvision process --route` would cost, beside what it would without."""
    compact, scattered = forecast.compact, forecast.scattered
    unpaid = "" if compact.pays else ": it would not pay"
    unrouted = f", {_seconds(found.seconds)} unrouted ({found.dtype})" if found.cut else ""
    return (
        f"{'routed':<17}{compact.share:.0%} of the full network everywhere if the full regions lie together, "
        f"{scattered.share:.0%} if scattered{unpaid} ({compact.regions} regions, "
        f"{compact.experts[1].regions} of them in full)\n"
        f"{'routed time':<17}{_seconds(forecast.seconds_compact)} of computing here if they lie together, "
        f"{_seconds(forecast.seconds_scattered)} if scattered ({forecast.dtype}){unrouted}"
    )


def text(found: "RasterPlan") -> str:
    """The plan as aligned lines."""
    from bigvision.streaming.checkpoints import rows_a_step

    channels, height, width = found.shape
    lines = [
        ("scene", f"{channels} bands, {height} x {width} ({height * width / 1e6:.1f} megapixels)"),
        ("model", f"{found.model}: {found.parameters:,} parameters, {found.classes} classes"),
        ("compute", f"{_count(found.flops)}FLOP a scene, {found.flops_per_parameter:.3g} a parameter"),
        ("bytes per FLOP", f"{found.bytes_per_flop:.3g} (weights and all activations, float32)"),
        ("run whole", f"{_size(found.dense_forward_bytes)} at once, {_size(found.activation_bytes)} in all"),
        ("trained whole", _size(found.dense_training_bytes)),
    ]
    if found.streaming is None:
        lines.append(("streamed", f"not possible: {found.not_streamed}"))
    else:
        streaming = found.streaming
        disk = f" and {_size(streaming.training_disk_bytes)} on disk" if streaming.training_disk_bytes else ""
        lines.append(("streamed", f"{_size(streaming.forward_bytes)} of buffers ({streaming.dtype})"))
        trained = f"refused: {streaming.training_refused}"
        if not streaming.training_refused:
            trained = (
                f"{_size(streaming.training_bytes)}{disk}, {rows_a_step(streaming.rows)}, "
                f"{streaming.recomputation:.2f} forward passes done again"
            )
        lines.append(("trained streamed", trained))
    return "\n".join(f"{name:<17}{value}" for name, value in lines + _job_lines(found))


def _job_lines(found: "RasterPlan") -> list[tuple[str, str]]:
    """What `bigvision process` would do."""
    cut = found.cut
    if cut is None:
        return [("process", f"refused: {found.refused}")]
    return [
        (
            "process",
            f"{cut.cut}, stride {cut.stride} px ({cut.exactness}), "
            f"{found.overhead:.2f} x the pixels, {found.dtype}",
        ),
        ("predicted peak", _size(cut.predicted_bytes)),
        (
            "computing time",
            f"{_seconds(found.seconds)} here ({_rate(found):.2f} megapixels/s); "
            "starting, reading and writing come on top",
        ),
        ("output", f"{_size(found.output_bytes)} before compression"),
    ]


def _rate(found: "RasterPlan") -> float:
    return found.shape[1] * found.shape[2] / 1e6 / max(found.seconds, 1e-9)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _size(size: float) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def _count(value: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value / 1e6:.3g} M"
