# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks: ours and theirs in turns, and prints one table. Called by run.sh."""
import argparse
import json
import math
import os
import pathlib
import platform
import random
import select
import shutil
import statistics
import subprocess
import sys
import time


class Side:
    """Ranks that wait for commands on pipes."""

    def __init__(self, name, folder, ranks, launch):
        self.name, self.ranks = name, ranks
        self.pipes = [folder / f"{name}.{r}" for r in range(ranks)]
        for pipe in [*self.pipes, folder / f"{name}.reply"]:
            os.mkfifo(pipe)
        self.process = launch(folder)
        # Read and write: neither open waits for the other end, nor for ever where a program did not start.
        self.commands = [os.fdopen(os.open(pipe, os.O_RDWR), "w") for pipe in self.pipes]
        self.answers = os.open(folder / f"{name}.reply", os.O_RDWR)

    def do(self, verb, **words):
        line = " ".join([verb, *(f"{k}={v}" for k, v in words.items())])
        for pipe in self.commands:
            print(line, file=pipe, flush=True)
        answer = b""
        while not answer.endswith(b"\n"):
            if select.select([self.answers], [], [], 1)[0]:
                answer += os.read(self.answers, 65536)
            elif any(process.poll() is not None for process in self.process):
                sys.exit(f"{self.name}: ended during: {line}")
        answer = json.loads(answer)
        if answer["failed"]:
            sys.exit(f"{self.name}: failed: {line}")
        return answer

    def quit(self):
        for pipe in self.commands:
            print("quit", file=pipe, flush=True)
            pipe.close()
        for process in self.process:
            process.wait(timeout=60)


def forget(place):
    """Drops a checkpoint from the page cache."""
    for path in pathlib.Path(place).rglob("*") if os.path.isdir(place) else [pathlib.Path(place)]:
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_many(path, count):
    """A file of many small tensors: what is timed is its header."""
    import torch
    from safetensors.torch import save_file
    memory = torch.zeros(count, 4)
    save_file({f"model.layers.{i // 9}.self_attn.proj_{i % 9}.weight": memory[i].clone() for i in range(count)}, path)


