/* Strided operands of one shape: check the shape, sort and merge its dims, find an element, copy a part. */
#ifndef PYREG_STRIDED_H
#define PYREG_STRIDED_H

#include "pyreg.h"

enum { MAX_OPERANDS = 7 };

/* A dim has one length, and a stride for each operand; that of an operand that is not there is 0. */
struct dim {
    size_t length;
    int64_t stride[MAX_OPERANDS];
};

/* PYREG_BAD_SHAPE for what pyreg.h does not allow, else the number of elements. */
enum pyreg_status count_elements(int ndim, const int64_t *shape, size_t *elements);

/* Strides of a dense array in C order whose elements are `size` apart. */
void c_strides(size_t ndim, const int64_t *shape, size_t size, int64_t *strides);

/* Appends a dim to the n before it, as one with the last if they are one in all operands; returns the new n. */
int append_dim(struct dim *dims, int n, const struct dim *dim);

/* Inserts a dim behind all those that do not reach less far (stable); returns n + 1. */
int insert_dim(struct dim *dims, int n, const struct dim *dim, int64_t (*reach)(const struct dim *dim));

/* How far element `index` of the dims, in C order, lies from the first: added to at[k] for each operand k < operands;
 * or for one operand.  Modulo 2^64. */
void add_offsets(const struct dim *dims, int n, size_t index, int operands, int64_t *at);
int64_t offset_of(const struct dim *dims, int n, size_t index, int operand);

/* Copies a box of elements of `size` bytes between two arrays.  Dim 0 is the innermost; strides are in bytes. */
enum { MAX_BOX = 10 };
struct box {
    size_t size;
    int ndim;
    size_t length[MAX_BOX];
    int64_t to_stride[MAX_BOX], from_stride[MAX_BOX];
};
void copy_box(const struct box *box, char *to, const char *from);

#endif
