#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What dcp costs a compiler, in seconds of user time: including dcp/dcp.hpp, next to including nlohmann/json.hpp; and 400 types of
# tensors in one state, next to one type.
#
#   tests/bench/compile_cost.sh [repetitions, 8 if not given; the first is dropped] [compiler...]
#
# Repetitions are interleaved, so that a busy machine makes everything slower and not one thing. Printed are the median and, in
# brackets, the smallest and largest of the repetitions.
set -eu -o pipefail

repetitions=${1:-8}
shift || true
[ "$repetitions" -ge 2 ] || { echo "at least 2 repetitions: the first is dropped" >&2; exit 2; }
compilers=()
for compiler in "${@:-g++ clang++}"; do
  for name in $compiler; do
    if command -v "$name" >/dev/null; then compilers+=("$name"); else echo "left out: $name was not found" >&2; fi
  done
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

{ echo '#include <nlohmann/json.hpp>'; echo 'int main() {}'; } >"$work/json.cpp"
{ echo '#include <dcp/dcp.hpp>'; echo 'int main() {}'; } >"$work/dcp.cpp"

# A model of 400 tensors of $1 types.
model() {
  local elements=(float double std::int32_t std::uint8_t) k t
  local placements=('Shard<0>, Replicate' 'Replicate, Shard<1>' 'Shard<0>, Shard<1>' 'Replicate, Replicate')
  echo '#include <dcp/dcp.hpp>'
  echo 'using namespace dcp;'
  echo 'struct Model {'
  echo '  explicit Model(SelfComm const& self) : mesh{self, {1, 1}} {}'
  echo '  DeviceMesh<2> mesh;'
  for t in 0 1 2 3; do echo "  std::vector<${elements[t]}> memory$t = std::vector<${elements[t]}>(1 << 16);"; done
  for ((k = 0; k < 400; ++k)); do
    t=$((k % $1))
    echo "  ShardedTensor<${elements[t % 4]}, Placement<${placements[t / 4 % 4]}>, Shape<$((8 + t / 16)), 16>> t$k{mesh, memory$((t % 4))};"
  done
  echo '  StateDict state() {'
  echo '    return {'
  for ((k = 0; k < 400; ++k)); do echo "        {\"layer.$k.weight\", t$k},"; done
  echo '    };'
  echo '  }'
  echo '};'
  echo 'int main() {'
  echo '  SelfComm self;'
  echo '  Model model{self};'
  echo '  return model.state().size() == 400 ? 0 : 1;'
  echo '}'
}
model 1 >"$work/types1.cpp"
model 400 >"$work/types400.cpp"

measured=(json/-fsyntax-only dcp/-fsyntax-only json/-c dcp/-c types1/-c types400/-c)
TIMEFORMAT=%U
for ((r = 0; r < repetitions; ++r)); do
  for compiler in "${compilers[@]}"; do
    for what in "${measured[@]}"; do
      file=${what%/*} mode=${what#*/}
      if [ "$mode" = -c ]; then flags=(-c -o "$work/out.o"); else flags=("$mode"); fi
      if ! seconds=$({ time "$compiler" -std=c++20 -I"$root/include" "${flags[@]}" "$work/$file.cpp" 2>"$work/errors"; } 2>&1); then
        cat "$work/errors" >&2
        exit 1
      fi
      if [ "$r" -gt 0 ]; then echo "$seconds" >>"$work/$compiler.$file$mode"; fi
    done
  done
done

# "median [smallest - largest]" and the median alone
median() { sort -n "$1" | awk '{ v[NR] = $1 } END { printf "%.3f", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
spread() { sort -n "$1" | awk '{ v[NR] = $1 } END { printf "[%.2f - %.2f]", v[1], v[NR] }'; }

nproc=$(nproc)
model=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
echo "user time in seconds, median of $((repetitions - 1)) [smallest - largest]; ${model:-$(uname -m)}, $nproc processors"
for compiler in "${compilers[@]}"; do
  echo
  "$compiler" --version | head -n 1
  for mode in -fsyntax-only -c; do
    json=$(median "$work/$compiler.json$mode") dcp=$(median "$work/$compiler.dcp$mode")
    printf '  %-14s nlohmann/json.hpp %s %s   dcp/dcp.hpp %s %s   ratio %s (limit 2)\n' "$mode" "$json" "$(spread "$work/$compiler.json$mode")" \
      "$dcp" "$(spread "$work/$compiler.dcp$mode")" "$(awk "BEGIN { printf \"%.2f\", $dcp / $json }")"
  done
  one=$(median "$work/$compiler.types1-c") many=$(median "$work/$compiler.types400-c")
  printf '  %-14s 1 type %s %s   400 types %s %s   difference %s (limit 2)\n' -c "$one" "$(spread "$work/$compiler.types1-c")" "$many" "$(spread "$work/$compiler.types400-c")" \
    "$(awk "BEGIN { printf \"%.2f\", $many - $one }")"
done
