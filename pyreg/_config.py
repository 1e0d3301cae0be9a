"""What was built, and what it runs on."""

import os
from typing import Any, Literal

from pyreg import _core
from pyreg._version import __version__

__all__ = ["show_config"]


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
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
    rows = {
        "compiler": config["compiler"],
        "instruction set": f"{config['isa']} (can run {', '.join(config['isa_available'])}; PYREG_ISA chooses)",
        "OpenMP": f"{config['openmp']}, {os.path.basename(config['openmp_library'])}",
        "threads": config["threads"],
        "last-level cache": f"{config['cache_bytes'] / 2**20:.1f} MiB",
    }
    print(f"pyreg {config['version']}")
    for name, value in rows.items():
        print(f"  {name:<17} {value}")
    return None
