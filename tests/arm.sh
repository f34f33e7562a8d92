#!/usr/bin/env bash
# The recorded bits, then the tests, on an emulated 64-bit Arm: Debian's Python and the registry's wheels, run by QEMU.
#
#     tests/arm.sh [FOLDER [TEST FILE …]]       # .arm in the checkout, and all files, unless given; 1.1 GB
#     QEMU_CPU=neoverse-n1 tests/arm.sh         # on another CPU; with NUMBA_CPU_NAME=neoverse-n1, compiled for it
#     FOLDER/venv/bin/python -c 'print("hello")'  # anything else there, once it is made
#
# Everything lies in FOLDER, and deleting that undoes all of it: nothing is installed, mounted or registered with the
# kernel, and nobody has to be root. A step that is done leaves a mark in FOLDER/done and is not repeated; so does a
# test file that passed, until a source changes. Machine code is kept in FOLDER/machine-code: from none, the recorded
# bits take an hour, and all tests several.
#
# It takes Debian's apt and dpkg (whose mirror it uses), Perl, and Python 3.11 or later with pip (whose index it uses).
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
release=trixie
python_version=3.13 # that of the release

mkdir -p "${1:-.arm}/done" "${1:-.arm}/output"
folder=$(cd "${1:-.arm}" && pwd)
export PATH="$folder/tools/usr/bin:$PATH"

fail() {
    echo "tests/arm.sh: $*" >&2
    exit 1
}

step() { # Call a function and leave its mark, unless that is there.
    [ -e "$folder/done/$1" ] && return
    echo "+ $1"
    "$1"
    touch "$folder/done/$1"
}

tools() { # QEMU and mmdebstrap, the host's own if it has them.
    local absent=() package
    for package in apt-get dpkg-deb perl; do
        command -v "$package" >/dev/null || fail "there is no $package here: it takes Debian, or what is made from it"
    done
    python3 -c 'import pip, tomllib' || fail "python3 must be Python 3.11 or later, with pip"
    command -v qemu-aarch64-static >/dev/null || absent+=(qemu-user-static)
    command -v mmdebstrap >/dev/null || absent+=(mmdebstrap)
    if [ ${#absent[@]} = 0 ]; then return; fi
    # Not installed but unpacked: installing qemu-user-static would register it with the kernel.
    mkdir -p "$folder/packages"
    (cd "$folder/packages" && apt-get download "${absent[@]}") ||
        fail "apt cannot download ${absent[*]}: 'apt-get update' may help; installed, they are used as well"
    for package in "$folder"/packages/*.deb; do dpkg-deb -x "$package" "$folder/tools"; done
}

root() { # What Python and the wheels need of Debian, unpacked but not set up: nothing of it has to run for that.
    local mirror
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
    rm -rf "$folder/root"
    mkdir "$folder/root"
    mmdebstrap --quiet --mode=chrootless --variant=extract --architectures=arm64 --format=tar \
        --include=python3,libstdc++6,libgomp1 "$release" - ${mirror:+"$mirror"} |
        tar -x --no-same-owner --exclude='./dev/*' -C "$folder/root"
    ln -s usr/lib "$folder/root/lib" # where programs ask for their loader
}

venv() { # A virtual environment of that Python. Its python is a script, so that Python can start itself.
    mkdir -p "$folder/venv/bin"
    printf 'home = %s\ninclude-system-site-packages = false\n' "$folder/root/usr/bin" >"$folder/venv/pyvenv.cfg"
    printf '#!/bin/sh\nexec %q -0 "$0" -L %q %q "$@"\n' \
        "$(command -v qemu-aarch64-static)" "$folder/root" "$folder/root/usr/bin/python3" >"$folder/venv/bin/python"
    chmod +x "$folder/venv/bin/python"
}

wheels() { # What the tests need, by the host's pip; nothing is built.
    local site="$folder/venv/lib/python$python_version/site-packages" platforms=() glibc wanted
    for glibc in 17 24 26 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
    mapfile -t wanted < <(python3 - <<'END'
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
wanted = {*project["dependencies"], *extras["test"], *extras["data"], *extras["dask"], *extras["plot"]}
print(*sorted(name for name in wanted if not name.startswith(project["name"])), sep="\n")
END
    )
    rm -rf "$site"
    python3 -m pip install --quiet --no-warn-conflicts --target "$site" "${platforms[@]}" \
        --platform manylinux2014_aarch64 --python-version "$python_version" --only-binary=:all: "${wanted[@]}"
}

emulated() { # Run Python there.
    PYTHONPATH="$checkout" NUMBA_CACHE_DIR="$folder/machine-code" "$folder/venv/bin/python" "$@"
}

compare() { # The recorded bits.
    echo "+ tests/recorded.py"
    emulated tests/recorded.py
}

run_tests() { # The files, one by one, since all of them take hours.
    local sources passed file name status failed=()
    sources=$(cat grpo_fast/*.py grpo_fast/_kernels/*.py tests/*.py tests/helpers/*.py tests/*.json pyproject.toml | sha256sum | cut -c 1-16)
    passed=$folder/done/tests-$sources-${QEMU_CPU:-default}-${NUMBA_CPU_NAME:-default}
    mkdir -p "$passed"
    for file; do
        name=$(basename "$file" .py)
        [ -e "$passed/$name" ] && continue
        echo "+ $file"
        status=0
        emulated -m pytest -q -rs -p no:cacheprovider "$file" 2>&1 | tee "$folder/output/$name.txt" || status=$?
        case $status in
        0 | 5) touch "$passed/$name" ;; # 5: there is no test in it for this machine
        *) failed+=("$file") ;;
        esac
    done
    [ ${#failed[@]} = 0 ] || fail "tests failed in ${failed[*]}; the output is in $folder/output"
}

main() {
    step tools
    step root
    step venv
    step wheels
    emulated -c 'if True:
        import platform, numba, numpy
        versions = {"Python": platform.python_version(), "Numba": numba.__version__, "NumPy": numpy.__version__}
        print(platform.machine(), *(f"{name} {version}" for name, version in versions.items()), sep=", ")'
    compare
    if [ $# -gt 1 ]; then run_tests "${@:2}"; else run_tests tests/test_*.py; fi
    exit # Whatever is written to this file meanwhile is not read.
}
main "$@"
