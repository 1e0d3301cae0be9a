"""The ops that are measured: a module for each, and a file in ../shapes.

A module has these data:

    TABLE_BY             there is a table for each combination of these parameters
    SUBJECTS, COLUMNS    of its tables
    MARKDOWN             the columns of the table in the documentation
    NOTES                what a reader of the tables has to know
    PEERS                what it is compared with
    PACKAGES             whose versions are shown

and these functions:

    elements(shape)                               how many elements a shape has
    contenders(dtype, shape, threads, peers=())   the calls to be timed, by name; those of dropout also take a rate
    check(dtype)                                  raises an error if a result is wrong, and yields what is right
"""

import importlib
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

OPS = {"dropout": "dropout", "batchnorm": "batchnorm", "jax": "jax_ops"}


def load(name):
    return importlib.import_module(f"bench.cases.{OPS[name]}")


def shapes(name):
    return tomllib.loads((Path(__file__).parents[1] / "shapes" / f"{name}.toml").read_text())


def numpy_dtype(name):
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def missing(dtype):
    """Why a dtype cannot be measured here, or None."""
    return "ml_dtypes is not installed" if dtype == "bfloat16" and not find_spec("ml_dtypes") else None


def installed(peer):
    from bench.cases import onednn

    module = {"PyTorch": "torch", "Flax": "flax"}.get(peer, "numpy")
    return bool(onednn.find() if peer == "oneDNN" else find_spec(module))


def normal(shape, dtype, seed=0):
    """Normal numbers.  They repeat after 2^20, because drawing 10^9 would take longer than the benchmark."""
    block = np.random.default_rng(seed).standard_normal(min(1 << 20, np.prod(shape)), np.float32)
    return np.resize(block.astype(numpy_dtype(dtype)), shape)
