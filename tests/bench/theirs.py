# SPDX-License-Identifier: Apache-2.0
"""The other side of the benchmarks: PyTorch's distributed checkpoint and safetensors, on gloo ranks that keep a state in memory.

    theirs.py <folder> <rank> <ranks>

Takes the commands of bench_ranks from <folder>/theirs.<rank>, and rank 0 answers on <folder>/theirs.reply:
  state tensors=64 rows=2048 columns=2048 dim=0 | fill | clear | check
  save|load with=hf|files|safetensors place=... files=4        hf: HuggingFaceStorageWriter with consolidation; files: FileSystemWriter
  async executor=thread|process stager=default|kept place=...  dcp.async_save; default: without a word about staging; kept: one stager for all
                                                               saves, which uses its memory again, shared with the process where that writes
  matrices count=8 rows=4096 columns=4096 dim=0 | digest       bfloat16, split along `dim` over the ranks; the sum of their bits over all ranks
  load-matrices with=quantized|gguf place=... threads=2        QuantizedHuggingFaceStorageReader; or gguf-py's dequantize, of this rank's rows
  open place=... with=files                                    FileSystemReader.read_metadata; without `with`, safetensors.safe_open, the names of all tensors
  convert with=torch_save|hf from=... place=...                dcp_to_torch_save; or a load and HuggingFaceStorageWriter
"""
import contextlib
import json
import logging
import os
import shutil
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Matrices:
    """What quantized checkpoints are loaded into."""

    def __init__(self, mesh, count, rows, columns, dim):
        self.rank, self.ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        local = [rows, columns]
        each = -(-local[dim] // self.ranks)
        self.begin, self.end = min(local[dim], self.rank * each), min(local[dim], self.rank * each + each)
        local[dim] = self.end - self.begin
        self.memory = {f"layers.{t}.weight": torch.zeros(*local, dtype=torch.bfloat16) for t in range(count)}
        self.state = {name: tensor if mesh is None else DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False, shape=torch.Size([rows, columns]), stride=(columns, 1)) for name, tensor in self.memory.items()}

    def load(self, how, place, threads):
        if how == "quantized":
            dcp.load(self.state, storage_reader=QuantizedHuggingFaceStorageReader(place, thread_count=threads, target_dtype=torch.bfloat16), no_dist=self.ranks == 1)
            return
        import gguf
        for tensor in gguf.GGUFReader(f"{place}/model.gguf").tensors:
            self.memory[tensor.name].copy_(torch.from_numpy(gguf.quants.dequantize(tensor.data[self.begin:self.end], tensor.tensor_type)))

    def digest(self):
        return sum(int((tensor.view(torch.int16).to(torch.int64) & 0xFFFF).sum()) for tensor in self.memory.values())


