#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Benchmarks: what dcp takes to save and load, next to PyTorch's distributed checkpoint and safetensors on the same machine, in turns.
#
#   tests/bench/run.sh            every row, 8 turns each, the first of which is dropped: about ten minutes
#   tests/bench/run.sh --quick    three turns, warm, large tensors: a minute's look
#   tests/bench/run.sh --only save,load,async,small,open,plan,quantized,torch
#
# Installs what is missing, builds with -O2, prints one table and writes it to build/bench/results.json, .svg (the chart) and .md (the
# table of README.md).
# Rows are medians with the smallest and largest turn in brackets. Environment: DCP_BENCH_DIR (build/bench: in a folder dcp-bench-work there, which is emptied, checkpoints are
# written, about 8 GiB), DCP_CACHE (~/.cache/dcp: the PyTorch environment).
set -eu -o pipefail

# shellcheck source=tests/support/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/../support/install.sh"
cd "$dcp_root"
options=()
for argument in "$@"; do
  case $argument in
    --quick) options+=(--repeats 4 --quick) ;;
    --help) sed -n '3,13s/^# \{0,1\}//p' "$0"; exit ;;
    *) options+=("$argument") ;;
  esac
done

dcp_install g++ cmake ninja-build nlohmann-json3-dev libopenmpi-dev openmpi-bin python3-venv
dcp_install liburing-dev || true    # without it there are no rows of io_uring
dcp_install libeigen3-dev || true   # and without this none of what is computed during a save
dcp_python_environment
[ -n "$dcp_python" ] || { echo "no benchmarks: $dcp_python_reason" >&2; exit 1; }
mkdir -p build
cmake -S . -B build/bench -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" -DDCP_BUILD_TESTS=OFF -DDCP_BUILD_EXAMPLES=OFF -DDCP_BUILD_BENCHMARKS=ON >build/bench.log 2>&1 || { cat build/bench.log; exit 1; }
cmake --build build/bench >>build/bench.log 2>&1 || { cat build/bench.log; exit 1; }

mpirun=(mpirun)
if [ "$(id -u)" -eq 0 ]; then mpirun+=(--allow-run-as-root); fi
if dcp_has liburing-dev; then options+=(--uring); fi
if dcp_has libeigen3-dev; then options+=(--eigen); fi
exec "$dcp_python" tests/bench/bench.py --program build/bench/bench_ranks --simulate build/bench/bench_simulate --mpirun "${mpirun[*]} --oversubscribe" --work "${DCP_BENCH_DIR:-build/bench}/dcp-bench-work" \
  --json build/bench/results.json --svg build/bench/results.svg --markdown build/bench/results.md "${options[@]}"
