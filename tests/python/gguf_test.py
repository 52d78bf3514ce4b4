# SPDX-License-Identifier: Apache-2.0
"""GGUF: what we write is read by the gguf package, and is byte for byte what it quantizes itself; what it writes is read by us, bit for bit what it
dequantizes. DCP_SEED=<seed> repeats one round."""
import json
import os
import random

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type

from interop import check, check_same, load_quantized, quantize, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIMPLE = (Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)
BLOCKS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.NVFP4)
# As quantized_tool saves them.
METADATA = {
    "general.architecture": "llama", "test.text": 'größe "quoted" 重み', "test.bool": True, "test.u8": 255, "test.i8": -128, "test.u16": 65535, "test.i16": -32768, "test.u32": 2**32 - 1,
    "test.i32": -2**31, "test.u64": 2**64 - 1, "test.i64": -2**63, "test.f32": float(numpy.float32(0.1)), "test.f64": 1e-300, "test.flags": [True, False, True], "test.numbers": [1, -2, 3],
    "test.scores": [0.5, -1.25], "tokenizer.ggml.tokens": ["<s>", "größe", ""],
}


def dequantized(data, kind, dtype=torch.float32):
    return torch.from_numpy(numpy.array(gguf.quants.dequantize(data, kind), dtype=numpy.float32)).to(dtype)


# ---- theirs reads ours

