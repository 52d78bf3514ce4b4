# SPDX-License-Identifier: Apache-2.0
"""What we write is read by Python's safetensors, and by a loader that is as strict as transformers, huggingface_hub and vLLM together."""
import json
import re

import safetensors
import safetensors.torch

from interop import check, check_equal, facts, read_json, run, tool


def load_like_transformers(directory):
    """Every check that a loader of the ecosystem makes of a model directory; returns its tensors."""
    check(not (directory / "model.safetensors").exists(), "a single file beside an index: transformers would load only that")
    index = read_json(directory / "model.safetensors.index.json")
    check(set(index) == {"metadata", "weight_map"}, "transformers reads both parts of an index")
    check(isinstance(index["metadata"]["total_size"], int), "total_size is a number")
    weight_map = index["weight_map"]
    files = sorted(set(weight_map.values()))
    check(files == sorted(path.name for path in directory.glob("*.safetensors")), "every file beside the index is in it, and is there")
    pattern = re.compile(r"^model-(\d{5})-of-(\d{5})\.safetensors$")
    for number, name in enumerate(files, start=1):
        match = pattern.match(name)
        check(match and int(match[1]) == number and int(match[2]) == len(files), f"{name} is file {number} of {len(files)}")
    tensors, total = {}, 0
    for name in files:
        with safetensors.safe_open(directory / name, framework="pt") as opened:
            metadata = opened.metadata()
            check(metadata.get("format") == "pt", f"{name}: transformers and huggingface_hub want format pt, not {metadata}")
            check(all(isinstance(key, str) and isinstance(text, str) for key, text in metadata.items()), f"{name}: metadata are texts")
            for tensor in opened.keys():
                check(weight_map.get(tensor) == name, f"{tensor} is in {name}, the index says {weight_map.get(tensor)}")
                check(tensor not in tensors, f"{tensor} is in two files")
                tensors[tensor] = opened.get_tensor(tensor)
                total += tensors[tensor].numel() * tensors[tensor].element_size()
    check(set(tensors) == set(weight_map), "the index lists what the files hold")
    check(index["metadata"]["total_size"] == total, f"total_size is {index['metadata']['total_size']}, the tensors have {total} bytes")
    for tensor in tensors:
        check(not re.match(r"(module|_orig_mod|_fsdp_wrapped_module|model_state)\.", tensor), f"{tensor}: a loader wants the model's own names")
    return tensors, index


def check_layout_of_files(directory):
    """The rules that the reference writer keeps and mapping readers profit from."""
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        check((8 + length) % 4096 == 0, f"{path}: data begin at {8 + length}")
        header = json.loads(data[8:8 + length])
        header.pop("__metadata__")
        cursor = 0
        for name, tensor in header.items():   # in the order of the data, widest dtypes first
            check(tensor["data_offsets"][0] == cursor, f"{path}: {name} begins at {tensor['data_offsets'][0]}, not at {cursor}")
            cursor = tensor["data_offsets"][1]
        check(8 + length + cursor == len(data), f"{path}: nothing behind the last tensor")


def main(directory):
    for ranks in (1, 4):
        for file_bytes in (20_000, 1_000_000_000):
            place, expected = directory / f"final-{ranks}-{file_bytes}", directory / "expected.json"
            tool("write", "final", "safetensors", place, ranks, file_bytes, expected)
            expected = read_json(expected)["tensors"]
            tensors, _ = load_like_transformers(place)
            check_equal({name: facts(tensor) for name, tensor in tensors.items()}, expected, "safe_open")
            by_file = {}
            for path in place.glob("*.safetensors"):
                by_file |= safetensors.torch.load_file(path)
            check_equal({name: facts(tensor) for name, tensor in by_file.items()}, expected, "load_file")
            check_layout_of_files(place)

    # Slices, as tensor-parallel loaders read them.
    with safetensors.safe_open(next(place.glob("*.safetensors")), framework="pt") as opened:
        part = opened.get_slice("model.layers.0.self_attn.q_proj.weight")
        check(facts(part[100:203, 3:]) == facts(tensors["model.layers.0.self_attn.q_proj.weight"][100:203, 3:]), "a slice is a slice of the tensor")

    for ranks in (1, 2):
        for file_bytes in (1_000, 1_000_000_000):
            place, expected = directory / f"model-{ranks}-{file_bytes}", directory / "model.json"
            tool("write-model", place, ranks, file_bytes, expected)
            expected = read_json(expected)
            tensors, index = load_like_transformers(place)
            check_equal({name: facts(tensor) for name, tensor in tensors.items()}, expected["tensors"], "the model under bare names")
            optimizer, _ = load_like_transformers(place / "optimizer")
            check_equal({name: facts(tensor) for name, tensor in optimizer.items()}, expected["optimizer"], "the optimizer in a directory of its own")
            check(any(path.name.endswith("config.json") for path in place.iterdir()), "config.json is beside the model")
            # Tied weights as save_model and save_torch_state_dict note them.
            for dropped, kept in expected["tied"].items():
                with safetensors.safe_open(place / index["weight_map"][kept], framework="pt") as opened:
                    check(opened.metadata().get(dropped) == kept, f"{dropped} is noted as {kept}")
                    check(dropped not in opened.keys(), f"{dropped} is stored once")
                if len(set(index["weight_map"].values())) > 1:
                    check(index["metadata"].get(dropped) == kept, f"the index notes {dropped} as {kept}")


run(main)
