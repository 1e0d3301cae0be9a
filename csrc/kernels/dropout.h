/* y = kept ? x * scale : 0 for one row, given the mask's bits. */
#ifndef PYREG_KERNELS_DROPOUT_H
#define PYREG_KERNELS_DROPOUT_H

#include "elem.h"
#include "kernels.h"
#include "stream.h"
#include "vec.h"

enum { LINE_BYTES = 64, WORD = 32 };

static inline elem_t dropout_elem(elem_t x, uint32_t kept, acc_t scale) {
    elem_t y = store(load(x) * scale);
    return kept ? y : 0;
}

/* ---- Vectors of elements, as bits; spelled out because compilers find them in a plain loop on some targets only -- */

#if defined(PYREG_F32)
typedef uint32_t elem_bits;
typedef vec32 vec;
#elif defined(PYREG_F64)
typedef uint64_t elem_bits;
typedef vec64 vec;
#else
typedef uint16_t elem_bits;
typedef vec16 vec;
#endif
enum { LANES = VEC_BYTES / sizeof(elem_t) };

/* y[j] = bit j of kept ? v[j] : 0. */
static inline void store_kept(elem_t *y, vec v, uint32_t kept) {
#if defined(__AVX512BW__)
    __m512i bits = (__m512i)v;
    if (sizeof(elem_t) == 2)
        bits = _mm512_maskz_mov_epi16(kept, bits);
    else if (sizeof(elem_t) == 4)
        bits = _mm512_maskz_mov_epi32((__mmask16)kept, bits);
    else
        bits = _mm512_maskz_mov_epi64((__mmask8)kept, bits);
    _mm512_storeu_si512(y, bits);
#else
    static const elem_bits powers[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    vec bit;
    memcpy(&bit, powers, sizeof bit);
    v &= (vec)(((elem_bits)kept & bit) == bit);
    memcpy(y, &v, sizeof v);
#endif
}

/* One vector of x * scale, in the element type. */
#if defined(PYREG_BF16)
static inline vec scaled(const elem_t *x, acc_t scale) {
    /* Two in each 32-bit lane: the upper one is a float once the lower is cleared, the lower once it is shifted up.
     * Rounding is simpler than store()'s.  Adding half rounds ties up, not to even; but no product with 1 / keep ties
     * (a bfloat16 keep has one of 128 significands, and so has x: all 16,384 pairs were tried, and are by the tests).
     * And the product of a NaN ends in 16 zero bits, so it does not carry. */
    vec32 pair;
    memcpy(&pair, x, sizeof pair);
    vec32 a = (vec32)((vecf)(pair & 0xffff0000u) * scale), b = (vec32)((vecf)(pair << 16) * scale);
    a += 0x8000;
    b += 0x8000;
    return (vec16)((a & 0xffff0000u) | b >> 16);
}
#elif defined(PYREG_F16) && defined(__AVX512F__)
static inline vec scaled(const elem_t *x, acc_t scale) {
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
        __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x + h));
        half[h] = _mm512_cvtps_ph(_mm512_mul_ps(a, _mm512_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT);
    }
    return (vec16)_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}
#elif defined(PYREG_F16) && defined(__F16C__)
static inline vec scaled(const elem_t *x, acc_t scale) {
    __m128i half[2];
    for (int h = 0; h < 2; h++) {
        __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x + h));
        half[h] = _mm256_cvtps_ph(_mm256_mul_ps(a, _mm256_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT);
    }
    return (vec16)_mm256_set_m128i(half[1], half[0]);
}
#elif defined(PYREG_F16)
static inline vec scaled(const elem_t *x, acc_t scale) {
    vec v = {0};
    for (int j = 0; j < LANES; j++) v[j] = store(load(x[j]) * scale);
    return v;
}
#else
static inline vec scaled(const elem_t *x, acc_t scale) {
    typedef acc_t vec_acc __attribute__((vector_size(VEC_BYTES)));
    vec_acc v;
    memcpy(&v, x, sizeof v);
    return (vec)(v * scale);
}
#endif

/* x, y: 32 elements. */
static inline void dropout_word(const elem_t *x, elem_t *y, uint32_t kept, acc_t scale) {
    for (int j = 0; j < WORD; j += LANES) store_kept(y + j, scaled(x + j, scale), kept >> j);
}

static void dropout(const void *x_, void *y_, size_t n, const uint32_t *keep, unsigned shift, double scale_,
                    bool stream) {
    const elem_t *x = x_;
    elem_t *y = y_;
    acc_t scale = (acc_t)scale_;
    size_t j = 0;
    for (; j + WORD <= n; j += WORD) {
        for (size_t b = 0; b < WORD * sizeof(elem_t); b += LINE_BYTES) {
            __builtin_prefetch((const char *)(x + j) + b + PREFETCH_BYTES);
            if (!stream) __builtin_prefetch((const char *)(y + j) + b + PREFETCH_BYTES, 1);
        }
        uint32_t kept = keep_word(keep, shift, j / WORD);
        if (stream) {
            elem_t line[WORD] __attribute__((aligned(LINE_BYTES)));
            dropout_word(x + j, line, kept, scale);
            stream_lines(y + j, line, sizeof line);
        } else {
            dropout_word(x + j, y + j, kept, scale);
        }
    }
    uint32_t kept = keep_word(keep, shift, j / WORD);
    for (; j < n; j++, kept >>= 1) y[j] = dropout_elem(x[j], kept & 1, scale);
}

#endif
