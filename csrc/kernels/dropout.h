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

/* Lines of y are asked for from nearer than those of x: on an Intel Emerald Rapids 2 to 4 % less time in L2 and L3 than
 * from as far. */
enum { PREFETCH_Y_BYTES = 1024 };

/* ties, ask, stream: constants where this is called, so that none of them is tested for each word. */
static ALWAYS_INLINE void dropout_words(const elem_t *x, elem_t *y, size_t words, const uint32_t *keep, unsigned shift,
                                        acc_t scale, bool ties, bool ask, bool stream) {
    for (size_t w = 0; w < words; w++, x += WORD, y += WORD) {
        for (size_t b = 0; b < WORD * sizeof(elem_t); b += LINE_BYTES) {
            if (ask) __builtin_prefetch((const char *)x + b + PREFETCH_BYTES);
            if (!stream) __builtin_prefetch((const char *)y + b + PREFETCH_Y_BYTES, 1);
        }
        uint32_t kept = keep_word(keep, shift, w);
        if (stream) {
            elem_t line[WORD] __attribute__((aligned(LINE_BYTES)));
            dropout_word(x, line, kept, scale, ties);
            stream_lines(y, line, sizeof line);
        } else {
            dropout_word(x, y, kept, scale, ties);
        }
    }
}

/* The loop for these settings; ties: a constant. */
static ALWAYS_INLINE void dropout_loop(const elem_t *x, elem_t *y, size_t words, const uint32_t *keep, unsigned shift,
                                       acc_t scale, bool ties, bool ask, bool stream) {
    if (ask && stream)
        dropout_words(x, y, words, keep, shift, scale, ties, true, true);
    else if (ask)
        dropout_words(x, y, words, keep, shift, scale, ties, true, false);
    else if (stream)
        dropout_words(x, y, words, keep, shift, scale, ties, false, true);
    else
        dropout_words(x, y, words, keep, shift, scale, ties, false, false);
}

static void dropout(const void *x_, void *y_, size_t n, const uint32_t *keep, unsigned shift, double scale_, bool ask,
                    bool stream) {
    const elem_t *x = x_;
    elem_t *y = y_;
    const acc_t scale = (acc_t)scale_;
    const size_t words = n / WORD;
    if (may_tie(scale))
        dropout_loop(x, y, words, keep, shift, scale, true, ask, stream);
    else
        dropout_loop(x, y, words, keep, shift, scale, false, ask, stream);
    uint32_t kept = keep_word(keep, shift, words);
    for (size_t j = words * WORD; j < n; j++, kept >>= 1) y[j] = dropout_elem(x[j], kept & 1, scale);
}

#endif
