#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian or Ubuntu machine to a training run that saves in the background, is killed while it does, goes on with other ranks,
# is told to end (SIGTERM), goes on again, and ends with the bits of a run that was never interrupted. Three minutes after what is missing
# has been installed.
#
#   bash examples/quickstart.sh                  all of it
#   bash examples/quickstart.sh --model DIR      also loads, reshards and saves the Hugging Face model in DIR
#   bash examples/quickstart.sh --seconds        what each part took, besides
#
# Can be run again at any time; everything is under build/quickstart. Environment: DCP_CACHE (~/.cache/dcp: a Python environment).
set -u -o pipefail

model="" show_seconds=""
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$(realpath -e -- "${2:?--model takes a directory}") || exit 2; shift ;;
    --seconds) show_seconds=1 ;;
    *) sed -n '3,11s/^# \{0,1\}//p' "$0"; [ "$1" = --help ]; exit ;;
  esac
  shift
done

# shellcheck source=tests/support/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/../tests/support/install.sh"
cd "$dcp_root" || exit 1
build=$dcp_root/build/quickstart
run=$build/run
interrupted=$run/interrupted   # a directory for each checkpoint below it
steps=40
not_shown=() job=""

fail() {
  printf '\n%s\ndcp quickstart: FAILED\n' "$*"
  exit 1
}
say() {
  dcp_say "${show_seconds:+[$SECONDS s] }$*"
}

say "Packages: a compiler, CMake and Ninja to build; nlohmann-json for the library; Eigen and Open MPI for the training"
dcp_install g++ cmake ninja-build nlohmann-json3-dev libeigen3-dev libopenmpi-dev openmpi-bin || fail "nothing can be built without these packages"
echo "all there"
SECONDS=0

