"""`bigvision train`: a network on labelled scenes, by random crops or by whole scenes."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bigvision.cli.process import Device, DType, band_numbers, numbers


def train(
    scenes: Annotated[
        Path, typer.Option(metavar="PAIRS.csv", help="Columns scene, labels and split (train or val).")
    ],
    model: Annotated[
        str,
        typer.Option(
            help="torchvision:NAME, package.module:factory or file.py:factory, each with ?key=value; "
            "#name behind it says which of several outputs counts."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; made, or continued.")],
    weights: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands to read, from 1, in order: 1,2,3.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of each band, subtracted after --scale.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each band.")] = None,
    unscale: Annotated[
        bool, typer.Option(help="Apply the scale and offset that the file's bands carry.")
    ] = False,
    scale: Annotated[float, typer.Option(help="Divide the values by this first.")] = 1.0,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, dice, focal, or a sum: cross_entropy+0.5*dice.")
    ] = "cross_entropy",
    class_weights: Annotated[
        str | None, typer.Option(help="One number a class, or balanced (inverse frequency).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times through the scenes. Default: 10; whole: enough for 100 steps.")
    ] = None,
    crop: Annotated[int, typer.Option(help="Side of a random crop; 0 trains on whole scenes.")] = 256,
    batch: Annotated[int, typer.Option(help="Crops a step, over all ranks.")] = 8,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Default: all pixels once.")] = None,
    augment: Annotated[bool, typer.Option(help="Turn and flip crops.")] = True,
    jitter: Annotated[float, typer.Option(help="Random gain and offset of crops' bands, up to this.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="sgd, nesterov, adam, adamw or rmsprop.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="constant, linear, cosine, poly or step.")] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of linear rise.")] = 0,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    dtype: Annotated[DType, typer.Option(help="bfloat16: mixed precision.")] = DType.float32,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    memory: Annotated[str, typer.Option(help="What the process may take over a whole scene.")] = "4GiB",
    rows: Annotated[int | None, typer.Option(help="Rows a step of a whole-scene scan.")] = None,
    scratch: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for spilled states.")] = None,
    scratch_limit: Annotated[str, typer.Option(help="Bytes they may take there.")] = "40GiB",
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 100; whole scenes: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of crops, order and dropout.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run.")] = False,
    route: Annotated[
        Path | None, typer.Option(metavar="ROUTE.toml", help="Train its cheap network and gate, too.")
    ] = None,
) -> None:
    """Train a network on labelled scenes; `bigvision process` takes the result.

    Interrupted at any moment, the same command goes on from the last checkpoint. Under torchrun, scenes or
    crops are divided among the ranks and gradients averaged.
    """
    from bigvision.jobs.train_raster import TrainOptions
    from bigvision.jobs.train_raster import train as job

    options = TrainOptions(
        model=model,
        weights=weights,
        bands=band_numbers(bands),
        unscale=unscale,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        scale=scale,
        loss=loss,
        class_weights=class_weights
        if class_weights == "balanced"
        else numbers(class_weights, "--class-weights"),
        epochs=epochs,
        crop=crop,
        batch=batch,
        steps_per_epoch=steps_per_epoch,
        augment=augment,
        jitter=jitter,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        dtype=dtype.value,
        device=device.value,
        memory=memory,
        rows=rows,
        scratch=scratch,
        scratch_limit=scratch_limit,
        checkpoint_every=checkpoint_every,
        seed=seed,
        tensorboard=tensorboard,
        overwrite=overwrite,
        route=route,
    )
    try:
        result = job(scenes, out, options, typer.echo)
    except RuntimeError as error:
        sys.exit(f"bigvision: {error}")
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"weights   {result.weights}\ncurves    {result.folder / 'curves.png'}\n{result.command}")
