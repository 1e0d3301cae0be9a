"""What pyreg/numpy_abi.h says of NumPy's arrays, against the headers of the installed NumPy."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from common import python

import pyreg

HEADER = Path(__file__).parents[1] / "pyreg" / "numpy_abi.h"
ARRAY = "data ndim=nd shape=dimensions strides base dtype=descr flags"
DTYPE = "scalar=typeobj kind letter=type byteorder num=type_num"
LAYOUTS = [  # ours, theirs, ours=theirs
    ("numpy_array", "PyArrayObject_fields", ARRAY),
    ("numpy_dtype", "PyArray_DescrProto", f"{DTYPE} of_1.itemsize=elsize"),  # version 1
    ("numpy_dtype", "_PyArray_DescrNumPy2", f"{DTYPE} of_2.flags=flags of_2.itemsize=elsize"),
]
CONSTANTS = {
    "INT16": "INT16",
    "FLOAT16": "HALF",
    "FLOAT32": "FLOAT",
    "FLOAT64": "DOUBLE",
    "KEEP_ORDER": "KEEPORDER",
    **{flag: f"ARRAY_{flag}" for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS", "ALIGNED", "WRITEABLE")},
}
FUNCTIONS = {
    "ABI_VERSION": "PyArray_GetNDArrayCVersion",
    "NEW": "PyArray_New",
    "NEW_LIKE": "PyArray_NewLikeArray",
    "SET_BASE": "PyArray_SetBaseObject",
}


def test_layouts_and_constants_are_those_of_numpy(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        pytest.skip("no headers of Python")
    major = int(np.__version__.split(".")[0])
    lines = ['#include "numpy_abi.h"', "#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION"]
    lines += ["#include <stddef.h>", "#include <numpy/arrayobject.h>"]
    for ours, theirs, fields in LAYOUTS:
        if major == 1 and theirs == "_PyArray_DescrNumPy2":
            continue
        if major == 1 and theirs == "PyArray_DescrProto":
            theirs = "PyArray_Descr"
        for field in fields.split():
            a, _, b = field.partition("=")
            b = b or a
            lines += [
                f'_Static_assert(offsetof({ours}, {a}) == offsetof({theirs}, {b}), "offset of {theirs}.{b}");',
                f'_Static_assert(sizeof((({ours} *)0)->{a}) == sizeof((({theirs} *)0)->{b}), "size of {theirs}.{b}");',
            ]
    lines.append('_Static_assert(sizeof(*((numpy_array *)0)->shape) == sizeof(npy_intp), "size of a length");')
    lines += [
        f'_Static_assert((int)NUMPY_{ours} == (int)NPY_{theirs}, "{ours}");' for ours, theirs in CONSTANTS.items()
    ]
    source = tmp_path / "layouts.c"
    source.write_text("\n".join(lines) + "\n")
    include = [HEADER.parent, np.get_include(), python_headers]
    command = [compiler, "-std=gnu11", "-fsyntax-only", *(f"-I{path}" for path in include), source]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_functions_stand_at_their_places_in_numpys_table():
    places = dict(re.findall(r"NUMPY_(\w+) = (\d+)", HEADER.read_text()))
    theirs = Path(np.get_include(), "numpy", "__multiarray_api.h").read_text()
    for ours, name in FUNCTIONS.items():
        (place,) = re.findall(rf"#define {name} \\\n.*?PyArray_API\[(\d+)\]", theirs, re.DOTALL)
        assert places[ours] == place, name


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_size_of_an_element_is_numpys(dtype):
    # An array of one element ends where the next begins: out may be beside x, and may not be x moved by one byte less.
    memory = np.zeros(2 * np.dtype(dtype).itemsize, "u1")
    x, beside = memory.view(dtype)[:1], memory.view(dtype)[1:]
    assert pyreg._ops._core.can_write(beside, x, (), (x,))
    assert not pyreg._ops._core.can_write(x, x, (), (memory[x.itemsize - 1 :],))
    assert pyreg._ops._core.can_write(x, x, (), (memory[x.itemsize :],))


def test_arrays_of_a_numpy_to_come_are_refused():
    program = """
import ctypes, numpy._core._multiarray_umath as umath
version = ctypes.CFUNCTYPE(ctypes.c_uint)(lambda: 0x03000001)
table = (ctypes.c_void_p * 300)(ctypes.cast(version, ctypes.c_void_p).value)
new = ctypes.pythonapi.PyCapsule_New
new.argtypes, new.restype = [ctypes.c_void_p] * 3, ctypes.py_object
umath._ARRAY_API = new(ctypes.addressof(table), None, None)
try:
    import pyreg
except ImportError as error:
    print(error)
"""
    assert python(program) == "pyreg knows the arrays of NumPy 1 and 2, and this NumPy's are of version 3"


@pytest.mark.parametrize("call", ["dropout(new, key=1)", "dropout(x, key=1, out=new)", "batch_norm(x, out=new)"])
def test_types_that_numpy_does_not_number_are_refused(call):
    """Not taken for bfloat16, before that is known."""
    program = f"""
import numpy as np, numpy._core._multiarray_umath as umath, pyreg
x = np.ones((4, 3))
new = x.astype(umath._get_sfloat_dtype()())
assert new.dtype.num == -1
try:
    pyreg.{call}
except (TypeError, ValueError) as error:
    print(error)
"""
    what = "x has" if "new," in call else "out has"
    assert python(program).startswith(what)
