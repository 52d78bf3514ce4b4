#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of dcp on a Debian or Ubuntu machine as it comes: installs what is missing, builds, tests.
#
#   tests/run.sh            g++: all tests, packaging, compile errors, fuzzers; compiled by clang++: the same code under the address and
#                           undefined-behaviour sanitizers, and under the thread sanitizer
#   tests/run.sh --full     also compiled by clang++ without sanitizers, with the examples
#   tests/run.sh --quick    only the g++ build, without making the PyTorch environment
#   tests/run.sh --long     all of it; campaigns (random laws, crashes, fuzzers) run long: hours
#
# Can be run again at any time; builds lie in build/. Ends with each build's result, what was not run and why, and a verdict.
# Environment: DCP_JOBS (number of processors), DCP_CACHE (~/.cache/dcp: the PyTorch environment).
set -u -o pipefail

mode=default
for argument in "$@"; do
  case $argument in
    --quick) mode=quick ;;
    --full) mode=full ;;
    --long) mode=long ;;
    *) sed -n '3,12s/^# \{0,1\}//p' "$0"; [ "$argument" = --help ]; exit ;;
  esac
done

# shellcheck source=tests/support/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/support/install.sh"
cd "$dcp_root" || exit 1
jobs=${DCP_JOBS:-$(nproc)}
results=() not_run=() failed=0 passed_tests=0 failed_tests=0

dcp_say "Packages: compilers and libraries that the tests need"
if ! dcp_install g++ cmake ninja-build nlohmann-json3-dev doctest-dev; then
  echo "dcp tests: FAILED (nothing can be built without these packages)"
  exit 1
fi
# Each of these is one part of the tests; what cannot be had is named at the end.
dcp_install ccache clang libcli11-dev libeigen3-dev liburing-dev libcurl4-openssl-dev libopenmpi-dev openmpi-bin python3-venv || true
if dcp_has clang; then dcp_install libclang-rt-dev || true; fi
echo "$(g++ --version | head -n 1); $(cmake --version | head -n 1); $(clang++ --version 2>/dev/null | head -n 1 || echo 'no clang++'); $jobs jobs"

dcp_say "Python: PyTorch, safetensors and gguf, whose checkpoints ours are compared with"
if [ $mode = quick ]; then dcp_python_environment --if-there; else dcp_python_environment; fi
if [ -n "$dcp_python" ]; then echo "$dcp_python"; else echo "left out: $dcp_python_reason"; fi

dcp_s3_environment
if [ -n "$dcp_s3_python" ]; then echo "$dcp_s3_python"; else echo "left out: $dcp_s3_python_reason"; fi

if [ $mode = quick ] && [ -z "$dcp_python" ]; then dcp_model="" dcp_model_reason="--quick"; else dcp_published_model; fi
if [ -n "$dcp_model" ]; then echo "$dcp_model"; else echo "published model left out: $dcp_model_reason"; fi

launcher=""
if command -v ccache >/dev/null; then
  launcher=ccache
  export CCACHE_BASEDIR=$dcp_root CCACHE_NOHASHDIR=1   # a fresh clone elsewhere finds what this one compiled
  export CCACHE_SLOPPINESS=pch_defines,time_macros     # what it asks of those who precompile headers
fi

