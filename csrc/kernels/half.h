/* float16 and bfloat16 <-> float, round to nearest even, without branches so that loops vectorise.
 * Right whatever the floating-point mode: no step reads or makes a subnormal float. */
#ifndef PYREG_HALF_H
#define PYREG_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float f) {
    uint32_t u = float_bits(f);
    uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    uint32_t nan = u >> 16 | 0x40; /* quiet, payload kept; rounding could turn it into Inf */
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* float16 has 10 mantissa bits and exponent bias 15; float has 23 and 127. */
static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    uint32_t normal = rest + ((127u - 15u) << 23);
    uint32_t special = (rest | 0x7f800000u) | (rest & 0x7fffffu ? 0x400000u : 0); /* Inf, NaN made quiet */
    /* subnormal: h * 2^-24, counted from 2^-14 so that no float here is subnormal */
    uint32_t subnormal = float_bits(bits_float(rest + (113u << 23)) - bits_float(113u << 23));
    uint32_t magnitude = rest >= 0x0f800000u ? special : rest < 0x00800000u ? subnormal : normal;
    return bits_float(sign | magnitude);
}

static inline uint16_t float_to_f16(float f) {
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffffu;
    uint32_t normal = (rest - ((127u - 15u) << 23) + 0xfffu + (rest >> 13 & 1)) >> 13; /* carries into the exponent */
    uint32_t special = rest > 0x7f800000u ? 0x7e00u | (rest >> 13 & 0x3ffu) : 0x7c00u;
    /* below 2^-14 adding 0.5 leaves the wanted multiple of 2^-24 in the low bits, rounded to nearest even */
    uint32_t subnormal = float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f);
    uint32_t magnitude = rest >= 0x477ff000u ? special : rest < 0x38800000u ? subnormal : normal;
    return (uint16_t)(sign | magnitude);
}

#endif
