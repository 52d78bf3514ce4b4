# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of torch.distributed.checkpoint: what PyTorch saves is read by us, what we save is read by PyTorch, and a training run goes on from
our files as from its own. DCP_SEED=<seed> repeats other placements."""
import collections
import contextlib
import ctypes
import ctypes.util
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import random
import shutil
import struct
import warnings
import zipfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _validate_global_plan
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from interop import ALL_DTYPES, check, check_equal, facts, on_ranks, read_json, run, some_tensor, tensor_bytes
import interop


def tool(*arguments, where):
    try:
        interop.tool(*arguments, program="torch_dcp_tool")
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None


@contextlib.contextmanager
def during(where):
    """Says where PyTorch itself failed."""
    try:
        yield
    except AssertionError:
        raise
    except BaseException as error:   # CheckpointException is no Exception
        raise AssertionError(f"{where}: {error!r}") from error


def quiet():
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


# ---- Python's objects as our program names them

def number_text(number):
    """Numbers that JSON has; the bits of those that it lacks."""
    return number if not isinstance(number, float) or math.isfinite(number) else f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016x}"


def typed(value):
    """JSON of any object, with "__type__" where JSON has no such type."""
    def of(kind, **members):
        return {"__type__": kind, **members}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, torch.Size):
        return of("torch.Size", items=list(value))
    if isinstance(value, int):
        return value if abs(value) <= 2**53 else of("int", decimal=str(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else of("float", repr=repr(value))
    if isinstance(value, complex):
        return of("complex", re=value.real, im=value.imag)
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        return of(type(value).__name__, items=[typed(item) for item in value])
    if isinstance(value, (bytes, bytearray)):
        return of(type(value).__name__, hex=value.hex())
    if isinstance(value, io.BytesIO):
        return of("io.BytesIO", hex=value.getvalue().hex(), pos=value.tell())
    if isinstance(value, torch.dtype):
        return of("torch.dtype", name=str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return of("torch.device", name=str(value))
    if isinstance(value, pathlib.PurePath):
        return of(f"pathlib.{type(value).__name__}", name=str(value))
    if isinstance(value, torch.Tensor):
        return of("tensor", dtype=interop.NAMES[value.dtype], shape=list(value.shape), hex=tensor_bytes(value).hex())
    if isinstance(value, dict):
        plain = all(isinstance(key, str) for key in value)
        return {key: typed(item) for key, item in value.items()} if plain else of("dict", items=[[typed(key), typed(item)] for key, item in value.items()])
    raise TypeError(type(value))


def value_facts(value):
    """The kind and the JSON text of a value of its own."""
    kind, content = "json", typed(value)
    fits = isinstance(value, (bool, float)) or (isinstance(value, int) and -2**63 <= value < 2**63)
    if fits:
        kind, content = "number", number_text(value)
    elif isinstance(value, str):
        kind = "text"
    elif isinstance(value, (bytes, io.BytesIO)):
        kind, content = "bytes", (value if isinstance(value, bytes) else value.getvalue()).hex()
    elif isinstance(value, list) and value and len({type(item) for item in value}) == 1 and isinstance(value[0], (bool, int, float)) and all(-2**63 <= item < 2**63 for item in value if isinstance(item, int)):
        kind, content = "array", [number_text(item) for item in value]
    return {"kind": kind, "json": json.dumps(content, sort_keys=True)}


def same_object(a, b):
    """Equal, of equal types all the way down; NaN is NaN, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return facts(a) == facts(b)
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_object, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_object(a[key], b[key]) for key in a)
    if isinstance(a, io.BytesIO):
        return (a.getvalue(), a.tell()) == (b.getvalue(), b.tell())
    return a == b


# ---- models

class Mlp(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2]), nn.Linear(sizes[2], 3)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def batch(step, size):
    random_numbers = torch.Generator().manual_seed(step)
    return torch.randn(8, size, generator=random_numbers), torch.randn(8, 3, generator=random_numbers)


def train(model, optimizer, steps, size):
    losses = []
    for step in steps:
        x, y = batch(step, size)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model, size, optimizer=torch.optim.Adam):
    """The state of a model after three steps, as PyTorch's helpers name it."""
    chosen = optimizer(model.parameters(), lr=0.01)
    train(model, chosen, range(3), size)
    model_state, optimizer_state = get_state_dict(model, chosen)
    return {"model": model_state, "optimizer": optimizer_state, "step": 3}


def seeded(*sizes):
    torch.manual_seed(1)
    return Mlp(*sizes)


# ---- what PyTorch writes

