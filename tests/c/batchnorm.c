/* The C library alone, for sanitizers: every dtype, layout and option on arrays that end where they end.
 *
 *   cmake -B build/san -DPYREG_SANITIZE=ON && cmake --build build/san && ctest --test-dir build/san
 *
 * Exit status 0 and no report: passed; 2: this machine lacks the instruction set.
 *
 * Values are tested in tests/test_batchnorm.py; here only that a plain loop in double agrees for float and double. */
#include "pyreg.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void expect(bool ok, const char *what, int64_t a, int64_t b, int64_t c) {
    if (ok) return;
    failures++;
    fprintf(stderr, "failed: %s at (%lld, %lld, %lld)\n", what, (long long)a, (long long)b, (long long)c);
}

static uint32_t state = 1;
static double uniform(void) { /* in [-2, 2) */
    state = state * 1664525u + 1013904223u;
    return (double)(state >> 8) / (1 << 22) - 2;
}

static size_t size_of(enum pyreg_dtype dtype) { return dtype == PYREG_F64 ? 8 : dtype == PYREG_F32 ? 4 : 2; }

/* Exactly as long as it has to be: one element more is out of bounds. */
static void *filled(enum pyreg_dtype dtype, size_t n) {
    char *p = malloc(n ? n * size_of(dtype) : 1);
    for (size_t i = 0; i < n; i++) {
        double d = uniform();
        float f = (float)d;
        uint32_t u;
        memcpy(&u, &f, 4);
        uint16_t half =
            dtype == PYREG_BF16 ? (uint16_t)(u >> 16) : (uint16_t)(0x3800 + (u >> 13 & 0x3ff)); /* [0.5, 1) */
        if (dtype == PYREG_F64)
            memcpy(p + 8 * i, &d, 8);
        else if (dtype == PYREG_F32)
            memcpy(p + 4 * i, &f, 4);
        else
            memcpy(p + 2 * i, &half, 2);
    }
    return p;
}

static double value(enum pyreg_dtype dtype, const void *p, size_t i) {
    return dtype == PYREG_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i];
}

/* x: (n, channels, inner), or channels before n in memory if swapped, with gaps of `gap` elements between inner rows.
 */
static void run(enum pyreg_dtype dtype, int64_t n, int64_t channels, int64_t inner, bool swapped, int64_t gap) {
    const int64_t size = (int64_t)size_of(dtype), row = inner + gap, shape[3] = {n, channels, inner};
    const int64_t strides[3] = {swapped ? row * size : channels * row * size, swapped ? n * row * size : row * size,
                                size};
    const size_t total = (size_t)(n * channels * row);
    const enum pyreg_dtype statistic = dtype == PYREG_F64 ? PYREG_F64 : PYREG_F32;
    void *x = filled(dtype, total), *dy = filled(dtype, total), *residual = filled(dtype, total);
    void *y = filled(dtype, total), *dx = filled(dtype, total), *dresidual = filled(dtype, total);
    void *scale = filled(statistic, (size_t)channels), *bias = filled(statistic, (size_t)channels);
    void *mean = filled(statistic, (size_t)channels), *var = filled(statistic, (size_t)channels);
    void *dscale = filled(statistic, (size_t)channels), *dbias = filled(statistic, (size_t)channels);
    bool *mask = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++) mask[i] = i % 3 != 1;
    const int64_t mask_strides[3] = {1, 0, 0};

    for (int option = 0; option < 4; option++) {
        const bool relu = option & 1, masked = option & 2;
        const struct pyreg_batchnorm common = {
            .dtype = dtype,
            .ndim = 3,
            .axis = 1,
            .shape = shape,
            .epsilon = 1e-5,
            .relu = relu,
            .scale = option ? scale : NULL,
            .bias = option ? bias : NULL,
        };
        const struct pyreg_batchnorm_forward forward = {
            .common = common,
            .x = {x, strides},
            .mask = {masked ? mask : NULL, mask_strides},
            .residual = {relu ? residual : NULL, strides},
            .y = {y, strides},
            .mean = mean,
            .var = var,
        };
        expect(pyreg_batchnorm_forward(&forward) == PYREG_OK, "forward", n, channels, inner);
        const struct pyreg_batchnorm_backward backward = {
            .common = common,
            .dy = {dy, strides},
            .x = forward.x,
            .mask = forward.mask,
            .y = forward.y,
            .dx = {dx, strides},
            .dresidual = {relu ? dresidual : NULL, strides},
            .mean = mean,
            .var = var,
            .dscale = dscale,
            .dbias = dbias,
        };
        expect(pyreg_batchnorm_backward(&backward) == PYREG_OK, "backward", n, channels, inner);
        for (int64_t c = 0; option == 0 && size >= 4 && n * inner > 0 && c < channels; c++) {
            double sum = 0, square = 0;
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < inner; j++) {
                    double v = value(dtype, x, (size_t)((i * strides[0] + c * strides[1]) / size + j));
                    sum += v;
                    square += v * v;
                }
            double m = sum / (double)(n * inner), s = square / (double)(n * inner) - m * m;
            expect(fabs(value(dtype, mean, (size_t)c) - m) < 1e-6, "mean", n, channels, inner);
            expect(fabs(value(dtype, var, (size_t)c) - s) < 1e-6, "var", n, channels, inner);
        }
        const struct pyreg_batchnorm_inference inference = {
            .common = common, .x = forward.x, .residual = forward.residual, .y = forward.x, .mean = mean, .var = var};
        expect(pyreg_batchnorm_inference(&inference) == PYREG_OK, "inference", n, channels, inner);
    }
    void *all[] = {x, dy, residual, y, dx, dresidual, scale, bias, mean, var, dscale, dbias, mask};
    for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) free(all[k]);
}

