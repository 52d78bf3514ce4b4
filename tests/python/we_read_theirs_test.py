# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's HuggingFaceStorageWriter and safetensors' save_file write is read by us, whole and in shards: random meshes,
placements and dtypes. DCP_SEED=<seed> repeats one round."""
import os
import random
import warnings

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from interop import DTYPES, check, check_equal, facts, on_ranks, read_json, run, some_tensor, tool

SIZES = (1, 2, 3, 5, 8, 13)


def subjects(seed, consolidated):
    """Names, dtypes and shapes of a state, the same on every rank."""
    choose = random.Random(seed)
    dtypes = [dtype for name, dtype in DTYPES.items() if name not in ("F4", "F8_E8M0")]
    if consolidated:   # torch 2.15.0 consolidates only floats with dimensions
        dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    tensors = {}
    for i in range(choose.randint(1, 12)):
        shape = [choose.choice(SIZES) for _ in range(choose.randint(1 if consolidated else 0, 4))]
        tensors[f"layer.{i}.{'größe' if choose.random() < 0.2 else 'weight'}"] = (choose.choice(dtypes), shape)
    return tensors


def placed(name, dtype, shape, mesh, choose):
    whole = some_tensor(name, dtype, shape)
    placements = [choose.choice([Replicate()] + [Shard(dim) for dim in range(len(shape))]) for _ in range(mesh.ndim)]
    if choose.random() < 0.15:
        return whole
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes))].contiguous() if shape else whole
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def write(rank, place, seed, shape_of_mesh, consolidated):
    warnings.filterwarnings("ignore")
    mesh = init_device_mesh("cpu", shape_of_mesh)
    choose = random.Random(seed + 1)
    tensors = subjects(seed, consolidated)
    state = {name: placed(name, dtype, shape, mesh, choose) for name, (dtype, shape) in tensors.items()}
    files = choose.randint(1, 3)
    mapping = {name: choose.randint(1, files) for name in tensors} if choose.random() < 0.5 else None
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(place), fqn_to_index_mapping=mapping, save_distributed=True, enable_consolidation=consolidated))


def check_loads(place, expected, directory, where):
    for ranks in (1, 3):
        tool("load", place, ranks, directory / "found.json")
        found = read_json(directory / "found.json")
        check(found["foreign"], f"{where}: nobody but us writes a commit record")
        check_equal(found["tensors"], expected, where)


def main(directory):
    first, rounds = random.SystemRandom().randrange(2**31), 60 if os.environ.get("DCP_LONG") else 6
    if "DCP_SEED" in os.environ:
        first, rounds = int(os.environ["DCP_SEED"]), 1
    for seed in range(first, first + rounds):
        choose = random.Random(seed)
        mesh = choose.choice([(1,), (2,), (3,), (4,), (2, 2)])
        for consolidated in (False, True):
            where, place = f"seed {seed}, mesh {mesh}, consolidated {consolidated}", directory / f"{seed}-{consolidated}"
            expected = {name: facts(some_tensor(name, dtype, shape)) for name, (dtype, shape) in subjects(seed, consolidated).items()}
            on_ranks(torch.Size(mesh).numel(), write, directory, place, seed, mesh, consolidated)
            check_loads(place, expected, directory, where)
            if consolidated:
                check_loads(place / "sharded", expected, directory, where + ", its shards")

    # One process, no shards.
    tensors = {f"t.{name}": some_tensor(name, dtype, [4, 6]) for name, dtype in DTYPES.items() if name != "F4"}
    tensors |= {"scalar": some_tensor("scalar", torch.float32, []), "empty": some_tensor("empty", torch.int64, [0, 3]), "": some_tensor("", torch.uint8, [1])}
    tensors["t.F4"] = some_tensor("F4", torch.uint8, [4, 6]).view(torch.float4_e2m1fn_x2)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "note": "größe"})
    check_loads(directory / "model.safetensors", {name: facts(tensor) for name, tensor in tensors.items()}, directory, "save_file")


run(main)
