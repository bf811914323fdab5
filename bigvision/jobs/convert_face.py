"""Take over work done with InsightFace `arcface_torch`: its backbones, its training checkpoints, its configs.

backbone    `backbone.pth`, `model.pt`: a state dict                          -> our safetensors
checkpoint  `checkpoint_gpu_0.pt ...` of all ranks: backbone and centres      -> safetensors of both
config      `configs/NAME.py`: assignments to `config.X`, read and not run    -> our command line
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvision.models.embedding import BackboneSpec, build_backbone, save_backbone
from bigvision.models.iresnet import DEPTHS
from bigvision.models.weights import told
from bigvision.tensors import save_tensors
from tiling.publish import complete

NETWORKS = {
    "r18": "iresnet18",
    "r34": "iresnet34",
    "r50": "iresnet50",
    "r100": "iresnet100",
    "r200": "iresnet200",
    "mbf": "mobilefacenet",
    "mbf_large": "mobilefacenet_large",
}
RANK_FILE = re.compile(r"checkpoint_gpu_(\d+)\.pt")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    backbone: Path
    spec: BackboneSpec
    centres: Path | None
    classes: int


def convert_weights(source: Path, out: Path, backbone: str | None = None) -> Converted:
    """Convert a state dict, or a folder of per-rank checkpoints with their centres joined in class order.

    `out` is the backbone's file; centres go beside it as `NAME.centres.safetensors`. Without `backbone` the
    network is told by its parameter names. Raises ValueError for files that are missing, don't fit, or are no
    state dicts.
    """
    if source.is_dir():
        states = [_read(path) for path in _rank_files(source)]
        state = _entry(states[0], "state_dict_backbone", source)
        centres = torch.cat([_entry(part, "state_dict_softmax_fc", source)["weight"] for part in states])
    else:
        loaded = _read(source)
        state, centres = loaded.get("state_dict_backbone", loaded), None
    state = {name.removeprefix("module."): value for name, value in state.items()}
    name = backbone or recognise(state, source)
    spec = BackboneSpec(name, *_sizes(state, name))
    model = build_backbone(spec)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    save_backbone(model, spec, out)
    path = None if centres is None else _save_centres(centres, out)
    return Converted(out, spec, path, 0 if centres is None else len(centres))


def recognise(state: dict[str, Tensor], source: Path) -> str:
    """The name of the backbone that the state dict of `source` is of; ValueError where it is none of ours."""
    if "conv_sep.layers.0.weight" in state:
        wide = state["conv_sep.layers.0.weight"].shape[1] > 256
        return "mobilefacenet_large" if wide else "mobilefacenet"
    units = [len({key.split(".")[1] for key in state if key.startswith(f"layer{n}.")}) for n in range(1, 5)]
    depth = next((depth for depth, depths in DEPTHS.items() if list(depths) == units), None)
    if depth is None or "fc.weight" not in state:
        raise ValueError(
            f"{source} holds the weights of none of the known backbones: "
            f"{units} residual units in four layers"
        )
    return f"iresnet{depth}"


def read_config(path: Path) -> dict[str, Any]:
    """The values that a config assigns to `config.NAME`: literals, and arithmetic of numbers and of values
    assigned before. Nothing of the file is run.

    Raises ValueError where the file is no Python, or a value is more than that.
    """
    try:
        tree = ast.parse(path.read_text(), str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Python file: {error}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Attribute):
            continue
        name = statement.targets[0].attr
        try:
            found[name] = _value(statement.value, found)
        except (ValueError, ArithmeticError, TypeError) as error:
            what = f"{name} = {ast.unparse(statement.value)}"
            raise ValueError(
                f"{path} line {statement.lineno}: {what} is more than a plain value: {error}"
            ) from error
    if not found:
        raise ValueError(f"{path} assigns nothing to a config")
    return found


def config_arguments(config: dict[str, Any], ranks: int) -> tuple[list[str], list[str]]:
    """Arguments of `bigvision face train`, and the settings that have no counterpart here.

    `ranks` turns the batch of a GPU into the batch of all. Raises ValueError for a network that isn't ours.
    """
    taken: dict[str, str] = {}
    rest = dict(config)
    network = rest.pop("network", "r50")
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is none of {', '.join(NETWORKS)}")
    taken["backbone"] = NETWORKS[network]
    margin = rest.pop("margin_list", None)
    if margin is not None:
        taken["margin"] = ",".join(f"{value:g}" for value in margin)
    rate = rest.pop("sample_rate", 1)
    taken["active"] = "all" if rate >= 1 else f"sampled:{max(rate, 1e-9):g}"  # 0: only the batch's
    if rate < 1 and rest.get("optimizer", "sgd") == "sgd":
        taken["inactive"] = "dense"  # theirs moves all centres, also those that were not sampled
    # Theirs passes as many whole batches before an update; here one batch of that size is passed in parts.
    parts = int(rest.get("gradient_acc", 1))
    taken["batch-size"] = str(int(rest.pop("batch_size", 128)) * ranks * parts)
    taken["dtype"] = "float16" if rest.pop("fp16", False) else "float32"
    if rest.get("rec") not in (None, "synthetic"):
        taken["data"] = f"rec:{rest.pop('rec')}"
    for theirs, ours in SAME.items():
        if rest.get(theirs) is not None:
            taken[ours] = f"{rest.pop(theirs)}"
    if "warmup" in taken:
        taken["warmup"] = str(max(0, float(taken["warmup"])))  # theirs has none where it is negative
    if rest.get("optimizer", "sgd") == "sgd":
        rest.pop("optimizer", None)
    targets = [
        f"bin:{Path(taken.get('data', 'rec:.')[4:]) / name}.bin" for name in rest.pop("val_targets", [])
    ]
    arguments = [part for name, value in taken.items() for part in (f"--{name}", value)]
    arguments += ["--evaluate", *targets] if targets else []
    return arguments, [f"{name} = {value!r}" for name, value in rest.items()]


SAME = {
    "embedding_size": "dim",
    "lr": "lr",
    "momentum": "momentum",
    "weight_decay": "weight-decay",
    "num_epoch": "epochs",
    "warmup_epoch": "warmup",
    "num_classes": "classes",
    "gradient_acc": "accumulate",
    "num_workers": "workers",
    "seed": "seed",
    "output": "out",
}


ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """A literal, arithmetic of numbers, or `config.NAME` of a value known already."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.attr not in known:
            raise ValueError(f"{node.attr} has no value before it")
        return known[node.attr]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _value(node.left, known), _value(node.right, known)
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise ValueError("only numbers are reckoned with")
        return ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, known)
    if isinstance(node, ast.Tuple | ast.List):
        items = [_value(item, known) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    return ast.literal_eval(node)


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no file of plain tensors: {told(error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _rank_files(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
    if not found:
        raise ValueError(f"{folder} holds no checkpoint_gpu_*.pt")
    if sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{folder} holds checkpoint_gpu_*.pt of the ranks {sorted(found)}: not a complete set"
        )
    return [found[rank] for rank in range(len(found))]


def _entry(state: dict[str, Any], name: str, source: Path) -> dict[str, Tensor]:
    if not isinstance(state.get(name), dict):
        raise ValueError(f"a checkpoint in {source} has no {name}")
    entry: dict[str, Tensor] = state[name]
    return entry


def _sizes(state: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Embedding width and image size, from the shapes of the last layers."""
    try:
        if name.startswith("mobilefacenet"):
            return len(state["features.layers.2.weight"]), 16 * state[
                "features.layers.0.layers.0.weight"
            ].shape[2]
        dim, inputs = state["fc.weight"].shape
        return dim, 16 * int((inputs // 512) ** 0.5)
    except KeyError as error:
        raise ValueError(f"weights without {error} do not fit {name}") from error


def _save_centres(centres: Tensor, out: Path) -> Path:
    path = out.with_suffix(".centres.safetensors")
    with complete(path) as place:
        save_tensors({"weight": centres}, place)
    return path