say "Building examples/trainer.cpp and examples/reshard_model.cpp in build/quickstart"
mkdir -p "$build"
if [ -f "$build/CMakeCache.txt" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$dcp_root" "$build/CMakeCache.txt"; then
  rm -rf "$build"   # the checkout was moved
  mkdir -p "$build"
fi
targets=(example_trainer)
if [ -n "$model" ]; then targets+=(example_reshard_model); fi
if ! { cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" \
         -DDCP_BUILD_TESTS=OFF -DDCP_WITH_MPI=ON -DDCP_WITH_EIGEN=ON &&
       cmake --build "$build" --target "${targets[@]}"; } >"$build/build.log" 2>&1; then
  tail -n 40 "$build/build.log"
  fail "does not build, see $build/build.log"
fi
trainer=$build/examples/trainer
echo "built"

rm -rf "$run"
mkdir -p "$run/ranks" "$run/logs"
launch=(mpirun)
if mpirun --version 2>&1 | grep -q -E 'Open MPI|OpenRTE'; then
  launch+=(--oversubscribe)
  if [ "$(id -u)" -eq 0 ]; then launch+=(--allow-run-as-root); fi
  export OMPI_MCA_btl_vader_single_copy_mechanism=none   # containers forbid it
fi

signal_ranks() {
  local processes=("$run"/ranks/*)
  kill "$1" "${processes[@]##*/}" 2>/dev/null
}
# Ctrl-C in the middle must not leave ranks behind.
trap 'if [ -n "$job" ]; then signal_ranks -KILL; fi' EXIT

# train LOG RANKS MESH ARGUMENTS...: the trainer, its output in a log. Each rank notes its process id, for the one who kills it.
train() {
  local log=$run/logs/$1 ranks=$2 mesh=$3
  shift 3
  rm -f "$run"/ranks/*
  # shellcheck disable=SC2016   # expanded by the ranks' shells
  "${launch[@]}" -np "$ranks" sh -c 'echo >"$0/$$"; exec "$@"' "$run/ranks" "$trainer" --mesh "$mesh" "$@" >"$log" 2>&1
}
must_train() {
  train "$@" || { cat "$run/logs/$1"; fail "training failed"; }
}
losses() { grep -h -E '^step [0-9]+ loss -?0x' "$@"; }
reached() { losses "$1" | tail -n 1 | cut -d ' ' -f 2; }
save_every=(--save-every 2)

say "Training, never interrupted: $steps steps on one rank"
must_train reference 1 1x1 --steps $steps "${save_every[@]}" --checkpoint "$run/reference"
losses "$run/logs/reference" | sed -n "1,3p; ${steps}p"
grep '^saved' "$run/logs/reference" | tail -n 1
tail -n 1 "$run/logs/reference"

# The records of saves that are under way, of which some data has been written; or that were, when all ranks were killed.
under_way() {
  compgen -G "$interrupted/step-*.dcp-*/optimizer/*.safetensors" >/dev/null && grep -l -s '"state": *"open"' "$interrupted"/step-*.dcp-*/dcp.json
}

say "The same on 4 ranks (mesh 2 x 2), all killed with SIGKILL at a random time at which a save is under way behind the training"
killed=""
for ((try = 1; try <= 20 && ${#killed} == 0; ++try)); do
  train "killed-$try" 4 2x2 --steps $steps "${save_every[@]}" --checkpoint "$interrupted" &
  job=$!
  sleep "$((RANDOM % 4)).$((RANDOM % 10))"
  while kill -0 $job 2>/dev/null; do
    # Not the first save: there shall be a checkpoint to go on from.
    if [ -e "$interrupted/latest" ] && under_way >/dev/null; then
      signal_ranks -KILL
      break
    fi
  done
  wait $job 2>/dev/null
  job=""
  killed=$(under_way | head -n 1)
  if [ -z "$killed" ]; then
    echo "try $try: the save was over before the signal came"
    if [ "$(reached "$run/logs/killed-$try")" = "$steps" ]; then rm -rf "$interrupted"; fi   # so was the run: a new one
  fi
done
[ -n "$killed" ] || fail "no kill hit a save"
killed=${killed%/dcp.json}
grep '^saved' "$run/logs/killed-$((try - 1))" | tail -n 1
losses "$run/logs/killed-$((try - 1))" | tail -n 1
echo "left behind: ${killed##*/}, state open: $(cd "$killed" && find . -name '*.safetensors' -printf '%P (%s bytes) ')"
echo "the newest complete checkpoint: $(cat "$interrupted/latest")"

say "Going on with 2 ranks (mesh 1 x 2), until one of them is told to end (SIGTERM)"
train on-2 2 1x2 --steps $steps "${save_every[@]}" --checkpoint "$interrupted" &
job=$!
while kill -0 $job 2>/dev/null && ! losses "$run/logs/on-2" >/dev/null 2>&1; do sleep 0.02; done
ranks=("$run"/ranks/*)
kill -TERM "${ranks[0]##*/}"
wait $job || { cat "$run/logs/on-2"; fail "training failed"; }
job=""
grep -E '^(load|training|SIGTERM)' "$run/logs/on-2"
grep -q "^SIGTERM.* after step $(reached "$run/logs/on-2"), which is saved" "$run/logs/on-2" || fail "SIGTERM did not end the run with a save"
[ ! -e "$killed" ] || fail "$killed was not cleaned up"

say "Going on with 3 ranks (mesh 3 x 1)"
must_train on-3 3 3x1 --steps $steps "${save_every[@]}" --checkpoint "$interrupted"
grep -E '^(load|training)' "$run/logs/on-3"
losses "$run/logs/on-3" | tail -n 1

say "Bit for bit?"
losses "$run/logs/reference" | sort -u >"$run/losses-reference"
losses "$run"/logs/killed-* "$run"/logs/on-* | sort -u >"$run/losses-interrupted"
cmp "$run/losses-reference" "$run/losses-interrupted" || fail "the losses differ"
echo "the losses of all $(wc -l <"$run/losses-reference") steps are equal, those computed twice included"
reference=$run/reference/$(cat "$run/reference/latest") checkpoint=$interrupted/$(cat "$interrupted/latest") files=0
while read -r file; do
  cmp "$reference/$file" "$checkpoint/$file" || fail "the checkpoints differ"
  echo "${checkpoint##*/}/$file: $(stat -c %s "$checkpoint/$file") equal bytes"
  files=$((files + 1))
done < <(cd "$reference" && find . -type f ! -name dcp.json -printf '%P\n' | sort)
[ "$files" -ge 4 ] || fail "the checkpoint lacks files"

say "What the order of sums is worth: --fast-sums adds as it comes"
must_train ordered-4 4 2x2 --steps 12
must_train fast-2 2 2x1 --steps 12 --fast-sums
must_train fast-4 4 2x2 --steps 12 --fast-sums
printf '%-10s%-24s%-24s%s\n' "" "ordered, any mesh" "fast, 2 ranks" "fast, 4 ranks"
paste -d ' ' <(losses "$run/logs/ordered-4") <(losses "$run/logs/fast-2") <(losses "$run/logs/fast-4") |
  awk 'NR % 3 == 0 { printf "step %-5s%-24s%-24s%s\n", $2, $4, $9, $14 }'
echo "ordered $(tail -n 1 "$run/logs/ordered-4"), fast $(tail -n 1 "$run/logs/fast-4"): 4 ranks, $(nproc) processors"
cmp -s <(losses "$run/logs/reference" | head -n 12) <(losses "$run/logs/ordered-4") || fail "ordered sums gave other bits"
if cmp -s <(losses "$run/logs/fast-2") <(losses "$run/logs/fast-4"); then fail "unordered sums gave the same bits; then this shows nothing"; fi

say "A flipped byte is refused"
broken=$run/broken
mkdir "$broken"
cp -r "$checkpoint" "$broken"
victim=$(find "$broken/${checkpoint##*/}" -maxdepth 1 -name '*.safetensors' | sort | head -n 1)
at=$(($(stat -c %s "$victim") / 2))
byte=$(od -An -tu1 -j $at -N 1 "$victim")
# shellcheck disable=SC2059   # the format is the byte
printf "\\x$(printf %02x $((byte ^ 1)))" | dd of="$victim" bs=1 seek=$at conv=notrunc status=none
if train broken 2 2x1 --steps $((steps + 1)) --checkpoint "$broken"; then fail "a checkpoint with a flipped byte was loaded"; fi
grep -E '^(dcp:|  (code|rank|during|file|hint) )' "$run/logs/broken"
grep -q '^  code *corrupt' "$run/logs/broken" || { cat "$run/logs/broken"; fail "refused for another reason"; }

say "The checkpoint in Python, with the safetensors package"
environment=$dcp_cache/quickstart-python
if [ ! -x "$environment/bin/python" ] || ! "$environment/bin/python" -c 'import numpy, safetensors' 2>/dev/null; then
  dcp_has python3-venv || dcp_install python3-venv || true
  if ! python=$(dcp_base_python); then
    reason="there is no Python >= 3.10 with venv"
  else
    echo "making $environment with the packages numpy and safetensors"
    rm -rf "$environment"
    if ! { "$python" -m venv "$environment" &&
           "$environment/bin/python" -m pip install --quiet --disable-pip-version-check numpy safetensors; } >"$run/logs/pip" 2>&1; then
      tail -n 2 "$run/logs/pip"
      rm -rf "$environment"
      reason="the packages numpy and safetensors could not be installed"
    fi
  fi
fi
if [ -n "${reason:-}" ]; then
  echo "not shown: $reason"
  not_shown+=("Python ($reason)")
else
  "$environment/bin/python" examples/read_with_safetensors.py "$checkpoint" LICENSE || fail "Python does not read what was saved"
fi

if [ -n "$model" ]; then
  say "The model in $model: loaded by 4 ranks, saved, loaded by 3 ranks, saved, compared"
  "$build/examples/reshard_model" "$model" "$run/model" >"$run/logs/model" 2>&1 || { cat "$run/logs/model"; fail "the model did not survive"; }
  tail -n 1 "$run/logs/model"
fi

say "Done in $SECONDS s after installation. The trainer to read, and to start from, is examples/trainer.cpp"
if [ ${#not_shown[@]} -gt 0 ]; then printf 'not shown: %s\n' "${not_shown[@]}"; fi
echo "dcp quickstart: PASSED"
