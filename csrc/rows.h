/* How dropout goes through x and y: in rows of elements whose mask bits are near each other, cut into chunks. */
#ifndef PYREG_ROWS_H
#define PYREG_ROWS_H

#include "mask_bits.h"
#include "strided.h"

/* A dim's strides: of x and y in bytes, of the mask in bits. */
enum { X, Y, MASK, ROW_OPERANDS };

struct rows {
    size_t count, length;             /* of rows; of each, in elements */
    struct mask_row bits;             /* of a row */
    bool neighbours;                  /* its bits are just neighbours */
    bool contiguous;                  /* its elements are neighbours in x and in y */
    bool shared;                      /* rows that follow each other have the same bits */
    struct dim outer[PYREG_MAX_DIMS]; /* what counts the rows, in memory order, innermost last */
    int num_outer;

    /* What a row consists of, in memory order, innermost first; stride[MASK]: in the row.  A part of a row takes a part
     * of inner[cut], and the others, of `whole` elements, as a whole. */
    struct dim inner[MAX_BOX];
    int num_inner, cut;
    size_t whole;

    size_t part, per_chunk, chunks_per_part; /* a chunk is some rows, as far as one part of their elements */
};

_Static_assert(ROW_OPERANDS <= (int)MAX_OPERANDS, "a dim has a stride for each operand");

/* The rows of a call on elements of `size` bytes.  worth: so many elements must share a group of bits for it to pay; 0:
 * none are made. */
void rows_plan(struct rows *rows, const struct pyreg_dropout *args, size_t size, size_t worth);

size_t rows_chunks(const struct rows *rows);

/* Elements j .. j + n - 1, of `size` bytes, of a row of x into a tile; or out of a tile into a row of y. */
void rows_copy_in(const struct rows *rows, size_t size, const char *x, size_t j, size_t n, char *tile);
void rows_copy_out(const struct rows *rows, size_t size, char *y, size_t j, size_t n, const char *tile);

#endif
