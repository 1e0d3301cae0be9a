/* Mask bits from counters.  Compiled once per instruction set (PYREG_ISA); exports one table. */
#include "../arith.h"
#include "kernels.h"
#include "philox.h"
#include "threefry.h"

/* ---- philox-v1: digit p of element i is bit i % 32 of word p % 4 of Philox at counter (i / 32, p / 4) ------------ */

static void prepare(struct draw *draw) {
    for (uint32_t r = 0; r < PHILOX_ROUNDS; r++) {
        draw->round_key[r][0] = (uint32_t)(draw->key[0] + r * PHILOX_W0);
        draw->round_key[r][1] = (uint32_t)(draw->key[1] + r * PHILOX_W1);
    }
    for (int p = 0; p < LIMIT_DIGITS; p++) draw->digit[p] = -(uint32_t)(draw->limit >> (63 - p) & 1);
}

/* Eight digits of the elements of LANES32 words, and how they compare with those of the limit. */
struct digits {
    vec32 less, equal;
};

/* Digits 4 q .. 4 q + 3, or + 7 if eight, of the words at these counters (low halves; the high half is the same).
 * Of the first two rounds half is the same for all of them, and most for all q. */
static INLINE_LONG struct digits compare_digits(const struct draw *draw, vec32 counter, uint32_t high, uint32_t q,
                                                bool eight) {
    const uint64_t(*k)[2] = draw->round_key;
    vec64 low[2]; /* even and odd words */
    split_low(counter, &low[0], &low[1]);
    struct philox_state s[2][2]; /* [q][even, odd] */
    for (uint32_t g = 0; g < 1u + eight; g++) {
        uint64_t first = (uint64_t)PHILOX_M1 * (q + g); /* p1 of round 1 */
        uint64_t second =
            (uint64_t)PHILOX_M0 * ((uint32_t)(first >> 32) ^ high ^ (uint32_t)k[0][0]); /* p0 of round 2 */
        for (int h = 0; h < 2; h++) {
            vec64 p0 = mul_wide(low[h], splat64(PHILOX_M0));
            vec64 p1 = mul_wide(p0 >> 32 ^ splat64(k[0][1]), splat64(PHILOX_M1));
            s[g][h] = (struct philox_state){p1 >> 32 ^ splat64((uint32_t)first ^ k[1][0]), p1,
                                            p0 ^ splat64(second >> 32 ^ k[1][1]), splat64(second)};
        }
    }
#pragma GCC unroll 8
    for (int r = 2; r < PHILOX_ROUNDS; r++)
        for (int g = 0; g < 1 + eight; g++)
            for (int h = 0; h < 2; h++) s[g][h] = philox_round(s[g][h], k[r][0], k[r][1]);

    struct digits d = {splat32(0), splat32(~0u)};
    for (int g = eight; g >= 0; g--) { /* least significant digit first: a digit that differs overrules those below */
        const vec32 digit[4] = {interleave_low(s[g][0].c0, s[g][1].c0), interleave_low(s[g][0].c1, s[g][1].c1),
                                interleave_low(s[g][0].c2, s[g][1].c2), interleave_low(s[g][0].c3, s[g][1].c3)};
        for (int p = 3; p >= 0; p--) {
            vec32 limit = splat32(draw->digit[4 * (q + (uint32_t)g) + (uint32_t)p]);
            vec32 differ = digit[p] ^ limit;
            d.less = select32(differ, limit, d.less);
            d.equal &= ~differ;
        }
    }
    return d;
}

/* The elements of each word that tie with the limit in their first digits, and the words in which there are some. */
struct ties {
    uint32_t element[MASK_WORDS];
    uint64_t some[MASK_WORDS / 64 + 1]; /* a bit for each word */
};

static inline void note_ties(struct ties *ties, vec32 equal, uint32_t word) {
    memcpy(ties->element + word, &equal, sizeof equal);
    ties->some[word / 64] |= (uint64_t)nonzero_bits(equal) << word % 64;
}

