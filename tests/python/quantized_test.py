# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: those that we write are read by PyTorch's QuantizedHuggingFaceStorageReader, those that safetensors' save_file writes by
us, bit for bit. DCP_SEED=<seed> repeats one round."""
import json
import os
import random
import types
import warnings

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from interop import check, check_same, load_quantized, on_ranks, quantize, run

FLOATS = (torch.float32, torch.bfloat16)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def weights(*shape, dtype=torch.float32):
    """Rows of different magnitudes, some of them zero."""
    tensor = torch.randn(*shape) * torch.exp(torch.randn(*shape[:-1], 1) * 2)
    tensor[..., : shape[-2] // 5, :] = 0
    return tensor.to(dtype)


# ---- theirs reads ours

def read(rank, place, state, wanted, target, dim):
    """Into plain tensors and into shards, by PyTorch's reader."""
    warnings.filterwarnings("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = {name: torch.full(shape, float("nan"), dtype=target) for name, shape in state.items()}
    dcp.load(plain, storage_reader=QuantizedHuggingFaceStorageReader(str(place), target_dtype=target))
    check_same(plain, wanted, "QuantizedHuggingFaceStorageReader")
    shards = {}
    for name, shape in state.items():
        local, _ = compute_local_shape_and_global_offset(shape, mesh, [Shard(dim)])
        shards[name] = DTensor.from_local(torch.full(local, float("nan"), dtype=target), mesh, [Shard(dim)], run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())
    dcp.load(shards, storage_reader=QuantizedHuggingFaceStorageReader(str(place), target_dtype=target))
    for name, tensor in shards.items():
        size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, [Shard(dim)])
        part = wanted[name][tuple(slice(begin, begin + length) for begin, length in zip(offset, size))]
        check_same({name: tensor.to_local()}, {name: part}, f"shard of rank {rank}")


def torch_reads_fp8_blocks(directory):
    tensors = {"q.layers.0.up.weight": weights(300, 257), "q.layers.0.down.weight": weights(256, 384, dtype=torch.bfloat16), "q.layers.1.up.weight": weights(100, 130, dtype=torch.float16), "norm.bias": torch.randn(70)}
    quantize("fp8_block", tensors, directory / "fp8")
    for target in FLOATS:
        ours, found = load_quantized(directory / "fp8", target)
        check({name for name, scheme in found["schemes"].items() if scheme == "fp8_block 128x128"} == {name for name in tensors if name.startswith("q.")}, f"schemes {found['schemes']}")
        for name, tensor in tensors.items():
            check((ours[name].float() - tensor.float()).abs().max() <= tensor.abs().max() / 28, f"{name} is far from what was saved")
        quantized = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("q.")}
        for dim in (0, 1):
            on_ranks(2, read, directory, directory / "fp8", quantized, {name: ours[name] for name in quantized}, target, dim)


def torch_reads_mxfp4(directory):
    """Through its function for whole tensors: its load fills only a part of each row."""
    tensors = {"q.experts.gate_up_proj": weights(4, 24, 96), "q.experts.down_proj": weights(3, 16, 64, dtype=torch.bfloat16), "router.bias": torch.randn(8)}
    quantize("mxfp4", tensors, directory / "mxfp4")
    stored = {}
    for path in (directory / "mxfp4").glob("*.safetensors"):
        stored |= safetensors.torch.load_file(path)
    for target in FLOATS:
        ours, _ = load_quantized(directory / "mxfp4", target)
        reader = QuantizedHuggingFaceStorageReader(str(directory / "mxfp4"), target_dtype=target)
        shapes = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if not name.startswith("q."):
                continue
            check(shapes[f"{name}_blocks"].size == tensor.shape, f"{name}: PyTorch's reader gives it the shape {shapes[f'{name}_blocks'].size}")
            request = types.SimpleNamespace(storage_offsets=(0, 0, 0), lengths=tuple(tensor.shape))
            theirs = reader._dequantize_tensor_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"], request, 0, 0)
            check_same({name: ours[name]}, {name: theirs}, "_dequantize_tensor_mxfp4")


# ---- ours reads what save_file writes

def write(place, tensors, config, choose):
    """In one file or two, as a model's directory; the parts of a tensor need not lie in the same file."""
    place.mkdir()
    names = list(tensors)
    choose.shuffle(names)
    cut = choose.randint(0, len(names) - 1)
    files = [part for part in (names[:cut], names[cut:]) if part]
    weight_map = {}
    for number, part in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        safetensors.torch.save_file({tensor: tensors[tensor] for tensor in part}, place / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}))
    (place / "config.json").write_text(json.dumps({"model_type": "test", "quantization_config": config}))


def codes(choose, shape, dtype):
    """Every code but NaN."""
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    if dtype == torch.float8_e4m3fn:
        raw[(raw & 0x7F) == 0x7F] = choose.randint(0, 126)
    elif dtype == torch.float8_e5m2:
        raw[(raw & 0x7F) >= 0x7C] = choose.randint(0, 123)
    return raw.view(dtype)


