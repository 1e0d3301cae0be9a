/* Vectors of elements of one type: what the loops of dropout and batch-norm load, compute with, and store.  Together
 * with vec.h and stream.h the only place where one instruction set differs from another. */
#ifndef PYREG_KERNELS_LANES_H
#define PYREG_KERNELS_LANES_H

#include "../arith.h"
#include "elem.h"
#include "kernels.h"
#include "vec.h"

/* ---- A vector of elements as bits, for dropout.  Spelled out because compilers find these in a plain loop on some
 * targets only. ---------------------------------------------------------------------------------------------------- */

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

/* y[j] = bit `first + j` of kept ? v[j] : 0; first: a multiple of LANES below 32. */
static inline void store_kept(elem_t *y, vec v, uint32_t kept, unsigned first) {
#if defined(__AVX512BW__)
    kept >>= first;
    if (sizeof(elem_t) == 2)
        v = (vec)_mm512_maskz_mov_epi16(kept, (__m512i)v);
    else if (sizeof(elem_t) == 4) /* as floats, so that a product that has just been computed becomes a masked one */
        v = (vec)_mm512_maskz_mov_ps((__mmask16)kept, (__m512)v);
    else
        v = (vec)_mm512_maskz_mov_pd((__mmask8)kept, (__m512d)v);
    memcpy(y, &v, sizeof v);
#else
#define BIT(j) (elem_bits)1 << (j) % WIDTH
#define EIGHT_BITS(j) BIT(j), BIT(j + 1), BIT(j + 2), BIT(j + 3), BIT(j + 4), BIT(j + 5), BIT(j + 6), BIT(j + 7)
    enum { WIDTH = 8 * sizeof(elem_bits) };
    static const elem_bits bit_of_lane[32] = {EIGHT_BITS(0), EIGHT_BITS(8), EIGHT_BITS(16), EIGHT_BITS(24)};
    vec bit;
    memcpy(&bit, bit_of_lane + first, sizeof bit);
    const vec all = (elem_bits)(kept >> first / WIDTH * WIDTH) - (vec){0};
    v &= ~(vec)((all & bit) == 0);
    memcpy(y, &v, sizeof v);
#undef BIT
#undef EIGHT_BITS
#endif
}

#if defined(PYREG_BF16)
/* Two elements are in each 32-bit lane: the upper one is a float once the lower is cleared, the lower once it is shifted
 * up.  So no lanes are shuffled. */
static inline vecf odd_floats(const elem_t *x) {
    vec32 pairs;
    memcpy(&pairs, x, sizeof pairs);
    return (vecf)(pairs & 0xffff0000u);
}

static inline vecf even_floats(const elem_t *x) {
    vec32 pairs;
    memcpy(&pairs, x, sizeof pairs);
    return (vecf)(pairs << 16);
}

/* Of floats whose upper halves are the elements. */
static inline vec32 pairs_of(vec32 even, vec32 odd) { return even >> 16 | (odd & 0xffff0000u); }

/* To even, in the upper half of each lane.  Simpler than store(): here a NaN ends in 16 zero bits, so it does not carry. */
static inline vec32 round_bf16(vecf v) { return (vec32)v + 0x7fff + ((vec32)v >> 16 & 1); }
#endif

/* Whether a product with this scale may lie between two elements.  With the reciprocal of a bfloat16 none does: it has
 * one of 128 significands, and so has x: all 16,384 pairs were tried, and are by the tests. */
static inline bool may_tie(acc_t scale) {
#if defined(PYREG_BF16)
    return 1 / load(store(1 / scale)) != scale;
#else
    (void)scale;
    return false;
#endif
}

/* One vector of x * scale, in the element type; ties: may_tie(scale). */
#if defined(PYREG_BF16)
static inline vec scaled(const elem_t *x, acc_t scale, bool ties) {
    const vecf odd = odd_floats(x) * scale, even = even_floats(x) * scale;
    if (ties) return (vec16)pairs_of(round_bf16(even), round_bf16(odd));
    return (vec16)pairs_of((vec32)even + 0x8000, (vec32)odd + 0x8000);
}
#elif defined(PYREG_F16) && defined(__AVX512F__)
static inline vec scaled(const elem_t *x, acc_t scale, bool ties) {
    (void)ties;
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
        __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x + h));
        half[h] = _mm512_cvtps_ph(_mm512_mul_ps(a, _mm512_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT);
    }
    return (vec16)_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}
#elif defined(PYREG_F16) && defined(__F16C__)
static inline vec scaled(const elem_t *x, acc_t scale, bool ties) {
    (void)ties;
    __m128i half[2];
    for (int h = 0; h < 2; h++) {
        __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x + h));
        half[h] = _mm256_cvtps_ph(_mm256_mul_ps(a, _mm256_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT);
    }
    return (vec16)_mm256_set_m128i(half[1], half[0]);
}
#elif defined(PYREG_F16)
static inline vec scaled(const elem_t *x, acc_t scale, bool ties) {
    (void)ties;
    vec v = {0};
    for (int j = 0; j < LANES; j++) v[j] = store(load(x[j]) * scale);
    return v;
}
#else
static inline vec scaled(const elem_t *x, acc_t scale, bool ties) {
    (void)ties;
    typedef acc_t vec_acc __attribute__((vector_size(VEC_BYTES)));
    vec_acc v;
    memcpy(&v, x, sizeof v);
    return (vec)(v * scale);
}
#endif

/* ---- LANES32 halves as floats, for batch-norm's sweeps.  HALVES: where there are instructions for them. ------------ */