/* The numbers of these words, and zeros to fill the last vector; returns how many they are. */
static size_t list_ties(const struct ties *ties, uint32_t word[MASK_WORDS + LANES32]) {
    size_t count = 0;
    for (uint32_t w = 0; w <= MASK_WORDS / 64; w++)
        for (uint64_t some = ties->some[w]; some; some &= some - 1)
            word[count++] = 64 * w + (uint32_t)__builtin_ctzll(some);
    memset(word + count, 0, LANES32 * sizeof *word);
    return count;
}

/* Digits 16 and on, one word at a time: wanted once in 256 words of 32 elements that tie, themselves one in nine. */
static void resolve_word(const struct draw *draw, uint64_t counter, uint32_t element, uint32_t *keep) {
    for (uint32_t q = 4; element && q < 16; q++) {
        uint32_t digit[4];
        philox4x32(draw->key, (uint32_t[4]){(uint32_t)counter, (uint32_t)(counter >> 32), q, 0}, digit);
        for (uint32_t p = 0; p < 4; p++) {
            uint32_t limit = draw->digit[4 * q + p];
            *keep &= ~(element & limit & ~digit[p]);
            element &= ~(digit[p] ^ limit);
        }
    }
}

static void resolve(const struct draw *draw, uint64_t first, const struct ties *ties, uint32_t *keep) {
    uint32_t words[MASK_WORDS + LANES32];
    const size_t count = list_ties(ties, words);
    for (size_t n = 0; n < count; n += LANES32) { /* what lies past the count is computed and not used */
        vec32 word;
        memcpy(&word, words + n, sizeof word);
        struct digits d = compare_digits(draw, word + (uint32_t)first, (uint32_t)(first >> 32), 2, true);
        uint32_t less[LANES32], equal[LANES32];
        memcpy(less, &d.less, sizeof less);
        memcpy(equal, &d.equal, sizeof equal);
        for (size_t j = 0; j < LANES32 && n + j < count; j++) {
            uint32_t at = words[n + j], element = ties->element[at];
            keep[at] &= ~(element & less[j]);
            if (element & equal[j]) resolve_word(draw, first + at, element & equal[j], keep + at);
        }
    }
}

static struct upcoming take(struct upcoming *next) {
    const struct upcoming taken = *next;
    *next = NOTHING;
    return taken;
}

/* The lines of one of equal shares, in order. */
static inline void ask_for(struct upcoming *next, size_t share) {
    if (share == 0) return; /* at is NULL, and NULL + 0 is undefined */
    const char *end = next->at + share;
#pragma GCC unroll 4
    for (const char *line = next->at; line < end; line += LINE_BYTES) __builtin_prefetch(line);
    next->at = end;
}

static void philox(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep, struct upcoming *next) {
    const uint64_t before_carry = (UINT64_C(1) << 32) - (uint32_t)first;
    if (words > before_carry) { /* the loops below take the counter's high half as fixed */
        const size_t same_high = (size_t)before_carry;
        philox(draw, first, same_high, keep, next);
        philox(draw, first + same_high, words - same_high, keep + same_high, next);
        return;
    }
    struct ties ties;
    memset(ties.some, 0, sizeof ties.some);
    bool eight = draw->limit << 4, more = draw->limit << 8;
    vec32 counter = lane_numbers() + (uint32_t)first;
    struct upcoming upcoming = take(next);
    const size_t share = upcoming.bytes / (words / LANES32);
    for (uint32_t w = 0; w < words; w += LANES32, counter += LANES32) {
        ask_for(&upcoming, share);
        struct digits d = eight ? compare_digits(draw, counter, (uint32_t)(first >> 32), 0, true)
                                : compare_digits(draw, counter, (uint32_t)(first >> 32), 0, false);
        *(vec32 *)(keep + w) = ~d.less;
        if (more) note_ties(&ties, d.equal, w);
    }
    if (more) resolve(draw, first, &ties, keep);
}

