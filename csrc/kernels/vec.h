/* Vectors of the widest registers that the build allows: GCC/clang vector extensions, and the few operations that
 * these cannot say (or that gcc says slowly), once per instruction set.  Without any of them: two-lane generic code. */
#ifndef PYREG_VEC_H
#define PYREG_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

/* For what a constant argument makes short, but is long: clang would compile one for all calls, half as fast.  gcc
 * takes the right ones by itself, and is 5 % slower where it is told. */
#if defined(__clang__)
#define INLINE_LONG ALWAYS_INLINE
#else
#define INLINE_LONG inline
#endif

#if defined(__AVX512F__)
enum { VEC_BYTES = 64 };
#elif defined(__AVX2__)
enum { VEC_BYTES = 32 };
#else
enum { VEC_BYTES = 16 };
#endif
enum { LANES16 = VEC_BYTES / 2, LANES32 = VEC_BYTES / 4, LANES64 = VEC_BYTES / 8 };

typedef uint64_t vec64 __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t vec32 __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t vec16 __attribute__((vector_size(VEC_BYTES)));
typedef float vecf __attribute__((vector_size(VEC_BYTES)));

static inline vec64 splat64(uint64_t v) { return v - (vec64){0}; }
static inline vec32 splat32(uint32_t v) { return v - (vec32){0}; }
static inline vecf splatf(float v) { return v - (vecf){0}; }

/* 0, 1, 2, ... */
static inline vec32 lane_numbers(void) {
    static const uint32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec32 v;
    memcpy(&v, numbers, sizeof v);
    return v;
}

/* 64-bit product of the low 32 bits of each lane. */
static inline vec64 mul_wide(vec64 a, vec64 b) {
#if defined(__AVX512F__)
    return (vec64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vec64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (vec64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (vec64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

/* The high 32 bits of each lane, and garbage above them.  A shift would do: but with 512 bits shifts and shuffles have
 * one port each, so code that shifts elsewhere balances the two with this. */
static inline vec64 high_half(vec64 a) {
#if defined(__AVX512F__)
    return (vec64)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#else
    return a >> 32;
#endif
}

/* low(a0), low(b0), low(a1), low(b1), ... as 32-bit lanes in memory order. */
static inline vec32 interleave_low(vec64 a, vec64 b) {
#if defined(__AVX512F__)
    return (vec32)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    return (vec32)_mm256_blend_epi32((__m256i)a, (__m256i)(b << 32), 0xaa);
#elif __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return (vec32)(a << 32 | (b & 0xffffffff));
#else
    return (vec32)((a & 0xffffffff) | b << 32);
#endif
}

/* The converse: v0, v2, ... and v1, v3, ... in the low halves of 64-bit lanes, garbage above. */
static inline void split_low(vec32 v, vec64 *even, vec64 *odd) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    *even = (vec64)v >> 32, *odd = (vec64)v;
#else
    *even = (vec64)v, *odd = (vec64)v >> 32;
#endif
}

/* mask ? a : b, bit by bit. */
static inline vec32 select32(vec32 mask, vec32 a, vec32 b) {
#if defined(__AVX512F__)
    return (vec32)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xca);
#else
    return b ^ (mask & (a ^ b));
#endif
}

/* a ^ b ^ c. */
static inline vec64 xor3(vec64 a, vec64 b, vec64 c) {
#if defined(__AVX512F__)
    return (vec64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

static inline vec32 rotate_left(vec32 v, int n) {
#if defined(__AVX2__) && !defined(__AVX512F__) /* by whole bytes: one shuffle instead of two shifts and an or */
    const __m256i by16 = _mm256_setr_epi32(0x01000302, 0x05040706, 0x09080b0a, 0x0d0c0f0e, 0x01000302, 0x05040706,
                                           0x09080b0a, 0x0d0c0f0e);
    const __m256i by24 = _mm256_setr_epi32(0x00030201, 0x04070605, 0x080b0a09, 0x0c0f0e0d, 0x00030201, 0x04070605,
                                           0x080b0a09, 0x0c0f0e0d);
    if (n == 16) return (vec32)_mm256_shuffle_epi8((__m256i)v, by16);
    if (n == 24) return (vec32)_mm256_shuffle_epi8((__m256i)v, by24);
#endif
    return v << n | v >> (32 - n);
}

#if !defined(__AVX512F__)
/* Bit j = whether lane j is all ones; else it is 0. */
static inline uint32_t lane_bits(vec32 mask) {
#if defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#elif defined(__aarch64__)
    return vaddvq_u32(vandq_u32((uint32x4_t)mask, (uint32x4_t){1, 2, 4, 8}));
#else
    uint32_t bits = 0;
    for (int j = 0; j < LANES32; j++) bits |= (mask[j] & 1) << j;
    return bits;
#endif
}
#endif

/* Bit j = (a[j] <= b[j]). */
static inline uint32_t at_most_bits(vec32 a, vec32 b) {
#if defined(__AVX512F__)
    return _mm512_cmple_epu32_mask((__m512i)a, (__m512i)b);
#else
    return lane_bits((vec32)(a <= b));
#endif
}

/* Bit j = (v[j] != 0). */
static inline uint32_t nonzero_bits(vec32 v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#else
    return lane_bits((vec32)(v == 0)) ^ ((UINT32_C(1) << LANES32) - 1);
#endif
}

#endif
