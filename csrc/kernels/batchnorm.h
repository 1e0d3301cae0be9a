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

#if defined(PYREG_F16)
static inline void store_narrow(elem_t *to, const acc_t *from) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storel_epi64((__m128i *)to, _mm_cvtps_ph(_mm_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#else
    for (size_t l = 0; l < LANES64; l++) to[l] = store(from[l]);
#endif
}
#endif

/* The first n elements, 0 < n <= LANES64, and zeros. */
static inline narrow load_part(const elem_t *x, size_t n) {
#if defined(PYREG_F32) && defined(__AVX512F__)
    return (narrow)_mm256_maskz_loadu_ps((__mmask8)(0xff >> (LANES64 - n)), x);
#else
    elem_t part[LANES64] = {0};
    if (n == LANES64) return load_narrow(x);
    for (size_t l = 0; l < n; l++) part[l] = x[l];
    return load_narrow(part);
#endif
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

/* The hardware's prefetcher stops at page ends and at the ends of rows: cache lines are asked for this far ahead. Where
 * a row is as long as that, there it would be another thread's columns: then the next columns, or the next row. */
enum { AHEAD = 4096 / sizeof(elem_t), LINE = 64 / sizeof(elem_t) };

static ALWAYS_INLINE void prefetch(const elem_t *p, size_t n, ptrdiff_t ahead) {
    for (size_t j = 0; j < n; j += LINE) __builtin_prefetch(p + j + ahead);
}

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

/* ---- Sums of the backward pass ----------------------------------------------------------------------------------- */

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
                if (mask[i] || isfinite(d))
                    dscale[k] += d * g;
                else
                    lost[k] += g;
            }
    }
}

/* ---- Elementwise sweeps ------------------------------------------------------------------------------------------ */

/* Coefficients in the precision of the computation: one a line, or one a column; these are repeated past the end so
 * that a cache line of elements finds its own whatever column it starts in. */
struct coefficients {
    acc_t centre[BN_COLUMNS + LINE], gain[BN_COLUMNS + LINE], slope[BN_COLUMNS + LINE], offset[BN_COLUMNS + LINE];
};
_Static_assert(sizeof(struct coefficients) <= BN_NARROW * sizeof(acc_t), "bn_coefficients.narrow has room for them");

/* n >= 1 */
static void narrow_to(acc_t *to, const double *from, size_t n) {
    to[0] = (acc_t)from[0];
    for (size_t j = 1; j < n; j++) to[j] = (acc_t)from[j];
    for (size_t j = 0; j < LINE; j++) to[n + j] = to[j];
}

/* One line.  NULL for what is absent, which is known when a loop is compiled. */
struct sweep {
    ptrdiff_t ahead; /* to prefetch */
    const elem_t *x, *residual, *dy, *relu_y;
    const uint8_t *mask;
    elem_t *out, *dresidual;
    acc_t floor;
};

/* Some elements of it, ready for the loop: gcc converts float16 quickly only in loops that do nothing else. */
#if defined(PYREG_F16)
typedef acc_t value_t;
static inline acc_t read_value(value_t v) { return v; }
static inline value_t write_value(acc_t a) { return a; }
#else
typedef elem_t value_t;
static inline acc_t read_value(value_t v) { return load(v); }
static inline value_t write_value(acc_t a) { return store(a); }
#endif

struct values {
    const value_t *x, *residual, *dy, *relu_y;
    const uint8_t *mask;
    value_t *out, *dresidual;
    acc_t floor;
};

/* n values, with coefficients k .. k + n - 1, or k for all. */
static ALWAYS_INLINE void sweep_values(const struct coefficients *restrict c, const struct values *v, size_t k,
                                       size_t n, bool channel_line) {
#pragma GCC unroll 1
#pragma GCC ivdep
    for (size_t i = 0; i < n; i++) {
        const size_t m = channel_line ? k : k + i;
        const acc_t d = read_value(v->x[i]) - c->centre[m];
        if (v->dy) {
            value_t g = v->dy[i];
            if (v->relu_y) g = read_value(v->relu_y[i]) > 0 ? g : 0;
            acc_t through_statistics = c->slope[m] * d + c->offset[m];
            if (v->mask) through_statistics = v->mask[i] ? through_statistics : 0;
            if (v->dresidual) v->dresidual[i] = g;
            v->out[i] = write_value(c->gain[m] * read_value(g) + through_statistics);
        } else {
            acc_t y = d * c->gain[m] + c->offset[m];
            if (v->residual) y += read_value(v->residual[i]);
            v->out[i] = write_value(v->floor > y ? v->floor : y);
        }
    }
}

