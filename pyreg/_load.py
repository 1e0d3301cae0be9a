"""Imports the C core so that OpenMP, which that loads, leaves the importing thread as it was.

Where OpenMP binds threads to CPUs (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY) it pins the thread that loads it to
one of them, and with it all threads that this one starts later: those of JAX, too.
"""

import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path

_package = Path(__file__).parent
if importlib.util.find_spec("pyreg._core") is None:
    if _others := sorted(file.name for file in _package.glob("_core.*") if file.suffix in (".so", ".pyd")):
        raise ImportError(
            f"{_package} was compiled for another Python: it has {', '.join(_others)}, and this Python loads "
            f"_core{importlib.machinery.EXTENSION_SUFFIXES[0]}; install pyreg with this Python's pip"
        )
    if not _package.is_dir():
        raise ImportError(f"{_package} is in an archive, from which no compiled module is loaded; install it by pip")
    raise ImportError(
        f"{_package} is pyreg's source, without its compiled core; start Python in another folder, or with -P, to "
        "import the installed pyreg"
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


def _edited_sources() -> list[str]:
    """The sources of the core that are newer than it.  Only an editable installation has them beside its package."""
    core = Path(str(_core.__file__))
    if core.parent == _package:
        return []
    compiled = core.stat().st_mtime
    patterns = ("pyreg/*.pyx", "pyreg/*.pxd", "pyreg/*.h", "csrc/**/*.c", "csrc/**/*.h")
    return [
        str(file) for pattern in patterns for file in _package.parent.glob(pattern) if file.stat().st_mtime > compiled
    ]


if _edited := _edited_sources():
    warnings.warn(
        f"edited after pyreg was compiled, and without effect before it is installed again, by ./run or pip install "
        f"-e .: {', '.join(_edited)}",
        RuntimeWarning,
        stacklevel=2,
    )
