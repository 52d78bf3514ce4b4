# SPDX-License-Identifier: Apache-2.0
"""What we write is read by PyTorch's HuggingFaceStorageReader: both layouts, on 1, 2 and 4 gloo ranks, into DTensors of any placement."""
import itertools
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from interop import DTYPES, check, facts, on_ranks, read_json, run, tool


def placements_for(index, dims, axes):
    choices = list(itertools.product([Replicate()] + [Shard(dim) for dim in range(dims)], repeat=axes))
    return choices[index % len(choices)]


def unread(dtype, shape):
    """Filled with one byte, so that an element that is not read is noticed."""
    elements = torch.Size(shape).numel()
    return torch.full((max(1, elements) * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)[:elements].reshape(shape)


def read(rank, place, expected, shape_of_mesh, turn):
    warnings.filterwarnings("ignore")
    mesh = init_device_mesh("cpu", shape_of_mesh)
    state = {}
    for index, (name, wanted) in enumerate(expected.items()):
        dtype, shape = DTYPES[wanted["dtype"]], torch.Size(wanted["shape"])
        if (index + turn) % 5 == 4:
            state[name] = unread(dtype, shape)
        else:
            placements = placements_for(index + turn, len(shape), len(shape_of_mesh))
            local_shape, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
            state[name] = DTensor.from_local(unread(dtype, local_shape), mesh, placements, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(place)))
    for name, wanted in expected.items():
        tensor = state[name]
        if isinstance(tensor, DTensor):
            # Gathered as bytes: collectives do not know every dtype.
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (tensor.to_local().contiguous().reshape(-1).view(torch.uint8), box_of(tensor)))
            tensor = assembled(parts, wanted)
        check(facts(tensor) == wanted, f"{place.name}, mesh {shape_of_mesh}, turn {turn}: {name} is {facts(tensor)}, expected {wanted}")


def box_of(tensor):
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def assembled(parts, wanted):
    dtype = DTYPES[wanted["dtype"]]
    whole = torch.zeros([*wanted["shape"], dtype.itemsize], dtype=torch.uint8)
    for raw, (shape, offset) in parts:
        if raw.numel():
            box = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape))
            whole[box] = raw.reshape([*shape, dtype.itemsize])
    return whole.reshape(-1).view(dtype).reshape(wanted["shape"]) if whole.numel() else torch.empty(wanted["shape"], dtype=dtype)


def main(directory):
    turn = 0   # other placements each time
    for layout, writers, file_bytes in (("sharded", 1, 10**9), ("sharded", 3, 10**9), ("sharded", 4, 20_000), ("final", 4, 20_000)):
        place = directory / f"{layout}-{writers}-{file_bytes}"
        tool("write", layout, "torch", place, writers, file_bytes, directory / "expected.json")
        expected = read_json(directory / "expected.json")["tensors"]
        for mesh in ((1,), (2,), (4,), (2, 2)):
            on_ranks(torch.Size(mesh).numel(), read, directory, place, expected, mesh, turn)
            turn += 1


run(main)
