/* y = kept ? x * scale : 0 for one row, given the mask's bits. */
#ifndef PYREG_KERNELS_DROPOUT_H
#define PYREG_KERNELS_DROPOUT_H

#include "lanes.h"
#include "stream.h"

enum { WORD = 32 };

static inline elem_t dropout_elem(elem_t x, uint32_t kept, acc_t scale) {
    elem_t y = store(load(x) * scale);
    return kept ? y : 0;
}

/* x, y: 32 elements. */
static inline void dropout_word(const elem_t *x, elem_t *y, uint32_t kept, acc_t scale, bool ties) {
    for (unsigned j = 0; j < WORD; j += LANES) store_kept(y + j, scaled(x + j, scale, ties), kept, j);
}

static inline void dropout_words(const elem_t *x, elem_t *y, size_t n, const uint32_t *keep, unsigned shift,
                                 acc_t scale, bool ties, bool ask, bool stream) {
    size_t j = 0;
    for (; j + WORD <= n; j += WORD) {
        for (size_t b = 0; b < WORD * sizeof(elem_t); b += LINE_BYTES) {
            if (ask) __builtin_prefetch((const char *)(x + j) + b + PREFETCH_BYTES);
            if (!stream) __builtin_prefetch((const char *)(y + j) + b + PREFETCH_BYTES, 1);
        }
        uint32_t kept = keep_word(keep, shift, j / WORD);
        if (stream) {
            elem_t line[WORD] __attribute__((aligned(LINE_BYTES)));
            dropout_word(x + j, line, kept, scale, ties);
            stream_lines(y + j, line, sizeof line);
        } else {
            dropout_word(x + j, y + j, kept, scale, ties);
        }
    }
    uint32_t kept = keep_word(keep, shift, j / WORD);
    for (; j < n; j++, kept >>= 1) y[j] = dropout_elem(x[j], kept & 1, scale);
}

static void dropout(const void *x, void *y, size_t n, const uint32_t *keep, unsigned shift, double scale_, bool ask,
                    bool stream) {
    const acc_t scale = (acc_t)scale_;
    if (may_tie(scale)) /* a loop of its own */
        dropout_words(x, y, n, keep, shift, scale, true, ask, stream);
    else
        dropout_words(x, y, n, keep, shift, scale, false, ask, stream);
}

#endif
