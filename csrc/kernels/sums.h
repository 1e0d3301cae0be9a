/* Batch-norm's sums down the columns of a block, for one element type.  Lanes are columns and each column adds its
 * elements in order, so vector width cannot change a bit. */
#ifndef PYREG_KERNELS_SUMS_H
#define PYREG_KERNELS_SUMS_H

#include "lanes.h"

/* ---- Of the forward pass ------------------------------------------------------------------------------------ */

enum { UNROLL = 4, VECTORS = UNROLL * LANES64 };

/* Rows of several blocks of columns are taken so many at a time that they stay in L1 from block to block; but so many
 * that loading the sums does not count. */
static inline size_t row_tile(size_t rows, size_t width) {
    return width <= VECTORS ? rows : at_most(rows, width < 256 ? 4096 / width : 16);
}

/* x: (rows, vectors * LANES64) at stride; sums and shift: (vectors * LANES64). */
static ALWAYS_INLINE void add_vectors(const elem_t *x, ptrdiff_t stride, size_t rows, size_t vectors,
                                      const double *shift, double *sum, double *square) {
    wide s[UNROLL], q[UNROLL], m[UNROLL];
    for (size_t v = 0; v < vectors; v++) {
        s[v] = load_wide(sum + v * LANES64);
        q[v] = load_wide(square + v * LANES64);
        m[v] = shift ? load_wide(shift + v * LANES64) : (wide){0};
    }
    for (size_t r = 0; r < rows; r++, x += stride) {
        prefetch(x, vectors * LANES64, stride >= AHEAD ? 2 * VECTORS : AHEAD);
        for (size_t v = 0; v < vectors; v++) {
            wide d = widen(load_narrow(x + v * LANES64));
            if (shift) d -= m[v];
            s[v] += d;
            q[v] = shift ? q[v] + d * d : add_exact_product(q[v], d, d);
        }
    }
    for (size_t v = 0; v < vectors; v++) {
        store_wide(sum + v * LANES64, s[v]);
        store_wide(square + v * LANES64, q[v]);
    }
}

/* x: (rows, width) at stride; sums and shift: (width). */
static ALWAYS_INLINE void add_rows(const elem_t *x, ptrdiff_t stride, size_t rows, size_t width, const double *shift,
                                   double *sum, double *square) {
    for (size_t n; rows; rows -= n, x += (ptrdiff_t)n * stride) {
        n = row_tile(rows, width);
        size_t j = 0;
        for (; j + VECTORS <= width; j += VECTORS)
            add_vectors(x + j, stride, n, UNROLL, shift ? shift + j : NULL, sum + j, square + j);
        for (; j + LANES64 <= width; j += LANES64)
            add_vectors(x + j, stride, n, 1, shift ? shift + j : NULL, sum + j, square + j);
        for (; j < width; j++)
            for (size_t r = 0; r < n; r++) {
                double d = (double)load(x[(ptrdiff_t)r * stride + (ptrdiff_t)j]) - (shift ? shift[j] : 0);
                sum[j] += d;
                square[j] += d * d;
            }
    }
}

/* A line of each of `rows` rows; sums: (period).  The same order as add_rows, but the sums are loaded once, and what
 * the line lacks to a whole vector is filled up with zeros, which change no sum. */
static ALWAYS_INLINE void add_short_lines(const elem_t *x, ptrdiff_t stride, size_t rows, size_t length, size_t period,
                                          double *sum, double *square) {
    for (size_t j = 0; j < at_most(period, length); j += VECTORS) {
        wide s[UNROLL], q[UNROLL];
        for (size_t v = 0; v < UNROLL; v++) {
            s[v] = load_wide(sum + j + v * LANES64);
            q[v] = load_wide(square + j + v * LANES64);
        }
        for (size_t r = 0; r < rows; r++) {
            const elem_t *at = x + (ptrdiff_t)r * stride + j;
            size_t left = length - j;
            prefetch(at, left, AHEAD);
            for (; left >= VECTORS; at += period, left = left > period ? left - period : 0)
                for (size_t v = 0; v < UNROLL; v++) {
                    wide d = widen(load_narrow(at + v * LANES64));
                    s[v] += d;
                    q[v] = add_exact_product(q[v], d, d);
                }
            for (size_t v = 0; v < UNROLL; v++)
                if (left > v * LANES64) {
                    wide d = widen(load_part(at + v * LANES64, at_most(left - v * LANES64, LANES64)));
                    s[v] += d;
                    q[v] = add_exact_product(q[v], d, d);
                }
        }
        for (size_t v = 0; v < UNROLL; v++) {
            store_wide(sum + j + v * LANES64, s[v]);
            store_wide(square + j + v * LANES64, q[v]);
        }
    }
}

