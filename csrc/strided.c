#include "strided.h"

#include <string.h>

enum pyreg_status count_elements(int ndim, const int64_t *shape, size_t *elements) {
    if (ndim < 0 || ndim > PYREG_MAX_DIMS) return PYREG_BAD_SHAPE;
    int64_t count = 1; /* without regard to dims of 0, which do not excuse the others */
    bool empty = false;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] < 0) return PYREG_BAD_SHAPE;
        empty |= shape[d] == 0;
        if (__builtin_mul_overflow(count, shape[d] ? shape[d] : 1, &count)) return PYREG_BAD_SHAPE;
    }
    if (!empty && (uint64_t)count > SIZE_MAX) return PYREG_BAD_SHAPE;
    *elements = empty ? 0 : (size_t)count;
    return PYREG_OK;
}

void c_strides(size_t ndim, const int64_t *shape, size_t size, int64_t *strides) {
    int64_t step = (int64_t)size;
    for (size_t d = ndim; d-- > 0; step *= shape[d]) strides[d] = step;
}

int append_dim(struct dim *dims, int n, const struct dim *dim) {
    bool one = n > 0;
    for (int k = 0; one && k < MAX_OPERANDS; k++)
        one = (uint64_t)dims[n - 1].stride[k] == (uint64_t)dim->stride[k] * dim->length;
    const size_t outer = one ? dims[n - 1].length : 1;
    if (!one) n++;
    if (dim != &dims[n - 1]) dims[n - 1] = *dim;
    dims[n - 1].length *= outer;
    return n;
}

int insert_dim(struct dim *dims, int n, const struct dim *dim, int64_t (*reach)(const struct dim *dim)) {
    int at = n;
    for (; at > 0 && reach(&dims[at - 1]) < reach(dim); at--) dims[at] = dims[at - 1];
    dims[at] = *dim;
    return n + 1;
}

void add_offsets(const struct dim *dims, int n, size_t index, int operands, int64_t *at) {
    for (int d = n - 1; d >= 0; d--) {
        const uint64_t j = index % dims[d].length;
        index /= dims[d].length;
        for (int k = 0; k < operands; k++) at[k] = (int64_t)((uint64_t)at[k] + j * (uint64_t)dims[d].stride[k]);
    }
}

int64_t offset_of(const struct dim *dims, int n, size_t index, int operand) {
    uint64_t at = 0;
    for (int d = n - 1; d >= 0; index /= dims[d--].length)
        at += index % dims[d].length * (uint64_t)dims[d].stride[operand];
    return (int64_t)at;
}

/* ---- Copies ------------------------------------------------------------------------------------------------------ */

static inline void copy_elements(size_t size, size_t n, char *to, int64_t to_stride, const char *from,
                                 int64_t from_stride) {
    for (size_t j = 0; j < n; j++) memcpy(to + (int64_t)j * to_stride, from + (int64_t)j * from_stride, size);
}

/* A loop of its own for elements that are neighbours on one side: it has one address less to keep. */
static inline void copy_sized(size_t size, size_t n, char *to, int64_t to_stride, const char *from,
                              int64_t from_stride) {
    const int64_t next = (int64_t)size;
    if (to_stride == next && from_stride == next)
        memcpy(to, from, n * size);
    else if (to_stride == next)
        copy_elements(size, n, to, next, from, from_stride);
    else if (from_stride == next)
        copy_elements(size, n, to, to_stride, from, next);
    else
        copy_elements(size, n, to, to_stride, from, from_stride);
}

static void copy_run(size_t size, size_t n, char *to, int64_t to_stride, const char *from, int64_t from_stride) {
    switch (size) { /* a constant size is one move */
    case 1: copy_sized(1, n, to, to_stride, from, from_stride); break;
    case 2: copy_sized(2, n, to, to_stride, from, from_stride); break;
    case 4: copy_sized(4, n, to, to_stride, from, from_stride); break;
    default: copy_sized(8, n, to, to_stride, from, from_stride); break;
    }
}

void copy_box(const struct box *box, char *to, const char *from) {
    size_t at[MAX_BOX] = {0};
    for (int d = 0; d < box->ndim;) {
        copy_run(box->size, box->length[0], to, box->to_stride[0], from, box->from_stride[0]);
        for (d = 1; d < box->ndim; d++) { /* the next run: as an odometer */
            to += box->to_stride[d], from += box->from_stride[d];
            if (++at[d] < box->length[d]) break;
            to -= (int64_t)box->length[d] * box->to_stride[d], from -= (int64_t)box->length[d] * box->from_stride[d];
            at[d] = 0;
        }
    }
}