def figure(name, answers):
    return {contestant: [answer.get(name) for answer in all_answers] for contestant, all_answers in answers.items()}


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.rows, self.limits = [], []
        self.repeats = arguments.repeats
        self.sides = {}
        self.work = pathlib.Path(arguments.work).resolve()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def start(self, ranks, bound=True):
        """`bound`: to processors, as the launcher of MPI sees fit. Open MPI gives each of two ranks one of two, and what a rank does in the background has to share it."""
        self.stop()
        folder = self.work / f"pipes-{ranks}-{time.monotonic_ns()}"
        folder.mkdir()
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_btl_vader_single_copy_mechanism="none")
        if not bound:
            environment["OMPI_MCA_hwloc_base_binding_policy"] = "none"
        ours = lambda f: [subprocess.Popen([*self.arguments.mpirun.split(), "-n", str(ranks), self.arguments.program, str(f)], env=environment)]
        theirs = lambda f: [subprocess.Popen([sys.executable, str(pathlib.Path(__file__).parent / "theirs.py"), str(f), str(r), str(ranks)], env=environment) for r in range(ranks)]
        self.sides["ours"] = Side("ours", folder, ranks, ours)
        self.sides["theirs"] = Side("theirs", folder, ranks, theirs)
        self.ranks = ranks

    def stop(self):
        for side in self.sides.values():
            side.quit()
        self.sides = {}

    def end(self):
        """After a failure: the ranks that still wait for commands."""
        for side in self.sides.values():
            for process in side.process:
                if process.poll() is None:
                    process.terminate()

    def both(self, verb, **words):
        for side in self.sides.values():
            side.do(verb, **words)

    def measure(self, work, cache, contestants, targets):
        self.compare(work, cache, figure("seconds", self.turns(contestants)), targets)

    def turns(self, contestants):
        """`contestants`: name -> (side, verb, words, files to forget or None), run in turns. Returns name -> answers, without the first. Each turn has
        an order of its own, and what one has left to be written is written before the next begins: nobody always comes after the same other one."""
        answers = {name: [] for name in contestants}
        for turn in range(self.repeats):
            for name, (side, verb, words, cold) in random.Random(turn).sample(list(contestants.items()), len(contestants)):
                os.sync()
                if cold is not None:
                    forget(cold)
                answers[name].append(self.sides[side].do(verb, **words))
        return {name: all_answers[1:] for name, all_answers in answers.items()}

    def compare(self, work, cache, times, targets):
        """`times`: name -> seconds. `targets`: (name, against, least ratio, and perhaps seconds that may be lost beyond it)."""
        for name, against, least, *beyond in targets:
            seconds, against_seconds = sorted(times[name]), sorted(times[against])
            ratio = statistics.median(against_seconds) / statistics.median(seconds)
            self.rows.append({"work": work, "cache": cache, "ranks": self.ranks, "ours": name, "seconds": seconds, "against": against, "against_seconds": against_seconds, "ratio": ratio, "target": least, "beyond": sum(beyond)})
            print(self.line(self.rows[-1]), flush=True)

    def bounded(self, work, what, value, unit, most):
        self.limits.append({"work": work, "what": what, "ranks": self.ranks, "value": value, "unit": unit, "most": most})
        print(f"{work:<42} {self.ranks} {what}: {value:.2f} {unit}, target <= {most} {'met' if value <= most else 'MISSED'}", flush=True)

    @staticmethod
    def line(row):
        spread = lambda s: f"{statistics.median(s):8.4f} [{s[0]:.4f} {s[-1]:.4f}]"
        target = "" if row["target"] is None else f"{row['target']:.3g}" + (f" + {row['beyond'] * 1000:.0f} ms" if row["beyond"] else "")
        verdict = f">= {target:<5} {'met' if met(row) else 'MISSED'}" if target else ""
        return f"{row['work']:<42} {row['ranks']} {row['cache']:<5} {row['ours']:<18} {spread(row['seconds'])}  {row['against']:<28} {spread(row['against_seconds'])}  {row['ratio']:6.2f}x {verdict}"

    def run(self):
        place = lambda name: str(self.work / name)
        wanted = lambda name: not self.arguments.only or name in self.arguments.only.split(",")
        size = {"tensors": 64, "rows": 2048, "columns": 2048}

        if wanted("save") or wanted("load"):
            self.start(2)
            for dim in (0, 1):
                self.both("state", **size, dim=dim)
                self.both("fill")
                ours = ("ours", "save", {"place": place("ours"), "files": 4}, None)
                if not wanted("save"):
                    continue
                contestants = {"dcp": ours, "hf writer, consolidated": ("theirs", "save", {"with": "hf", "place": place("hf"), "files": 4}, None)}
                targets = [("dcp", "hf writer, consolidated", 3.5)]
                if dim == 0:
                    if self.arguments.uring:
                        contestants["dcp, io_uring"] = ("ours", "save", {"place": place("ours"), "files": 4, "engine": "uring"}, None)
                    contestants["dcp, no checksums"] = ("ours", "save", {"place": place("ours"), "files": 4, "checksums": 0}, None)
                    contestants["FileSystemWriter"] = ("theirs", "save", {"with": "files", "place": place("files")}, None)
                    (self.work / "raw").mkdir(exist_ok=True)
                    contestants["O_DIRECT, 1 in flight"] = ("ours", "raw", {"place": place("raw"), "direct": 1}, None)
                    targets += [("dcp", "FileSystemWriter", 1.4), ("dcp", "O_DIRECT, 1 in flight", 0.95), ("dcp", "dcp, no checksums", 0.98)]
                    if self.arguments.uring:
                        targets += [("dcp, io_uring", "FileSystemWriter", 1.8)]
                self.measure(f"durable save, Shard({dim})", "-", contestants, targets)
                extra = self.sides["ours"].do("save", place=place("ours"), files=4, memory=64 << 20)["extra_kib"]
                self.bounded(f"durable save, Shard({dim})", "most memory beside the state, 64 MiB allowed", extra / 1024, "MiB", 64 + 16)
            if wanted("load"):
                self.both("state", **size, dim=0)
                self.both("fill")
                self.sides["ours"].do("save", place=place("ours"), files=4)
                for how in ("hf", "files"):
                    self.sides["theirs"].do("save", place=place(how), files=4, **{"with": how})
                for dim in (0, 1):
                    self.both("state", **size, dim=dim)
                    for cache in ("warm",) if self.arguments.quick else ("warm", "cold"):
                        cold = lambda name: place(name) if cache == "cold" else None
                        contestants = {
                            "dcp, verified": ("ours", "load", {"place": place("ours")}, cold("ours")),
                            "dcp, unverified": ("ours", "load", {"place": place("ours"), "verify": "none"}, cold("ours")),
                            "FileSystemReader": ("theirs", "load", {"place": place("files"), "with": "files"}, cold("files")),
                            "HuggingFaceStorageReader": ("theirs", "load", {"place": place("hf"), "with": "hf"}, cold("hf")),
                        }
                        if cache == "cold":
                            del contestants["dcp, unverified"]
                            targets = [("dcp, verified", "FileSystemReader", (1.2, 1.3)[dim]), ("dcp, verified", "HuggingFaceStorageReader", 1.0)]
                        elif dim == 0:
                            targets = [("dcp, verified", "FileSystemReader", 0.75), ("dcp, unverified", "FileSystemReader", 1.0), ("dcp, verified", "HuggingFaceStorageReader", None), ("dcp, verified", "dcp, unverified", 0.7)]
                        else:
                            targets = [("dcp, verified", "FileSystemReader", 1.5), ("dcp, unverified", "FileSystemReader", 1.9), ("dcp, verified", "HuggingFaceStorageReader", 0.55), ("dcp, unverified", "HuggingFaceStorageReader", 0.8)]
                        self.measure(("load, same layout", "load, Shard(0) to Shard(1)")[dim], cache, contestants, targets)
                    limit = 64 << 20
                    answer = self.sides["ours"].do("load", place=place("ours"), memory=limit)
                    extra = answer["extra_kib"]
                    if dim == 1:   # runs of 4 KiB
                        self.bounded("load, Shard(0) to Shard(1)", "bytes read, in bytes needed", answer["read_times"], "x", 1.5)
                    self.bounded(("load, same layout", "load, Shard(0) to Shard(1)")[dim], "most memory beside the state, 64 MiB allowed", extra / 1024, "MiB", 64 + 16)
                    self.sides["ours"].do("clear")
                    self.sides["ours"].do("load", place=place("ours"))
                    self.both("check")
        if wanted("async"):
            self.asynchronous(place, size)
        if wanted("small") and not self.arguments.quick:   # the other side takes minutes
            self.start(1)
            self.both("state", tensors=20000, rows=32, columns=32, dim=0)
            self.both("fill")
            for verb in ("save", "load"):
                self.measure(f"20,000 tensors of 4 KiB, {verb}", "warm", {
                    "dcp": ("ours", verb, {"place": place("small-ours")}, None),
                    "FileSystemWriter" if verb == "save" else "FileSystemReader": ("theirs", verb, {"place": place("small-files"), "with": "files"}, None),
                    "safetensors + fsync" if verb == "save" else "safetensors": ("theirs", verb, {"place": place("small-st"), "with": "safetensors"}, None),
                }, [("dcp", "FileSystemWriter" if verb == "save" else "FileSystemReader", 50), ("dcp", "safetensors + fsync" if verb == "save" else "safetensors", 4)])
            self.both("check")
        if wanted("open"):
            self.start(1)
            path = place("many.safetensors")
            write_many(path, 100_000)
            self.measure("open a file of 100,000 tensors", "warm", {"dcp": ("ours", "open", {"place": path}, None), "safe_open": ("theirs", "open", {"place": path}, None)}, [("dcp", "safe_open", 5)])
        if wanted("quantized"):
            self.quantized()
        if wanted("torch"):
            self.torch(place, size)
        self.stop()
        if wanted("plan"):
            for schema, what, most in (("405b", "405B parameters on 8,960 ranks", 2), ("experts", "64 sets of names on 8,960 ranks", 10)):
                self.bounded(what, "median time to plan of a rank", self.plan_milliseconds(schema), "ms", most)

    def asynchronous(self, place, size):
        """Saves in the background. All are the second of their process or a later one: staging memory is there, and so is their process of the other side."""
        self.start(2, bound=False)
        self.both("state", **size, dim=0)
        self.both("fill")
        ours = {f"dcp{name}": ("ours", "async", {"place": place("-".join(["run", *words.values()])), "files": 4, **words}, None)
                for name, words in (("", {}), (", process", {"executor": "process"}), (", deferred stager", {"stager": "deferred"}))}
        theirs = {f"async_save, {executor}{how}": ("theirs", "async", {"executor": executor, "stager": stager, "place": place(f"async-{executor}")}, None)
                  for executor in ("thread", "process") for how, stager in (("", "default"), (", stager kept", "kept"))}
        answers = self.turns({**ours, "memcpy": ("ours", "copy", {}, None), "dcp, save": ("ours", "save", {"place": place("ours"), "files": 4}, None), **theirs})
        self.compare("stall of a save in the background", "-", figure("seconds", answers), [
            ("dcp", "memcpy", 1 / 1.15, 0.002),
            ("dcp", "async_save, thread", 3), ("dcp", "async_save, thread, stager kept", None),
            ("dcp, process", "async_save, process", 3.5), ("dcp, process", "async_save, process, stager kept", None)])
        self.bounded("stall of a save in the background", "return of the call, deferred stager", statistics.median(figure("seconds", answers)["dcp, deferred stager"]) * 1000, "ms", 1)
        self.compare("the same, from call to commit", "-", {**figure("commit", answers), "dcp, save": figure("seconds", answers)["dcp, save"]}, [
            ("dcp", "async_save, thread", 1.5), ("dcp", "async_save, thread, stager kept", None),
            ("dcp, process", "async_save, process", 3), ("dcp, process", "async_save, process, stager kept", None),
            ("dcp", "dcp, save", 1 / 1.2)])
        for _, _, words, _ in ours.values():
            self.both("clear")
            self.sides["ours"].do("load", place=self.latest(words["place"]))
            self.sides["theirs"].do("load", place=place("async-process"), **{"with": "files"})
            self.both("check")
        for ranks in (1, 2):
            self.start(ranks, bound=False)
            side = self.sides["ours"]
            if ranks == 1 and self.arguments.eigen:
                side.do("state", **size, dim=0)
                self.measure("products of matrices during a save", "-", {"dcp": ("ours", "compute", {"place": place("run"), "files": 4}, None), "the products alone": ("ours", "compute", {}, None)}, [("dcp", "the products alone", 1 / 1.05)])
            side.do("state", tensors=20000, rows=32, columns=32, dim=0)
            side.do("fill")
            answers = self.turns({"dcp": ("ours", "async", {"place": place("run")}, None), "memcpy": ("ours", "copy", {}, None)})
            work = f"20,000 tensors of 4 KiB on {ranks} rank{'s' if ranks > 1 else ''}, stall"
            self.compare(work, "-", figure("seconds", answers), [("dcp", "memcpy", 1, 0.010)])
            self.bounded(work, "of it planning", statistics.median(a["planning"] for a in answers["dcp"]) * 1000, "ms", 1)
            side.do("clear")
            side.do("load", place=self.latest(place("run")))
            side.do("check")

    def quantized(self):
        """Into bfloat16, and from it. Checkpoints that others wrote have no checksums; where one of ours is read, it is verified."""
        import quantized
        place = lambda name: self.work / f"quantized-{name}"
        size = {"count": 8, "rows": 4096, "columns": 4096}
        make = quantized.Maker(**size)
        for scheme in ("plain", *quantized.SCHEMES):
            make.safetensors(scheme, place(scheme))
        for kind in quantized.KINDS:
            make.gguf(kind, place(kind))
        self.start(2)
        self.both("matrices", **size, dim=0)
        ours, theirs = self.sides["ours"], self.sides["theirs"]
        ours.do("fill-matrices")
        self.measure("durable save of bfloat16", "-", {"dcp, FP8 blocks": ("ours", "save-matrices", {"place": place("ours"), "quantized": 1}, None), "dcp, as it is": ("ours", "save-matrices", {"place": place("ours-plain"), "quantized": 0}, None)},
                     [("dcp, FP8 blocks", "dcp, as it is", None)])
        for dim in (0, 1):
            self.both("matrices", **size, dim=dim)
            reader = {name: ("theirs", "load-matrices", {"place": place("ours"), "with": "quantized", "threads": threads}, None) for threads, name in QUANTIZED_READERS.items()}
            self.measure(f"load, FP8 blocks, Shard({dim})", "warm", {"dcp, verified": ("ours", "load-matrices", {"place": place("ours")}, None), "dcp, unverified": ("ours", "load-matrices", {"place": place("ours"), "verify": "none"}, None), **reader},
                         [(name, against, None) for name in ("dcp, verified", "dcp, unverified") for against in reader])
            self.same_matrices("FP8 blocks")
        self.both("matrices", **size, dim=0)
        load = lambda name, form: ("ours", "load-matrices", {"place": place(name), "as": form}, None)
        contestants = {"dcp, plain bfloat16": load("plain", "plain"), **{f"dcp, {scheme}": load(scheme, "quantized") for scheme in quantized.SCHEMES}, **{f"dcp, GGUF {kind}": load(kind, "gguf") for kind in quantized.KINDS}}
        self.measure("load to bfloat16", "warm", contestants, [(name, "dcp, plain bfloat16", None) for name in contestants if name != "dcp, plain bfloat16"])
        for kind in ("Q4_0", "Q4_K", "Q8_0"):
            self.measure(f"load, GGUF {kind}", "warm", {"dcp": load(kind, "gguf"), "gguf-py": ("theirs", "load-matrices", {"place": place(kind), "with": "gguf"}, None)}, [("dcp", "gguf-py", None)])
            self.same_matrices(kind)
        self.start(1)
        self.sides["ours"].do("matrices", **size)
        parts = {f"dcp, {name}": ("ours", "load-parts", {"place": place("fp8_block"), "parts": count}, None) for name, count in (("8 column shards", 8), ("whole", 1))}
        answers = self.turns(parts)
        self.compare("load, FP8 blocks, ranks are threads", "warm", figure("seconds", answers), [("dcp, 8 column shards", "dcp, whole", None)])
        shard, whole = (all_answers[0]["read_bytes"] for all_answers in answers.values())
        self.bounded("load, FP8 blocks, ranks are threads", "bytes read for 1 of 8 column shards, in those of the whole", shard / whole, "x", 0.13)

    def torch(self, place, size):
        """PyTorch's own format, on both sides. What is loaded was written by PyTorch, without checksums but a CRC-32 per tensor, or by us."""
        self.start(2)
        self.both("state", **size, dim=0)
        self.both("fill")
        self.measure("durable save in PyTorch's format", "-", {"dcp": ("ours", "save", {"place": place("ours-torch"), "as": "torch"}, None), "FileSystemWriter": ("theirs", "save", {"with": "files", "place": place("files")}, None)}, [("dcp", "FileSystemWriter", 1.4)])
        for dim, least in ((0, 1.0), (1, 1.8)):
            self.both("state", **size, dim=dim)
            self.measure(("load of PyTorch's, same layout", "load of PyTorch's, Shard(0) to Shard(1)")[dim], "warm", {
                "dcp, unverified": ("ours", "load", {"place": place("files"), "as": "torch", "verify": "none"}, None),
                "dcp": ("ours", "load", {"place": place("files"), "as": "torch"}, None),
                "dcp, its own": ("ours", "load", {"place": place("ours-torch"), "as": "torch"}, None),
                "FileSystemReader": ("theirs", "load", {"place": place("files"), "with": "files"}, None),
            }, [("dcp, unverified", "FileSystemReader", least), ("dcp", "FileSystemReader", None), ("dcp, its own", "FileSystemReader", None)])
            self.sides["ours"].do("clear")
            self.sides["theirs"].do("load", place=place("ours-torch"), **{"with": "files"})
            self.sides["ours"].do("load", place=place("files"), **{"as": "torch"})
            self.both("check")
        self.start(1)
        self.both("state", **size, dim=0)
        self.both("fill")
        self.measure("PyTorch's format to safetensors, 1 GiB", "warm", {
            "dcp": ("ours", "convert", {"from": place("files"), "place": place("converted")}, None),
            "dcp_to_torch_save": ("theirs", "convert", {"with": "torch_save", "from": place("files"), "place": place("converted-theirs")}, None),
            "load and HuggingFaceStorageWriter": ("theirs", "convert", {"with": "hf", "from": place("files"), "place": place("converted-theirs")}, None),
        }, [("dcp", "dcp_to_torch_save", 3), ("dcp", "load and HuggingFaceStorageWriter", 3)])
        extra = self.sides["ours"].do("convert", place=place("converted"), memory=64 << 20, **{"from": place("files")})["extra_kib"]
        self.bounded("PyTorch's format to safetensors, 1 GiB", "most memory, 64 MiB allowed", extra / 1024, "MiB", 64 + 16)
        for cache, least in (("warm", 0.7), ("cold", 0.95)):
            cold = place("ours-torch") if cache == "cold" else None
            self.measure("verify, 1 GiB", cache, {"dcp": ("ours", "verify", {"place": place("ours-torch")}, cold), "the same bytes, only read": ("ours", "read", {"place": place("ours-torch")}, cold)}, [("dcp", "the same bytes, only read", least)])
        if self.arguments.quick:
            return
        self.both("state", tensors=20000, rows=32, columns=32, dim=0)
        self.both("fill")
        for verb, least in (("save", 40), ("load", 40)):
            self.measure(f"20,000 tensors of 4 KiB in PyTorch's format, {verb}", "warm", {
                "dcp": ("ours", verb, {"place": place("small-torch-ours" if verb == "save" else "small-files"), "as": "torch"}, None),
                "FileSystemWriter" if verb == "save" else "FileSystemReader": ("theirs", verb, {"place": place("small-files"), "with": "files"}, None),
            }, [("dcp", "FileSystemWriter" if verb == "save" else "FileSystemReader", least)])
        self.both("check")
        self.measure("20,000 tensors of 4 KiB in PyTorch's format, open", "warm", {"dcp": ("ours", "open", {"place": place("small-files"), "as": "torch"}, None), "FileSystemReader.read_metadata": ("theirs", "open", {"place": place("small-files"), "with": "files"}, None)}, [("dcp", "FileSystemReader.read_metadata", 25)])

    def same_matrices(self, what):
        """Both sides must have loaded the same."""
        digests = {name: side.do("digest")["digest"] for name, side in self.sides.items()}
        if len(set(digests.values())) > 1:
            sys.exit(f"{what}: the two sides loaded different values: {digests}")

    @staticmethod
    def latest(root):
        return f"{root}/{pathlib.Path(root, 'latest').read_text().strip()}"

    def plan_milliseconds(self, schema):
        """The planner of examples/simulate.cpp, on ranks over the whole job."""
        lines = subprocess.run([self.arguments.simulate, "--schema", schema, "--ranks", "8960", "--planned", "40"], check=True, capture_output=True, text=True).stdout.splitlines()
        begin = next(i for i, line in enumerate(lines) if line.split()[:1] == ["rank"])
        return statistics.median(float(line.split()[2]) for line in lines[begin + 1:] if line.strip())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--simulate", help="the program of examples/simulate.cpp, for the rows of planning")
    parser.add_argument("--uring", action="store_true", help="the program was built with liburing")
    parser.add_argument("--eigen", action="store_true", help="the program was built with Eigen")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--work", required=True)
    parser.add_argument("--repeats", type=int, default=8, help="the first is dropped")
    parser.add_argument("--only", default="", help="of: save,load,async,small,open,plan,quantized,torch")
    parser.add_argument("--quick", action="store_true", help="without cold caches and small tensors")
    parser.add_argument("--json")
    parser.add_argument("--svg")
    parser.add_argument("--markdown", help="the table of README.md")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    try:
        bench.run()
    finally:
        bench.end()
    machine = {"system": platform.platform(), "processor": processor(), "processors": os.cpu_count(), "python": platform.python_version(), **versions()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    missed = sum(not met(row) for row in bench.rows) + sum(limit["value"] > limit["most"] for limit in bench.limits)
    print(f"{missed} targets missed" if missed else "all targets met")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"machine": machine, "rows": bench.rows, "limits": bench.limits}, indent=1))
    if arguments.markdown:
        pathlib.Path(arguments.markdown).write_text(table(bench.rows, bench.limits))
    if arguments.svg:
        pathlib.Path(arguments.svg).write_text(chart(bench.rows, machine))


