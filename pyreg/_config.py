"""What was built, and what it runs on."""

import os

from pyreg import _core
from pyreg._version import __version__

__all__ = ["show_config"]


def show_config(mode="stdout"):
    """Print how pyreg was built and what it uses on this machine.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}; wanted 'stdout' or 'dicts'")
    config = {"version": __version__, **_core.config()}
    if mode == "dicts":
        return config
    print(f"pyreg {config['version']}")
    print(f"  compiler          {config['compiler']}")
    print(f"  instruction set   {config['isa']} (this machine runs {', '.join(config['isa_available'])}; PYREG_ISA chooses)")
    print(f"  OpenMP            {config['openmp']}, {os.path.basename(config['openmp_library'])}")
    print(f"  threads           {config['threads']}")
    print(f"  last-level cache  {config['cache_bytes'] / 2**20:.1f} MiB")
    return None
