/* Threefry2x32-20 (Salmon et al., SC 2011), rotations as published, on vectors of counters. */
#ifndef PYREG_THREEFRY_H
#define PYREG_THREEFRY_H

#include "vec.h"

/* Counters in flight: each chain is a string of dependent adds, rotates and xors.  Four fill the execution ports; with
 * AVX-512's 32 registers eight do, where there are four ports (AMD Zen 5: 0.40 ns instead of 0.53 per element). */
enum { CHAINS = VEC_BYTES == 64 ? 8 : 4 };

struct threefry_state {
    vec32 x0[CHAINS], x1[CHAINS];
};

static inline void threefry2x32(const uint32_t key[2], struct threefry_state *s) {
    static const int rotation[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t k[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bda};
#pragma GCC unroll 8
    for (int c = 0; c < CHAINS; c++) s->x0[c] += k[0], s->x1[c] += k[1];
#pragma GCC unroll 5
    for (uint32_t r = 0; r < 5; r++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 8
            for (int c = 0; c < CHAINS; c++) {
                s->x0[c] += s->x1[c];
                s->x1[c] = rotate_left(s->x1[c], rotation[r % 2][j]) ^ s->x0[c];
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) s->x0[c] += k[(r + 1) % 3], s->x1[c] += k[(r + 2) % 3] + r + 1;
    }
}

#endif
