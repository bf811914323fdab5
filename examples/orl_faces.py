"""Learn faces from 24 people and tell 16 others apart: the ORL set, on a processor, in minutes.

    python examples/orl_faces.py ../shared/data/faces/orl [RUN]

Forty people prove that the pipeline learns; they say nothing about millions.
"""

import sys
from pathlib import Path

from bigvision.jobs.evaluate_faces import EmbedOptions, evaluate, lines
from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.options import TrainOptions
from bigvision.jobs.train_face import train

EPOCHS = 25


def main(faces: Path, out: Path, epochs: float = EPOCHS) -> float:
    """Train on s1 ... in name order up to the 24th, return the verification accuracy on the other 16."""
    out.mkdir(parents=True, exist_ok=True)
    options = TrainOptions(
        data=f"folder:{faces}@0:24",
        out=out,
        backbone="mobilefacenet",
        image_size=48,
        dim=128,
        margin="1,0.2,0",
        scale=16.0,
        batch_size=48,
        epochs=epochs,
        lr=0.05,
        warmup=1.0,
        augment="light",
        dtype="bfloat16",
        evaluate=(f"folder:{faces}@24:40",),
        evaluate_every=5.0,
        workers=0,
    )
    train(options, World())
    (found,) = evaluate(
        EmbedOptions(out / "backbone.safetensors"), [f"folder:{faces}@24:40"], roc=out / "roc.png"
    )
    print("\n".join(lines(found)))
    return found.verification.accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "orl-run"))
