#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in; does nothing once it is complete.
# Usage: scripts/setup.sh [run|dev]     run: what the tool needs; dev: and what its tests need
# Environment: PYTHON (an interpreter, 3.11 or later), BATCHLLM_VENV (where; default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-run}
venv=${BATCHLLM_VENV:-.venv}
say() { echo "setup: $*" >&2; }
stop() { say "$*"; exit 2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || stop "PYTHON is '$PYTHON', which is not a Python 3.11 or later that runs"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11; do
        if is_new_enough "$name"; then echo "$name"; return; fi
    done
    stop "no Python 3.11 or later found; install one (apt-get install python3) or set PYTHON"
}

# Debian and Ubuntu ship Python without the parts that make virtual environments.
ensure_venv() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null && return
    local package log
    package=$("$1" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')
    as_root true 2>/dev/null ||
        stop "$1 cannot make virtual environments; run as root: apt-get update && apt-get install $package"
    say "installing $package, which $1 needs to make virtual environments"
    log=$({ as_root apt-get -qq update || true
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$package"; } 2>&1) ||
        stop "could not install $package:"$'\n'"$log"
}

# Without one the tool works too, on torch's own kernels, several times slower.
ensure_compiler() {
    command -v g++ >/dev/null && return
    if ! as_root true 2>/dev/null; then
        say "no g++ found, so no kernels are compiled and the tool is slower; to mend it, run as root:"
        say "  apt-get update && apt-get install g++ libc6-dev, then remove $venv and start again"
        return
    fi
    say "installing g++, which compiles the kernels"
    { as_root apt-get -qq update || true
      as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y g++ libc6-dev; } >/dev/null 2>&1 ||
        say "could not install g++, so no kernels are compiled and the tool is slower"
}

# Only the tests of `batchllm.spark` need it here; they are left out, and say so, where it is missing.
ensure_java() {
    command -v java >/dev/null && return
    if ! as_root true 2>/dev/null; then
        say "no java found, so what runs on Spark is not tested; to mend it, run as root:"
        say "  apt-get update && apt-get install openjdk-17-jre-headless"
        return
    fi
    say "installing java 17, which Spark runs on"
    { as_root apt-get -qq update || true
      as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y openjdk-17-jre-headless ||
          as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y default-jre-headless
    } >/dev/null 2>&1 || say "could not install java, so what runs on Spark is not tested"
}

python=$(find_python)
mark="$venv/.batchllm-$kind"
# What was installed is told by what asks for it: a change there installs again.
wanted=$({ cat pyproject.toml setup.py constraints.txt batchllm/native/src/*.* \
    batchllm/native/src/simulator/* cuda/*.py cuda/csrc/* cuda/include/batchllm/*
    command -v nvcc || true; } | sha256sum)
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$wanted" ]; then exit 0; fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then  # none, or not made to the end
    ensure_venv "$python"
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
ensure_compiler
# Modules are compiled when they are first imported: most of those installed never are. Unless none
# may be then: each process would compile all that it imports, torch for five seconds.
compile=--no-compile
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$compile" \
        --constraint constraints.txt "$@" 2> >(grep -v "^WARNING" >&2 || true)
}
requirements_of() {
    "$venv/bin/python" -c 'import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["optional-dependencies"][sys.argv[1]]))' "$1"
}
run_mark="$venv/.batchllm-run"
if [ ! -f "$run_mark" ] || [ "$(cat "$run_mark")" != "$wanted" ]; then
    say "installing batchllm into $venv (a few minutes the first time)"
    install --editable .
    echo "$wanted" >"$run_mark"
fi
if [ "$kind" = dev ]; then
    ensure_java
    say "installing what the tests need"
    install --requirement <(requirements_of dev)
fi
echo "$wanted" >"$mark"
