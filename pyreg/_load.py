"""Imports the C core so that OpenMP's threads sleep while they have nothing to do.

By default they spin for milliseconds, at the end of a parallel region and after it.  On a machine that others use too
that takes the CPU from the very thread that is waited for: with one busy process beside two threads, calls of 0.5 ms
took up to 15 times as long as on one thread alone; asleep, as long, and nothing was lost when the machine was idle.
OpenMP reads the policy once, when it is loaded, so it is set for that moment, unless the user has set one.
"""

import importlib.util
import os

_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

if importlib.util.find_spec("pyreg._core") is None:
    raise ImportError(
        f"{os.path.dirname(__file__)} is pyreg's source, without its compiled core; start Python in another folder, "
        "or with -P, to import the installed pyreg"
    )
if any(name in os.environ for name in _POLICIES):
    importlib.import_module("pyreg._core")
else:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        importlib.import_module("pyreg._core")
    finally:
        del os.environ["OMP_WAIT_POLICY"]
