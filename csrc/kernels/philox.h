/* Philox4x32-10 (Salmon et al., SC 2011), constants as published, on one counter and on vectors of counters. */
#ifndef PYREG_PHILOX_H
#define PYREG_PHILOX_H

#include "kernels.h"
#include "vec.h"

static const uint32_t PHILOX_M0 = 0xd2511f53, PHILOX_M1 = 0xcd9e8d57; /* multipliers */
static const uint32_t PHILOX_W0 = 0x9e3779b9, PHILOX_W1 = 0xbb67ae85; /* key increments */

static inline void philox4x32(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int r = 0; r < PHILOX_ROUNDS; r++, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        uint64_t p0 = (uint64_t)PHILOX_M0 * c0, p1 = (uint64_t)PHILOX_M1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* One counter per 64-bit lane, its words in the low halves: a widening product then gives both halves that a round
 * wants, and the garbage above is never looked at. */
struct philox_state {
    vec64 c0, c1, c2, c3;
};

static inline struct philox_state philox_round(struct philox_state s, uint64_t k0, uint64_t k1) {
    vec64 p0 = mul_wide(s.c0, splat64(PHILOX_M0)), p1 = mul_wide(s.c2, splat64(PHILOX_M1));
    return (struct philox_state){xor3(p1 >> 32, s.c1, splat64(k0)), p1, xor3(high_half(p0), s.c3, splat64(k1)), p0};
}

#endif
