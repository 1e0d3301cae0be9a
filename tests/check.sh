#!/bin/sh
# What `./run check` does.  It wants ruff, mypy, clang-format, cmake and sphinx-build in PATH; what needs a package of the
# system that is missing is skipped, and says so.
#
#   tests/check.sh            lint docs build sanitize
#   tests/check.sh --all      all steps: these, races memory instructions cpus compilers systems types dist wheel slow
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
    clang-format --dry-run -Werror pyreg/*.h csrc/*.[ch] csrc/kernels/*.[ch] tests/c/*.[ch]
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

sanitize() { # addresses and undefined behaviour; on this machine's best instruction set, or with --all on each
    isas=native
    [ -n "$all" ] && isas=all
    if has "${clang:-clang}" "clang libomp-dev"; then
        compile clang-addresses -DCMAKE_C_COMPILER="$clang" -DCMAKE_C_FLAGS=-Werror -DPYREG_SANITIZE=ON \
            -DPYREG_ISAS=$isas
        run_tests clang-addresses
        [ -z "$all" ] && return
    fi
    if has gcc gcc; then
        compile gcc-addresses -DCMAKE_C_COMPILER=gcc -DPYREG_SANITIZE=ON -DPYREG_ISAS=$isas
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
        for test in "golden $golden" "races 3" allocation batchnorm dropout ffi; do
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

emulate() { # CPU TRIPLE CTEST-OPTIONS CMAKE-OPTION...: by a cross compiler and qemu
    cpu=$1 triple=$2 tests=$3
    shift 3
    has "$triple-gcc" "gcc-$triple" && has "qemu-$cpu" qemu-user || return 0
    compile "$cpu" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR="$cpu" -DCMAKE_C_COMPILER="$triple-gcc" \
        "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-$cpu;-L;/usr/$triple" -DPYREG_SANITIZE=plain "$@"
    # shellcheck disable=SC2086 # words of it
    run_tests "$cpu" $tests
}

cpus() { # the results of other architectures, and of old CPUs
    some="-R ^(golden|dropout|allocation|races)_baseline" # qemu is slow
    emulate aarch64 aarch64-linux-gnu "-R baseline -E threads" # whose forks amid threads qemu itself does not survive
    emulate s390x s390x-linux-gnu "$some" # big-endian
    emulate arm arm-linux-gnueabihf "$some" -DCMAKE_C_FLAGS=-Werror # 32 bits
    i386=/usr/i686-linux-gnu/lib # this machine runs it; by qemu some of these take minutes
    emulate i386 i686-linux-gnu "$some" "-DCMAKE_C_FLAGS=-Werror -msse2 -mfpmath=sse" \
        "-DCMAKE_CROSSCOMPILING_EMULATOR=$i386/ld-linux.so.2;--library-path;$i386"
    if [ "$(uname -m)" = x86_64 ] && has qemu-x86_64 qemu-user && has gcc gcc; then
        plain
        for cpu in core2duo Nehalem Haswell; do qemu-x86_64 -cpu $cpu build/check/gcc/test_golden $golden; done
    fi
}

compilers() { # no warnings of any gcc or clang that is installed, and the same results
    for compiler in $(find /usr/bin /usr/local/bin -name 'gcc-[0-9]*' -o -name 'clang-[0-9]*' | sort -V); do
        name=${compiler##*/}
        compile "$name" -DCMAKE_C_COMPILER="$compiler" -DCMAKE_C_FLAGS=-Werror -DPYREG_OPENMP=OFF -DPYREG_SANITIZE=plain
        run_tests "$name" -R golden
    done
}

link_by_zig() { # TARGET CMAKE-OPTION...: compiles and links by zig, which brings the headers of many systems
    target=$1
    shift
    has "${ZIG:-zig}" "none; pip install ziglang, and ZIG=" || return 0
    mkdir -p build/check
    for tool in ar ranlib; do
        printf '#!/bin/sh\nexec "%s" %s "$@"\n' "$(command -v "${ZIG:-zig}")" $tool >build/check/zig-$tool
        chmod +x build/check/zig-$tool
    done
    CC="${ZIG:-zig} cc -target $target" compile "$target" -DCMAKE_AR="$PWD/build/check/zig-ar" \
        -DCMAKE_RANLIB="$PWD/build/check/zig-ranlib" -DPYREG_SANITIZE=plain "$@"
}

