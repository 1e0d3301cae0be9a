"""XLA's handlers, called with operands that do not fit: a program, or a damaged file of one, may say anything."""

import shutil
import subprocess
from pathlib import Path

import pytest
from common import python
from jaxcommon import jax

PROGRAM = """
import itertools, sys
import jax, numpy as np, pyreg.jax
from jax import ShapeDtypeStruct as S
jnp = jax.numpy
pyreg.jax.register()

f4, u4, u1, b1, i4 = (np.dtype(t) for t in ("f4", "u4", "u1", "?", "i4"))
x, c = S((4, 6), f4), S((6,), f4)
words = pyreg.jax._numbers.of_rate(0.5, jnp.dtype("f4"), "philox", False)
window = np.array([[0, 0], [4, 6], [0, 0]], "u4")
window_v1 = np.array([[0, 0], [4, 6]], "i4")
epsilon = pyreg.jax._numbers.words_of(1e-5)

# name: operands (types are filled with ones), results, attributes
CALLS = {
    "pyreg_dropout_v2": ([x, S((2,), u4), words, window], [x], {"generator": 0}),
    "pyreg_dropout_mask_v2": ([S((2,), u4), words, window], [S((3,), u1)], {"generator": 0}),
    "pyreg_dropout_packed_v2": ([x, S((3,), u1), words, window], [x], {}),
    "pyreg_dropout_v1": ([x, S((2,), u4), window_v1], [x], {"generator": 0, "rate": 0.5}),
    "pyreg_dropout_mask_v1": ([S((2,), u4), window_v1], [S((3,), u1)], {"generator": 0, "rate": 0.5}),
    "pyreg_dropout_packed_v1": ([x, S((3,), u1), window_v1], [x], {"rate": 0.5}),
    "pyreg_batch_norm_forward_v2": ([x, c, c, epsilon, S((4, 6), b1), x], [x, c, c, c], {"axis": 1, "relu": True}),
    "pyreg_batch_norm_backward_v2": (
        [x, c, c, x, c, c, c, epsilon, S((4, 6), b1), x], [x, c, c, x], {"axis": 1}),
    "pyreg_batch_norm_forward_v1": (
        [x, c, c, S((4, 6), b1), x], [x, c, c], {"axis": 1, "relu": True, "epsilon": 1e-5}),
    "pyreg_batch_norm_backward_v1": (
        [x, c, c, x, c, c, c, S((4, 6), b1), x], [x, c, c, x], {"axis": 1, "epsilon": 1e-5}),
}

def value(operand):
    return np.ones(operand.shape, operand.dtype) if isinstance(operand, S) else operand

def run(name, operands, results, attributes):
    attributes = {k: np.int64(v) if type(v) is int else v for k, v in attributes.items()}
    try:
        jax.block_until_ready(jax.ffi.ffi_call(name, results)(*map(value, operands), **attributes))
    except Exception as error:
        if "INVALID_ARGUMENT" not in str(error):
            print(name, type(error).__name__, str(error)[:200])
        return False
    return True

def wrong_types(t):
    \"\"\"Other shapes of the same dtype, and other dtypes; for handlers that old files ask for, one of THIN.\"\"\"
    return itertools.islice(all_wrong_types(t), None, None, THIN if name.endswith("v1") else 1)

def all_wrong_types(t):
    shape, dtype = t.shape, np.dtype(t.dtype)
    for other in sorted({(), (1,), (1 << 20,), (*shape, 1), (1, *shape), shape[:-1], (*shape[:-1], shape[-1] + 1),
                         (*shape[:-1], shape[-1] - 1), (*shape[:-1], 1 << 20), (2, *shape), (1,) * 62, (0, *shape)}):
        yield S(other, dtype)
    for other in sorted({f4, np.dtype("f2"), u4, u1, b1, i4, np.dtype("c8")} - {dtype}, key=str):
        yield S(shape, other)
    yield S((), np.dtype("u2"))

# What fits all the same: batch dims of 1 or of the same length, an absent operand, another window of the same size ...
# Here only that nothing crashes, and how many calls are refused.
for name, (operands, results, attributes) in CALLS.items():
    assert run(name, operands, results, attributes), name
    refused = taken = 0
    for i in range(len(operands)):
        for wrong in wrong_types(operands[i]):
            if run(name, [*operands[:i], wrong, *operands[i + 1 :]], results, attributes):
                taken += 1
            else:
                refused += 1
    for i in range(len(results)):
        for wrong in wrong_types(results[i]):
            if run(name, operands, [*results[:i], wrong, *results[i + 1 :]], attributes):
                taken += 1
            else:
                refused += 1
    for key, bad in itertools.product(attributes, (-1, 2, 3, 7, 1 << 32, -(1 << 63), (1 << 32) + 1, 1.5, float("nan"))):
        was = attributes[key]
        if isinstance(was, bool) or isinstance(was, int) != isinstance(bad, int):
            continue
        if run(name, operands, results, {**attributes, key: bad}):
            taken += 1
        else:
            refused += 1
    print("counts", name, refused, taken)

# Windows of any content read and write nothing outside, whatever they mean.
rng = np.random.default_rng(0)
for _ in range(60):
    values = [0, 1, 4, 6, 7, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
    words_of_window = rng.choice(np.array(values, "u4"), (3, 2))
    run("pyreg_dropout_v2", [x, S((2,), u4), words, words_of_window], [x], {"generator": 0})
    run("pyreg_dropout_packed_v2", [x, S((3,), u1), words, words_of_window], [x], {})
    run("pyreg_dropout_mask_v2", [S((2,), u4), words, words_of_window], [S((3,), u1)], {"generator": 0})
    run("pyreg_dropout_v1", [x, S((2,), u4), words_of_window[:2].view("i4")], [x], {"generator": 0, "rate": 0.5})
"""


