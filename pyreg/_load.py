"""Imports the C core so that OpenMP, which that loads, leaves the importing thread as it was.

Where OpenMP binds threads to CPUs (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY) it pins the thread that loads it to
one of them, and with it all threads that this one starts later: those of JAX, too.
"""

import importlib.util
import os
import sys

if importlib.util.find_spec("pyreg._core") is None:
    raise ImportError(
        f"{os.path.dirname(__file__)} is pyreg's source, without its compiled core; start Python in another folder, "
        "or with -P, to import the installed pyreg"
    )
if sys.platform != "linux":  # threads are bound on Linux alone
    _core = importlib.import_module("pyreg._core")
else:
    _cpus = os.sched_getaffinity(0)
    try:
        _core = importlib.import_module("pyreg._core")
    finally:
        _pinned = os.sched_getaffinity(0) != _cpus
        if _pinned:
            os.sched_setaffinity(0, _cpus)
    if _pinned:
        _core.unpinned()
