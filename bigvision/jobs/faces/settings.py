"""What a run is a function of, and what may change when it goes on from a checkpoint.

A label is the number of an identity: where one folder was renamed, all those behind it have other numbers,
and a head that was trained on the old ones is wrong for every class. A checkpoint therefore holds digests of
the identities and of the images' labels.
"""

import hashlib
from typing import Any

import numpy as np

from bigvision.jobs.faces.options import TrainOptions
from datasets.face_images import FaceSource

FIXED = (
    *("backbone", "dim", "image_size", "margin", "scale", "storage", "head_optimizer", "inactive"),
    *("batch_size", "seed"),
)
CHANGEABLE = (
    *("active", "epochs", "lr", "momentum", "weight_decay", "warmup", "schedule", "power", "clip"),
    *("dtype", "batch_norm", "accumulate", "augment"),
)
IMAGES = "images"  # changeable, too: more of the same identities


def run_settings(options: TrainOptions, classes: int, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint is compared with; `data` is of `data_state`."""
    return {name: getattr(options, name) for name in (*FIXED, *CHANGEABLE)} | {"classes": classes} | data


def data_state(source: FaceSource) -> dict[str, Any]:
    """The identities of a set and its images, as digests and counts."""
    labels = np.ascontiguousarray(source.labels())
    names = getattr(source, "names", None)
    digest = hashlib.sha256()
    if names is None:
        digest.update(np.unique(labels).tobytes())
    else:
        for name in names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
    return {"identities": digest.hexdigest(), IMAGES: [len(source), hashlib.sha256(labels.data).hexdigest()]}


def differences(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
    """What is said of settings that changed as `allowed` names them.

    Raises ValueError naming all that may not change, or may but isn't allowed to, and what would allow it.
    """
    changed = [name for name in now if saved.get(name) != now[name]]
    refused = [name for name in changed if name not in allowed or name not in (*CHANGEABLE, IMAGES)]
    if refused:
        may = [name for name in refused if name in (*CHANGEABLE, IMAGES)]
        help = f" (--changed {' '.join(may)} goes on with what is new)" if may == refused else ""
        texts = "; ".join(_difference(name, saved.get(name), now[name]) for name in refused)
        raise ValueError(f"the checkpoint is of another run: {texts}{help}")
    return [_difference(name, saved.get(name), now[name]) for name in changed]


def _difference(name: str, saved: Any, now: Any) -> str:
    if name == "identities":
        return "the identities of the data (their names, numbers or order) are others"
    if name == IMAGES and saved is not None:
        same = " with other labels" if saved[0] == now[0] else ""
        return f"images were {saved[0]:,} and are {now[0]:,}{same}"
    return f"{name} was {saved!r} and is {now!r}"