def check_file(place, tensors, kind):
    """Every tensor and every key of a file of ours, by the gguf package; `kind`: of those named "q." and more."""
    reader = gguf.GGUFReader(place / "model.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected = METADATA if kind is None else METADATA | {"general.quantization_version": 2}
    check(found == expected, f"{place}: its metadata are {found}")
    check({tensor.name for tensor in reader.tensors} == set(tensors), f"{place}: other names")
    for stored in reader.tensors:
        tensor = tensors[stored.name]
        where = f"{place}: {stored.name}"
        check([int(size) for size in reversed(stored.shape)] == list(tensor.shape), f"{where} has the shape {stored.shape}")
        if kind is None or not stored.name.startswith("q."):
            check(stored.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64"}[str(tensor.dtype)[6:]], f"{where} is {stored.tensor_type.name}")
            check(stored.data.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes(), f"{where} has other bytes")
            continue
        check(stored.tensor_type == kind, f"{where} is {stored.tensor_type.name}")
        check(gguf.quants.quantize(tensor.float().numpy(), kind).tobytes() == stored.data.tobytes(), f"{where}: the gguf package quantizes to other bytes")
    return reader


def gguf_reads_ours(directory):
    random_floats = lambda *shape: torch.randn(*shape) * torch.exp(torch.randn(*shape[:-1], 1) * 2)
    tensors = {"q.up.weight": random_floats(60, 160), "q.down.weight": random_floats(33, 64).to(torch.bfloat16), "q.experts.weight": random_floats(3, 5, 96).to(torch.float16), "q.zero.weight": torch.zeros(4, 32),
               "norm": torch.randn(13), "half": torch.randn(3, 5).to(torch.float16), "brain": torch.randn(7, 2).to(torch.bfloat16)}
    for dtype in (torch.float64, torch.int8, torch.int16, torch.int32, torch.int64):
        tensors[str(dtype)[6:]] = (torch.randn(3, 6) * 100).to(dtype)
    for kind in (None, *SIMPLE):
        for ranks in (1, 2):
            place = directory / f"ours-{kind.name if kind is not None else 'plain'}-{ranks}"
            quantize("gguf:" + (kind.name if kind is not None else ""), tensors, place, ranks)
            reader = check_file(place, tensors, kind)
        for dtype in FLOATS if kind is not None else FLOATS[:1]:
            ours, found = load_quantized(place, dtype, "gguf")
            wanted = {stored.name: dequantized(stored.data, kind, dtype) if kind is not None and stored.name.startswith("q.") else tensors[stored.name] for stored in reader.tensors}
            check_same(ours, wanted, f"{place} as {dtype}")
            check(json.loads(found["values"]["test.other"]) == {"no": "type of GGUF"}, "what GGUF has no type for stands in the record")


# ---- ours reads theirs

def random_blocks(choose, kind, rows, blocks):
    """Random bytes; a block that means a number without end is drawn again."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    data = choose.integers(0, 256, (rows * blocks, size), dtype=numpy.uint8)
    while True:
        with numpy.errstate(all="ignore"):
            bad = ~numpy.isfinite(gguf.quants.dequantize(data, kind)).all(axis=1)
        if not bad.any():
            return data.reshape(rows, blocks * size)
        data[bad] = choose.integers(0, 256, (int(bad.sum()), size), dtype=numpy.uint8)


def subjects(choose):
    """name -> data as they are stored, type, tensor that we should load as float32."""
    tensors = {}

    def add(name, data, kind, values=None):
        tensors[name] = (data, kind, values if values is not None else dequantized(data, kind))

    rows, blocks = int(choose.integers(1, 20)), int(choose.integers(1, 4))
    floats = choose.standard_normal((rows, 256 * blocks)).astype(numpy.float32)
    for kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0, Type.MXFP4):
        add(f"blk.0.{kind.name}.weight", gguf.quants.quantize(floats, kind), kind)
    for kind in BLOCKS:
        add(f"blk.1.{kind.name}.weight", random_blocks(choose, kind, rows, blocks), kind)
    add("brain", gguf.quants.quantize(floats, Type.BF16), Type.BF16, torch.from_numpy(floats).to(torch.bfloat16))
    for data in (floats, floats.astype(numpy.float16), floats.astype(numpy.float64), *((floats * 50).astype(dtype) for dtype in (numpy.int8, numpy.int16, numpy.int32, numpy.int64))):
        add(f"plain.{data.dtype}", data, None, torch.from_numpy(data))
    add("vector", floats[0, :5].copy(), None, torch.from_numpy(floats[0, :5].copy()))
    # A grid that we do not decode: its blocks, as they are.
    grid = choose.integers(0, 256, (rows, 66 * blocks), dtype=numpy.uint8)
    add("grid", grid, Type.IQ2_XXS, torch.from_numpy(grid.reshape(rows, blocks, 66)))
    return tensors


def write(path, tensors, alignment, split):
    writer = gguf.GGUFWriter(path, "test", split_max_tensors=split)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, value in METADATA.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            (writer.add_array if isinstance(value, list) else writer.add_bool if isinstance(value, bool) else writer.add_string)(key.replace("general", "test.general"), value)
        else:
            {"u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16, "u32": writer.add_uint32, "i32": writer.add_int32,
             "u64": writer.add_uint64, "i64": writer.add_int64, "f32": writer.add_float32, "f64": writer.add_float64}[key.removeprefix("test.")](key, value)
    writer.add_array("test.nested", [[1, 2], [3]])
    for name, (data, kind, _) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def we_read(directory, seed):
    choose = numpy.random.default_rng(seed)
    tensors = subjects(choose)
    for alignment, split in ((32, 0), (64, 0), (32, 3)):
        where = f"seed {seed}, alignment {alignment}, {split} tensors in a file"
        place = directory / f"theirs-{seed}-{alignment}-{split}"
        place.mkdir()
        write(place / "model.gguf", tensors, alignment, split)
        files = sorted(place.iterdir())
        check((len(files) > 1) == (split > 0), f"{where}: {files}")
        for dtype in FLOATS:
            ours, found = load_quantized(random.Random(seed).choice((place, files[0])), dtype, "gguf")
            wanted = {name: values.to(dtype) if name in found["schemes"] else values for name, (_, _, values) in tensors.items()}
            check_same(ours, wanted, where)
        check(found["schemes"] == {name: f"gguf {kind.name}" for name, (_, kind, _) in tensors.items() if name.startswith("blk.")}, f"{where}: {found['schemes']}")
        check(len(found["warnings"]) == 1 and "grid" in found["warnings"][0], f"{where}: {found['warnings']}")
        values = {key: json.loads(text) for key, text in found["values"].items()}
        for key, value in (METADATA | {"test.nested": [[1, 2], [3]]}).items():
            value = numpy.float32(value) if key == "test.f32" else value
            known = values[key.replace("general", "test.general")]
            check((numpy.float32(known) if key == "test.f32" else known) == value, f"{where}: {key} is {known}")
        check(values["general.architecture"] == "test", f"{where}: its architecture is {values['general.architecture']}")


def main(directory):
    torch.manual_seed(0)
    gguf_reads_ours(directory)
    first, rounds = random.SystemRandom().randrange(2**31), 20 if os.environ.get("DCP_LONG") else 3
    if "DCP_SEED" in os.environ:
        first, rounds = int(os.environ["DCP_SEED"]), 1
    for seed in range(first, first + rounds):
        we_read(directory, seed)


run(main)