# build_and_test NAME WHY COMPILER PARTS [cmake option...]; the variable `wrapper` is put before ctest, `optimisation` is the compiler's
build_and_test() {
  local name=$1 why=$2 compiler=$3 parts=$4 directory=build/$1 summary status before=$SECONDS
  shift 4
  dcp_say "$name: $why"
  if [ -f "$directory/CMakeCache.txt" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$dcp_root" "$directory/CMakeCache.txt"; then
    rm -rf "$directory"   # the checkout was moved
  fi
  mkdir -p "$directory"
  echo "building in $directory (log: $directory/build.log)"
  if ! { cmake -S . -B "$directory" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" \
           -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="$optimisation -g1" -DDCP_TEST_PARTS="$parts" \
           -DDCP_PYTHON="$dcp_python" -DDCP_PYTHON_REASON="$dcp_python_reason" \
           -DDCP_S3_PYTHON="$dcp_s3_python" -DDCP_S3_PYTHON_REASON="$dcp_s3_python_reason" \
           -DDCP_MODEL="$dcp_model" -DDCP_MODEL_REASON="$dcp_model_reason" \
           -DDCP_LONG="$([ $mode = long ] && echo ON || echo OFF)" "$@" &&
         cmake --build "$directory" --parallel "$jobs" -- -k 0; } >"$directory/build.log" 2>&1; then
    grep -E -A 12 'FAILED:|error|Error' "$directory/build.log" | head -n 80
    results+=("$name: does not build, see $directory/build.log")
    failed=1
    return
  fi
  echo "built in $((SECONDS - before)) s"
  "${wrapper[@]}" ctest --test-dir "$directory" --parallel "$jobs" --output-on-failure --no-tests=error 2>&1 | tee "$directory/ctest.log"
  status=${PIPESTATUS[0]}
  # "100% tests passed, 0 tests failed out of 31"; newer versions leave the middle out when nothing failed
  summary=$(grep -E '^[0-9]+% tests passed' "$directory/ctest.log" | tail -n 1)
  results+=("$name: ${summary:-ctest ended without a summary} ($((SECONDS - before)) s)")
  local all bad
  all=$(sed -n 's/.* out of \([0-9]*\)$/\1/p' <<<"$summary")
  bad=$(sed -n 's/.* \([0-9]*\) tests\{0,1\} failed out of.*/\1/p' <<<"$summary")
  failed_tests=$((failed_tests + ${bad:-0})) passed_tests=$((passed_tests + ${all:-0} - ${bad:-0}))
  if [ "$status" -ne 0 ] || [ -z "$summary" ]; then failed=1; fi
  mapfile -t -O "${#not_run[@]}" not_run < <(grep . "$directory/not_run.txt")
  mapfile -t -O "${#not_run[@]}" not_run < <(sed -n 's/^not run: //p' "$directory/Testing/Temporary/LastTest.log")   # what a test found out by itself
}

every_build="units;mpi;s3;examples"
wrapper=() optimisation=-O1
build_and_test gcc "all tests" g++ "$every_build;floors;headers;compile_fail;packaging;fuzz;python"
if [ $mode != quick ]; then
  # clang++ takes two thirds of the time that g++ takes with these sanitizers; g++'s stand in where there is no clang++.
  sanitizing=clang++
  dcp_has clang || sanitizing=g++
  optimisation=-O0   # -O1 takes this compiler two and a half times as long, and the tests half their time
  build_and_test asan "the same code, compiled by $sanitizing, under the address and undefined-behaviour sanitizers" $sanitizing "units;mpi;s3" -DDCP_BUILD_EXAMPLES=OFF -DDCP_SANITIZE="address;undefined"

  # On kernels with much address space randomisation the programs of some compilers start only without it.
  probe=$(mktemp -d)
  echo 'int main() {}' >"$probe/main.cpp"
  tsan=yes
  if ! $sanitizing -fsanitize=thread "$probe/main.cpp" -o "$probe/main" 2>/dev/null; then
    not_run+=("thread sanitizer ($sanitizing cannot link with it)")
    tsan=""
  elif ! "$probe/main" 2>/dev/null; then
    wrapper=(setarch "$(uname -m)" -R)
    if ! "${wrapper[@]}" "$probe/main" 2>/dev/null; then
      not_run+=("thread sanitizer (its programs do not start on this kernel)")
      tsan=""
    fi
  fi
  rm -rf "$probe"
  if [ -n "$tsan" ]; then build_and_test tsan "the same code, compiled by $sanitizing, under the thread sanitizer" $sanitizing "units" -DDCP_BUILD_EXAMPLES=OFF -DDCP_SANITIZE=thread; fi
  wrapper=() optimisation=-O1

  if ! dcp_has clang; then
    not_run+=("clang++ build (clang++ was not found)")
  elif [ $mode = full ] || [ $mode = long ]; then
    build_and_test clang "the same code compiled by clang++, without sanitizers" clang++ "$every_build"
  fi
else
  not_run+=("clang++ build and sanitizers (--quick)")
fi

dcp_say "Results"
printf '%s\n' "${results[@]}"
echo "$passed_tests passed, $failed_tests failed"
if [ ${#not_run[@]} -eq 0 ]; then
  echo "not run: nothing"
else
  mapfile -t not_run < <(printf '%s\n' "${not_run[@]}" | awk '!seen[$0]++')
  printf -v line '%s; ' "${not_run[@]}"
  echo "not run: ${line%; }"
fi
if [ $failed -eq 0 ]; then echo "dcp tests: PASSED"; else echo "dcp tests: FAILED"; fi
exit $failed
