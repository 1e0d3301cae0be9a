"""What the benchmarks share: interleaved timing, ratios, the machine they ran on, tables and files."""

import json
import math
import os
import platform
import time
import timeit
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# A setting made for another CPU would slow NumPy's matrix products down.  It is read when NumPy is loaded.
os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
from rich.console import Console

import pyreg

SAMPLE_SECONDS = 0.4e-3  # quick calls are repeated until a sample is about this long
WARM_BELOW_SECONDS = 5e-3  # quicker ones run once untimed before each sample: what came before has filled the caches

console = Console(width=max(Console().width, 150), highlight=False)


# ---- Timing ----------------------------------------------------------------------------------------------------------


def interleave(contenders, rounds):
    """Seconds a call of each contender, one sample in each round: A B C, A B C, ...

    Other work on the machine comes and goes in seconds.  It hits neighbouring samples alike, so the ratios of two
    contenders within a round are steadier than their times.
    """
    timers = {name: timeit.Timer(call) for name, call in contenders.items()}
    seconds = {name: np.empty(rounds) for name in contenders}
    calls = {}
    for name, timer in timers.items():
        timer.timeit(1)  # compiles, starts threads, touches memory
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / timer.timeit(1)))
    for r in range(rounds):
        for name, timer in timers.items():
            if r == 0 or seconds[name][r - 1] < WARM_BELOW_SECONDS:
                timer.timeit(1)
            seconds[name][r] = timer.timeit(calls[name]) / calls[name]
    return seconds


def summary(samples):
    return {"min": float(np.min(samples)), "median": float(np.median(samples))}


def numpy_dtype(name):
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def skip(dtype):
    """Why a dtype cannot be measured here, or None."""
    return "ml_dtypes is not installed" if dtype == "bfloat16" and not find_spec("ml_dtypes") else None


# ---- The machine -----------------------------------------------------------------------------------------------------


def cpus():
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(packages=("numpy", "ml_dtypes")):
    """What a reader must know to compare the figures with others."""
    build = pyreg.show_config("dicts")
    return {
        "cpu": cpu_model(),
        "cpus": cpus(),
        "last-level cache": f"{build['cache_bytes'] / 2**20:.1f} MiB",
        "instruction set": build["isa"],
        "compiler": build["compiler"],
        "OpenMP": Path(build["openmp_library"]).name,
        "python": platform.python_version(),
        "pyreg": pyreg.__version__,
        **{package: version(package) or "not installed" for package in packages},
    }


def busy_cpus(seconds=0.5):
    """How many CPUs were busy with any process over this time."""

    def read():
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = (
            int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
        return user + nice + system + irq + softirq + steal, idle + iowait

    busy, idle = read()
    time.sleep(seconds)
    busy_after, idle_after = read()
    used, rest = busy_after - busy, idle_after - idle
    return os.cpu_count() * used / max(1, used + rest)


# ---- What is printed and written -------------------------------------------------------------------------------------


def show_environment(env):
    for name, value in env.items():
        console.print(f"[dim]{name:>17}[/]  {value}")


def time_text(seconds):
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{number_text(seconds * scale)} {unit}"


def number_text(value):
    """Three significant digits without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def integer(text):
    return int(float(text))  # 1.6e7 is easier to read


def label(value):
    return value if isinstance(value, str) else f"{value:,}"


def write_json(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {path}")
