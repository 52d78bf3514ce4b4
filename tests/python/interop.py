# SPDX-License-Identifier: Apache-2.0
"""What the comparisons with PyTorch, safetensors and gguf share: our programs, hashes of tensors, ranks."""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing

NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16", torch.int32: "I32", torch.uint32: "U32",
    torch.int64: "I64", torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float4_e2m1fn_x2: "F4",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
NAMES |= {torch.complex32: "C32", torch.complex128: "C128"}   # which safetensors lacks
ALL_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def tool(*arguments, program="interop_tool"):
    """Runs a program of ours; an error there ends the test."""
    path = pathlib.Path(os.environ["DCP_BUILD_DIR"]) / "tests" / "python" / program
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=250)
    check(done.returncode == 0, f"{program} {arguments}: {done.stderr or done.returncode}")


def quantize(scheme, tensors, place, ranks=2):
    """Saves `tensors` with us; those that are named "q." and more are quantized."""
    safetensors.torch.save_file(tensors, f"{place}.safetensors")
    tool("save", scheme, f"{place}.safetensors", place, ranks, program="quantized_tool")


def load_quantized(place, dtype, kind="safetensors", ranks=3):
    """What we load from a checkpoint of somebody, quantized tensors as `dtype`; and the facts of it."""
    with tempfile.TemporaryDirectory() as out:
        tool("load", kind, place, ranks, NAMES[dtype], f"{out}/plain", f"{out}/found.json", program="quantized_tool")
        tensors = {}
        for path in pathlib.Path(out, "plain").glob("*.safetensors"):
            tensors |= safetensors.torch.load_file(path)
        return tensors, read_json(f"{out}/found.json")


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def tensor_bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts(tensor):
    """As the program describes a tensor. In files the shape of F4 counts elements, in torch pairs of them."""
    shape = list(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        shape[-1] *= 2
    return {"dtype": NAMES[tensor.dtype], "shape": shape, "sha256": hashlib.sha256(tensor_bytes(tensor)).hexdigest()}


def check_same(found, expected, where):
    """Compares two maps of names to tensors, bit for bit."""
    check_equal({name: facts(tensor) for name, tensor in found.items()}, {name: facts(tensor) for name, tensor in expected.items()}, where)


def check_equal(found, expected, where):
    """Compares two maps of names to facts, with a short message."""
    check(set(found) == set(expected), f"{where}: other names: {sorted(set(found) ^ set(expected))[:5]}")
    for name, wanted in expected.items():
        check(found[name] == wanted, f"{where}: {name} is {found[name]}, expected {wanted}")


def some_tensor(name, dtype, shape):
    """Random bits that follow from the name; halves and quarters of what a float can be are no numbers, so no arithmetic may touch them."""
    random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little"))
    count = 1
    for size in shape:
        count *= size
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=random)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def _rank_main(rank, body, ranks, directory, arguments):
    torch.set_num_threads(1)
    # A file as meeting point: no port that another test could take.
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting-{ranks}-{body.__name__}", rank=rank, world_size=ranks)
    try:
        body(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(ranks, body, directory, *arguments):
    """Runs body(rank, *arguments) in `ranks` processes that form a gloo group; an exception of any is raised here."""
    meeting = tempfile.mkdtemp(dir=directory)
    torch.multiprocessing.start_processes(_rank_main, (body, ranks, meeting, arguments), nprocs=ranks, start_method="fork")


def run(main):
    """Runs main(directory) in a directory that goes away."""
    with tempfile.TemporaryDirectory() as directory:
        main(pathlib.Path(directory))
    sys.exit(0)


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())
