"""Whose threads help in calls from torch."""

import re
from pathlib import Path


def openmp_libraries() -> int:
    """How many OpenMP libraries the process has loaded; 0 where the system does not say."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0
    files = {line.rpartition("/")[2] for line in maps.splitlines() if "/" in line}
    return len({file for file in files if re.match(r"lib(g?omp|iomp)[-.\d]", file)})


# Torch's threads spin for milliseconds between its operations.  Where they are those of the OpenMP library that pyreg
# uses, too, they help; others would wait for their CPUs.
ONE_OPENMP = openmp_libraries() == 1