def placed(whole, mesh, placements):
    """The part of this rank, cut with torch.chunk: by a _StridedShard after the axes behind it."""
    local = whole
    strided = [axis for axis, placement in enumerate(placements) if isinstance(placement, _StridedShard)]
    for axis in [axis for axis in range(mesh.ndim) if axis not in strided] + strided:
        if isinstance(placements[axis], (Shard, _StridedShard)):
            dim, at = placements[axis].dim, mesh.get_local_rank(axis)
            parts = torch.chunk(local, mesh.size(axis), dim) if local.shape[dim] else ()
            local = parts[at] if at < len(parts) else local.narrow(dim, 0, 0)
    local = some_bytes(local.shape, local.dtype, tensor_bytes(local))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=torch.empty(whole.shape, device="meta").stride())


def some_bytes(shape, dtype, content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def wholes(state):
    """The leaves under their flat names, tensors whole."""
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in flatten_state_dict(state)[0].items()}


def every_dtype():
    """Names, dtypes and shapes. Pairs of F4 have no scalars with us."""
    for name, dtype in ALL_DTYPES.items():
        for shape in ((7, 6), (2, 8), (11,), (3, 5, 4), (), (1, 1), (0, 4), (5, 0)):
            if shape or name != "F4":
                yield f"{name}.{'x'.join(map(str, shape)) or 'scalar'}", dtype, shape


def tensors_of_every_dtype(ranks, directory, seed):
    state = {name: some_tensor(name, dtype, shape) for name, dtype, shape in every_dtype()}
    dcp.save(state, checkpoint_id=directory)
    return state


