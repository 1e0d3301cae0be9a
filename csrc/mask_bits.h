/* Mask bits, a span at a time: of a generator or packed, of neighbouring elements or gathered for a row. */
#ifndef PYREG_MASK_BITS_H
#define PYREG_MASK_BITS_H

#include "kernels/kernels.h"
#include "pyreg.h"

/* Elements that a thread claims at once: long enough to hide the claim, short enough to share out and to interrupt. */
enum { MASK_CHUNK = 16 * MASK_TILE };

/* Where the bits of a mask come from. */
struct mask_source {
    struct draw draw;
    make_bits *make;
};
enum pyreg_status mask_source_init(struct mask_source *source, const struct pyreg_mask *mask);

/* A span of the endless row of mask bits: a tile at any position.  Neighbouring rows share what it holds. */
struct mask_span {
    const struct mask_source *source;
    uint64_t first;                                             /* index of bit 0, a multiple of MASK_GROUP */
    size_t bits;                                                /* that have been made */
    uint32_t keep[MASK_WORDS + 2] __attribute__((aligned(64))); /* readers may look two words too far */
};
void mask_span_init(struct mask_span *span, const struct mask_source *source);

/* Puts the bits of [index, index + n) into the span, n <= MASK_TILE, and returns the position of the first.  Bits that
 * are made leave NOTHING of what is next. */
size_t mask_span_cover(struct mask_span *span, uint64_t index, size_t n, struct upcoming *next);

/* The bits of a row's elements: element j has bit j / run * step + j % run * run_step. */
struct mask_row {
    size_t run;
    uint64_t step, run_step;
};
enum { GATHERED_WORDS = MASK_TILE / 32 + 2 };
/* keep: n <= MASK_TILE bits, those of elements j and on of a row whose first bit is at `index`. */
void mask_gather(struct mask_span *span, const struct mask_row *row, uint64_t index, size_t j, size_t n,
                 uint32_t keep[GATHERED_WORDS]);

#endif
