"""The ops that are measured: a module for each, and a file in ../shapes.

A module has, as data: TABLE_BY (a table for each combination of these), SUBJECTS and COLUMNS of its tables, MARKDOWN
(those of the documentation), NOTES, PEERS; and the functions

    elements(shape)                               how many
    contenders(dtype, shape, threads, peers=())   the calls to be timed, by name; dropout also takes rate
    check(dtype)                                  raises if a result is wrong, yields what was found right
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
    """Normal numbers, from 2^20 on again and again: drawing 10^9 would take longer than the benchmark."""
    block = np.random.default_rng(seed).standard_normal(min(1 << 20, np.prod(shape)), np.float32)
    return np.resize(block.astype(numpy_dtype(dtype)), shape)
