import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What a test asks for is what it gets: no thread limits from outside.
for name in ("OMP_NUM_THREADS", "PYREG_ISA"):
    os.environ.pop(name, None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # test processes share the CPUs

# For bench/; in front, ./pyreg would be found, which is not compiled.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import pytest
from common import FUSION, ISAS
from hypothesis import settings

import pyreg
from pyreg import _core

settings.register_profile("pyreg", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("pyreg")


def compile_quickly():
    """XLA compiles thousands of small programs for the tests: do so without much optimisation, and equal ones once.

    What differs is the machine code of a fused loop.  PYREG_TESTS_XLA=default leaves XLA as users have it."""
    folder = tempfile.TemporaryDirectory(prefix="pyreg-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --{FUSION}=false"
    starts = [sys.executable, "-c", "import jax; jax.devices()"]
    if not subprocess.run(starts, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode:
        os.environ["XLA_FLAGS"] = flags  # which this XLA knows: it stops at unknown ones
    return folder


if os.environ.get("PYREG_TESTS_XLA") != "default" and "PYTEST_XDIST_WORKER" not in os.environ:  # else inherited
    cache = compile_quickly()  # until the process ends


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once on each instruction set of this machine."""
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[0])


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    yield pyreg.set_num_threads
    pyreg.set_num_threads(None)


@pytest.fixture
def one_cpu_cgroup():
    """A control group with a quota of one CPU, v1 or v2, where this process may make one."""
    for root, quota in (
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
        ("/sys/fs/cgroup", {"cpu.max": "100000 100000"}),
    ):
        group = Path(root) / f"pyreg-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in quota.items():
                (group / name).write_text(value)
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here")


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """few_by_jax(argument=values): on the backend of JAX operations, which compiles long, others are for -m slow."""
    for item in items:
        for mark in item.iter_markers("few_by_jax"):
            arguments = item.callspec.params
            few = all(arguments[name] in values for name, values in mark.kwargs.items())
            if arguments["jax_backend"] == "jax" and not few:
                item.add_marker(pytest.mark.slow)


CALLBACK = pytest.param("callback", marks=pytest.mark.slow)  # used by who asks for it only


@pytest.fixture(scope="module", params=[CALLBACK, "jax", "ffi"])  # the last stays until the end of the module
def jax_backend(request):
    """Runs the test once on each backend of pyreg.jax."""
    jax = pytest.importorskip("jax")
    from pyreg.jax import _backend

    if request.param == "ffi" and (problem := _backend._register()):
        pytest.skip(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "_chosen", (request.param, "by a test"))
        jax.clear_caches()
        yield request.param
    jax.clear_caches()
