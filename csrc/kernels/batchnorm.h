/* Batch-norm's loops for one element type: sums down the columns of a block, and the elementwise sweeps.
 * Lanes are columns and each column adds its elements in order, so vector width cannot change a bit. */
#ifndef PYREG_KERNELS_BATCHNORM_H
#define PYREG_KERNELS_BATCHNORM_H

#include "elem.h"
#include "kernels.h"
#include "stream.h"
#include "vec.h"

#include <math.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))

static inline size_t at_most(size_t a, size_t b) { return a < b ? a : b; }

/* ---- Vectors: elements as read, computed (narrow) and summed (wide) ---------------------------------------------- */

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
#else
    for (size_t l = 0; l < LANES64; l++) v[l] = load(x[l]);
#endif
    return v;
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

static inline elem_t *row(const struct bn_block *b, enum bn_operand k, size_t r) {
    return (elem_t *)b->of[k].at + (ptrdiff_t)r * b->of[k].stride;
}

/* ---- Sums of the forward pass ------------------------------------------------------------------------------------ */

/* Rows are taken ROW_TILE at a time: few enough streams for the prefetcher, enough to pay for loading the sums. */
enum { UNROLL = 4, ROW_TILE = 16 };

/* x: (rows, vectors * LANES64) at stride; sums and shift: (vectors * LANES64). */
static ALWAYS_INLINE void add_vectors(const elem_t *x, ptrdiff_t stride, size_t rows, size_t vectors,
                                      const double *shift, double *sum, double *square) {
    wide s[UNROLL], q[UNROLL], m[UNROLL];
    for (size_t v = 0; v < vectors; v++) {
        s[v] = load_wide(sum + v * LANES64);
        q[v] = load_wide(square + v * LANES64);
        m[v] = shift ? load_wide(shift + v * LANES64) : (wide){0};
    }
    for (size_t r = 0; r < rows; r++, x += stride)
        for (size_t v = 0; v < vectors; v++) {
            wide d = widen(load_narrow(x + v * LANES64));
            if (shift) d -= m[v];
            s[v] += d;
            q[v] = shift ? q[v] + d * d : add_exact_product(q[v], d, d);
        }
    for (size_t v = 0; v < vectors; v++) {
        store_wide(sum + v * LANES64, s[v]);
        store_wide(square + v * LANES64, q[v]);
    }
}

/* x: (rows, width) at stride; sums and shift: (width). */
static ALWAYS_INLINE void add_rows(const elem_t *x, ptrdiff_t stride, size_t rows, size_t width, const double *shift,
                                   double *sum, double *square) {
    size_t j = 0;
    for (; j + UNROLL * LANES64 <= width; j += UNROLL * LANES64)
        add_vectors(x + j, stride, rows, UNROLL, shift ? shift + j : NULL, sum + j, square + j);
    for (; j + LANES64 <= width; j += LANES64)
        add_vectors(x + j, stride, rows, 1, shift ? shift + j : NULL, sum + j, square + j);
    for (; j < width; j++)
        for (size_t r = 0; r < rows; r++) {
            double d = (double)load(x[(ptrdiff_t)r * stride + (ptrdiff_t)j]) - (shift ? shift[j] : 0);
            sum[j] += d;
            square[j] += d * d;
        }
}

static ALWAYS_INLINE void add_block(const struct bn_block *b, const double *shift, double *sum, double *square) {
    size_t n = b->period;
    if (n == b->width) {
        ptrdiff_t stride = b->of[BN_X].stride;
        for (size_t r = 0; r < b->rows; r += ROW_TILE)
            add_rows(row(b, BN_X, r), stride, at_most(b->rows - r, ROW_TILE), n, shift, sum, square);
        return;
    }
    for (size_t r = 0; r < b->rows; r++) { /* whole periods are rows of one period */
        const elem_t *x = row(b, BN_X, r);
        size_t whole = b->width / n;
        add_rows(x, (ptrdiff_t)n, whole, n, shift, sum, square);
        add_rows(x + whole * n, 0, 1, b->width - whole * n, shift, sum, square);
    }
}

/* sum += x, square += x^2 */
static void bn_sums(const struct bn_block *b, double *sum, double *square) { add_block(b, NULL, sum, square); }

