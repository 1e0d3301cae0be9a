# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The border between Python and csrc/pyreg.h: types, the GIL, status -> exception.  Arguments are checked in _ops.py."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Occurred

cnp.import_array()


cdef extern from "Python.h" nogil:
    int PyErr_CheckSignals()


cdef extern from "pyreg.h" nogil:
    ctypedef bint c_bool "bool"
    enum pyreg_status:
        PYREG_OK
        PYREG_NO_MEMORY
        PYREG_INTERRUPTED
    const char *pyreg_strerror(pyreg_status status)

    enum pyreg_dtype:
        PYREG_F32
        PYREG_F64
        PYREG_F16
        PYREG_BF16

    enum pyreg_generator:
        PYREG_PHILOX
        PYREG_THREEFRY
        PYREG_THREEFRY_X64

    struct pyreg_mask:
        pyreg_generator generator
        uint32_t key[2]
        double rate
        uint64_t offset

    enum:
        PYREG_MAX_DIMS

    pyreg_status pyreg_dropout(
        pyreg_dtype dtype, const pyreg_mask *mask, c_bool scaled, int ndim, const int64_t *shape, const void *x,
        const int64_t *x_strides, void *y, const int64_t *y_strides, const int64_t *mask_strides)
    pyreg_status pyreg_dropout_mask(const pyreg_mask *mask, size_t n, c_bool packed, uint8_t *out)

    int pyreg_get_num_threads()
    void pyreg_set_num_threads(int n)
    int pyreg_use_threads(int n)
    void pyreg_set_interrupt_check(c_bool (*check)() noexcept nogil)

    pyreg_status pyreg_init()
    const char *pyreg_isa_name()
    const char *pyreg_isa_available(int i)
    const char *pyreg_compiler()
    int pyreg_openmp_version()
    const char *pyreg_openmp_library()
    size_t pyreg_cache_bytes()


F32, F64, F16, BF16 = PYREG_F32, PYREG_F64, PYREG_F16, PYREG_BF16
PHILOX, THREEFRY, THREEFRY_X64 = PYREG_PHILOX, PYREG_THREEFRY, PYREG_THREEFRY_X64


cdef int check(pyreg_status status) except -1:
    if status == PYREG_OK:
        return 0
    if status == PYREG_INTERRUPTED and PyErr_Occurred():
        return -1  # raised by the signal handler
    message = pyreg_strerror(status).decode()
    raise MemoryError(message) if status == PYREG_NO_MEMORY else ValueError(message)


cdef c_bool signal_arrived() noexcept nogil:
    with gil:
        return PyErr_CheckSignals() != 0


cdef pyreg_mask make_mask(int generator, uint64_t key, double rate, uint64_t offset) noexcept:
    cdef pyreg_mask mask
    mask.generator = <pyreg_generator>generator
    mask.key[0] = <uint32_t>(key >> 32)
    mask.key[1] = <uint32_t>key
    mask.rate = rate
    mask.offset = offset
    return mask


def dropout(int dtype, cnp.ndarray x, cnp.ndarray y, int generator, uint64_t key, double rate, uint64_t offset,
            bint scaled, mask_strides):
    """y = dropout(x).  mask_strides: a tuple of x.ndim ints, or None for C order."""
    cdef pyreg_mask mask = make_mask(generator, key, rate, offset)
    cdef int64_t[PYREG_MAX_DIMS] strides
    cdef int64_t *strides_or_null = NULL
    cdef int d
    cdef pyreg_status status
    if mask_strides is not None:
        for d in range(x.ndim):
            strides[d] = mask_strides[d]
        strides_or_null = strides
    with nogil:
        status = pyreg_dropout(
            <pyreg_dtype>dtype, &mask, scaled, cnp.PyArray_NDIM(x), <const int64_t *>cnp.PyArray_DIMS(x),
            cnp.PyArray_DATA(x), <const int64_t *>cnp.PyArray_STRIDES(x), cnp.PyArray_DATA(y),
            <const int64_t *>cnp.PyArray_STRIDES(y), strides_or_null)
    check(status)


def dropout_mask(size_t n, cnp.ndarray out, bint packed, int generator, uint64_t key, double rate, uint64_t offset):
    """Fills out, a contiguous array of n bytes or (n + 7) // 8 if packed."""
    cdef pyreg_mask mask = make_mask(generator, key, rate, offset)
    cdef pyreg_status status
    with nogil:
        status = pyreg_dropout_mask(&mask, n, packed, <uint8_t *>cnp.PyArray_DATA(out))
    check(status)


def get_num_threads():
    return pyreg_get_num_threads()


def set_num_threads(int n):
    pyreg_set_num_threads(n)


def use_threads(int n):
    return pyreg_use_threads(n)


def config():
    available, i = [], 0
    while pyreg_isa_available(i) != NULL:
        available.append(pyreg_isa_available(i).decode())
        i += 1
    return {
        "compiler": pyreg_compiler().decode(),
        "isa": pyreg_isa_name().decode(),
        "isa_available": available,
        "openmp": pyreg_openmp_version(),
        "openmp_library": pyreg_openmp_library().decode(),
        "threads": pyreg_get_num_threads(),
        "cache_bytes": pyreg_cache_bytes(),
    }


cdef init():
    if pyreg_init() != PYREG_OK:
        import os
        names, i = [], 0
        while pyreg_isa_available(i) != NULL:
            names.append(pyreg_isa_available(i).decode())
            i += 1
        raise ImportError(f"PYREG_ISA={os.environ.get('PYREG_ISA')!r} is not an instruction set that this machine can "
                          f"run; choose from {', '.join(names)}")
    pyreg_set_interrupt_check(signal_arrived)


init()