def dtensors(ranks, directory, seed):
    """Of every dtype on every mesh, in placements that follow from the seed: uneven, fewer rows than ranks, empty, cut twice along one dimension."""
    choose = random.Random(seed)
    meshes = [init_device_mesh("cpu", shape) for shape in ((ranks,), (2, ranks // 2) if ranks > 1 else (1, 1), (1, ranks))]
    state, whole = {}, {}
    for name, dtype, shape in every_dtype():
        whole[name] = some_tensor(name, dtype, shape)
        mesh = choose.choice(meshes)
        placements = [choose.choice([Replicate()] + [Shard(dim) for dim in range(len(shape))]) for _ in range(mesh.ndim)]
        state[name] = placed(whole[name], mesh, placements) if choose.random() < 0.9 else whole[name]
    dcp.save(state, checkpoint_id=directory)
    return whole


def strided_shards(ranks, directory, seed):
    mesh = init_device_mesh("cpu", (2, ranks // 2) if ranks > 1 else (1, 1))
    whole, state = {}, {}
    for rows in (1, 2, 3, 8, 11, 12):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            name = f"{rows}.{dtype}"
            whole[name] = some_tensor(name, dtype, (rows, 3))
            state[name] = placed(whole[name], mesh, [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)])
    dcp.save(state, checkpoint_id=directory)
    return whole


def fsdp(ranks, directory, seed):
    model = seeded(6, 13, 7)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = trained(model, 6)
    dcp.save(state, checkpoint_id=directory)
    return wholes(state)


def fsdp_of_columns(ranks, directory, seed):
    model = seeded(8, 12, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), shard_placement_fn=lambda parameter: Shard(1) if parameter.dim() == 2 else None)
    state = trained(model, 8)
    dcp.save(state, checkpoint_id=directory)
    return wholes(state)


def hsdp(ranks, directory, seed):
    model = seeded(6, 9, 5)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = trained(model, 6, torch.optim.AdamW)
    dcp.save(state, checkpoint_id=directory)
    return wholes(state)


def fsdp_of_tensor_parallel(ranks, directory, seed):
    model = seeded(6, 12, 8)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    state = trained(model, 6)
    flat = flatten_state_dict(state)[0]
    check(any(isinstance(placement, _StridedShard) for leaf in flat.values() if isinstance(leaf, DTensor) for placement in leaf.placements), "fsdp_of_tensor_parallel: no strided shards")
    dcp.save(state, checkpoint_id=directory)
    return wholes(state)


def data_parallel(ranks, directory, seed):
    model = DistributedDataParallel(seeded(6, 9, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, range(3), 6)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=directory)
    return wholes(state)


def stream(content, position):
    result = io.BytesIO(content)
    result.seek(position)
    return result


def objects(ranks, directory, seed):
    values = {
        "none": None, "true": True, "false": False, "int": -7, "beyond double": 2**53 + 1, "largest": 2**63 - 1, "least": -2**63, "natural": 2**64 - 1, "huge": -(3**200), "float": 0.1, "minus zero": -0.0, "small": 5e-324,
        "infinite": math.inf, "no number": math.nan, "text": "größe \"quoted\" 重み 🚀\n", "no text": "", "bytes": bytes(range(256)), "no bytes": b"", "stream": stream(b"\x00\xffabc", 2), "bytearray": bytearray(b"\x00\x80"),
        "tuple": (1, 2.5, None, True, "x", b"\x80", [1, [2]], {"k": (3,), "": []}), "betas": (0.9, 0.999), "empty tuple": (), "list": [1, -2, 2**53 + 1], "floats": [0.5, -math.inf, math.nan], "bools": [True, False], "mixed": [1, 2.0, "x", None],
        "large list": [1, 2**64], "empty list": [], "set": {5}, "frozenset": frozenset([7]), "complex": 1.5 - 2j, "int keys": ({1: 2.5, "a": None, None: True},), "dtype": torch.bfloat16, "device": torch.device("cpu"), "size": torch.Size([2, 3]),
        "path": pathlib.PosixPath("/a/b"), "ordered": (collections.OrderedDict(a=1),), "streams": (stream(b"", 0), stream(b"xyz", 3)), "many": list(range(5000)), "texts": [f"name {i % 700}" for i in range(3000)],
        "tensors inside": (torch.arange(6, dtype=torch.int16).reshape(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16), {"w": torch.zeros(0, 2)}),
    }
    state = {"values": values, "nested": {"deep": [{"er": some_tensor("er", torch.float32, (3, 2))}, some_tensor("one", torch.int8, (4,)), 3, [[{"x": 1}]]], "empty": {}}, 7: {8: "int keys"}, "a.b": {"c.d": 1.0}}
    dcp.save(state, checkpoint_id=directory)
    return flatten_state_dict(state)[0]


def views(ranks, directory, seed):
    """Tensors whose elements do not lie in order, or are stored as something else than they mean."""
    base = torch.arange(240, dtype=torch.float32).reshape(10, 6, 4)
    numbers = torch.complex(base[0], base[1])
    state = {"transposed": base[0].t(), "permuted": base.permute(2, 0, 1), "every second": base[::2, 1::2], "expanded": base[0, :1].expand(5, 4), "tail": base[3:], "channels last": base[:4].reshape(2, 2, 6, 4).contiguous(memory_format=torch.channels_last),
             "conjugate": numbers.conj(), "negative": numbers.conj().imag, "parameter": nn.Parameter(base[2].clone()), "tied": base, "also tied": base}
    dcp.save(state, checkpoint_id=directory)
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state.items()}


def many(ranks, directory, seed):
    """More of everything than pickle writes at once."""
    mesh = init_device_mesh("cpu", (ranks,))
    whole = {f"w.{i}": some_tensor(f"w.{i}", torch.int16, (3,)) for i in range(1100)}
    values = {f"v.{i}": i for i in range(1100)}
    dcp.save({name: placed(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()} | values, checkpoint_id=directory)
    return whole | values


def sharded_tensors(ranks, directory, seed):
    """Two shards of a tensor on every rank, which do not lie next to each other."""
    whole = some_tensor("w", torch.float32, (4 * ranks, 3))
    shards = [sharded_tensor.Shard(whole[begin:begin + 2].clone(), ShardMetadata(shard_offsets=[begin, 0], shard_sizes=[2, 3], placement=f"rank:{dist.get_rank()}/cpu")) for begin in (2 * dist.get_rank(), 2 * (dist.get_rank() + ranks))]
    dcp.save({"w": sharded_tensor.init_from_local_shards(shards, *whole.shape)}, checkpoint_id=directory)
    return {"w": whole}


def mesh_of_some_ranks(ranks, directory, seed):
    mesh = DeviceMesh("cpu", [1, 3])
    whole = {"rows": some_tensor("rows", torch.float32, (5, 3)), "columns": some_tensor("columns", torch.float32, (2, 7)), "replicas": some_tensor("replicas", torch.float32, (4,)), "everywhere": some_tensor("everywhere", torch.int32, (3,))}
    shards = {name: distribute_tensor(whole[name], mesh, [placement], src_data_rank=None) for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("replicas", Replicate()))}
    dcp.save(shards | {"everywhere": whole["everywhere"]}, checkpoint_id=directory)
    return whole


def mixed(ranks, shift=0):
    """Some of everything, for the ways to write: the state, and its leaves whole."""
    mesh = init_device_mesh("cpu", (ranks,))
    state, whole = {"model": {}, "values": {"step": 3 + shift, "betas": (0.9, 0.999), "note": "größe" * 100, "raw": b"\x00\xff", "list": [1.5, 2.5]}}, {}
    for index, (dtype, shape) in enumerate(itertools.product((torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn), ((40, 30), (3, 3), (), (0, 2)))):
        name = f"layer.{index}"
        whole[f"model.{name}"] = some_tensor(f"{name} {shift}", dtype, shape)
        placements = [Shard(index % len(shape)) if shape and index % 3 else Replicate()]
        state["model"][name] = whole[f"model.{name}"] if index % 4 == 3 else placed(whole[f"model.{name}"], mesh, placements)
    return state, whole | {f"values.{name}": value for name, value in state["values"].items()}


def two_threads(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state, storage_writer=FileSystemWriter(directory, thread_count=2))
    return whole


def file_per_item(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state, storage_writer=FileSystemWriter(directory, single_file_per_rank=False, sync_files=False))
    return whole


def no_collectives(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state, checkpoint_id=directory, use_collectives=False)
    return whole


def behind_the_program(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.async_save(state, checkpoint_id=directory).result()
    return whole


class CachingPlanner(DefaultSavePlanner):
    """With plan caches of its own: they are those of the class."""


def cached_plan(ranks, directory, seed):
    for shift in range(3):
        state, whole = mixed(ranks, shift)
        dcp.save(state, checkpoint_id=directory, planner=CachingPlanner(enable_plan_caching=True))
    return whole


def lowest_rank_writes(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state, checkpoint_id=directory, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    return whole


def not_flattened(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state["model"] | {"values": state["values"]}, checkpoint_id=directory, planner=DefaultSavePlanner(flatten_state_dict=False))
    return {name.removeprefix("model."): leaf for name, leaf in whole.items() if name.startswith("model.")} | {"values": state["values"]}


class Zstd(StreamTransformExtension):
    """PyTorch's ZStandard extension, which wants a module of Python, over the library itself: one frame per item."""
    @staticmethod
    def registry_name():
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version):
        return Zstd()

    def get_descriptor(self):
        return "stream.zstd/1"

    def transform_from(self, input):
        raise NotImplementedError

    def transform_to(self, output):
        class Writer(io.BytesIO):
            def close(self):
                content = self.getvalue()
                library = zstd()
                library.ZSTD_compressBound.restype = library.ZSTD_compress.restype = ctypes.c_size_t
                bound = library.ZSTD_compressBound(ctypes.c_size_t(len(content)))
                packed = ctypes.create_string_buffer(bound)
                size = library.ZSTD_compress(packed, ctypes.c_size_t(bound), content, ctypes.c_size_t(len(content)), 3)
                check(size <= bound, "ZSTD_compress failed")
                output.write(packed.raw[:size])
                super().close()
        return Writer()


def zstd():
    name = ctypes.util.find_library("zstd")
    return ctypes.CDLL(name) if name else None


def compressed(ranks, directory, seed):
    state, whole = mixed(ranks)
    dcp.save(state, storage_writer=FileSystemWriter(directory, _extensions=[Zstd()]))
    return whole


ON_ALL = [tensors_of_every_dtype, dtensors, strided_shards, fsdp, fsdp_of_columns, data_parallel, objects, views, sharded_tensors, two_threads, file_per_item, no_collectives, behind_the_program, cached_plan, lowest_rank_writes, not_flattened]
ON_ALL += [compressed] if zstd() else []
ON_SOME = {2: [many], 4: [hsdp, fsdp_of_tensor_parallel, mesh_of_some_ranks]}


def write_theirs(rank, directory, seed):
    quiet()
    ranks = dist.get_world_size()
    for case in ON_ALL + ON_SOME.get(ranks, []):
        where = f"{case.__name__} on {ranks} ranks"
        place = directory / where.replace(" ", "-")
        try:
            leaves = case(ranks, place, seed)
        except BaseException as error:   # CheckpointException is no Exception
            raise AssertionError(f"{where}: PyTorch does not save: {error!r}") from error
        if rank == 0:
            torch.save((where, {name: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves.items()}), place.with_suffix(".pt"))


def kept(value, top=True):
    """What is left of an object after we have loaded it into C++ and saved it."""
    if isinstance(value, io.BytesIO) and top:
        return value.getvalue()
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(kept(item, False) for item in value)
    if isinstance(value, dict):
        return {key: kept(item, False) for key, item in value.items()}
    return value


def values_of(found):
    """What the program says of values, spelled as value_facts does."""
    return {name: value | {"json": json.dumps(json.loads(value["json"]), sort_keys=True)} for name, value in found["values"].items()}


def we_read_theirs(directory, seed):
    for ranks in (1, 2, 4):
        place = directory / f"theirs-{ranks}"
        place.mkdir()
        on_ranks(ranks, write_theirs, directory, place, seed)
        for number, file in enumerate(sorted(place.glob("*.pt"))):
            where, leaves = torch.load(file, weights_only=False)
            where = f"seed {seed}, saved by PyTorch, {where}"
            checkpoint = file.with_suffix("")
            tool("load", checkpoint, seed % 1000, directory / "found.json", where=where)
            found = read_json(directory / "found.json")
            check(found["foreign"], f"{where}: nobody but us writes a commit record")
            check_equal(found["tensors"], {name: facts(leaf) for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}, where)
            check_equal(values_of(found), {name: value_facts(leaf) for name, leaf in leaves.items() if not isinstance(leaf, torch.Tensor)}, where)
            copy, paths = copied(checkpoint, 1 + number % 4, seed % 1000, directory, where)
            with during(f"{where}, copied by us"):
                back = flat(_load_state_dict_from_keys(checkpoint_id=copy), paths)
            check_leaves(back, {name: kept(leaf) for name, leaf in leaves.items()}, f"{where}, copied by us, loaded by PyTorch")


# ---- what we write

def our_values(ranks):
    """What the program puts into its checkpoints, as Python has it."""
    single = lambda number: struct.unpack("<f", struct.pack("<f", number))[0]
    return {
        "flag": True, "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -2**31, "u64": 2**64 - 1, "i64": -2**63, "beyond double": 2**53 + 1, "f32": single(0.1), "f64": 1e-300, "infinite": -math.inf,
        "no number": math.nan, "minus zero": -0.0, "text": "größe \"quoted\" 重み 🚀\n", "no text": "", "bytes": bytes(range(256)), "no bytes": b"", "flags": [True, False, True], "numbers": [1, -2, 70000], "no numbers": [], "naturals": [2**64 - 1, 0],
        "scores": [0.5, -1.25], "reals": [0.1, math.inf], "position": [100 + rank for rank in range(ranks)], "none": None, "true": True, "list": [1, 2.5, "x", None, [], {}], "dict": {"": 0, "a": {"b": [1, {"c": "größe"}]}}, "empty list": [],
        "empty dict": {}, "betas": (0.9, 0.999), "empty tuple": (), "tuples": ((1,), [(None, True)]), "torch size": torch.Size([2, 3]), "set": {5, 6}, "some bytes": b"\x00\xff\x80", "bytearray": bytearray(b"\x00\xff\x80"), "infinity": -math.inf,
        "large": 12089258196146291747061, "negative": -(2**100), "int keys": {1: 2.5, "a": None}, "dtype": torch.bfloat16, "device": torch.device("cpu"), "complex": 1.5 - 2j, "tensor": torch.tensor([[1], [-1]], dtype=torch.int16),
        "tensors": (torch.tensor(1.5), torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)), "stream": stream(b"\x00\xff\x80", 2), "frozenset": frozenset([7]),
    }


# Which torch.load with weights_only takes from nobody.
NOT_PLAIN = {"values.stream", "values.frozenset"}


class Ours:
    """One checkpoint of ours, and what is in it."""
    def __init__(self, directory, ranks, seed):
        self.place, self.where, self.ranks, self.plain = directory / f"ours-{ranks}", f"seed {seed}, saved by us on {ranks} ranks", ranks, ranks != 2
        tool("save", self.place, ranks, (seed + ranks) % 1000, "plain" if self.plain else "all", directory / "expected.json", where=self.where)
        expected = read_json(directory / "expected.json")
        raw, begin = (directory / "expected.json.raw").read_bytes(), 0
        self.tensors = {}
        for name in expected["order"]:
            dtype, shape = ALL_DTYPES[expected["tensors"][name]["dtype"]], expected["tensors"][name]["shape"]
            if dtype == torch.float4_e2m1fn_x2:
                shape[-1] //= 2
            end = begin + math.prod(shape) * dtype.itemsize
            self.tensors[name] = some_bytes(shape, dtype, raw[begin:end])
            begin = end
        check(begin == len(raw), f"{self.where}: {len(raw)} bytes of tensors, expected {begin}")
        self.values = {f"values.{name}": value for name, value in our_values(ranks).items() if not (self.plain and f"values.{name}" in NOT_PLAIN)}
        self.leaves = self.tensors | self.values
        self.paths = {name: expected["paths"].get(name, [name]) for name in self.leaves}


def nest(leaves, paths):
    state = {}
    for name, leaf in leaves.items():
        below = state
        for part in paths[name][:-1]:
            below = below.setdefault(part, {})
        below[paths[name][-1]] = leaf
    return state


def part_of(whole, sizes, offsets):
    """The bytes of a box."""
    if not whole.numel():
        return b""
    raw = whole.reshape(-1).view(torch.uint8).reshape(*whole.shape, whole.dtype.itemsize)
    return tensor_bytes(raw[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes))])


