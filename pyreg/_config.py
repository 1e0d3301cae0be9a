"""What was built, and what it runs on."""

import os
import sys
from typing import Any, Literal

from pyreg import _core
from pyreg._arguments import check_choice
from pyreg._version import __version__

__all__ = ["show_config"]


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print how pyreg was built and what it uses on this machine.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict.

    Returns
    -------
    dict or None

    Raises
    ------
    ValueError
        If ``mode`` is neither.

    Examples
    --------
    >>> import pyreg
    >>> pyreg.show_config("dicts")["version"] == pyreg.__version__
    True
    """
    check_choice(mode, "mode", "stdout", "dicts")
    used = sys.modules.get("pyreg.jax._backend")  # only who uses JAX has it
    config = {"version": __version__, **_core.config(), "jax": used.describe() if used else "not used yet"}
    if mode == "dicts":
        return config
    rows = {
        "compiler": config["compiler"],
        "instruction set": f"{config['isa']} (can run {', '.join(config['isa_available'])}; PYREG_ISA chooses)",
        "OpenMP": os.path.basename(config["openmp_library"]),
        "threads": config["threads"],
        "last-level cache": f"{config['cache_bytes'] / 2**20:.1f} MiB",
        "JAX": config["jax"],
    }
    print(f"pyreg {config['version']}")
    for name, value in rows.items():
        print(f"  {name:<17} {value}")
    return None