#if defined(PYREG_F16)
/* n <= LINE elements as values, NULL for NULL; what is behind them in to[] is 0. */
static ALWAYS_INLINE const value_t *read_line(value_t *to, const elem_t *from, size_t n) {
    if (!from) return NULL;
    elem_t part[LINE] = {0};
    if (n < LINE) from = memcpy(part, from, n * sizeof(elem_t));
    for (size_t i = 0; i < LINE; i += LANES64) {
        narrow v = load_narrow(from + i);
        memcpy(to + i, &v, sizeof v);
    }
    return to;
}

static ALWAYS_INLINE void write_line(elem_t *to, const value_t *from, size_t n) {
    elem_t part[LINE], *at = n < LINE ? part : to;
    for (size_t i = 0; i < LINE; i += LANES64) store_narrow(at + i, from + i);
    if (n < LINE) memcpy(to, part, n * sizeof(elem_t));
}
#endif

static ALWAYS_INLINE elem_t *at_or_null(const elem_t *p, size_t j) { return p ? (elem_t *)p + j : NULL; }

/* Elements j .. j + n - 1 of the line, with coefficients k .. k + n - 1, or k for all. */
static ALWAYS_INLINE void sweep_run(const struct coefficients *restrict c, const struct sweep *s, size_t j, size_t k,
                                    size_t n, bool channel_line, elem_t *out, elem_t *dresidual) {
#if defined(PYREG_F16)
    for (size_t i = 0; i < n; i += LINE, j += LINE) {
        const size_t left = at_most(n - i, LINE);
        value_t x[LINE], residual[LINE], dy[LINE], relu_y[LINE], y[LINE], g[LINE];
        const struct values v = {
            .x = read_line(x, s->x + j, left),
            .residual = read_line(residual, at_or_null(s->residual, j), left),
            .dy = read_line(dy, at_or_null(s->dy, j), left),
            .relu_y = read_line(relu_y, at_or_null(s->relu_y, j), left),
            .mask = s->mask ? s->mask + j : NULL,
            .out = y,
            .dresidual = dresidual ? g : NULL,
            .floor = s->floor,
        };
        sweep_values(c, &v, channel_line ? k : k + i, s->mask ? left : LINE, channel_line);
        write_line(out + i, y, left);
        if (dresidual) write_line(dresidual + i, g, left);
    }
#else
    const struct values v = {
        .x = s->x + j,
        .residual = at_or_null(s->residual, j),
        .dy = at_or_null(s->dy, j),
        .relu_y = at_or_null(s->relu_y, j),
        .mask = s->mask ? s->mask + j : NULL,
        .out = out,
        .dresidual = dresidual,
        .floor = s->floor,
    };
    sweep_values(c, &v, k, n, channel_line);
#endif
}

/* Around the cache: a whole cache line goes through a buffer. */
static ALWAYS_INLINE void sweep_around(const struct coefficients *restrict c, const struct sweep *s, size_t j, size_t k,
                                       bool channel_line) {
    elem_t out[LINE] __attribute__((aligned(64))), dresidual[LINE] __attribute__((aligned(64)));
    sweep_run(c, s, j, k, LINE, channel_line, out, s->dresidual ? dresidual : NULL);
    stream_lines(s->out + j, out, sizeof out);
    if (!s->dresidual) return;
    if ((uintptr_t)(s->dresidual + j) % 64 == 0)
        stream_lines(s->dresidual + j, dresidual, sizeof dresidual);
    else
        memcpy(s->dresidual + j, dresidual, sizeof dresidual);
}

/* n elements; coefficient l for all, or element j's is j % period. */
static ALWAYS_INLINE void sweep_line(const struct coefficients *restrict c, const struct sweep *s, size_t n, size_t l,
                                     size_t period, bool channel_line, bool stream) {
    size_t j = 0, k = l;
    if (stream) { /* up to the first whole line of the output */
        j = at_most((size_t)(-(uintptr_t)s->out % 64) / sizeof(elem_t), n);
        sweep_run(c, s, 0, k, j, channel_line, s->out, s->dresidual);
        if (!channel_line) k = j % period;
    }
    if (stream || !channel_line)
        for (; j + LINE <= n; j += LINE) {
            prefetch(s->x + j, LINE, s->ahead);
            if (s->dy) prefetch(s->dy + j, LINE, s->ahead);
            if (s->relu_y) prefetch(s->relu_y + j, LINE, s->ahead);
            if (s->residual) prefetch(s->residual + j, LINE, s->ahead);
            if (stream)
                sweep_around(c, s, j, k, channel_line);
            else
                sweep_run(c, s, j, k, LINE, false, s->out + j, at_or_null(s->dresidual, j));
            if (!channel_line)
                for (k += LINE; k >= period;) k -= period;
        }
    sweep_run(c, s, j, k, n - j, channel_line, s->out + j, at_or_null(s->dresidual, j));
}

