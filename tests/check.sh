#!/bin/sh
# What `./run check` does.  It wants ruff, mypy, clang-format, cmake and sphinx-build in PATH; what needs a package of the
# system that is missing is skipped, and says so.
#
#   tests/check.sh            lint docs build sanitize
#   tests/check.sh --all      all steps: lint docs build sanitize races memory instructions cpus slow
#   tests/check.sh STEP...    these; links, of the manual to other sites, is in no list, because it wants the network
#
# CLANG=clang-19 chooses one of several.
set -eu
cd "$(dirname "$0")/.."
golden=tests/data/golden.txt
clang=${CLANG:-$(command -v clang || find /usr/bin -name 'clang-[0-9]*' | sort -V | tail -n 1)}

has() { # PROGRAM DEBIAN-PACKAGE: is there such a program?  Says what is skipped without it.
    command -v "$1" >/dev/null || { echo "check: $step: skipped what needs $1 (Debian: $2)" >&2; return 1; }
}

compile() { # NAME CMAKE-OPTION...: the C library and tests/c in build/check/NAME
    name=$1
    shift
    echo "check: $step: $name" >&2
    cmake -S . -B "build/check/$name" "$@" >/dev/null
    cmake --build "build/check/$name" --parallel "$(nproc)" >/dev/null
}

plain() { compile gcc -DCMAKE_C_COMPILER=gcc -DCMAKE_C_FLAGS=-Werror -DPYREG_SANITIZE=plain; }

run_tests() { # NAME CTEST-OPTION...
    name=$1
    shift
    ctest --test-dir "build/check/$name" --output-on-failure --no-tests=error "$@"
}

lint() {
    ruff check .
    ruff format --check .
    mypy
    clang-format --dry-run -Werror csrc/*.[ch] csrc/kernels/*.[ch] tests/c/*.[ch]
}

docs() { # the manual: no warnings, and no reference that leads nowhere
    sphinx-build --fresh-env --quiet --fail-on-warning --keep-going -b html docs build/docs
}

links() { sphinx-build --quiet --fail-on-warning -b linkcheck docs build/links; }

build() { # no warnings, and the same results on every instruction set of this machine
    if has gcc gcc; then
        plain
        run_tests gcc
    fi
}

sanitize() { # addresses and undefined behaviour
    if has "${clang:-clang}" "clang libomp-dev"; then
        compile clang-addresses -DCMAKE_C_COMPILER="$clang" -DCMAKE_C_FLAGS=-Werror -DPYREG_SANITIZE=ON
        run_tests clang-addresses
        [ -z "$all" ] && return
    fi
    if has gcc gcc; then
        compile gcc-addresses -DCMAKE_C_COMPILER=gcc -DPYREG_SANITIZE=ON
        run_tests gcc-addresses
    fi
}

races() {
    has "${clang:-clang}" "clang libomp-dev" || return 0
    compile clang-races -DCMAKE_C_COMPILER="$clang" -DPYREG_SANITIZE=thread
    # Archer tells ThreadSanitizer how OpenMP, which is not compiled with it, synchronises.
    archer=$("$clang" -print-file-name=libarcher.so)
    TSAN_OPTIONS=ignore_noninstrumented_modules=1 OMP_TOOL_LIBRARIES=$archer run_tests clang-races
}

memory() { # what is read before it is written
    has valgrind valgrind && has gcc gcc || return 0
    plain
    for isa in baseline x86-64-v3; do # it knows no AVX-512
        for test in "golden $golden" "races 3" allocation batchnorm dropout; do
            # shellcheck disable=SC2086 # words of it
            PYREG_ISA=$isa valgrind -q --error-exitcode=9 "build/check/gcc/test_"$test || [ $? = 2 ]
        done
    done
}

instructions() { # of the inner loops: no more than recorded
    has valgrind valgrind && has gcc gcc || return 0
    plain
    python tests/instructions.py build/check/gcc/test_count
}

cpus() { # the results of another architecture, and of an old CPU
    if has aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu && has qemu-aarch64 qemu-user; then
        compile aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
            -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DPYREG_SANITIZE=plain \
            "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
        run_tests aarch64 -R baseline -E threads # whose forks amid threads qemu itself does not survive
    fi
    if [ "$(uname -m)" = x86_64 ] && has qemu-x86_64 qemu-user && has gcc gcc; then
        plain
        qemu-x86_64 -cpu Nehalem build/check/gcc/test_golden $golden
    fi
}

slow() { python -m pytest -m slow; }

all=
case "${1-}" in
    "") set -- lint docs build sanitize ;;
    --all) all=yes && set -- lint docs build sanitize races memory instructions cpus slow ;;
esac
for step; do
    case $step in
        lint | docs | build | sanitize | links | races | memory | instructions | cpus | slow) $step ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
echo "check: passed: $*" >&2
