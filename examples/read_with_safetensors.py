#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of trainer.cpp with Python's own safetensors, and uses the model: its loss on a text, and what it would write next.

usage: read_with_safetensors.py CHECKPOINT TEXT
"""
import json
import pathlib
import sys

import numpy
from safetensors import safe_open

WINDOW = 16


def read(directory):
    """The tensors of a directory as the ecosystem lays them out: files, and an index that says which tensor lies in which file."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(directory / file, framework="numpy") as opened:
            for name in opened.keys():
                if index["weight_map"][name] != file:
                    sys.exit(f"{name} lies in {file}, but the index says {index['weight_map'][name]}")
                tensors[name] = opened.get_tensor(name)
    if set(tensors) != set(index["weight_map"]):
        sys.exit(f"{directory}: index and files name different tensors")
    return tensors


def log_probabilities(model, windows):
    x = model["embedding.weight"][windows].reshape(len(windows), -1)
    h = numpy.tanh(x @ model["up.weight"].T + model["up.bias"])
    logits = h @ model["down.weight"].T + model["down.bias"]
    logits -= logits.max(axis=1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))


def main():
    checkpoint, text = pathlib.Path(sys.argv[1]), numpy.frombuffer(pathlib.Path(sys.argv[2]).read_bytes(), dtype=numpy.uint8)
    model, optimizer = read(checkpoint), read(checkpoint / "optimizer")
    for name, tensor in model.items():
        print(f"  {name:18} {tensor.dtype} {str(list(tensor.shape)):12} mean {tensor.mean():+.5f}, standard deviation {tensor.std():.5f}")
        for moment in ("exp_avg", "exp_avg_sq"):
            if optimizer[f"optimizer.{name}.{moment}"].shape != tensor.shape:
                sys.exit(f"{name}: {moment} has another shape than the weights")

    starts = numpy.arange(0, len(text) - WINDOW, max(1, len(text) // 2000))
    windows = text[starts[:, None] + numpy.arange(WINDOW)]
    loss = -log_probabilities(model, windows)[numpy.arange(len(starts)), text[starts + WINDOW]].mean()
    print(f"  loss on {sys.argv[2]}, computed by numpy: {loss:.3f} (a model that knows nothing: {numpy.log(256):.3f})")
    if not loss < 4.5:
        sys.exit("these are not the weights of the model that was trained")

    random, written = numpy.random.default_rng(1), list(text[:WINDOW])
    for _ in range(60):
        likely = numpy.exp(1.5 * log_probabilities(model, numpy.array([written[-WINDOW:]]))[0].astype(numpy.float64))
        written.append(random.choice(256, p=likely / likely.sum()))
    print(f"  and it writes: {bytes(written).decode(errors='replace')!r}")


main()
