"""`bigvision face`: train, evaluate, convert, export, index and identify."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Face recognition with millions of identities.")

Weights = Annotated[Path, typer.Option(help="Backbone: safetensors, or a state dict with --backbone.")]
Backbone = Annotated[str | None, typer.Option(help="Name of the backbone, where the file doesn't say it.")]
Dim = Annotated[int, typer.Option(help="Width of the embedding, with --backbone.")]
ImageSize = Annotated[int, typer.Option(help="Side of the images, with --backbone.")]
Flip = Annotated[bool, typer.Option(help="Add the mirrored image's embedding.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Workers = Annotated[int, typer.Option(help="Processes that decode images.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def train(
    context: typer.Context,
    nproc_per_node: Annotated[int, typer.Option(help="Ranks on this machine.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="How often dead ranks are started again.")] = 3,
) -> None:
    """Train under torchrun, restarted from the last checkpoint when a rank dies; see --help."""
    from bigvision.jobs.faces.launch import launch

    raise typer.Exit(launch(context.args, ranks=nproc_per_node, max_restarts=max_restarts))


@app.command("eval")
def evaluate(
    weights: Weights,
    data: Annotated[
        list[str], typer.Option(help="bin:PATH, folder:PATH, rec:PATH, tar:PATTERN; repeatable.")
    ],
    backbone: Backbone = None,
    dim: Dim = 512,
    image_size: ImageSize = 112,
    flip: Flip = True,
    dtype: DType = "float32",
    device: Device = "auto",
    workers: Workers = 0,
    roc: Annotated[Path | None, typer.Option(help="Write a picture of the ROC curves.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report.")] = None,
) -> None:
    """Verification accuracy, TAR at FAR, identification."""
    from bigvision.jobs import evaluate_faces

    options = evaluate_faces.EmbedOptions(
        weights, backbone, dim, image_size, flip, dtype, device, workers=workers
    )
    for result in evaluate_faces.evaluate(options, data, roc=roc, report=report):
        typer.echo("\n".join(evaluate_faces.lines(result)))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A state dict, a folder of checkpoint_gpu_*.pt, or a config .py.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where the backbone goes (.safetensors).")] = None,
    backbone: Annotated[str | None, typer.Option(help="Its name; told from the weights if left out.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of a config's run: its batch is one rank's.")] = 1,
) -> None:
    """Take over InsightFace weights, checkpoints and configs."""
    from bigvision.jobs import convert_face

    if source.suffix == ".py":
        arguments, rest = convert_face.config_arguments(convert_face.read_config(source), ranks)
        typer.echo(" ".join(["bigvision face train", *arguments]))
        for line in rest:
            typer.echo(f"no counterpart: {line}", err=True)
        return
    done = convert_face.convert_weights(source, out or source.with_suffix(".safetensors"), backbone)
    typer.echo(f"{done.backbone}: {done.spec.name}, dim {done.spec.dim}, {done.spec.image_size} pixels")
    if done.centres is not None:
        typer.echo(f"{done.centres}: {done.classes} class centres")


@app.command()
def export(
    weights: Weights,
    out: Annotated[Path, typer.Option(help="FILE.onnx or FILE.pt2.")],
    backbone: Backbone = None,
    dim: Dim = 512,
    image_size: ImageSize = 112,
) -> None:
    """Export a backbone to ONNX or torch.export, checked against torch."""
    from bigvision.jobs.export_face import export_face
    from bigvision.models.embedding import BackboneSpec

    done = export_face(weights, out, None if backbone is None else BackboneSpec(backbone, dim, image_size))
    typer.echo(f"{done.path}: {done.bytes:,} bytes, within {done.difference:.1e} of torch")


@app.command()
def index(
    weights: Weights,
    data: Annotated[str, typer.Option(help="folder:PATH with one folder an identity, or another source.")],
    out: Annotated[Path, typer.Option(help="Folder of the gallery.")],
    backbone: Backbone = None,
    dim: Dim = 512,
    image_size: ImageSize = 112,
    landmarks: Annotated[Path | None, typer.Option(help="CSV: image,x1,y1,...,x5,y5.")] = None,
    every_image: Annotated[bool, typer.Option(help="Keep each image, not one mean an identity.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a gallery.")] = False,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Make a gallery of known faces."""
    from bigvision.jobs.evaluate_faces import EmbedOptions
    from bigvision.jobs.identify_faces import build_gallery

    options = EmbedOptions(weights, backbone, dim, image_size, device=device, workers=workers)
    gallery, damaged = build_gallery(
        options, data, out, landmarks=landmarks, per_identity=not every_image, overwrite=overwrite
    )
    typer.echo(f"{out}: {len(gallery.embeddings)} embeddings of {len(gallery.names)} identities")
    for name in damaged:
        typer.echo(f"left out: {name}", err=True)


@app.command()
def identify(
    weights: Weights,
    gallery: Annotated[Path, typer.Option(help="A gallery made by `bigvision face index`.")],
    images: Annotated[list[Path], typer.Argument(help="Images or folders of images.")],
    backbone: Backbone = None,
    dim: Dim = 512,
    image_size: ImageSize = 112,
    k: Annotated[int, typer.Option(help="Identities shown for each face.")] = 3,
    landmarks: Annotated[Path | None, typer.Option(help="CSV: image,x1,y1,...,x5,y5.")] = None,
    detector: Annotated[
        str | None, typer.Option(help="Whole photographs: insightface, facenet-pytorch, module:callable.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Name the nearest known identities of faces."""
    from bigvision.jobs.evaluate_faces import EmbedOptions
    from bigvision.jobs.identify_faces import identify as find

    options = EmbedOptions(weights, backbone, dim, image_size, device=device)
    found, damaged = find(options, gallery, images, k=k, landmarks=landmarks, detector=detector)
    for face in found:
        names = zip(face.names, face.cosines, strict=True)
        typer.echo(f"{face.image}  " + "  ".join(f"{name} {cosine:.3f}" for name, cosine in names))
    for name in damaged:
        typer.echo(f"left out: {name}", err=True)
