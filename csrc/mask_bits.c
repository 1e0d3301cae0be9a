#include "mask_bits.h"

#include "arith.h"
#include "dispatch.h"

#include <math.h>
#include <string.h>

/* ---- Sources ----------------------------------------------------------------------------------------------------- */

/* Bits that have been made before; beyond the last there are zeros. */
static void read_packed(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep, struct upcoming *next) {
    (void)next;
    const size_t size = 4 * words, from = (size_t)(first <= draw->num_bytes / 4 ? 4 * first : draw->num_bytes);
    const size_t n = at_most(draw->num_bytes - from, size);
    if (n) memcpy(keep, draw->bits + from, n);
    memset((char *)keep + n, 0, size - n);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (size_t w = 0; w < words; w++) keep[w] = __builtin_bswap32(keep[w]);
#endif
}

enum pyreg_status mask_source_init(struct mask_source *source, const struct pyreg_mask *mask) {
    struct draw *draw = &source->draw;
    if ((unsigned)mask->generator >= PYREG_NUM_GENERATORS) return PYREG_BAD_GENERATOR;
    if (!(mask->rate >= 0 && mask->rate <= 1)) return PYREG_BAD_RATE;
    const struct mask_kernels *kernels = dispatch_masks();
    const double keep = 1 - mask->rate;
    draw->key[0] = mask->key[0];
    draw->key[1] = mask->key[1];
    switch (mask->generator) {
    case PYREG_THREEFRY:
        draw->limit = (uint64_t)ceil((double)(float)keep * 0x1p23);
        source->make = kernels->threefry;
        break;
    case PYREG_THREEFRY_X64:
        draw->limit = (uint64_t)ceil(keep * 0x1p52);
        source->make = kernels->threefry_x64;
        break;
    case PYREG_PACKED:
        draw->bits = mask->bits;
        draw->num_bytes = mask->num_bytes;
        source->make = read_packed;
        return PYREG_OK;
    default: { /* rounded to 64 bits; the largest double below 1 still fits */
        draw->limit = mask->rate < 1 ? (uint64_t)nearbyint(mask->rate * 0x1p64) : 0;
        source->make = kernels->philox;
    }
    }
    kernels->prepare(draw);
    return PYREG_OK;
}

/* ---- Spans ------------------------------------------------------------------------------------------------------- */

void mask_span_init(struct mask_span *span, const struct mask_source *source) {
    span->source = source;
    span->first = span->bits = 0;
}

/* Groups are counted as indices are, modulo 2^64. */
static void make_groups(const struct mask_source *source, uint64_t group, size_t n, uint32_t *keep,
                        struct upcoming *next) {
    const uint64_t groups = UINT64_MAX / 32 + 1;
    group %= groups;
    const size_t before_end = group + n <= groups ? n : (size_t)(groups - group);
    source->make(&source->draw, group, before_end, keep, next);
    if (before_end < n) source->make(&source->draw, 0, n - before_end, keep + before_end, next);
}

size_t mask_span_cover(struct mask_span *span, uint64_t index, size_t n, struct upcoming *next) {
    uint64_t at = index - span->first; /* indices are modulo 2^64 */
    if (at < span->bits && at + n <= span->bits) return (size_t)at;

    uint64_t first = index & ~(uint64_t)(MASK_GROUP - 1), skip = first - span->first;
    size_t have = skip < span->bits ? span->bits - (size_t)skip : 0;
    if (have) memmove(span->keep, span->keep + skip / 32, have / 8);
    size_t want = divide_up((size_t)(index - first) + n, MASK_GROUP) * MASK_GROUP;
    make_groups(span->source, first / 32 + have / 32, (want - have) / 32, span->keep + have / 32, next);
    span->first = first;
    span->bits = want;
    return (size_t)(index - first);
}

static bool bit_at(const uint32_t *keep, size_t at) { return keep[at / 32] >> at % 32 & 1; }

/* The 32 bits from a position on. */
static uint32_t word_at(const uint32_t *keep, size_t at) { return keep_word(keep + at / 32, at % 32, 0); }

/* Puts 32 bits at a position; what was before it stays, what was behind is lost. */
static void put_word(uint32_t *keep, size_t at, uint32_t word) {
    uint64_t pair = (uint64_t)word << at % 32 | (keep[at / 32] & ((UINT32_C(1) << at % 32) - 1));
    keep[at / 32] = (uint32_t)pair;
    keep[at / 32 + 1] = (uint32_t)(pair >> 32);
}

/* The same with n bits that are all those of a word of zeros or of ones. */
static void put_run(uint32_t *keep, size_t at, size_t n, uint32_t word) {
    put_word(keep, at, word);
    for (size_t w = at / 32 + 1; 32 * w < at + n; w++) keep[w] = word;
}

/* ---- Rows whose bits are not just neighbours --------------------------------------------------------------------- */

/* n bits: each of those from `at` on in from[] fills a run; the first has been used `skip` times. */
static void spread_bits(const uint32_t *from, size_t at, size_t run, size_t skip, size_t n, uint32_t *keep) {
    for (size_t j = 0; j < n; j += run - skip, skip = 0, at++) {
        const uint32_t word = -(uint32_t)bit_at(from, at);
        put_run(keep, j, at_most(run - skip, n - j), word);
    }
}

/* n bits, of which the first `period` are there.  The period is doubled, because what has just been written is slow to
 * read. */
static void repeat_bits(size_t period, size_t n, uint32_t *keep) {
    for (size_t j = period, bits; j < n; j += bits) {
        if (period < 128 && j >= 2 * period) period *= 2;
        bits = at_most(period, 32);
        put_word(keep, j, word_at(keep, j - period));
    }
}

void mask_gather(struct mask_span *span, const struct mask_row *row, uint64_t index, size_t j, size_t n,
                 uint32_t keep[GATHERED_WORDS]) {
    const uint64_t step = row->step, run_step = row->run_step;
    const size_t run = step || run_step ? row->run : SIZE_MAX; /* else all are one bit */
    size_t skip = j % run;
    index += j / run * step;
    if (step <= 1 && run_step == 0) {
        size_t at = mask_span_cover(span, index, (skip + n - 1) / run + 1, &NOTHING);
        spread_bits(span->keep, at, run, skip, n, keep);
        return;
    }
    const size_t own = step == 0 && run < n ? run : n; /* the rest repeats them */
    for (size_t k = 0, bits; k < own; k += bits, skip = 0, index += step) {
        bits = at_most(run - skip, n - k);
        size_t at = mask_span_cover(span, index + skip * run_step, run_step ? bits : 1, &NOTHING);
        for (size_t b = 0; b < bits; b += 32)
            put_word(keep, k + b, run_step ? word_at(span->keep, at + b) : -(uint32_t)bit_at(span->keep, at));
    }
    repeat_bits(own, n, keep);
}
