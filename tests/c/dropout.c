/* Dropout in arrays of exactly the size they must have, for sanitizers: all small sizes, dtypes and generators, strided
 * and in place; the result is checked against the mask. */
#include "pyreg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t size_of[PYREG_NUM_DTYPES] = {[PYREG_F32] = 4, [PYREG_F64] = 8, [PYREG_F16] = 2, [PYREG_BF16] = 2};

static void fail(const char *what, size_t n) {
    printf("%s, n = %zu\n", what, n);
    exit(1);
}

/* 1.0 in every element. */
static char *ones(enum pyreg_dtype dtype, size_t n) {
    static const uint16_t f16 = 0x3c00, bf16 = 0x3f80;
    static const float f32 = 1;
    static const double f64 = 1;
    static const void *const one[] = {[PYREG_F32] = &f32, [PYREG_F64] = &f64, [PYREG_F16] = &f16, [PYREG_BF16] = &bf16};
    char *x = malloc(n * size_of[dtype] + !n);
    for (size_t i = 0; i < n; i++) memcpy(x + i * size_of[dtype], one[dtype], size_of[dtype]);
    return x;
}

static bool is_zero(const char *at, size_t size) {
    for (size_t b = 0; b < size; b++)
        if (at[b]) return false;
    return true;
}

static void check(enum pyreg_dtype dtype, const struct pyreg_mask *mask, size_t n, int64_t step) {
    const size_t size = size_of[dtype], room = n ? (n - 1) * (size_t)step + 1 : 0;
    const int64_t shape = (int64_t)n, dense = (int64_t)size, strided = step * (int64_t)size;
    char *x = ones(dtype, room), *y = malloc(n * size + !n);
    uint8_t *kept = malloc(n + !n), *packed = malloc((n + 7) / 8 + !n);
    struct pyreg_dropout args = {
        .dtype = dtype,
        .ndim = 1,
        .shape = &shape,
        .mask = *mask,
        .scale = pyreg_dropout_scale(dtype, mask->rate),
        .x = {x, &strided},
        .y = {y, &dense},
    };
    if (pyreg_dropout(&args)) fail("dropout", n);
    if (pyreg_dropout_mask(mask, n, false, kept) || pyreg_dropout_mask(mask, n, true, packed)) fail("mask", n);
    for (size_t i = 0; i < n; i++) {
        if (is_zero(y + i * size, size) == kept[i]) fail("dropout is not the mask", n);
        if ((packed[i / 8] >> i % 8 & 1) != kept[i]) fail("packed is not the mask", n);
    }
    char *again = malloc(n * size + !n);
    args.mask =
        (struct pyreg_mask){.generator = PYREG_PACKED, .rate = mask->rate, .bits = packed, .num_bytes = (n + 7) / 8};
    args.y.data = again;
    if (pyreg_dropout(&args)) fail("from bits", n);
    if (n && memcmp(again, y, n * size)) fail("from bits differs", n);
    free(again);
    args.mask = *mask, args.y = args.x;
    if (pyreg_dropout(&args)) fail("in place", n);
    for (size_t i = 0; i < n; i++)
        if (memcmp(x + i * (size_t)strided, y + i * size, size)) fail("in place differs", n);
    free(x), free(y), free(kept), free(packed);
}

/* Two dims of ones, one of which shares its mask. */
static void check_shared(const struct pyreg_mask *mask, size_t rows, size_t columns, bool by_row) {
    const size_t n = rows * columns;
    const int64_t shape[2] = {(int64_t)rows, (int64_t)columns}, strides[2] = {4 * shape[1], 4};
    const int64_t mask_strides[2] = {by_row, !by_row};
    char *x = ones(PYREG_F32, n);
    uint8_t *kept = malloc(n);
    const struct pyreg_dropout args = {
        .dtype = PYREG_F32,
        .ndim = 2,
        .shape = shape,
        .mask = *mask,
        .scale = pyreg_dropout_scale(PYREG_F32, mask->rate),
        .x = {x, strides},
        .y = {x, strides},
        .mask_strides = mask_strides,
    };
    if (pyreg_dropout(&args)) fail("shared", n);
    if (pyreg_dropout_mask(mask, by_row ? rows : columns, false, kept)) fail("mask", n);
    for (size_t i = 0; i < n; i++)
        if (is_zero(x + 4 * i, 4) == kept[by_row ? i / columns : i % columns])
            fail("dropout is not the shared mask", n);
    free(x), free(kept);
}

int main(void) {
    if (pyreg_init()) return 2; /* this machine lacks the instruction set */
    static const double rates[] = {0, 0.1, 0.5, 1};
    for (int g = 0; g < PYREG_PACKED; g++)
        for (int d = 0; d < PYREG_NUM_DTYPES; d++)
            for (size_t n = 0; n < 1100; n++) {
                const struct pyreg_mask mask = {
                    .generator = (enum pyreg_generator)g, .key = {1, 2}, .rate = rates[n % 4], .offset = n * 0x10001};
                check((enum pyreg_dtype)d, &mask, n, 1 + (int64_t)(n % 5 == 0));
            }
    for (size_t n = 9000; n < 200000; n += 60007) { /* several tiles, chunks and threads */
        const struct pyreg_mask mask = {.generator = PYREG_PHILOX, .key = {3, 4}, .rate = 0.1, .offset = n};
        pyreg_set_num_threads(1 + (int)(n % 3));
        check(PYREG_F32, &mask, 8 * n, 1);
        check(PYREG_BF16, &mask, n, 3);
    }
    for (int g = 0; g < PYREG_PACKED; g++) /* short and long rows, of several tiles */
        for (size_t rows = 1; rows < 9000; rows = 3 * rows + 1)
            for (size_t columns = 1; columns < 9000; columns = 2 * columns + 1) {
                const struct pyreg_mask mask = {
                    .generator = (enum pyreg_generator)g, .key = {5, 6}, .rate = 0.3, .offset = rows};
                if (rows * columns > 500000) continue;
                check_shared(&mask, rows, columns, true);
                check_shared(&mask, rows, columns, false);
            }
    return 0;
}