systems() { # other operating systems: runs what can run here, and links the rest
    if has gcc gcc; then # what macOS gets
        compile posix -DCMAKE_C_COMPILER=gcc "-DCMAKE_C_FLAGS=-Werror -DPYREG_AS_POSIX" -DPYREG_OPENMP=OFF \
            -DPYREG_SANITIZE=plain
        run_tests posix -E v4
    fi
    if has musl-gcc musl-tools; then # which lacks the kernel's headers
        compile musl -DCMAKE_C_COMPILER=musl-gcc -DPYREG_OPENMP=OFF -DPYREG_SANITIZE=plain \
            "-DCMAKE_C_FLAGS=-idirafter /usr/include -idirafter /usr/include/$(uname -m)-linux-gnu"
        run_tests musl -E v4
    fi
    mingw=x86_64-w64-mingw32-gcc-posix
    if has $mingw gcc-mingw-w64-x86-64-posix && has wine wine; then
        compile windows-x86_64 -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_C_COMPILER=$mingw \
            -DCMAKE_CROSSCOMPILING_EMULATOR=wine -DPYREG_SANITIZE=plain
        WINEDEBUG=-all run_tests windows-x86_64 -E v4
    fi
    link_by_zig aarch64-windows-gnu -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=ARM64
    link_by_zig aarch64-macos -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64
    link_by_zig x86_64-macos -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=x86_64
    echo "check: $step: only compiled, not run: macOS, and Windows on arm64" >&2
}

types() { # of all that users may import, as pyright sees them
    where=$(mktemp -d) # not here: it would read the checkout
    (cd "$where" && basedpyright --ignoreexternal --verifytypes pyreg) || { rm -r "$where"; return 1; }
    rm -r "$where"
}

dist() { # what is uploaded: the sdist, the wheel made from it, and this wheel beside old and new packages
    out=build/dist
    rm -rf $out
    python -m build --outdir $out
    twine check --strict $out/*
    check-wheel-contents $out/*.whl
    if tar -tf $out/*.tar.gz | grep '^[^/]*/\.[^/]*/'; then
        echo "check: dist: these hidden folders are not for the sdist" >&2
        return 1
    fi
    fresh oldest-numpy "numpy==1.26.*" "ml_dtypes==0.4.*"
    fresh oldest-jax "jax==0.9.0" "flax==0.12.6" ml_dtypes
    fresh newest numpy jax flax ml_dtypes
}

fresh() { # NAME REQUIREMENT...: the wheel in an environment of its own, with these packages
    name=$1
    shift
    echo "check: $step: $name: $*" >&2
    python -m venv --clear "build/check/$name"
    "build/check/$name/bin/python" -m pip -qq --disable-pip-version-check install --no-compile \
        build/dist/*.whl "pytest>=8" "hypothesis>=6.100" "threadpoolctl>=3.5" "$@"
    if "build/check/$name/bin/python" -c 'import jax' 2>/dev/null; then set -- jax_dropout nnx; else set --; fi
    for test in dropout batchnorm layers numpy_abi "$@"; do
        "build/check/$name/bin/python" -P -m pytest -q "tests/test_$test.py"
    done
}

wheel() { # for Linux from glibc 2.28 on, by the compiler that is here; it needs nothing but libc, and less than 3 MB
    out=$PWD/build/wheel
    rm -rf "$out"
    mkdir -p "$out/symbols"
    echo 'int nothing;' | python -m ziglang cc -target "$(uname -m)-linux-gnu.2.28" --verbose -shared -x c - \
        -lpthread -ldl -lm -o "$out/nothing.so" 2>"$out/zig.txt"
    for library in c pthread dl m; do
        file=$(grep -o "[^ ]*/lib$library\.so\.[0-9]*" "$out/zig.txt" | head -n 1)
        ln -s "$file" "$out/symbols/lib$library.so"
    done
    # Some functions are in no shared library of glibc 2.28, but linked into each program, as pthread_atfork is.
    own=$(grep -o "[^ ]*/libc_nonshared\.a" "$out/zig.txt" | head -n 1)
    echo "GROUP($(readlink "$out/symbols/libc.so") $own)" >"$out/libc.so"
    mv "$out/libc.so" "$out/symbols/libc.so"
    python -m pip -qq --disable-pip-version-check wheel . --no-deps -w "$out" \
        --config-settings=cmake.define.PYREG_OPENMP=OFF \
        "--config-settings=cmake.define.CMAKE_MODULE_LINKER_FLAGS=-L$out/symbols"
    auditwheel repair --plat "manylinux_2_28_$(uname -m)" -w "$out/repaired" "$out"/*.whl
    auditwheel show "$out"/repaired/*.whl
    find "$out/repaired" -size +3M | grep . && return 1
    python -m venv --clear "$out/venv"
    "$out/venv/bin/python" -m pip -qq --disable-pip-version-check install "$out"/repaired/*.whl
    "$out/venv/bin/python" -P -m pyreg
}

slow() { # and all tests with XLA as users have it, which the tests make compile more quickly
    python -m pytest -m slow
    PYREG_TESTS_XLA=default python -m pytest -n auto --maxprocesses 4 --dist worksteal
}

all=
case "${1-}" in
    "") set -- lint docs build sanitize ;;
    --all)
        all=yes
        set -- lint docs build sanitize races memory instructions cpus compilers systems types dist wheel slow
        ;;
esac
for step; do
    case $step in
        lint | docs | build | sanitize | races | memory | instructions | cpus) $step ;;
        compilers | systems | types | dist | wheel | slow | links) $step ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
echo "check: passed: $*" >&2
