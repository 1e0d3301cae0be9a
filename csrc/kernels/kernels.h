/* The list of inner loops.  They are serial, allocate nothing and check nothing: that is done above them. */
#ifndef PYREG_KERNELS_H
#define PYREG_KERNELS_H

#include <float.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "floats are computed in other types here, so results would differ; on a 32-bit x86: -msse2 -mfpmath=sse"
#endif

/* A row of mask bits: word j holds elements 32 j .. 32 j + 31, least significant bit first, 1 = kept.
 * Generators make whole groups, the most that one vector of any instruction set holds, up to MASK_WORDS at once. */
enum { MASK_GROUP = 512, MASK_TILE = 4096, MASK_WORDS = (MASK_TILE + MASK_GROUP) / 32 };

/* Loops ask for cache lines this far ahead where the hardware's own prefetcher stops, at page ends. */
enum { PREFETCH_BYTES = 4096 };

/* What will be read next: loops that make bits ask for it meanwhile, because memory has nothing else to do then, and
 * leave NOTHING. */
struct upcoming {
    const char *at;
    size_t bytes;
};
#define NOTHING ((struct upcoming){NULL, 0})

/* 32 bits of a row that starts `shift` bits into keep[]: word j of it. */
static inline uint32_t keep_word(const uint32_t *keep, unsigned shift, size_t j) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t pair;
    memcpy(&pair, keep + j, sizeof pair); /* compilers make two loads of the other form */
#else
    const uint64_t pair = (uint64_t)keep[j + 1] << 32 | keep[j];
#endif
    return (uint32_t)(pair >> shift);
}

/* A mask, ready for the loops.  Round keys and digits lie in memory because a vector is filled from there for free. */
enum { PHILOX_ROUNDS = 10, LIMIT_DIGITS = 64 };
struct draw {
    uint32_t key[2];
    uint64_t limit;                       /* philox: dropped iff u < limit, of 2^64; threefry: kept iff draw < limit */
    uint64_t round_key[PHILOX_ROUNDS][2]; /* philox */
    uint32_t digit[LIMIT_DIGITS];         /* philox: the binary digits of limit, top one first, as masks 0 or ~0 */
    const uint8_t *bits;                  /* packed: the mask itself, of so many bytes */
    size_t num_bytes;
};

/* Makes mask bits.  `first` is the index of word 0's element 0 divided by 32;
 * `words` is a multiple of MASK_GROUP / 32; keep[] is aligned to 64 bytes. */
typedef void make_bits(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep, struct upcoming *next);

/* One table per instruction set. */
struct mask_kernels {
    void (*prepare)(struct draw *draw); /* fills in the fields below `limit` */
    make_bits *philox, *threefry, *threefry_x64;
    /* The generators alone: one block, computed as the loops above do. */
    void (*philox_block)(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]);
    void (*threefry_block)(const uint32_t key[2], const uint32_t counter[2], uint32_t out[2]);
};

/* ---- Batch-norm: a block of rows, what the loops work on ----------------------------------------------------------
 * A row has `lines` lines of `length` neighbouring elements; element j of line l belongs to column l * period + j %
 * period, and a channel owns one or several columns.  What is summed is an array of doubles, one per column.
 *
 *   Channels last (NHWC): a column per channel;         Channels first (NCHW): a line per channel, here of 10 elements,
 *   here rows of 4 channels, lines 1, period 4.         which 4 columns take in turn: lines 2, period 4.
 *
 *            column 0 1 2 3                                      channel c               channel c + 1
 *     row 0         a b c d                              row 0   0 1 2 3 0 1 2 3 0 1     4 5 6 7 4 5 6 7 4 5
 *     row 1         a b c d                              row 1   0 1 2 3 0 1 2 3 0 1     4 5 6 7 4 5 6 7 4 5
 *     row 2         a b c d      (letters: channels)                           (numbers: columns)
 *
 * So neighbouring elements always belong to different columns, and these are the lanes of vectors. */
enum bn_operand { BN_X, BN_Y, BN_RESIDUAL, BN_DY, BN_DX, BN_DRESIDUAL, BN_MASK, BN_OPERANDS };

struct bn_rows {
    void *at;         /* row 0; NULL: there is no such operand */
    ptrdiff_t stride; /* from row to row, in elements */
};

struct bn_block {
    size_t rows, lines, length, period; /* lines > 1 only if each is one channel's */
    struct bn_rows of[BN_OPERANDS];     /* a byte per element in the mask, the table's dtype in the others */
    bool channel_lines;                 /* a coefficient per line; else one per column */
    bool relu;
    bool stream; /* write around the cache */
};

enum { BN_COLUMNS = 1024 };                 /* of a block: at most */
enum { BN_NARROW = 4 * (BN_COLUMNS + 32) }; /* its coefficients in the precision of the computation: room for so many */

/* dx = gain * dy + slope * (x - centre) + offset; y = gain * (x - centre) + offset. */
struct bn_coefficients {
    const double *centre, *gain, *slope, *offset; /* slope: NULL for y */
    void *narrow;                                 /* memory for the loops: BN_NARROW floats or doubles */
};

/* Loops over elements: one table per instruction set and dtype.  x and y are arrays of that dtype. */
struct kernels {
    /* y[j] = bit `shift + j` of keep ? x[j] * scale : 0, for j < n.  Reads at most two words past the last bit.
     * ask: for the cache lines of x ahead, too.  stream: write around the cache; y is then aligned to 64 bytes.  x may
     * be y. */
    void (*dropout)(const void *x, void *y, size_t n, const uint32_t *keep, unsigned shift, double scale, bool ask,
                    bool stream);
    void (*stream_end)(void); /* after the last streamed store of a chunk: makes them visible to other threads */

    /* Batch-norm.  All are described where they are defined. */
    void (*bn_sums)(const struct bn_block *b, double *sum, double *square);
    void (*bn_shifted_sums)(const struct bn_block *b, const double *shift, double *sum, double *square);
    void (*bn_masked_sums)(const struct bn_block *b, const double *shift, double *count, double *sum, double *square);
    void (*bn_gradient_sums)(const struct bn_block *b, const double *shift, double *sum, double *dbias, double *dscale);
    void (*bn_finite_gradient_sums)(const struct bn_block *b, const double *shift, double *dbias, double *dscale,
                                    double *lost);
    void (*bn_normalise)(const struct bn_block *b, const struct bn_coefficients *coefficients);
    void (*bn_differentiate)(const struct bn_block *b, const struct bn_coefficients *coefficients);
    void (*bn_sweep_wide)(const struct bn_block *b, const struct bn_coefficients *coefficients);
};

#endif