static void errors(void) {
    float one[4] = {1, 2, 3, 4};
    const int64_t shape[2] = {2, 2}, negative[2] = {2, -1}, huge[2] = {INT64_MAX, 4}, strides[2] = {8, 4};
    struct pyreg_batchnorm_forward args = {.x = {one, strides}, .y = {one, strides}, .mean = one, .var = one};
    const struct pyreg_batchnorm good = {.dtype = PYREG_F32, .ndim = 2, .axis = 1, .shape = shape, .epsilon = 1e-5};
#define EXPECT(member, value, status)                                                                                  \
    args.common = good, args.common.member = value;                                                                    \
    expect(pyreg_batchnorm_forward(&args) == status, #member, 0, 0, 0)
    EXPECT(axis, 2, PYREG_BAD_AXIS);
    EXPECT(axis, -1, PYREG_BAD_AXIS);
    EXPECT(ndim, 0, PYREG_BAD_SHAPE);
    EXPECT(shape, negative, PYREG_BAD_SHAPE);
    EXPECT(shape, huge, PYREG_BAD_SHAPE);
    EXPECT(dtype, PYREG_NUM_DTYPES, PYREG_BAD_DTYPE);
    pyreg_fail_allocation(1);
    EXPECT(relu, false, PYREG_NO_MEMORY);
    expect(one[0] == 1 && one[3] == 4, "nothing written", 0, 0, 0);
}

int main(void) {
    static const int64_t lengths[] = {0, 1, 7, 16, 17, 31, 32, 49, 65};
    enum { NUM = sizeof lengths / sizeof lengths[0] };
    if (pyreg_init() != PYREG_OK) return 2;
    errors();
    pyreg_set_num_threads(3);
    for (enum pyreg_dtype dtype = 0; dtype < PYREG_NUM_DTYPES; dtype++) {
        for (int a = 0; a < NUM; a++)
            for (int b = 0; b < NUM; b++)
                for (int swapped = 0; swapped < 2; swapped++) {
                    run(dtype, 5, lengths[a], lengths[b], swapped, 0);
                    run(dtype, lengths[a], lengths[b], 1, swapped, b % 2);
                    run(dtype, lengths[a], 3, lengths[b], swapped, 1);
                }
        run(dtype, 3, 2, 70000, false, 0);
        run(dtype, 40000, 20, 1, false, 0);
        run(dtype, 300, 1100, 1, false, 3);
        run(dtype, 40000, 3, 2, true, 1);
    }
    if (failures) fprintf(stderr, "%d failed on %s\n", failures, pyreg_isa_name());
    return failures != 0;
}