def unread(dtype, shape):
    """Filled with one byte, so that an element that is not read is noticed."""
    elements = math.prod(shape)
    return torch.full((max(1, elements) * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)[:elements].reshape(tuple(shape))


def check_leaves(found, leaves, where):
    """Whole tensors and values under their flat names."""
    check(set(found) == set(leaves), f"{where}: other names: {sorted(set(found) ^ set(leaves))[:5]}")
    for name, wanted in leaves.items():
        check(same_object(found[name], wanted), f"{where}: {name} is {found[name]!r:.300}, expected {wanted!r:.300}")


def check_metadata(ours):
    with during(f"{ours.where}, its metadata"):
        metadata = FileSystemReader(ours.place).read_metadata()
        faults = _validate_global_plan([None] * max(2, ours.ranks), metadata)   # of one plan it does not look at the volumes
    check(faults == [], f"{ours.where}: PyTorch finds fault with the plan: {faults}")
    paths = {name: list(path) for name, path in metadata.planner_data.items()}
    check_equal(paths, ours.paths, f"{ours.where}, the names in names")
    check(set(metadata.state_dict_metadata) == set(ours.leaves), f"{ours.where}: other names: {sorted(set(metadata.state_dict_metadata) ^ set(ours.leaves))[:5]}")
    stored = collections.defaultdict(dict)
    for index in metadata.storage_data:
        stored[index.fqn][index.index] = index.offset
    for name, entry in metadata.state_dict_metadata.items():
        if name in ours.values:
            check(isinstance(entry, BytesStorageMetadata) and stored[name] == {None: None}, f"{ours.where}: {name} is {entry}, stored as {stored[name]}")
            continue
        whole = ours.tensors[name]
        check(isinstance(entry, TensorStorageMetadata) and (entry.properties.dtype, entry.size) == (whole.dtype, whole.shape), f"{ours.where}: {name} is {entry}")
        check(sum(chunk.sizes.numel() for chunk in entry.chunks) == whole.numel(), f"{ours.where}: {name} has the chunks {entry.chunks}")
        check(stored[name] == {number: chunk.offsets for number, chunk in enumerate(entry.chunks)}, f"{ours.where}: {name} has the chunks {entry.chunks}, stored as {stored[name]}")
    return metadata


def loads_with_weights_only(value):
    """Out of an archive that torch.save wrote."""
    archive = io.BytesIO()
    torch.save(value, archive)
    archive.seek(0)
    try:
        torch.load(archive, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def check_archives(ours, metadata):
    """Each is one that unzip and torch.load take by themselves."""
    files = {path.name: path.read_bytes() for path in ours.place.glob("*.distcp")}
    used = {name: {} for name in files}   # by offset: tied tensors are one archive
    for index, place in metadata.storage_data.items():
        where = f"{ours.where}: the archive of {index.fqn} at {place}"
        blob = files[place.relative_path][place.offset:place.offset + place.length]
        used[place.relative_path][place.offset] = place.length
        with during(where):
            with zipfile.ZipFile(io.BytesIO(blob)) as archive:
                check(archive.testzip() is None, f"{where}: a CRC-32 is wrong")
            found = torch.load(io.BytesIO(blob), weights_only=index.fqn not in NOT_PLAIN)
        if index.fqn in ours.values:
            if index.fqn in NOT_PLAIN:
                check(not loads_with_weights_only(ours.values[index.fqn]), f"{where}: its kind loads with weights_only, now")
            check(same_object(found, ours.values[index.fqn]), f"{where} is {found!r}, expected {ours.values[index.fqn]!r}")
            continue
        whole = ours.tensors[index.fqn]
        chunk = metadata.state_dict_metadata[index.fqn].chunks[index.index]
        check((found.dtype, found.shape) == (whole.dtype, chunk.sizes), f"{where} has {found.dtype} of {found.shape}")
        check(tensor_bytes(found) == part_of(whole, chunk.sizes, chunk.offsets), f"{where} has other bytes")
    check({name: len(content) for name, content in files.items()} == {name: sum(lengths.values()) for name, lengths in used.items()}, f"{ours.where}: bytes of no archive")


def check_own_reading(ours, directory):
    """We read it, and what is left of it without our own files beside PyTorch's."""
    bare = ours.place.with_name(f"{ours.place.name}-bare")
    shutil.copytree(ours.place, bare, ignore=shutil.ignore_patterns("dcp.*"))
    for place, foreign in ((ours.place, False), (bare, True)):
        where = f"{ours.where}, {'without' if foreign else 'with'} the commit record"
        tool("load", place, 3, directory / "found.json", where=where)
        found = read_json(directory / "found.json")
        check(found["foreign"] == foreign, f"{where}: foreign is {found['foreign']}")
        check_equal(found["tensors"], {name: facts(tensor) for name, tensor in ours.tensors.items()}, where)
        if foreign:
            check_equal(values_of(found), {name: value_facts(value) for name, value in ours.values.items()}, where)


def read_ours(rank, all_of_ours, seed):
    """Into shards, plain tensors and values."""
    quiet()
    ranks = dist.get_world_size()
    choose = random.Random(seed + ranks)
    meshes = [init_device_mesh("cpu", shape) for shape in {(ranks,), (2, ranks // 2), (ranks // 2, 2), (1, ranks)}]
    for ours in all_of_ours:
        where = f"{ours.where}, loaded by PyTorch on {ranks} ranks"
        leaves = dict.fromkeys(ours.values)
        for name, whole in ours.tensors.items():
            mesh = choose.choice(meshes)
            placements = [choose.choice([Replicate()] + [Shard(dim) for dim in range(whole.dim())]) for _ in range(mesh.ndim)]
            if choose.random() < 0.2:
                leaves[name] = unread(whole.dtype, whole.shape)
            else:
                sizes, _ = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
                leaves[name] = DTensor.from_local(unread(whole.dtype, sizes), mesh, placements, run_check=False, shape=whole.shape, stride=torch.empty(whole.shape, device="meta").stride())
        state = nest(leaves, ours.paths)
        with during(where):
            dcp.load(state, storage_reader=FileSystemReader(ours.place))
        for name, found in flat(state, ours.paths).items():
            if name in ours.values:
                check(same_object(found, ours.values[name]), f"{where}: {name} is {found!r:.300}, expected {ours.values[name]!r:.300}")
            elif isinstance(found, DTensor):
                box = compute_local_shape_and_global_offset(found.shape, found.device_mesh, found.placements)
                check(tensor_bytes(found.to_local()) == part_of(ours.tensors[name], *box), f"{where}: {name} as {found.placements} on {found.device_mesh.shape} differs at rank {rank}")
            else:
                check(facts(found) == facts(ours.tensors[name]), f"{where}: {name} as a plain tensor differs")


def theirs_read_ours(directory, seed):
    all_of_ours = [Ours(directory, ranks, seed) for ranks in (1, 2, 3, 4)]
    for ours in all_of_ours:
        check_archives(ours, check_metadata(ours))
        check_own_reading(ours, directory)
        with during(ours.where):
            state = _load_state_dict_from_keys(checkpoint_id=ours.place)
            some = _load_state_dict_from_keys({"optimizer.state"}, checkpoint_id=ours.place)
            dcp_to_torch_save(ours.place, directory / "whole.pt")
            with torch.serialization.safe_globals([bytes]):   # torch.save writes b"" as a call of it
                whole = torch.load(directory / "whole.pt", weights_only=ours.plain)
        check_leaves(flat(state, ours.paths), ours.leaves, f"{ours.where}, without a state to fill")
        names = dict.fromkeys(ours.paths)
        check(levels(state, ours.paths) == nest(names, ours.paths), f"{ours.where}: the state that PyTorch makes of it is nested otherwise")
        check(list(some) == ["optimizer"] and list(some["optimizer"]) == ["state"] and len(some["optimizer"]["state"]) > 10, f"{ours.where}: optimizer.state selects {list(some)}")
        check_leaves(flat(whole, ours.paths), ours.leaves, f"{ours.where}, after dcp_to_torch_save")
    for ranks in (2, 4):
        on_ranks(ranks, read_ours, directory, all_of_ours, seed)


def flat(state, paths):
    found = {}
    for name, path in paths.items():
        below = state
        for part in path:
            below = below[part]
        found[name] = below
    return found


def levels(state, paths):
    """The dicts within dicts, with None for every leaf."""
    leaves = {tuple(path) for path in paths.values()}
    def walk(below, path):
        return {key: None if (*path, key) in leaves else walk(item, (*path, key)) for key, item in below.items()}
    return walk(state, ())


def each_over_the_other(directory, seed):
    """A checkpoint of one in the place of one of the other is never a mixture."""
    place, state = directory / "ours-over", {"w": torch.arange(6.0), "step": 4}
    dcp.save({"w": torch.zeros(6), "step": 3}, checkpoint_id=directory / "first")
    tool("copy", directory / "first", directory / "paths.json", 1, 0, place, where="each_over_the_other")
    dcp.save(state, checkpoint_id=place)
    try:
        tool("load", place, 0, directory / "found.json", where="")
    except AssertionError as error:
        check("the commit record says" in str(error), f"PyTorch's checkpoint over ours: {error}")
        return
    check_equal(read_json(directory / "found.json")["tensors"], {"w": facts(state["w"])}, "PyTorch's checkpoint over ours")
    check_equal(read_json(directory / "found.json")["values"], {"step": value_facts(4)}, "PyTorch's checkpoint over ours")


# ---- a run that goes on

def copied(place, ranks, turn, directory, where):
    """The checkpoint after we have loaded and saved it, and the names that each of its names consists of."""
    paths = {}
    if (place / ".metadata").exists():
        paths = {name: list(map(str, path)) for name, path in (FileSystemReader(place).read_metadata().planner_data or {}).items()}
    (directory / "paths.json").write_text(json.dumps(paths))
    copy = place.with_name(f"{place.name}-copied-{ranks}")
    tool("copy", place, directory / "paths.json", ranks, turn, copy, where=where)
    return copy, {name: list(path) for name, path in FileSystemReader(copy).read_metadata().planner_data.items()}


def run_of(optimizer):
    model = seeded(6, 13, 7)
    return model, optimizer(model.parameters(), lr=0.01)


def goes_on(directory):
    """Three steps, a checkpoint, three more: the last three must not know whose files they began with."""
    for number, (name, optimizer, ranks) in enumerate([("Adam", torch.optim.Adam, 1), ("AdamW", torch.optim.AdamW, 3), ("SGD", lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9), 4)]):
        model, chosen = run_of(optimizer)
        train(model, chosen, range(3), 6)
        place = directory / f"run-{number}"
        state = {"model": model.state_dict(), "optimizer": chosen.state_dict(), "step": 3, "rng": torch.get_rng_state(), "history": [0.5, 0.25]}
        dcp.save(state, checkpoint_id=place)
        wanted = train(model, chosen, range(3, 6), 6)
        copy, _ = copied(place, ranks, number, directory, name)
        torch.manual_seed(99)
        model, chosen = run_of(optimizer)
        train(model, chosen, range(7, 8), 6)
        loaded = {"model": model.state_dict(), "optimizer": chosen.state_dict(), "step": 0, "rng": torch.zeros_like(state["rng"]), "history": None}
        with during(f"{name}, saved by us on {ranks} ranks"):
            dcp.load(loaded, checkpoint_id=copy)
        model.load_state_dict(loaded["model"])
        chosen.load_state_dict(loaded["optimizer"])
        groups = chosen.state_dict()["param_groups"]
        check(same_object(groups, state["optimizer"]["param_groups"]), f"{name}, saved by us on {ranks} ranks: param_groups are {groups}, expected {state['optimizer']['param_groups']}")
        check(loaded["step"] == 3 and torch.equal(loaded["rng"], state["rng"]) and loaded["history"] == [0.5, 0.25], f"{name}: {loaded['step']}, {loaded['history']}")
        found = train(model, chosen, range(loaded["step"], 6), 6)
        check(found == wanted, f"{name}, saved by us on {ranks} ranks: the losses are {found}, expected {wanted}")


def sharded_run(mesh):
    model = seeded(6, 13, 7)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def first_half(rank, place):
    quiet()
    model, optimizer = sharded_run(init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, optimizer, range(3), 6)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=place)
    losses = train(model, optimizer, range(3, 6), 6)
    if rank == 0:
        place.with_suffix(".json").write_text(json.dumps(losses))


def second_half(rank, place, wanted):
    quiet()
    model, optimizer = sharded_run(init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, optimizer, range(7, 8), 6)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    with during("FSDP on 2 ranks, saved by us"):
        dcp.load(state, checkpoint_id=place)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    check(same_object(optimizer.param_groups[0]["betas"], (0.9, 0.999)), f"betas are {optimizer.param_groups[0]['betas']}")
    found = train(model, optimizer, range(3, 6), 6)
    check(found == wanted, f"FSDP on 2 ranks, saved by us: the losses are {found}, expected {wanted}")


def goes_on_in_shards(directory):
    place = directory / "sharded-run"
    on_ranks(2, first_half, directory, place)
    copy, _ = copied(place, 3, 0, directory, "FSDP on 2 ranks")
    on_ranks(2, second_half, directory, copy, read_json(place.with_suffix(".json")))


def main(directory):
    quiet()
    torch.set_num_threads(1)
    goes_on(directory)
    goes_on_in_shards(directory)
    first, rounds = random.SystemRandom().randrange(2**31), 10 if os.environ.get("DCP_LONG") else 1
    if "DCP_SEED" in os.environ:
        first, rounds = int(os.environ["DCP_SEED"]), 1
    for seed in range(first, first + rounds):
        place = directory / f"round-{seed}"
        place.mkdir()
        we_read_theirs(place, seed)
        theirs_read_ours(place, seed)
        each_over_the_other(place, seed)


run(main)
