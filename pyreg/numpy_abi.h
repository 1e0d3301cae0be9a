/* What _core.pyx knows of NumPy: how its arrays lie in memory, and four functions of its table.  NumPy keeps both as they
 * are within a major version ("ABI"), and what stands here is the same in versions 1 and 2 but for the size of an element.
 * So one build serves both, and building needs no NumPy, of 17 MB.  tests/test_numpy_abi.py compares with its headers.
 *
 * https://numpy.org/doc/stable/reference/c-api/types-and-structures.html and .../array.html */
#ifndef PYREG_NUMPY_ABI_H
#define PYREG_NUMPY_ABI_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    PyObject head;
    PyTypeObject *scalar;
    char kind, letter, byteorder, flags;
    int num;
    union {
        struct {
            int itemsize;
        } of_1;
        struct {
            uint64_t flags;
            int64_t itemsize;
        } of_2;
    };
} numpy_dtype;

typedef struct {
    PyObject head;
    char *data;
    int ndim;
    int64_t *shape, *strides; /* strides in bytes; NumPy's npy_intp, of 64 bits wherever this is built */
    PyObject *base;
    numpy_dtype *dtype;
    int flags;
} numpy_array;

enum { NUMPY_INT16 = 3, NUMPY_FLOAT32 = 11, NUMPY_FLOAT64 = 12, NUMPY_FLOAT16 = 23 }; /* numpy_dtype.num */
enum { NUMPY_C_CONTIGUOUS = 1, NUMPY_F_CONTIGUOUS = 2, NUMPY_ALIGNED = 0x100, NUMPY_WRITEABLE = 0x400 };
enum { NUMPY_KEEP_ORDER = 2 };
enum { NUMPY_ABI_VERSION = 0, NUMPY_NEW = 93, NUMPY_NEW_LIKE = 277, NUMPY_SET_BASE = 282 }; /* places in the table */

static void **numpy_api; /* the table */
static int numpy_major;

/* table: numpy._core._multiarray_umath._ARRAY_API. */
static int numpy_use(PyObject *table) {
    numpy_api = PyCapsule_GetPointer(table, NULL);
    if (!numpy_api) return -1;
    unsigned version = ((unsigned (*)(void))numpy_api[NUMPY_ABI_VERSION])();
    numpy_major = (int)(version >> 24);
    if (numpy_major == 1 || numpy_major == 2) return 0;
    PyErr_Format(PyExc_ImportError, "pyreg knows the arrays of NumPy 1 and 2, and this NumPy's are of version %d",
                 numpy_major);
    return -1;
}

static inline int64_t numpy_itemsize(numpy_array *a) {
    return numpy_major == 1 ? a->dtype->of_1.itemsize : a->dtype->of_2.itemsize;
}

/* Whether a has all these flags, and this machine's byte order. */
static inline int numpy_is(numpy_array *a, int flags) {
    char foreign = PY_LITTLE_ENDIAN ? '>' : '<';
    return (a->flags & flags) == flags && a->dtype->byteorder != foreign;
}

static inline int numpy_same_shape(numpy_array *a, numpy_array *b) {
    return a->ndim == b->ndim && (!a->ndim || !memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof *a->shape));
}

static inline PyObject *numpy_new_like(numpy_array *a) {
    PyObject *(*new_like)(numpy_array *, int, numpy_dtype *, int) = numpy_api[NUMPY_NEW_LIKE];
    return new_like(a, NUMPY_KEEP_ORDER, NULL, 0);
}

/* type: numpy.ndarray.  strides and data: NULL for new memory in C order. */
static inline PyObject *numpy_new(PyTypeObject *type, int ndim, const int64_t *shape, int num, const int64_t *strides,
                                  void *data) {
    PyObject *(*new)(PyTypeObject *, int, const int64_t *, int, const int64_t *, void *, int, int, PyObject *) =
        numpy_api[NUMPY_NEW];
    return new (type, ndim, shape, num, strides, data, 0, data ? NUMPY_WRITEABLE : 0, NULL);
}

static inline int numpy_set_base(numpy_array *a, PyObject *base) {
    int (*set_base)(numpy_array *, PyObject *) = numpy_api[NUMPY_SET_BASE];
    Py_INCREF(base); /* which it takes, even when it fails */
    return set_base(a, base);
}

#endif