@pytest.mark.parametrize("thin", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_calls_that_do_not_fit(thin):
    lines = python(
        f"THIN = {thin}\n{PROGRAM}", warnings="ignore", timeout=300, JAX_ENABLE_COMPILATION_CACHE="0"
    ).splitlines()
    counts = [line.split()[1:] for line in lines if line.startswith("counts")]
    assert [line for line in lines if not line.startswith("counts")] == []
    assert len(counts) == 10
    for name, refused, taken in counts:
        assert int(refused) > 5 * int(taken), (name, refused, taken)


def test_parameters_where_the_statistics_go():
    """XLA may be told to write the mean over the scale, and the variance over the bias."""
    code = """
import jax, numpy as np, pyreg.jax
jnp, S = jax.numpy, jax.ShapeDtypeStruct
pyreg.jax.register()
x, epsilon = jnp.asarray(np.random.default_rng(0).random((64, 4)), "f4"), pyreg.jax._numbers.words_of(1e-5)
outs = [S((64, 4), "float32"), *[S((4,), "float32")] * 3]
ys = []
for aliases in ({}, {1: 1}, {2: 3}, {1: 2, 2: 1}):
    call = jax.ffi.ffi_call("pyreg_batch_norm_forward_v2", outs, input_output_aliases=aliases)
    operands = x, jnp.arange(1.0, 5.0), jnp.ones(4), epsilon, jnp.zeros(0, bool), jnp.zeros(0)
    ys.append(np.asarray(jax.jit(lambda *a: call(*a, axis=np.int64(1), relu=False))(*operands)[0]))
print(all((y == ys[0]).all() for y in ys))
"""
    assert python(code, warnings="ignore") == "True"


# Structs of csrc/xla.h: XLA's name, ours, and the pairs of names of the fields.
LAYOUTS = [
    ("Extension_Base", "extension", "struct_size type next"),
    ("Api_Version", "version", "struct_size extension_start=extensions major_version=major minor_version=minor"),
    ("Metadata", "metadata", "struct_size api_version=version traits"),
    ("Metadata_Extension", "metadata_extension", "extension_base=head metadata"),
    ("Error_Create_Args", "error_create_args", "struct_size extension_start=extensions message errc=code"),
    ("Error_Destroy_Args", "error_destroy_args", "struct_size extension_start=extensions error"),
    (
        "ThreadPool_Schedule_Args",
        "schedule_args",
        "struct_size extension_start=extensions ctx=context task data=argument",
    ),
    (
        "Api",
        "api",
        "struct_size extension_start=extensions api_version=version internal_api=internal "
        "XLA_FFI_Error_Create=error_create XLA_FFI_Error_Destroy=error_destroy XLA_FFI_ThreadPool_Schedule=schedule",
    ),
    ("Buffer", "buffer", "struct_size extension_start=extensions dtype data rank dims"),
    ("Args", "buffers", "struct_size extension_start=extensions size=count types args=buffers"),
    ("Rets", "buffers", "struct_size extension_start=extensions size=count types rets=buffers"),
    ("ByteSpan", "span", "ptr=text len=length"),
    ("Scalar", "scalar", "dtype value"),
    ("Attrs", "attributes", "struct_size extension_start=extensions size=count types names attrs=values"),
    (
        "CallFrame",
        "call_frame",
        "struct_size extension_start=extensions api ctx=context stage args=operands rets=results attrs=attributes",
    ),
]
CONSTANTS = {
    **{f"DataType_{name}": name for name in ("PRED", "S32", "S64", "U8", "U32", "F16", "F32", "F64", "BF16")},
    **{f"Error_Code_{name}": name for name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")},
    "ExecutionStage_EXECUTE": "EXECUTE",
    "AttrType_SCALAR": "SCALAR",
    "Extension_Metadata": "METADATA",
    "API_MAJOR": "API_MAJOR",
}


def test_declarations_are_those_of_jaxlib(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    lines = ["#include <stddef.h>", '#include "xla/ffi/api/c_api.h"', '#include "xla.h"']
    if "XLA_FFI_InternalExtension" in Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text():
        lines.append("#define XLA_FFI_Extension_Base XLA_FFI_InternalExtension")  # its name since version 0.5
    for theirs, ours, fields in LAYOUTS:
        for field in fields.split():
            their_field, _, our_field = field.partition("=")
            a, b = (f"XLA_FFI_{theirs}", their_field), (f"struct xla_{ours}", our_field or their_field)
            lines += [
                f'_Static_assert(offsetof({a[0]}, {a[1]}) == offsetof({b[0]}, {b[1]}), "offset of {a[0]}.{a[1]}");',
                f"_Static_assert(sizeof((({a[0]} *)0)->{a[1]}) == sizeof((({b[0]} *)0)->{b[1]}), "
                f'"size of {a[0]}.{a[1]}");',
            ]
    for theirs, ours in CONSTANTS.items():
        lines.append(f'_Static_assert((int)XLA_FFI_{theirs} == (int)XLA_{ours}, "{ours}");')
    lines.append('_Static_assert((int)XLA_FFI_API_MINOR >= (int)XLA_API_MINOR, "minor version");')
    source = tmp_path / "layouts.c"
    source.write_text("\n".join(lines) + "\n")
    csrc = Path(__file__).parents[1] / "csrc"
    command = [compiler, "-std=c11", "-fsyntax-only", "-I", jax.ffi.include_dir(), "-I", csrc, source]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
