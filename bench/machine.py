"""The machine that the figures come from."""

import datetime
import os
import platform
import re
import time
from pathlib import Path

import pyreg
from pyreg import _config

PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "flax", "equinox", "dm-haiku", "keras", "onednn-cpu-gomp")
BUSY = 0.15  # CPUs that other processes may use before the figures are doubtful


def cpus():
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def thread_counts():
    """1, 2, 4, ... and the number of all CPUs."""
    return sorted({1 << k for k in range(cpus().bit_length()) if 1 << k <= cpus()} | {cpus()})


def read(path, missing=""):
    try:
        return Path(path).read_text().strip()
    except OSError:
        return missing


def caches():
    """Bytes of the data caches by level: {"L1": 32768, ...}, as the operating system says."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = read(folder / "size", "0K")
        if read(folder / "type") != "Instruction" and size[:-1].isdigit():
            sizes[f"L{read(folder / 'level')}"] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return sizes or {"L2": 1 << 20, "L3": pyreg.show_config("dicts")["cache_bytes"]}


def nodes():
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def busy_cpus(seconds=0.3):
    """How many CPUs were busy during this time, with any process."""

    def clock():
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, read("/proc/stat").split("\n")[0].split()[1:9])
        return user + nice + system + irq + softirq + steal, idle + iowait

    busy, idle = clock()
    time.sleep(seconds)
    busy_after, idle_after = clock()
    used, rest = busy_after - busy, idle_after - idle
    return os.cpu_count() * used / max(1, used + rest)


def describe():
    """What a reader must know to compare the figures with others."""
    build = pyreg.show_config("dicts")
    huge = read("/sys/kernel/mm/transparent_hugepage/enabled", "unknown")
    return {
        "cpu": build["cpu"],
        "cpus": cpus(),
        "virtual": "hypervisor" in read("/proc/cpuinfo"),
        "NUMA nodes": nodes(),
        "caches": caches(),
        "instruction set": build["isa"],
        "threads": build["threads"],
        "OpenMP": Path(build["openmp_library"]).name,
        "OpenMP settings": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))},
        "compiler": build["compiler"],
        "huge pages": huge.partition("[")[2].partition("]")[0] or huge,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pyreg": pyreg.__version__,
        "packages": _config.versions(PACKAGES),
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "busy CPUs at the start": round(busy_cpus(), 2),
    }


def title(machine):
    """One line for tables and plots."""
    return f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['instruction set']}"


def folder():
    """The name of this machine's folder: its CPU, and how many of them."""
    words = re.findall("[a-z0-9.]+", pyreg.show_config("dicts")["cpu"].lower().replace("(r)", ""))
    return "-".join([*words, str(cpus())])


def versions(machine, packages=PACKAGES):
    return ", ".join(f"{name} {v}" for name, v in machine["packages"].items() if v and name in packages)