class State:
    def __init__(self, mesh, tensors, rows, columns, dim):
        self.rank, self.ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        self.tensors, self.rows, self.columns, self.dim = tensors, rows, columns, dim
        whole = (rows, columns)[dim]
        each = -(-whole // self.ranks)
        self.begin, self.end = min(whole, self.rank * each), min(whole, self.rank * each + each)
        local = [rows, columns]
        local[dim] = self.end - self.begin
        # Each tensor with a storage of its own: those of one storage, as DTensors, are what async_save of PyTorch 2.15.0 cannot stage.
        self.memory = [torch.zeros(*local) for _ in range(tensors)]
        self.stagers = {}
        self.state = {}
        for t in range(tensors):
            name = f"layers.{t}.weight"
            # One rank without a mesh: plain tensors, which is the fast path of both libraries.
            self.state[name] = self.memory[t] if mesh is None else DTensor.from_local(self.memory[t], mesh, [Shard(dim)], run_check=False, shape=torch.Size([rows, columns]), stride=(columns, 1))

    def expected(self, t):
        row = torch.arange(self.rows, dtype=torch.int64)[:, None]
        column = torch.arange(self.columns, dtype=torch.int64)[None, :]
        part = (slice(self.begin, self.end), slice(None)) if self.dim == 0 else (slice(None), slice(self.begin, self.end))
        return ((t * 7919 + row * 4099 + column) % 16777213).to(torch.float32)[part]

    def mapping(self, files):
        return {f"layers.{t}.weight": t * files // self.tensors + 1 for t in range(self.tensors)}


def fsync_tree(place):
    for directory, _, files in os.walk(place):
        for name in [*files, "."]:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save(state, how, place, files):
    if how == "hf":
        dcp.save(state.state, storage_writer=HuggingFaceStorageWriter(place, fqn_to_index_mapping=state.mapping(files), save_distributed=True, enable_consolidation=True), no_dist=state.ranks == 1)
    elif how == "files":
        dcp.save(state.state, storage_writer=FileSystemWriter(place), no_dist=state.ranks == 1)
    else:
        os.makedirs(place, exist_ok=True)
        save_file(state.state, f"{place}/model.safetensors")
        fsync_tree(place)


def async_save(state, executor, stager, place):
    """Until the state may change, and until the checkpoint is complete."""
    words = {}
    if stager == "kept":
        if executor not in state.stagers:
            # Pinned memory and copies that do not block are for accelerators.
            state.stagers[executor] = DefaultStager(StagingOptions(use_pinned_memory=False, use_shared_memory=executor == "process", use_async_staging=False, use_non_blocking_copy=False))
        words["async_stager"] = state.stagers[executor]
    kind = AsyncCheckpointerType.PROCESS if executor == "process" else AsyncCheckpointerType.THREAD
    begin = time.perf_counter()
    future = dcp.async_save(state.state, checkpoint_id=place, async_checkpointer_type=kind, no_dist=state.ranks == 1, **words)
    stall = time.perf_counter() - begin
    future.result()
    return stall, time.perf_counter() - begin


def load(state, how, place):
    if how == "hf":
        dcp.load(state.state, storage_reader=HuggingFaceStorageReader(place), no_dist=state.ranks == 1)
    elif how == "files":
        dcp.load(state.state, storage_reader=FileSystemReader(place), no_dist=state.ranks == 1)
    else:
        found = load_file(f"{place}/model.safetensors")
        for name, tensor in state.state.items():
            tensor.copy_(found[name])


def main():
    folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    mesh = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    state = matrices = None
    commands = open(f"{folder}/theirs.{rank}")
    answers = open(f"{folder}/theirs.reply", "w") if rank == 0 else None
    for line in commands:
        verb, *words = line.split()
        words = dict(word.split("=", 1) for word in words)
        seconds, commit, digest, failure = 0.0, 0.0, 0, ""
        if verb == "quit":
            break
        try:
            begin = None
            if ranks > 1:
                dist.barrier()
            begin = time.perf_counter()
            if verb == "state":
                state = State(mesh, *(int(words[name]) for name in ("tensors", "rows", "columns", "dim")))
            elif verb == "fill":
                for t in range(state.tensors):
                    state.memory[t].copy_(state.expected(t))
            elif verb == "clear":
                for memory in state.memory:
                    memory.zero_()
            elif verb == "check":
                for t in range(state.tensors):
                    if not torch.equal(state.memory[t], state.expected(t)):
                        raise RuntimeError("wrong contents")
            elif verb == "save":
                if rank == 0:
                    shutil.rmtree(words["place"], ignore_errors=True)
                if ranks > 1:
                    dist.barrier()
                begin = time.perf_counter()
                save(state, words["with"], words["place"], int(words.get("files", 1)))
            elif verb == "async":
                if rank == 0:
                    shutil.rmtree(words["place"], ignore_errors=True)
                if ranks > 1:
                    dist.barrier()
                stall, commit = async_save(state, words["executor"], words["stager"], words["place"])
            elif verb == "load":
                load(state, words["with"], words["place"])
            elif verb == "matrices":
                matrices = Matrices(mesh, *(int(words[name]) for name in ("count", "rows", "columns", "dim")))
            elif verb == "digest":
                digest = matrices.digest()
            elif verb == "load-matrices":
                matrices.load(words["with"], words["place"], int(words.get("threads", 1)))
            elif verb == "open" and "with" in words:
                if not FileSystemReader(words["place"]).read_metadata().state_dict_metadata:
                    raise RuntimeError("no tensors")
            elif verb == "convert":
                if rank == 0:
                    shutil.rmtree(words["place"], ignore_errors=True)
                if words["with"] == "torch_save":
                    dcp_to_torch_save(words["from"], words["place"] + ".pt")
                else:
                    load(state, "files", words["from"])
                    save(state, "hf", words["place"], 1)
            elif verb == "open":
                with safe_open(words["place"], "pt") as file:
                    count = len(file.keys())
                if count == 0:
                    raise RuntimeError("no tensors")
            else:
                failure = f"no such command: {verb}"
            seconds = stall if verb == "async" else time.perf_counter() - begin
        except Exception as error:  # told to the driver, which ends the run
            failure = f"{type(error).__name__}: {error}"
            print(f"rank {rank}: {verb}: {failure}", file=sys.stderr)
        outcome = torch.tensor([seconds, commit, float(bool(failure))], dtype=torch.float64)
        digest = torch.tensor(digest)
        if ranks > 1:
            dist.all_reduce(outcome, op=dist.ReduceOp.MAX)
            dist.all_reduce(digest)
        if rank == 0:
            print(json.dumps({"seconds": outcome[0].item(), "commit": outcome[1].item(), "digest": digest.item(), "failed": bool(outcome[2].item())}), file=answers, flush=True)
    if ranks > 1:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


if __name__ == "__main__":   # the process executor imports this file again
    main()
