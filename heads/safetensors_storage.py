"""Storage of `torch.distributed.checkpoint` in safetensors files, streamed.

PyTorch's own safetensors writer serialises a rank's tensors into one bytes object first, and its reader
copies a whole shard before it assigns it: at ten million classes that is twice the memory of the centres.
Here tensors go to and from the file block by block. Files are of the same format as that writer's with
`save_distributed=True`: one a rank, the offset of each shard under the header's DCP_SHARDING_INFO. No
pickle anywhere.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

_BLOCK = 1 << 26  # bytes
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class StreamedWriter(HuggingFaceStorageWriter):
    """Writes each rank's shards to `folder/shard-RANK.safetensors`, flushed to the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `torch.distributed.checkpoint.StorageWriter.write_data`."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        number = cast(dict[str, Any], plan.storage_data)["shard_index"] - 1
        tensors = [(item, _tensor(planner, item)) for item in plan.items]
        with (self._folder / f"shard-{number:05d}.safetensors").open("wb") as file:
            file.write(_header(tensors))
            for _, tensor in tensors:
                for block in _blocks(tensor):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        done.set_result([WriteResult(i.index, t.numel() * t.element_size(), None) for i, t in tensors])
        return done


class StreamedReader(HuggingFaceStorageReader):
    """Reads what `StreamedWriter` wrote, on any number of ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(req).detach()
        source = f.get_slice(req.storage_index.fqn)
        rest = tuple(slice(o, o + n) for o, n in zip(req.storage_offsets[1:], req.lengths[1:], strict=True))
        rows = max(1, _BLOCK // max(1, target[:1].numel() * target.element_size()))
        for low in range(0, req.lengths[0], rows):
            high = min(low + rows, req.lengths[0])
            target[low:high] = source[
                (slice(req.storage_offsets[0] + low, req.storage_offsets[0] + high), *rest)
            ]
        planner.commit_tensor(req, target)


def _tensor(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    if not isinstance(data, Tensor):
        raise ValueError(f"{item.index.fqn}: only tensors are saved here, got {type(data).__name__}")
    return data.detach()


def _header(tensors: list[tuple[WriteItem, Tensor]]) -> bytes:
    entries: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    end = 0
    for item, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        name = item.index.fqn
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        chunk = item.tensor_data.chunk if item.tensor_data else None
        offsets[name] = {"saved_offsets": list(chunk.offsets) if chunk else [0] * tensor.ndim}
    entries["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    for low in range(0, len(flat), _BLOCK):
        yield flat[low : low + _BLOCK].cpu().numpy().data