def scales(*shape, dtype=torch.float32):
    return torch.exp(torch.randn(shape) * 2).to(dtype)


def exponents(*shape):
    return torch.randint(110, 140, shape, dtype=torch.uint8)


def spread(numbers, sizes, shape):
    """Each number for a block of `sizes` elements, cut to `shape`."""
    for dim, size in enumerate(sizes):
        numbers = numbers.repeat_interleave(size, dim)
    return numbers[tuple(slice(0, length) for length in shape)]


def fp4(packed):
    return FP4[torch.stack([packed & 15, packed >> 4], dim=-1).long()].flatten(-2)


def compressed(form, bits, kind, strategy, **words):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": [], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **words}}}}


def subjects(choose):
    """Pairs of what is stored and what it means: (case, stored tensors, quantization_config, values in float32)."""
    rows, columns = choose.randint(1, 80), choose.choice((32, 64, 96, 128, 160))
    name = "model.layers.0.up.weight"
    dtype = choose.choice((torch.float8_e4m3fn, torch.float8_e5m2))
    code = codes(choose, (rows, columns), dtype)
    block = choose.choice(((128, 128), (16, 32), (7, 24), (1, 128)))
    grid = scales(-(-rows // block[0]), -(-columns // block[1]), dtype=choose.choice((torch.float32, torch.bfloat16)))
    yield "fp8 block", {name: code, f"{name}_scale_inv": grid}, {"quant_method": "fp8", "weight_block_size": block}, code.float() * spread(grid.float(), block, code.shape)
    one = scales(*choose.choice(((), (1,))), dtype=choose.choice(FLOATS))
    yield "fp8 tensor", {name: code, f"{name}_scale": one}, compressed("float-quantized", 8, "float", "tensor"), code.float() * one.float()
    column = scales(rows, 1, dtype=choose.choice((torch.float32, torch.bfloat16, torch.float16)))
    yield "fp8 channel", {name: code, f"{name}_scale": column}, compressed("float-quantized", 8, "float", "channel"), code.float() * column.float()
    powers = exponents(rows, columns // 32)
    two = lambda powers: torch.ldexp(torch.ones(powers.shape), powers.int() - 127)
    code = codes(choose, (rows, columns), torch.float8_e4m3fn)
    yield "mxfp8", {name: code, f"{name}_scale": powers}, compressed("mxfp8-quantized", 8, "float", "group", group_size=32), code.float() * spread(two(powers), (1, 32), code.shape)

    packed = codes(choose, (rows, columns // 2), torch.uint8)
    yield "mxfp4 packed", {f"{name}_packed": packed, f"{name}_scale": powers}, compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32), fp4(packed) * spread(two(powers), (1, 32), code.shape)
    experts = choose.randint(1, 4)
    blocks, powers = codes(choose, (experts, rows, columns // 32, 16), torch.uint8), exponents(experts, rows, columns // 32)
    yield "mxfp4 blocks", {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": powers}, {"quant_method": "mxfp4"}, (fp4(blocks) * two(powers)[..., None]).flatten(-2)

    code = codes(choose, (rows, columns), torch.int8)
    yield "int8 channel", {name: code, f"{name}_scale": column}, compressed("int-quantized", 8, "int", "channel"), code.float() * column.float()
    yield "int8 tensor", {name: code, f"{name}_scale": one}, compressed("int-quantized", 8, "int", "tensor"), code.float() * one.float()
    size = choose.choice((8, 16))
    group = scales(rows, columns // size, dtype=choose.choice(FLOATS))
    yield "int8 group", {name: code, f"{name}_scale": group}, compressed("int-quantized", 8, "int", "group", group_size=size), code.float() * spread(group.float(), (1, size), code.shape)
    zeros = codes(choose, (rows, 1), torch.int8)
    yield "int8 zero points", {name: code, f"{name}_scale": column, f"{name}_zero_point": zeros}, compressed("int-quantized", 8, "int", "channel", symmetric=False), (code.float() - zeros.float()) * column.float()


def we_read(directory, seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    for case, stored, config, values in subjects(choose):
        place = directory / f"{seed}-{case.replace(' ', '-')}"
        plain = {"model.norm.weight": torch.randn(9, dtype=torch.bfloat16)}
        write(place, stored | plain, config, choose)
        for target in (*FLOATS, torch.float16):
            found, facts = load_quantized(place, target)
            name = next(iter(facts["schemes"]), None)
            check(name is not None, f"seed {seed}, {case}: found no quantized tensor")
            check_same(found, plain | {name: values.to(target)}, f"seed {seed}, {case}, {facts['schemes']}")


def main(directory):
    torch.manual_seed(0)
    torch_reads_fp8_blocks(directory)
    torch_reads_mxfp4(directory)
    first, rounds = random.SystemRandom().randrange(2**31), 30 if os.environ.get("DCP_LONG") else 4
    if "DCP_SEED" in os.environ:
        first, rounds = int(os.environ["DCP_SEED"]), 1
    for seed in range(first, first + rounds):
        we_read(directory, seed)


run(main)
