"""A model named on the command line, built and given its weights.

    torchvision:NAME            a builder of torchvision (`fcn_resnet50`, `deeplabv3_resnet50`, ...)
    package.module:factory      any importable callable that returns a module
    path/file.py:factory        a callable in a file
    path/model.pt2              a program saved by `torch.export.save`

The first three take `?key=value&...`: values are Python literals where they read as such, else strings; an
empty value is None, so that `encoder_weights=` asks for no download. Any of them may end in `#name`, which
says which of several outputs counts: `#logits`, `#0`, `#decoder.map`.
"""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from bigvision.graph.outputs import name_output
from bigvision.models.weights import load_weights


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from: `source` (module or file), `factory` in it ("" for a .pt2), its arguments.

    output: which of several outputs counts; None: as `main_output` has it.
    """

    source: str
    factory: str
    arguments: tuple[tuple[str, Any], ...] = ()
    output: str | None = None

    @property
    def is_program(self) -> bool:
        """Whether it is a saved `torch.export` program."""
        return self.source.endswith(".pt2")

    @property
    def is_file(self) -> bool:
        """Whether the source is a file rather than an importable module."""
        return self.is_program or self.source.endswith(".py")


def parse_spec(text: str) -> ModelSpec:
    """The parts of `source:factory?key=value&...`; ValueError where the text is none of the four forms."""
    text, output = _output_of(text)
    head, _, query = text.partition("?")
    if head.endswith(".pt2"):
        if query:
            raise ValueError(f"model {text!r}: a .pt2 takes no arguments")
        return ModelSpec(head, "", output=output)
    source, colon, factory = head.rpartition(":")
    if not colon or not source or not factory.isidentifier():
        raise ValueError(
            f"model {text!r} is none of torchvision:NAME, package.module:factory, path/file.py:factory, "
            "path/model.pt2"
        )
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and not all("=" in part for part in query.split("&")):
        raise ValueError(f"model {text!r}: arguments are written ?key=value&key=value")
    return ModelSpec(source, factory, tuple((key, _value(value)) for key, value in pairs), output)


def _output_of(text: str) -> tuple[str, str | None]:
    """(the model, the name behind its last #, if that is one and no part of a path or of an argument)."""
    model, mark, name = text.rpartition("#")
    named = mark and re.fullmatch(r"[\w.-]+", name) and not name.endswith(".pt2")
    return (model, name) if named else (text, None)


def load_model(text: str, weights: Path | None = None, *, trust: bool = False) -> nn.Module:
    """Build the model that `text` names, in eval mode on the CPU, with `weights` if given.

    A factory draws its initial weights from seed 0, so that one command always means one network.
    `trust` allows a .pt2, which can carry pickles. Raises ValueError (what the user named doesn't load, said
    in one sentence) before anything else happens.
    """
    spec = parse_spec(text)
    model = _load_program(spec, trust) if spec.is_program else _build(spec, text)
    if weights is not None:
        load_weights(model, weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model if spec.output is None else name_output(model, spec.output)


def _value(text: str) -> Any:
    if text == "" or text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load_program(spec: ModelSpec, trust: bool) -> nn.Module:
    if not Path(spec.source).is_file():
        raise ValueError(f"model {spec.source} does not exist")
    if not trust:
        raise ValueError(
            f"model {spec.source}: a .pt2 can carry pickled code; say --trust-model if you trust it"
        )
    try:
        module = torch.export.load(spec.source).module()
    except Exception as error:
        raise ValueError(
            f"model {spec.source} is not a program of torch.export: {first_line(error)}"
        ) from error
    for change in ("train", "eval"):  # a program has the one mode it was exported in: torch lets these raise
        setattr(module, change, lambda *mode: module)
    return module


def _build(spec: ModelSpec, text: str) -> nn.Module:
    factory = _factory(spec, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = factory(**dict(spec.arguments))
        except Exception as error:
            name = f"{spec.source}:{spec.factory}"
            raise ValueError(f"model {name} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {text!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _factory(spec: ModelSpec, text: str) -> Callable[..., Any]:
    if spec.source == "torchvision":
        from torchvision import models

        if spec.factory not in models.list_models():
            raise ValueError(f"model {text!r}: torchvision has no model {spec.factory!r}")
        builder = models.get_model_builder(spec.factory)
        # Builders of segmentation networks fetch ImageNet weights by default; nothing is fetched unasked.
        quiet = {"weights_backbone": None} if "weights_backbone" in signature(builder).parameters else {}
        return partial(builder, **quiet)
    module = _module_of_file(Path(spec.source)) if spec.is_file else _module(spec.source)
    factory = getattr(module, spec.factory, None)
    if not callable(factory):
        raise ValueError(f"model {text!r}: {spec.source} has no callable {spec.factory!r}")
    return factory


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"model module {name!r} does not import: {first_line(error)}") from error


def file_module(path: Path) -> str:
    """The name under which a model's file is imported."""
    return f"_model_{path.stem}"


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"model file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(file_module(path), path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and torch.compile look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"model file {path} raised {type(error).__name__}: {first_line(error)}") from error
    return module


def first_line(error: BaseException) -> str:
    """The first line of an error's text: enough for a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