/* sum += x - shift, square += (x - shift)^2 */
static void bn_shifted_sums(const struct bn_block *b, const double *shift, double *sum, double *square) {
    add_block(b, shift, sum, square);
}

/* The same over the elements whose mask is set, and their count. */
static void bn_masked_sums(const struct bn_block *b, const double *shift, double *count, double *sum, double *square) {
    for (size_t r = 0; r < b->rows; r++) {
        const elem_t *x = row(b, BN_X, r);
        const uint8_t *mask = (const uint8_t *)b->of[BN_MASK].at + (ptrdiff_t)r * b->of[BN_MASK].stride;
        for (size_t first = 0; first < b->width; first += b->period)
            for (size_t j = 0; j < at_most(b->width - first, b->period); j++) {
                double m = mask[first + j] ? 1 : 0, d = (double)load(x[first + j]) - shift[j];
                d = mask[first + j] ? d : 0; /* not m * d: a NaN under the mask does not count */
                count[j] += m;
                sum[j] += d;
                square[j] += d * d;
            }
    }
}

/* ---- Sums of the backward pass ----------------------------------------------------------------------------------- */

/* dy behind the ReLU: 0 where its output y is not above 0.  v is the vector's first element. */
static ALWAYS_INLINE narrow gated(const elem_t *dy, const elem_t *y) {
    narrow g = load_narrow(dy);
    return y ? (narrow)((load_narrow(y) > (narrow){0}) & (narrow_bits)g) : g;
}

/* x, dy, y: (rows, vectors * LANES64) at their strides; sums and shift: (vectors * LANES64). */
static ALWAYS_INLINE void add_gradient_vectors(const struct bn_rows of[3], size_t j, size_t rows, size_t vectors,
                                               const double *shift, double *sum, double *dbias, double *dscale) {
    const elem_t *x = (const elem_t *)of[0].at + j, *dy = (const elem_t *)of[1].at + j, *y = of[2].at;
    if (y) y += j;
    wide s[UNROLL], b[UNROLL], g[UNROLL], m[UNROLL];
    for (size_t v = 0; v < vectors; v++) {
        s[v] = load_wide(sum + j + v * LANES64);
        b[v] = load_wide(dbias + j + v * LANES64);
        g[v] = load_wide(dscale + j + v * LANES64);
        m[v] = load_wide(shift + j + v * LANES64);
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t v = 0; v < vectors; v++) {
            wide xv = widen(load_narrow(x + v * LANES64));
            wide dyv = widen(gated(dy + v * LANES64, y ? y + v * LANES64 : NULL));
            if (!EXACT_PRODUCTS) xv -= m[v];
            s[v] += xv;
            b[v] += dyv;
            g[v] = EXACT_PRODUCTS ? add_exact_product(g[v], xv, dyv) : g[v] + xv * dyv;
        }
        x += of[0].stride;
        dy += of[1].stride;
        if (y) y += of[2].stride;
    }
    for (size_t v = 0; v < vectors; v++) {
        store_wide(sum + j + v * LANES64, s[v]);
        store_wide(dbias + j + v * LANES64, b[v]);
        store_wide(dscale + j + v * LANES64, g[v]);
    }
}

/* x, dy, y: (rows, width) at their strides; sums and shift: (width). */
static ALWAYS_INLINE void add_gradient_rows(const struct bn_rows of[3], size_t rows, size_t width, const double *shift,
                                            double *sum, double *dbias, double *dscale) {
    size_t j = 0;
    for (; j + UNROLL * LANES64 <= width; j += UNROLL * LANES64)
        add_gradient_vectors(of, j, rows, UNROLL, shift, sum, dbias, dscale);
    for (; j + LANES64 <= width; j += LANES64) add_gradient_vectors(of, j, rows, 1, shift, sum, dbias, dscale);
    const elem_t *x = of[0].at, *dy = of[1].at, *y = of[2].at;
    for (; j < width; j++)
        for (ptrdiff_t r = 0; r < (ptrdiff_t)rows; r++) {
            double d = (double)load(x[r * of[0].stride + (ptrdiff_t)j]) - (EXACT_PRODUCTS ? 0 : shift[j]);
            double g = (double)load(dy[r * of[1].stride + (ptrdiff_t)j]);
            if (y && !(load(y[r * of[2].stride + (ptrdiff_t)j]) > 0)) g = 0;
            sum[j] += d;
            dbias[j] += g;
            dscale[j] += d * g;
        }
}