def met(row):
    return row["target"] is None or statistics.median(row["seconds"]) <= statistics.median(row["against_seconds"]) / row["target"] + row["beyond"]


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def versions():
    from importlib.metadata import version
    return {name: version(name) for name in ("torch", "safetensors", "gguf")}


QUANTIZED_READERS = {1: "quantized reader", 2: "quantized reader, 2 threads"}
NAMES = {**{name: f"QuantizedHuggingFaceStorageReader, thread_count={threads}" for threads, name in QUANTIZED_READERS.items()}, "gguf-py": "gguf-py's dequantize and a cast", "hf writer, consolidated": "HuggingFaceStorageWriter, consolidated", "O_DIRECT, 1 in flight": "O_DIRECT writes, one in flight, and fsync",
         **{f"async_save, {executor}{how}": f"PyTorch's async_save, {executor} executor{how}" for executor in ("thread", "process") for how in ("", ", stager kept")}}


def table(rows, limits):
    def seconds(values):
        return f"{statistics.median(values):.3f} s [{min(values):.3f} {max(values):.3f}]"

    out = ["| work | dcp | against | times as fast |", "|---|---|---|---|"]
    for row in rows:
        work = row["work"] + (f", {row['cache']}" if row["cache"] != "-" else "") + (f" ({row['ours'].removeprefix('dcp, ')})" if row["ours"] != "dcp" else "")
        out.append(f"| {work} | {seconds(row['seconds'])} | {NAMES.get(row['against'], row['against'])} {seconds(row['against_seconds'])} | {row['ratio']:.2f} |")
    out += [f"| {limit['work']}: {limit['what']} | {limit['value']:.2f} {limit['unit']} | | |" for limit in limits if limit["unit"] != "MiB"]
    return "\n".join(out) + "\n"