/* Lines of a few periods are taken in so many rows at once. */
enum { SHORT_LINE = 8, ROWS_TOGETHER = 4 };

static ALWAYS_INLINE void add_block(const struct bn_block *b, const double *shift, double *sum, double *square) {
    const size_t n = b->period, whole = b->length / n;
    if (b->channel_lines && !shift && n % VECTORS == 0 && whole < SHORT_LINE) {
        for (size_t r = 0; r < b->rows; r += ROWS_TOGETHER)
            for (size_t l = 0; l < b->lines; l++)
                add_short_lines(row(b, BN_X, r) + l * b->length, b->of[BN_X].stride,
                                at_most(ROWS_TOGETHER, b->rows - r), b->length, n, sum + l * n, square + l * n);
        return;
    }
    if (b->lines == 1 && b->length == n) {
        add_rows(row(b, BN_X, 0), b->of[BN_X].stride, b->rows, n, shift, sum, square);
        return;
    }
    for (size_t r = 0; r < b->rows; r++)
        for (size_t l = 0; l < b->lines; l++) { /* whole periods are rows of one period */
            const elem_t *x = row(b, BN_X, r) + l * b->length;
            const double *m = shift ? shift + l * n : NULL;
            add_rows(x, (ptrdiff_t)n, whole, n, m, sum + l * n, square + l * n);
            add_rows(x + whole * n, 0, 1, b->length - whole * n, m, sum + l * n, square + l * n);
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
        for (size_t l = 0; l < b->lines; l++)
            for (size_t j = 0; j < b->length; j++, x++, mask++) {
                const size_t k = l * b->period + j % b->period;
                if (!*mask) continue;
                const double d = (double)load(*x) - shift[k];
                count[k] += 1;
                sum[k] += d;
                square[k] += d * d;
            }
    }
}

/* ---- Of the backward pass ----------------------------------------------------------------------------------- */

/* dy behind the ReLU: 0 where its output y is not above 0.  v is the vector's first element. */
static ALWAYS_INLINE narrow gated(const elem_t *dy, const elem_t *y) {
    narrow g = load_narrow(dy);
    return y ? (narrow)((load_narrow(y) > (narrow){0}) & (narrow_bits)g) : g;
}

