/* Arrays of any strides, seen as (outer, channels, inner) and walked block by block for the loops of batch-norm. */
#ifndef PYREG_BLOCKS_H
#define PYREG_BLOCKS_H

#include "kernels/kernels.h"
#include "strided.h"

_Static_assert(BN_OPERANDS <= (int)MAX_OPERANDS, "a dim has a stride for each operand");

/* Dims are sorted by x's strides and merged where they are one dim in all operands.  `inner` is
 * the innermost dim of stride smaller than the channels'; all other dims but the channels' are counted by `outer`. */
struct view {
    size_t outer, channels, inner;
    bool line;     /* inner is a line: a channel has a column for each of `spread` elements side by side */
    size_t spread; /* else: a row has a column for each of its elements; short rows go `spread` side by side */
    size_t size[BN_OPERANDS]; /* bytes of an element; 0: no such operand */
    bool output[BN_OPERANDS];
    char *data[BN_OPERANDS];
    size_t pack_at[BN_OPERANDS], pack_bytes; /* memory that a walk wants: where an operand is packed; in all */
    int num_outer;
    struct dim outer_dim[PYREG_MAX_DIMS], channel_dim, inner_dim;
};

struct operand {
    struct pyreg_array array;
    size_t size; /* of an element */
    bool output;
};

/* operands: BN_OPERANDS of them; the order of dims is that of BN_X.  An inner dim of long_line elements or more is
 * taken as a line, a shorter one together with the other channels'. */
void view_init(struct view *v, int ndim, const int64_t *shape, int axis, const struct operand *operands,
               size_t long_line);

/* A part of the view. */
struct region {
    size_t outer, outer_end, channel, channel_end, inner, inner_end;
};

enum { PACK = BN_COLUMNS }; /* elements of a block that has to be packed */

/* for (walk_begin(&w, v, region, pack); walk_next(&w);) work on w.block.  Operands that are not rows of neighbouring
 * elements are packed first, and outputs unpacked after, in v->pack_bytes of memory at `pack`. */
struct walk {
    const struct view *view;
    struct region left;
    size_t inner_begin;
    struct region now;
    bool packed[BN_OPERANDS];
    struct bn_block block;
    char *pack;
};
void walk_begin(struct walk *w, const struct view *v, struct region region, void *pack);
bool walk_next(struct walk *w);

/* Columns that a block of `channels` channels has. */
size_t view_columns(const struct view *v, size_t channels);
/* How many of `channels` channels a walk can take together: all that are neighbours in a row. */
size_t view_together(const struct view *v, size_t channels);

/* Address of an element. */
char *view_at(const struct view *v, enum bn_operand k, size_t outer, size_t channel, size_t inner);

#endif
