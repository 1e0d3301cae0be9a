"""What was built, and what it runs on."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, overload

from pyreg import _core
from pyreg._arguments import check_choice
from pyreg._version import __version__

__all__ = ["show_config"]


PACKAGES = ("numpy", "ml_dtypes", "jax", "jaxlib", "flax", "equinox", "dm-haiku", "keras", "torch")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed; importing them would take seconds."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    """Its name, where the operating system knows one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print how pyreg was built, what it uses on this machine, and what is installed beside it.

    ``python -m pyreg`` prints the same, for reports of bugs.

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
    config = {
        "version": __version__,
        **_core.config(),
        "jax": used.describe() if used else "not used yet",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "packages": versions(PACKAGES),
    }
    if mode == "dicts":
        return config
    rows = {
        "Python": config["python"],
        "platform": config["platform"],
        "CPU": config["cpu"],
        "compiler": config["compiler"],
        "instruction set": f"{config['isa']} (can run {', '.join(config['isa_available'])}; PYREG_ISA chooses)",
        "OpenMP": os.path.basename(config["openmp_library"]),
        "threads": config["threads"],
        "last-level cache": f"{config['cache_bytes'] / 2**20:.1f} MiB",
        "JAX": config["jax"],
        "packages": ", ".join(f"{name} {version}" for name, version in config["packages"].items()),
    }
    print(f"pyreg {config['version']}")
    for name, value in rows.items():
        print(f"  {name:<17} {value}")
    return None
