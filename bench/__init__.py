"""Benchmarks of pyreg: `python -m bench` lists them."""

import os

# A setting made for another CPU would slow NumPy's matrix products down.  It is read when NumPy is loaded.
os.environ.pop("OPENBLAS_CORETYPE", None)
