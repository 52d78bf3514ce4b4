#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Benchmarks on one GPU: what dcp takes to stage, save and load tensors on a device, next to plain copies, plain writes, PyTorch and safetensors.
#
#   tests/bench/gpu.sh                  8 GiB, or less where the GPU, the disk or the memory has less; 6 turns each, the first of which is dropped
#   tests/bench/gpu.sh --quick          2 GiB, 4 turns: under four minutes with building
#   tests/bench/gpu.sh --only async,save,load,quantized,compute     --gib N     --repeats N     --json FILE
#   tests/bench/gpu.sh --dry            without a GPU, and memory of the host in its place: whether every row runs. The figures mean nothing
#   tests/bench/gpu.sh --build FILE     only builds the program (with --dry: that of a dry run), for a machine without a toolkit, which takes it by --program FILE
#
# Needs g++, the CUDA toolkit (CUDA_HOME, that of nvcc in PATH, or /usr/local/cuda), nlohmann/json.hpp (DCP_JSON_INCLUDE: where it lies) and python3. Installs
# nothing and fetches nothing. Rows against PyTorch need a Python that has it: DCP_PYTHON, the environment of tests/run.sh, or python3. Without a GPU it says "not
# measured", and the exit status is 0. Environment: DCP_BENCH_DIR (build/bench: checkpoints are written to gpu-work below it), DCP_CUBLAS (the directory of
# libcublas.so, where neither the system nor PyTorch has it: the products of matrices are its).
set -eu -o pipefail

# shellcheck source=tests/support/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/../support/install.sh"
cd "$dcp_root"
options=() dry="" program="" build_only=""
while [ $# -gt 0 ]; do
  case $1 in
    --quick) options+=(--gib 2 --repeats 4) ;;
    --dry) dry=yes; options+=(--dry --gib 0.1 --repeats 3) ;;
    --program) program=$2; shift ;;
    --build) build_only=$2; shift ;;
    --help) sed -n '3,14s/^# \{0,1\}//p' "$0"; exit ;;
    *) options+=("$1") ;;
  esac
  shift
done
not_measured() { echo "not measured: $*"; exit 0; }

if [ -z "$dry$build_only" ] && ! { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }; then not_measured "there is no GPU"; fi
if [ -z "$program" ]; then
  dcp_has g++ || not_measured "g++ 12 or later was not found"
  flags=(-std=c++20 -O2 -DNDEBUG -Iinclude) libraries=(-static-libstdc++ -static-libgcc -lpthread -ldl)   # and so for machines with another g++, or none
  json=""
  for json in ${DCP_JSON_INCLUDE:+"$DCP_JSON_INCLUDE"} "" build/*/_deps/*json*/include build/*/_deps/*json*/single_include; do
    if dcp_includes nlohmann/json.hpp ${json:+"-I$json"}; then break; fi
    json=none
  done
  [ "$json" != none ] || not_measured "nlohmann/json.hpp was not found; DCP_JSON_INCLUDE can say where it lies"
  if [ -n "$json" ]; then flags+=(-isystem "$json"); fi
  if [ -n "$dry" ]; then
    flags+=(-DDCP_BENCH_DRY)
  else
    nvcc=$(command -v nvcc || true)
    toolkit=""
    for toolkit in ${CUDA_HOME:+"$CUDA_HOME"} ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} /usr/local/cuda /usr; do
      if [ -e "$toolkit/include/cuda_runtime_api.h" ]; then break; fi
      toolkit=""
    done
    [ -n "$toolkit" ] || not_measured "the CUDA toolkit was not found; CUDA_HOME can say where it lies"
    flags+=(-isystem "$toolkit/include") libraries=(-L"$toolkit/lib64" -L"$toolkit/lib" -lcudart_static -lrt "${libraries[@]}")
    if [ "$toolkit" = /usr ]; then flags=("${flags[@]/#-isystem/-idirafter}"); fi   # as a system directory it would come before g++'s own
  fi
  program=${build_only:-build/bench/bench_gpu${dry:+_dry}}
  mkdir -p "$(dirname "$program")"
  if ! [ "$program" -nt tests/bench/gpu.cpp ] || [ -n "$(find include -newer "$program" -print -quit)" ]; then
    g++ "${flags[@]}" tests/bench/gpu.cpp -o "$program" "${libraries[@]}"
  fi
fi
if [ -n "$build_only" ]; then exit 0; fi
if [ -z "$dry" ] && ! reason=$("$program" --info 2>&1 >/dev/null); then not_measured "$reason"; fi
driver=$(command -v python3 || true)
[ -n "$driver" ] || not_measured "python3 was not found"

torch=${DCP_PYTHON:-}
if [ -z "$torch" ] && dcp_python_environment --if-there >/dev/null; then torch=$dcp_python; fi
if [ -z "$torch" ] && "$driver" -c 'import torch' 2>/dev/null; then torch=$driver; fi
if [ -n "$torch" ]; then
  options+=(--torch "$torch")
  for library in "$("$torch" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null || true)"/nvidia/*/lib/libcublas.so.1?; do   # that of PyTorch does as well
    if [ -z "${DCP_CUBLAS:-}" ] && [ -e "$library" ]; then DCP_CUBLAS=$(dirname "$library"); export DCP_CUBLAS; fi
  done
fi
exec "$driver" tests/bench/gpu.py --program "$program" --work "${DCP_BENCH_DIR:-build/bench}/gpu-work" "${options[@]}"