static ALWAYS_INLINE void add_gradient_block(const struct bn_block *b, bool relu, const double *shift, double *sum,
                                             double *dbias, double *dscale) {
    static const enum bn_operand operand[3] = {BN_X, BN_DY, BN_Y};
    size_t n = b->period, step = n == b->width ? ROW_TILE : 1;
    for (size_t r = 0; r < b->rows; r += step) {
        struct bn_rows of[3], rest[3];
        size_t whole = b->width / n;
        for (int k = 0; k < 3; k++) {
            if (k == 2 && !relu) {
                of[k] = rest[k] = (struct bn_rows){NULL, 0};
                continue;
            }
            elem_t *at = row(b, operand[k], r);
            of[k] = (struct bn_rows){at, n == b->width ? b->of[operand[k]].stride : (ptrdiff_t)n};
            rest[k] = (struct bn_rows){at + whole * n, 0};
        }
        if (n == b->width) {
            add_gradient_rows(of, at_most(b->rows - r, step), n, shift, sum, dbias, dscale);
        } else {
            add_gradient_rows(of, whole, n, shift, sum, dbias, dscale);
            add_gradient_rows(rest, 1, b->width - whole * n, shift, sum, dbias, dscale);
        }
    }
}

/* sum += x, dbias += dy, dscale += dy * x; float64: with x - shift in place of x. */
static void bn_gradient_sums(const struct bn_block *b, const double *shift, double *sum, double *dbias, double *dscale) {
    if (b->relu)
        add_gradient_block(b, true, shift, sum, dbias, dscale);
    else
        add_gradient_block(b, false, shift, sum, dbias, dscale);
}

/* ---- Elementwise sweeps ------------------------------------------------------------------------------------------ */

/* Columns' coefficients in the precision of the computation. */
struct columns {
    acc_t centre[BN_COLUMNS], gain[BN_COLUMNS], slope[BN_COLUMNS], offset[BN_COLUMNS];
};

static void narrow_coefficients(struct columns *c, const struct bn_coefficients *from, size_t n) {
    for (size_t j = 0; j < n; j++) c->centre[j] = (acc_t)from->centre[j];
    for (size_t j = 0; j < n; j++) c->gain[j] = (acc_t)from->gain[j];
    for (size_t j = 0; j < n; j++) c->offset[j] = (acc_t)from->offset[j];
    if (from->slope)
        for (size_t j = 0; j < n; j++) c->slope[j] = (acc_t)from->slope[j];
}

/* One row's pointers, and which of them are used: known when the loops are compiled. */
struct sweep {
    const elem_t *x, *residual, *dy, *y_out;
    const uint8_t *mask;
    elem_t *y, *dx, *dresidual;
    acc_t floor;
};
enum { LINE = 64 / sizeof(elem_t) };

/* y[j] for j in [0, n), columns k + j. */
static ALWAYS_INLINE void normalise_run(const struct columns *c, size_t k, const elem_t *x, const elem_t *residual, elem_t *y, size_t n, acc_t floor) {
#pragma GCC ivdep
    for (size_t j = 0; j < n; j++) {
        acc_t v = (load(x[j]) - c->centre[k + j]) * c->gain[k + j] + c->offset[k + j];
        if (residual) v += load(residual[j]);
        y[j] = store(floor > v ? floor : v);
    }
}

static ALWAYS_INLINE void normalise_block(const struct bn_block *b, const struct columns *c, bool residual, acc_t floor) {
    for (size_t r = 0; r < b->rows; r++) {
        const elem_t *x = row(b, BN_X, r), *res = residual ? row(b, BN_RESIDUAL, r) : NULL;
        elem_t *y = row(b, BN_Y, r);
        for (size_t first = 0; first < b->width; first += b->period) {
            size_t j = first, n = at_most(b->width, first + b->period);
            if (b->stream) {
                size_t head = (size_t)(-(uintptr_t)(y + j) % 64) / sizeof(elem_t);
                head = at_most(head, n - j);
                normalise_run(c, 0, x + j, res ? res + j : NULL, y + j, head, floor);
                for (j += head; j + LINE <= n; j += LINE) {
                    elem_t line[LINE] __attribute__((aligned(64)));
                    normalise_run(c, j - first, x + j, res ? res + j : NULL, line, LINE, floor);
                    stream_lines(y + j, line, sizeof line);
                }
            }
            normalise_run(c, j - first, x + j, res ? res + j : NULL, y + j, n - j, floor);
        }
    }
}

