# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks on a GPU: ours and theirs in turns, and prints one table. Called by gpu.sh.

gpu.py --theirs <folder> <device> is PyTorch's side: one process that keeps a state in the memory of the device, and takes from <folder>/theirs.0
  state tensors=200 rows=640 columns=4096 | fill
  save place=... | load place=...           dcp.save and dcp.load, FileSystemWriter and FileSystemReader
  async place=...                           dcp.async_save, whose stager is kept, pinned and shared
  load-file place=...                       safetensors.torch.load_file of all files of a checkpoint
"""
import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time


def theirs(folder, device):
    import logging
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    on_gpu = device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    state, stager = {}, None
    answers = None
    for line in open(f"{folder}/theirs.0"):
        answers = answers or open(f"{folder}/theirs.reply", "w")
        verb, *words = line.split()
        words = dict(word.split("=", 1) for word in words)
        if verb == "quit":
            break
        answer = {"failed": False}
        try:
            wait()
            begin = time.perf_counter()
            if verb == "state":
                state = {}
                memory = torch.zeros(int(words["tensors"]), int(words["rows"]), int(words["columns"]), device=device)
                state = {f"layers.{t}.weight": memory[t].clone() for t in range(len(memory))}   # a storage of its own for each: dcp.save writes whole storages
                del memory
            elif verb == "fill":
                for t, tensor in enumerate(state.values()):
                    tensor.copy_(torch.arange(tensor.numel(), device=device).reshape(tensor.shape) % 16777213 + t)
            elif verb == "save":
                shutil.rmtree(words["place"], ignore_errors=True)
                begin = time.perf_counter()
                dcp.save(state, checkpoint_id=words["place"], no_dist=True)
            elif verb == "load":
                dcp.load(state, checkpoint_id=words["place"], no_dist=True)
            elif verb == "load-file":
                for path in sorted(pathlib.Path(words["place"]).glob("*.safetensors")):
                    load_file(path, device=device)
            elif verb == "async":
                shutil.rmtree(words["place"], ignore_errors=True)
                if stager is None:
                    stager = DefaultStager(StagingOptions(use_pinned_memory=on_gpu, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=on_gpu))
                begin = time.perf_counter()
                future = dcp.async_save(state, checkpoint_id=words["place"], async_checkpointer_type=AsyncCheckpointerType.THREAD, async_stager=stager, no_dist=True)
                answer["seconds"] = time.perf_counter() - begin
                future.result()
            else:
                raise RuntimeError("no such command")
            wait()
            answer.setdefault("seconds", time.perf_counter() - begin)
            answer["commit"] = time.perf_counter() - begin
        except Exception as error:  # told to the driver, which ends the run
            answer["failed"] = True
            print(f"{line.strip()}: {type(error).__name__}: {error}", file=sys.stderr)
        print(json.dumps(answer), file=answers, flush=True)


def main():
    from bench import Bench, Side, figure, met, processor

    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--torch", default="", help="a Python that has PyTorch")
    parser.add_argument("--torch-reason", default="no Python with PyTorch was found", help="why there is none")
    parser.add_argument("--work", required=True)
    parser.add_argument("--gib", type=float, default=8, help="of the state, at most")
    parser.add_argument("--repeats", type=int, default=6, help="the first is dropped")
    parser.add_argument("--only", default="", help="of: async,save,load,quantized,compute")
    parser.add_argument("--dry", action="store_true", help="the program was built with DCP_BENCH_DRY")
    parser.add_argument("--json")
    arguments = parser.parse_args()

    free, device, multiplies_not = subprocess.run([arguments.program, "--info"], check=True, capture_output=True, text=True).stdout.splitlines()
    work = pathlib.Path(arguments.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    memory = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    # What is there at once: on the device two states, and what load_file makes; on the disk four checkpoints; on the host pinned and staging memory of each side, and the page cache.
    limits = {"asked for": arguments.gib * 2**30, "the device": int(free) / 4, "the disk": shutil.disk_usage(work).free / 5, "the host": memory / 8}
    tensors, columns = 200, 4096
    rows = int(min(limits.values()) // (tensors * columns * 4))
    if rows == 0:
        sys.exit(f"not measured: there is no room for a state: {limits}")
    gib = rows * tensors * columns * 4 / 2**30
    print(f"{device}; {gib:.2f} GiB of float32 in {tensors} tensors (as much as {min(limits, key=limits.get)} has)", flush=True)

    left_out = []
    if multiplies_not:
        left_out.append(f"steps during a save ({multiplies_not})")
    with_torch = bool(arguments.torch)
    torch_device = "cpu" if arguments.dry else "cuda"
    if with_torch:
        probe = subprocess.run([arguments.torch, "-c", f"import torch, safetensors.torch, torch.distributed.checkpoint; print(torch.__version__); torch.zeros(1, device='{torch_device}')"], capture_output=True, text=True)
        if probe.returncode != 0:
            with_torch, arguments.torch_reason = False, f"{arguments.torch}: {(probe.stderr.strip() or 'does not start').splitlines()[-1]}"
    if not with_torch:
        left_out.append(f"all rows against PyTorch and safetensors ({arguments.torch_reason})")

    class OnGpu(Bench):
        def start(self):
            folder = self.work / "pipes"
            folder.mkdir()
            self.sides["ours"] = Side("ours", folder, 1, lambda f: [subprocess.Popen([arguments.program, str(f)])])
            if with_torch:
                self.sides["theirs"] = Side("theirs", folder, 1, lambda f: [subprocess.Popen([arguments.torch, str(pathlib.Path(__file__)), "--theirs", str(f), torch_device])])
            self.ranks = 1

        def turns_of(self, contestants):
            return self.turns({name: (side, verb, words, None) for name, (side, verb, words) in contestants.items() if side in self.sides})

        def rows_of(self, work, cache, times, targets):
            self.compare(work, cache, times, [(name, against, None if arguments.dry else least) for name, against, least in targets if name in times and against in times])

        def run(self):
            place = lambda name: str(self.work / name)
            wanted = lambda name: not arguments.only or name in arguments.only.split(",")
            drop = lambda *names: [shutil.rmtree(place(name), ignore_errors=True) for name in names]
            self.start()
            self.both("state", tensors=tensors, rows=rows, columns=columns)
            self.both("fill")
            size = f"{gib:.1f} GiB"

            if wanted("async"):
                answers = self.turns_of({
                    "dcp, deferred": ("ours", "async", {"place": place("run-deferred"), "stager": "deferred"}),
                    "dcp": ("ours", "async", {"place": place("run"), "stager": "copy"}),
                    "pinned copy": ("ours", "pinned", {"way": "out"}),
                    "async_save, pinned": ("theirs", "async", {"place": place("theirs-async")}),
                })
                calls, staged = figure("seconds", answers), figure("staged", answers)
                self.rows_of(f"copies of {size} made, from the call on", "-", {"dcp": staged["dcp, deferred"], "pinned copy": calls["pinned copy"]}, [("dcp", "pinned copy", 0.92)])
                self.bounded("deferred async_save", "time in the call", statistics.median(calls["dcp, deferred"]) * 1000, "ms", math.inf if arguments.dry else 1)
                self.rows_of("stall of async_save", "-", calls, [("dcp", "async_save, pinned", 1.3), ("dcp", "pinned copy", None)])
                commits = figure("commit", answers)
                self.rows_of("from call to commit", "-", commits, [("dcp", "async_save, pinned", None), ("dcp, deferred", "async_save, pinned", None)])
                print(f"wait_staged() after the copies: {statistics.median(figure('waited', answers)['dcp, deferred']):.4f} s", flush=True)
                drop("run", "theirs-async")
            if wanted("compute") and not multiplies_not:
                answers = self.turns_of({"dcp": ("ours", "compute", {"place": place("run-deferred")}), "alone": ("ours", "compute", {})})
                self.rows_of("a step of products while a save is in flight", "-", figure("seconds", answers), [("dcp", "alone", 1 / 1.03)])
            drop("run-deferred")

            if wanted("save") or wanted("load"):
                answers = self.turns_of({
                    "dcp": ("ours", "save", {"place": place("ours")}),
                    "dcp.save": ("theirs", "save", {"place": place("theirs")}),
                    "O_DIRECT writes": ("ours", "raw", {"place": place("raw")}),
                } if wanted("save") else {})
                if answers:
                    self.rows_of(f"durable save of {size}", "-", figure("seconds", answers), [("dcp", "dcp.save", 1.4), ("dcp", "O_DIRECT writes", 0.85)])
                    if not all(figure("direct", answers)["O_DIRECT writes"]):
                        print("the file system refuses O_DIRECT: what is called that was written through the page cache", flush=True)
                else:
                    self.sides["ours"].do("save", place=place("ours"))
                    if with_torch:
                        self.sides["theirs"].do("save", place=place("theirs"))
                drop("raw")
            if wanted("load"):
                self.sides["ours"].do("clear")
                self.sides["ours"].do("load", place=place("ours"))
                self.sides["ours"].do("check")
                self.sides["ours"].do("read", place=place("ours"))
                answers = self.turns_of({
                    "dcp": ("ours", "load", {"place": place("ours")}),
                    "pinned copy": ("ours", "pinned", {"way": "in"}),
                    "page cache": ("ours", "read", {"place": place("ours")}),
                    "load_file": ("theirs", "load-file", {"place": place("ours")}),
                    "dcp.load": ("theirs", "load", {"place": place("theirs")}),
                })
                times = figure("seconds", answers)
                times["the slower of the two"] = max((times["pinned copy"], times["page cache"]), key=statistics.median)
                self.rows_of(f"load of {size}, verified", "warm", times, [("dcp", "the slower of the two", 0.85), ("dcp", "pinned copy", None), ("dcp", "page cache", None), ("dcp", "load_file", 1), ("dcp", "dcp.load", 3)])
            drop("ours", "theirs")

            if wanted("quantized"):
                ours = self.sides["ours"]
                count = max(1, int(gib / 4 * 2**30 / (4096 * 4096 * 2)))
                if arguments.dry:
                    count = 1
                ours.do("matrices", count=count)
                ours.do("fill-matrices")
                for kind in ("plain", "fp8"):
                    ours.do("save-matrices", place=place(kind), **{"as": kind})
                for kind in ("plain", "fp8"):
                    ours.do("load-matrices", place=place(kind), **{"as": kind})
                    ours.do("check-matrices", place=place(kind), **{"as": kind})
                answers = self.turns_of({
                    "dcp": ("ours", "load-matrices", {"place": place("fp8"), "as": "fp8"}),
                    "dcp, stored as bfloat16": ("ours", "load-matrices", {"place": place("plain"), "as": "plain"}),
                })
                self.rows_of(f"load of FP8 blocks to {count * 32} MiB of bfloat16", "warm", figure("seconds", answers), [("dcp", "dcp, stored as bfloat16", None)])
                drop("plain", "fp8")
            self.stop()

    bench = OnGpu(arguments)
    try:
        bench.run()
    finally:
        bench.end()
        shutil.rmtree(work, ignore_errors=True)
    if left_out:
        print("left out: " + "; ".join(left_out))
    missed = sum(not met(row) for row in bench.rows) + sum(limit["value"] > limit["most"] for limit in bench.limits)
    print("a dry run: the figures mean nothing" if arguments.dry else f"{missed} targets missed" if missed else "all targets met")
    if arguments.json:
        machine = {"device": device, "processor": processor(), "processors": os.cpu_count(), "gib": gib, "torch": probe.stdout.strip() if with_torch else None}
        pathlib.Path(arguments.json).write_text(json.dumps({"machine": machine, "rows": bench.rows, "limits": bench.limits, "left_out": left_out, "dry": arguments.dry}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--theirs"]:
        theirs(*sys.argv[2:4])
    else:
        main()