#if (defined(PYREG_F16) || defined(PYREG_BF16)) && ((defined(__AVX2__) && defined(__F16C__)) || defined(__aarch64__))
#define HALVES
enum lanes { NEIGHBOURS, EVEN, ODD }; /* the last two: bfloat16 only, the half of a pair in each lane */

static inline vecf load_floats(const elem_t *x, enum lanes which) {
#if defined(PYREG_BF16)
    if (which != NEIGHBOURS) return which == EVEN ? even_floats(x) : odd_floats(x);
#else
    (void)which;
#endif
#if defined(PYREG_F16) && defined(__AVX512F__)
    return (vecf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(PYREG_F16) && defined(__F16C__)
    return (vecf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#elif defined(PYREG_F16)
    return (vecf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#elif defined(__AVX512F__)
    return (vecf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#elif defined(__AVX2__)
    return (vecf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#else
    return (vecf)vshll_n_u16(vld1_u16(x), 16);
#endif
}

#if defined(PYREG_BF16)
static inline void store_pairs(elem_t *to, vecf even, vecf odd) {
    const vec32 pairs = pairs_of(round_bf16(even), round_bf16(odd));
    memcpy(to, &pairs, sizeof pairs);
}
#endif

static inline void store_floats(elem_t *to, vecf v) {
#if defined(PYREG_F16) && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PYREG_F16) && defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PYREG_F16)
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    const vec32 rounded = round_bf16(v);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#elif defined(__AVX2__)
    const __m256i bits = (__m256i)(rounded >> 16);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#else
    vst1_u16(to, vshrn_n_u32((uint32x4_t)rounded, 16));
#endif
#endif
}

/* floor > v ? floor : v */
static inline vecf larger(float floor, vecf v) {
#if defined(__AVX512F__)
    return (vecf)_mm512_max_ps((__m512)splatf(floor), (__m512)v);
#elif defined(__AVX2__)
    return (vecf)_mm256_max_ps((__m256)splatf(floor), (__m256)v);
#else
    return (vecf)select32((vec32)(floor > v), (vec32)splatf(floor), (vec32)v);
#endif
}
#endif

/* ---- Elements as computed (narrow) and summed (wide), for batch-norm --------------------------------------------- */

typedef acc_t narrow __attribute__((vector_size(LANES64 * sizeof(acc_t))));
typedef __typeof__((narrow){0} > (narrow){0}) narrow_bits;
typedef double wide __attribute__((vector_size(VEC_BYTES)));

/* The product of two floats has 48 significant bits: exact in a double, with or without a fused add. */
enum { EXACT_PRODUCTS = sizeof(acc_t) < sizeof(double) };

static inline narrow load_narrow(const elem_t *x) {
    narrow v;
#if defined(PYREG_F32) || defined(PYREG_F64)
    memcpy(&v, x, sizeof v);
#elif defined(PYREG_F16) && defined(__AVX512F__)
    v = (narrow)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#elif defined(PYREG_F16) && defined(__AVX2__)
    v = (narrow)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)x));
#elif defined(PYREG_BF16) && defined(__AVX512F__)
    v = (narrow)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#elif defined(PYREG_BF16) && defined(__AVX2__)
    v = (narrow)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x)), 16);
#elif defined(PYREG_F16) && defined(__aarch64__)
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    v = (narrow)vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(pair))));
#else
    for (size_t l = 0; l < LANES64; l++) v[l] = load(x[l]);
#endif
    return v;
}

/* The first n elements, 0 < n <= LANES64, and zeros. */
static inline narrow load_part(const elem_t *x, size_t n) {
#if defined(PYREG_F32) && defined(__AVX512F__)
    return (narrow)_mm256_maskz_loadu_ps((__mmask8)(0xff >> (LANES64 - n)), x);
#else
    elem_t part[LANES64] = {0};
    if (n == LANES64) return load_narrow(x);
    for (size_t l = 0; l < n; l++) part[l] = x[l];
    return load_narrow(part);
#endif
}

static inline wide widen(narrow v) {
#if defined(PYREG_F64)
    return v;
#elif defined(__AVX512F__)
    return (wide)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
    return (wide)_mm256_cvtps_pd((__m128)v);
#else
    return __builtin_convertvector(v, wide);
#endif
}

static inline wide load_wide(const double *p) {
    wide v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_wide(double *p, wide v) { memcpy(p, &v, sizeof v); }

/* sum + a * b for exact products. */
static inline wide add_exact_product(wide sum, wide a, wide b) {
#if defined(__AVX512F__)
    return (wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__FMA__)
    return (wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}

/* Row r of an operand of a block. */
static inline elem_t *row(const struct bn_block *b, enum bn_operand k, size_t r) {
    return (elem_t *)b->of[k].at + (ptrdiff_t)r * b->of[k].stride;
}

/* ---- Prefetching ------------------------------------------------------------------------------------------------- */

/* The hardware's prefetcher stops at page ends and at the ends of rows: cache lines are asked for this far ahead. Where
 * a row is as long as that, there it would be another thread's columns: then the next columns, or the next row. */
enum { AHEAD = PREFETCH_BYTES / sizeof(elem_t), LINE = LINE_BYTES / sizeof(elem_t) };

static ALWAYS_INLINE void prefetch(const elem_t *p, size_t n, ptrdiff_t ahead) {
    for (size_t j = 0; j < n; j += LINE) __builtin_prefetch(p + j + ahead);
}

#endif