/* y = gain * (x - centre) + offset [+ residual], [0 where below] */
static void bn_normalise(const struct bn_block *b, const struct bn_coefficients *coefficients) {
    struct columns c;
    narrow_coefficients(&c, coefficients, b->period);
    acc_t floor = b->relu ? 0 : -(acc_t)INFINITY;
    if (b->of[BN_RESIDUAL].at)
        normalise_block(b, &c, true, floor);
    else
        normalise_block(b, &c, false, floor);
}

static ALWAYS_INLINE void differentiate_run(const struct columns *c, size_t k, const elem_t *x, const elem_t *dy, const elem_t *y, const uint8_t *mask, elem_t *dx, elem_t *dresidual, size_t n) {
#pragma GCC ivdep
    for (size_t j = 0; j < n; j++) {
        elem_t g = dy[j];
        if (y) g = load(y[j]) > 0 ? g : 0;
        acc_t through_statistics = c->slope[k + j] * (load(x[j]) - c->centre[k + j]) + c->offset[k + j];
        if (mask) through_statistics = mask[j] ? through_statistics : 0;
        dx[j] = store(c->gain[k + j] * load(g) + through_statistics);
        if (dresidual) dresidual[j] = g;
    }
}

static ALWAYS_INLINE void differentiate_block(const struct bn_block *b, const struct columns *c, bool relu, bool masked, bool residual) {
    for (size_t r = 0; r < b->rows; r++) {
        const elem_t *x = row(b, BN_X, r), *dy = row(b, BN_DY, r), *y = relu ? row(b, BN_Y, r) : NULL;
        const uint8_t *mask = masked ? (const uint8_t *)b->of[BN_MASK].at + (ptrdiff_t)r * b->of[BN_MASK].stride : NULL;
        elem_t *dx = row(b, BN_DX, r), *dres = residual ? row(b, BN_DRESIDUAL, r) : NULL;
        for (size_t first = 0; first < b->width; first += b->period) {
            size_t j = first, n = at_most(b->width, first + b->period);
            bool together = !residual || ((uintptr_t)(dx + j) - (uintptr_t)(dres + j)) % 64 == 0;
            if (b->stream && together) {
                size_t head = (size_t)(-(uintptr_t)(dx + j) % 64) / sizeof(elem_t);
                head = at_most(head, n - j);
                differentiate_run(c, 0, x + j, dy + j, y ? y + j : NULL, mask ? mask + j : NULL, dx + j, dres ? dres + j : NULL, head);
                for (j += head; j + LINE <= n; j += LINE) {
                    elem_t line[LINE] __attribute__((aligned(64))), dres_line[LINE] __attribute__((aligned(64)));
                    differentiate_run(c, j - first, x + j, dy + j, y ? y + j : NULL, mask ? mask + j : NULL, line, dres ? dres_line : NULL, LINE);
                    stream_lines(dx + j, line, sizeof line);
                    if (dres) stream_lines(dres + j, dres_line, sizeof dres_line);
                }
            }
            differentiate_run(c, j - first, x + j, dy + j, y ? y + j : NULL, mask ? mask + j : NULL, dx + j, dres ? dres + j : NULL, n - j);
        }
    }
}

/* dx = gain * g + slope * (x - centre) + offset, dresidual = g, where g = dy, 0 where the ReLU's output y is not above
 * 0.  Elements outside the mask: dx = gain * g. */
static void bn_differentiate(const struct bn_block *b, const struct bn_coefficients *coefficients) {
    struct columns c;
    narrow_coefficients(&c, coefficients, b->period);
    bool masked = b->of[BN_MASK].at, residual = b->of[BN_DRESIDUAL].at;
    if (masked)
        differentiate_block(b, &c, b->relu, true, residual);
    else if (!b->relu && !residual)
        differentiate_block(b, &c, false, false, false);
    else if (!residual)
        differentiate_block(b, &c, true, false, false);
    else
        differentiate_block(b, &c, b->relu, false, true);
}

#endif