static ALWAYS_INLINE void sweep_block(const struct bn_block *b, const struct coefficients *restrict c, bool backward,
                                      bool relu, bool masked, bool residual, bool channel_lines, bool stream) {
    const ptrdiff_t stride = b->of[BN_X].stride;
    for (size_t r = 0; r < b->rows; r++)
        for (size_t l = 0; l < b->lines; l++) {
            const size_t j = l * b->length;
            const struct sweep s = {
                .x = row(b, BN_X, r) + j,
                .residual = residual && !backward ? row(b, BN_RESIDUAL, r) + j : NULL,
                .dy = backward ? row(b, BN_DY, r) + j : NULL,
                .relu_y = backward && relu ? row(b, BN_Y, r) + j : NULL,
                .mask = masked ? (const uint8_t *)b->of[BN_MASK].at + (ptrdiff_t)r * b->of[BN_MASK].stride + j : NULL,
                .out = row(b, backward ? BN_DX : BN_Y, r) + j,
                .dresidual = residual && backward ? row(b, BN_DRESIDUAL, r) + j : NULL,
                .ahead = b->lines == 1 && b->length >= AHEAD && stride > (ptrdiff_t)b->length ? stride : AHEAD,
                .floor = relu ? 0 : -(acc_t)INFINITY,
            };
            sweep_line(c, &s, b->length, l, b->period, channel_lines, stream);
        }
}

/* One loop for each place of the coefficients and each way to write, each compiled for the operands there are. */
static ALWAYS_INLINE void sweep(const struct bn_block *b, const struct bn_coefficients *k, bool backward, bool relu,
                                bool masked, bool residual) {
    struct coefficients *c = k->narrow;
    const size_t n = b->channel_lines ? b->lines : b->period;
    narrow_to(c->centre, k->centre, n);
    narrow_to(c->gain, k->gain, n);
    narrow_to(c->offset, k->offset, n);
    if (backward) narrow_to(c->slope, k->slope, n);
    if (b->channel_lines && b->stream)
        sweep_block(b, c, backward, relu, masked, residual, true, true);
    else if (b->channel_lines)
        sweep_block(b, c, backward, relu, masked, residual, true, false);
    else if (b->stream)
        sweep_block(b, c, backward, relu, masked, residual, false, true);
    else
        sweep_block(b, c, backward, relu, masked, residual, false, false);
}

/* y = gain * (x - centre) + offset [+ residual], [0 where below] */
static void bn_normalise(const struct bn_block *b, const struct bn_coefficients *k) {
    if (b->of[BN_RESIDUAL].at)
        sweep(b, k, false, b->relu, false, true);
    else
        sweep(b, k, false, b->relu, false, false);
}

/* dx = gain * g + slope * (x - centre) + offset, dresidual = g, where g = dy, 0 where the ReLU's output y is not above
 * 0.  Elements outside the mask: dx = gain * g. */
static void bn_differentiate(const struct bn_block *b, const struct bn_coefficients *k) {
    const bool masked = b->of[BN_MASK].at, residual = b->of[BN_DRESIDUAL].at;
    if (!masked && !b->relu && !residual)
        sweep(b, k, true, false, false, false);
    else if (!masked && b->relu && !residual)
        sweep(b, k, true, true, false, false);
    else if (!masked && b->relu)
        sweep(b, k, true, true, false, true);
    else /* rare: which operands there are is found out at each element */
        sweep(b, k, true, b->relu, masked, residual);
}

/* What bn_differentiate does where there is a slope, else bn_normalise, in double: for coefficients and differences that
 * a float does not hold. */
static void bn_sweep_wide(const struct bn_block *b, const struct bn_coefficients *c) {
    const double floor = b->relu ? 0 : -INFINITY;
    for (size_t r = 0; r < b->rows; r++) {
        const elem_t *x = row(b, BN_X, r);
        for (size_t l = 0, i = 0; l < b->lines; l++)
            for (size_t j = 0; j < b->length; j++, i++) {
                const size_t k = b->channel_lines ? l : j % b->period;
                const double d = (double)load(x[i]) - c->centre[k];
                if (!c->slope) {
                    double y = d * c->gain[k] + c->offset[k];
                    if (b->of[BN_RESIDUAL].at) y += (double)load(row(b, BN_RESIDUAL, r)[i]);
                    row(b, BN_Y, r)[i] = store((acc_t)(floor > y ? floor : y));
                    continue;
                }
                const uint8_t *mask = (const uint8_t *)b->of[BN_MASK].at + (ptrdiff_t)r * b->of[BN_MASK].stride + i;
                const bool counts = !b->relu || load(row(b, BN_Y, r)[i]) > 0;
                const elem_t g = counts ? row(b, BN_DY, r)[i] : 0;
                const double through_statistics = b->of[BN_MASK].at && !*mask ? 0 : c->slope[k] * d + c->offset[k];
                if (b->of[BN_DRESIDUAL].at) row(b, BN_DRESIDUAL, r)[i] = g;
                row(b, BN_DX, r)[i] = store((acc_t)(c->gain[k] * (double)load(g) + through_statistics));
            }
    }
}

#endif