static void philox_block(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]) {
    struct draw draw = {.key = {key[0], key[1]}};
    prepare(&draw);
    struct philox_state s = {splat64(counter[0]), splat64(counter[1]), splat64(counter[2]), splat64(counter[3])};
    for (int r = 0; r < PHILOX_ROUNDS; r++) s = philox_round(s, draw.round_key[r][0], draw.round_key[r][1]);
    out[0] = (uint32_t)s.c0[0], out[1] = (uint32_t)s.c1[0], out[2] = (uint32_t)s.c2[0], out[3] = (uint32_t)s.c3[0];
}

/* ---- threefry: element i's draw is Threefry at counter (high, low) of i; kept iff it is below the limit ---------- */

/* A step makes the bits of this many elements; whole pairs of words are written at once. */
enum { STEP = CHAINS * LANES32, SPAN = STEP > 64 ? STEP : 64 };

/* Bits of STEP elements, from the one with the given index on, which is a multiple of that. */
static ALWAYS_INLINE void threefry_bits(const struct draw *draw, uint64_t index, bool x64, uint64_t bits[SPAN / 64]) {
    struct threefry_state s;
    for (uint32_t c = 0; c < CHAINS; c++) {
        s.x0[c] = splat32((uint32_t)(index >> 32));
        s.x1[c] = lane_numbers() + ((uint32_t)index + c * LANES32);
    }
    threefry2x32(draw->key, &s);
#pragma GCC unroll 8
    for (int c = 0; c < CHAINS; c++) {
        const int at = c * LANES32;
        uint32_t kept;
        if (x64) { /* in two halves; of the low one, 12 bits do not matter */
            const uint64_t last = (draw->limit << 12) - 1;
            const vec32 high = splat32((uint32_t)(last >> 32)), low = splat32((uint32_t)last);
            kept = ~at_most_bits(high, s.x0[c]) | (at_most_bits(s.x0[c], high) & at_most_bits(s.x1[c], low));
            kept &= (uint32_t)((UINT64_C(1) << LANES32) - 1);
        } else { /* of which 9 bits do not matter */
            kept = at_most_bits(s.x0[c] ^ s.x1[c], splat32((uint32_t)(draw->limit << 9) - 1));
        }
        bits[at / 64] |= (uint64_t)kept << at % 64;
    }
}

static inline void threefry_words(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep,
                                  struct upcoming *next, bool x64) {
    struct upcoming upcoming = take(next);
    const size_t share = upcoming.bytes / (words / (SPAN / 32));
    for (size_t w = 0; w < words; w += SPAN / 32) {
        ask_for(&upcoming, share);
        uint64_t bits[SPAN / 64] = {0};
        for (uint32_t j = 0; j < SPAN; j += STEP) {
            uint64_t part[SPAN / 64] = {0};
            threefry_bits(draw, (first + w) * 32 + j, x64, part);
            for (int k = 0; k < SPAN / 64; k++) bits[k] |= part[k] << j;
        }
        for (size_t k = 0; k < SPAN / 64; k++) {
            keep[w + 2 * k] = (uint32_t)bits[k];
            keep[w + 2 * k + 1] = (uint32_t)(bits[k] >> 32);
        }
    }
}

static void threefry(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep, struct upcoming *next) {
    threefry_words(draw, first, words, keep, next, false);
}

static void threefry_x64(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep, struct upcoming *next) {
    threefry_words(draw, first, words, keep, next, true);
}

static void threefry_block(const uint32_t key[2], const uint32_t counter[2], uint32_t out[2]) {
    struct threefry_state s;
    for (int c = 0; c < CHAINS; c++) s.x0[c] = splat32(counter[0]), s.x1[c] = splat32(counter[1]);
    threefry2x32(key, &s);
    out[0] = s.x0[CHAINS - 1][0], out[1] = s.x1[CHAINS - 1][0];
}

#define TABLE2(isa) pyreg_masks_##isa
#define TABLE(isa) TABLE2(isa)
const struct mask_kernels TABLE(PYREG_ISA) = {
    .prepare = prepare,
    .philox = philox,
    .threefry = threefry,
    .threefry_x64 = threefry_x64,
    .philox_block = philox_block,
    .threefry_block = threefry_block,
};
