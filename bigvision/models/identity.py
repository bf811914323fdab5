"""What a network is: equal for two only where they compute the same, whatever their command lines say."""

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.graph.trace import TracedGraph
from bigvision.models.code import code_identity
from bigvision.models.spec import parse_spec
from tiling.addresses import without_secrets


def network_identity(text: str, model: nn.Module, state: str, architecture: str) -> dict[str, Any]:
    """Of the network that `text` names: its values, structure, sources and packages, for JSON.

    state, architecture: as `state_hash` and `architecture_hash` say of the model when it was loaded.
    """
    arguments = [(key, without_secrets(repr(value))) for key, value in parse_spec(text).arguments]
    return {
        "model": without_secrets(text),
        "arguments": arguments,
        "torch": torch.__version__,
        "architecture": architecture,
        "state": state,
        "code": code_identity(text, model),
    }


def architecture_hash(model: nn.Module) -> str:
    """SHA-256 of how a network prints itself, but for addresses in memory."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode()).hexdigest()


def state_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types and values of all parameters and buffers, stored with weights or not."""
    digest = hashlib.sha256()
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            _add(digest, name, tensor)
    return digest.hexdigest()


def graph_hash(traced: TracedGraph, model: nn.Module) -> str:
    """SHA-256 of a network's operators and of the constants that no parameter or buffer of it holds."""
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    digest = hashlib.sha256()
    for node in traced.graph.nodes:
        digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    for node, tensor in traced.tensors.items():
        if traced.names[node] not in known:
            _add(digest, traced.names[node], tensor)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
