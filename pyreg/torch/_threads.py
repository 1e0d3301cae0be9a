"""Whose threads help in calls from torch."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pyreg import _core


def openmp_libraries() -> Iterator[str]:
    """Files of OpenMP libraries: torch's own, if it has one; else that of the process, if it has loaded just one."""
    is_one = re.compile(r"lib(g?omp|iomp)[-.\d]").match
    for file in (Path(torch.__file__).parent / "lib").glob("lib*omp*"):
        if is_one(file.name):
            yield str(file)
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())  # names of files are bytes
    except OSError:
        return
    files = {line[line.index("/") :] for line in maps.splitlines() if "/" in line}
    files = {file for file in files if is_one(file.rpartition("/")[2])}
    if len(files) == 1:
        yield files.pop()


# Torch's threads spin for milliseconds between its operations: they help.  Others would wait for their CPUs.
TEAM = any(_core.follow_openmp(file) for file in openmp_libraries())