def chart(rows, machine):
    """Ratios as bars, on a logarithmic scale: right of the line dcp is faster."""
    height, left, right, scale = 22, 420, 360, 90
    rows = [row for row in rows if not row["against"].startswith("dcp")]
    width = left + right + 120
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(rows) + 60}" font-family="sans-serif" font-size="11">',
           f'<rect width="{width}" height="{height * len(rows) + 60}" fill="white"/>',
           f'<text x="10" y="16" font-weight="bold">Times as fast as (medians, {machine["processors"]} processors)</text>']
    one = left + 40
    for i, row in enumerate(rows):
        y = 30 + i * height
        length = math.log2(max(row["ratio"], 0.26)) * scale / 1.5
        x, w = (one, length) if length >= 0 else (one + length, -length)
        out += [f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{row["work"]}, {row["cache"]}: {row["against"]}</text>'.replace(", -:", ":"),
                f'<rect x="{x:.0f}" y="{y + 3}" width="{max(w, 1):.0f}" height="{height - 7}" fill="{"#2b7" if row["ratio"] >= 1 else "#c73"}"/>',
                f'<text x="{max(one, one + length) + 6:.0f}" y="{y + 14}">{row["ratio"]:.2f}x  ({statistics.median(row["seconds"]):.3f} s)</text>']
    out += [f'<line x1="{one}" y1="26" x2="{one}" y2="{30 + height * len(rows)}" stroke="black"/>',
            f'<text x="10" y="{50 + height * len(rows)}" fill="#555">{machine["processor"]}, torch {machine["torch"]}, safetensors {machine["safetensors"]}</text>', "</svg>"]
    return "\n".join(out) + "\n"


if __name__ == "__main__":   # gpu.py uses what is above
    main()