/* x, dy, y: (rows, vectors * LANES64) at their strides; sums and shift: (vectors * LANES64). */
static ALWAYS_INLINE void add_gradient_vectors(const struct bn_rows of[3], ptrdiff_t ahead, size_t j, size_t rows,
                                               size_t vectors, const double *shift, double *sum, double *dbias,
                                               double *dscale) {
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
        prefetch(x, vectors * LANES64, ahead);
        prefetch(dy, vectors * LANES64, ahead);
        if (y) prefetch(y, vectors * LANES64, ahead);
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
static ALWAYS_INLINE void add_gradient_rows(struct bn_rows of[3], ptrdiff_t ahead, size_t rows, size_t width,
                                            const double *shift, double *sum, double *dbias, double *dscale) {
    for (size_t n; rows; rows -= n) {
        n = row_tile(rows, width);
        size_t j = 0;
        for (; j + VECTORS <= width; j += VECTORS)
            add_gradient_vectors(of, ahead, j, n, UNROLL, shift, sum, dbias, dscale);
        for (; j + LANES64 <= width; j += LANES64) add_gradient_vectors(of, ahead, j, n, 1, shift, sum, dbias, dscale);
        const elem_t *x = of[0].at, *dy = of[1].at, *y = of[2].at;
        for (; j < width; j++)
            for (ptrdiff_t r = 0; r < (ptrdiff_t)n; r++) {
                double d = (double)load(x[r * of[0].stride + (ptrdiff_t)j]) - (EXACT_PRODUCTS ? 0 : shift[j]);
                double g = (double)load(dy[r * of[1].stride + (ptrdiff_t)j]);
                if (y && !(load(y[r * of[2].stride + (ptrdiff_t)j]) > 0)) g = 0;
                sum[j] += d;
                dbias[j] += g;
                dscale[j] += d * g;
            }
        for (int k = 0; k < 3; k++)
            if (of[k].at) of[k].at = (elem_t *)of[k].at + (ptrdiff_t)n * of[k].stride;
    }
}

static ALWAYS_INLINE void add_gradient_block(const struct bn_block *b, bool relu, const double *shift, double *sum,
                                             double *dbias, double *dscale) {
    const size_t n = b->period, whole = b->length / n, rest = b->length - whole * n;
    if (b->lines == 1 && b->length == n) {
        struct bn_rows of[3] = {b->of[BN_X], b->of[BN_DY], relu ? b->of[BN_Y] : (struct bn_rows){NULL, 0}};
        add_gradient_rows(of, of[0].stride >= AHEAD ? 2 * VECTORS : AHEAD, b->rows, n, shift, sum, dbias, dscale);
        return;
    }
    for (size_t r = 0; r < b->rows; r++)
        for (size_t l = 0; l < b->lines; l++) { /* whole periods are rows of one period */
            const size_t k = l * n, j = l * b->length;
            elem_t *x = row(b, BN_X, r) + j, *dy = row(b, BN_DY, r) + j, *y = relu ? row(b, BN_Y, r) + j : NULL;
            struct bn_rows of[3] = {{x, (ptrdiff_t)n}, {dy, (ptrdiff_t)n}, {y, (ptrdiff_t)n}};
            const size_t last = at_most(whole, AHEAD / n); /* periods whose prefetch is the next row's line */
            add_gradient_rows(of, AHEAD, whole - last, n, shift + k, sum + k, dbias + k, dscale + k);
            add_gradient_rows(of, b->of[BN_X].stride - (ptrdiff_t)((whole - last) * n), last, n, shift + k, sum + k,
                              dbias + k, dscale + k);
            struct bn_rows tail[3] = {{x + whole * n, 0}, {dy + whole * n, 0}, {relu ? y + whole * n : NULL, 0}};
            add_gradient_rows(tail, 0, 1, rest, shift + k, sum + k, dbias + k, dscale + k);
        }
}

/* sum += x, dbias += dy, dscale += dy * x; float64: with x - shift in place of x. */
static void bn_gradient_sums(const struct bn_block *b, const double *shift, double *sum, double *dbias,
                             double *dscale) {
    if (b->relu)
        add_gradient_block(b, true, shift, sum, dbias, dscale);
    else
        add_gradient_block(b, false, shift, sum, dbias, dscale);
}

/* The same without sum and without what is masked and not finite: the dy of that is added to `lost`, too. */
static void bn_finite_gradient_sums(const struct bn_block *b, const double *shift, double *dbias, double *dscale,
                                    double *lost) {
    for (size_t r = 0; r < b->rows; r++) {
        const elem_t *x = row(b, BN_X, r), *dy = row(b, BN_DY, r), *y = b->relu ? row(b, BN_Y, r) : NULL;
        const uint8_t *mask = (const uint8_t *)b->of[BN_MASK].at + (ptrdiff_t)r * b->of[BN_MASK].stride;
        for (size_t l = 0, i = 0; l < b->lines; l++)
            for (size_t j = 0; j < b->length; j++, i++) {
                const size_t k = l * b->period + j % b->period;
                const double d = (double)load(x[i]) - (EXACT_PRODUCTS ? 0 : shift[k]);
                const double g = y && !(load(y[i]) > 0) ? 0 : (double)load(dy[i]);
                dbias[k] += g;
                if (mask[i] || __builtin_isfinite(d))
                    dscale[k] += d * g;
                else
                    lost[k] += g;
            }
    }
}

#endif
