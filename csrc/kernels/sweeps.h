/* Batch-norm's elementwise sweeps over a block, for one element type. */
#ifndef PYREG_KERNELS_SWEEPS_H
#define PYREG_KERNELS_SWEEPS_H

#include "lanes.h"
#include "stream.h"

#include <math.h>

/* Coefficients in the precision of the computation: one per line, or one per column; these are repeated past the end so
 * that a cache line of elements finds its own whatever column it starts in. */
struct coefficients {
    acc_t centre[BN_COLUMNS + LINE], gain[BN_COLUMNS + LINE], slope[BN_COLUMNS + LINE], offset[BN_COLUMNS + LINE];
};
_Static_assert(sizeof(struct coefficients) <= BN_NARROW * sizeof(acc_t), "bn_coefficients.narrow has room for them");

/* n >= 1.  A NaN becomes the one that store_floats() can round.  __builtin: mingw's isnan() converts to float, too. */
static void narrow_to(acc_t *to, const double *from, size_t n) {
    to[0] = __builtin_isnan(from[0]) ? (acc_t)NAN : (acc_t)from[0];
    for (size_t j = 1; j < n; j++) to[j] = __builtin_isnan(from[j]) ? (acc_t)NAN : (acc_t)from[j];
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

static ALWAYS_INLINE elem_t *at_or_null(const elem_t *p, size_t j) { return p ? (elem_t *)p + j : NULL; }

#ifdef HALVES /* compilers convert these slowly in a plain loop */
struct lane_coefficients {
    vecf centre, gain, slope, offset;
};

/* Those from k on, or k for all. */
static ALWAYS_INLINE struct lane_coefficients lanes_of(const struct coefficients *c, size_t k, bool channel_line) {
    struct lane_coefficients v;
    if (channel_line)
        return (struct lane_coefficients){splatf(c->centre[k]), splatf(c->gain[k]), splatf(c->slope[k]),
                                          splatf(c->offset[k])};
    memcpy(&v.centre, c->centre + k, sizeof v.centre);
    memcpy(&v.gain, c->gain + k, sizeof v.gain);
    memcpy(&v.slope, c->slope + k, sizeof v.slope);
    memcpy(&v.offset, c->offset + k, sizeof v.offset);
    return v;
}

struct lane_results {
    vecf out, dresidual;
};

/* LANES32 elements from j on; or, of a line of bfloat16 without a mask, of 2 LANES32 those at even places, or at odd. */
static ALWAYS_INLINE struct lane_results sweep_lanes(const struct lane_coefficients *c, const struct sweep *s, size_t j,
                                                     enum lanes which) {
    const vecf d = load_floats(s->x + j, which) - c->centre;
    if (!s->dy) {
        vecf y = d * c->gain + c->offset;
        if (s->residual) y += load_floats(s->residual + j, which);
        return (struct lane_results){.out = larger(s->floor, y)};
    }
    vecf g = load_floats(s->dy + j, which), through_statistics = c->slope * d + c->offset;
    if (s->relu_y) g = (vecf)((vec32)g & (vec32)(load_floats(s->relu_y + j, which) > 0));
    if (s->mask) {
        vec32 counts;
        for (size_t l = 0; l < LANES32; l++) counts[l] = -(uint32_t)s->mask[j + l];
        through_statistics = (vecf)((vec32)through_statistics & counts);
    }
    return (struct lane_results){c->gain * g + through_statistics, g};
}

static ALWAYS_INLINE void store_results(const struct lane_results *r, elem_t *out, elem_t *dresidual, size_t j) {
    store_floats(out + j, r->out);
    if (dresidual) store_floats(dresidual + j, r->dresidual);
}

static ALWAYS_INLINE const void *padded(void *to, const void *from, size_t bytes) {
    return from ? memcpy(to, from, bytes) : NULL;
}

/* n < LANES32 elements from j on.  Not inlined: the copies for each loop were a tenth of all that is compiled.  By value:
 * a variable that has been pointed to would stay in memory, in the loops, too. */
static NOINLINE void sweep_few(struct lane_coefficients c, struct sweep s, size_t j, size_t n, elem_t *out,
                               elem_t *dresidual) {
    const size_t bytes = n * sizeof(elem_t);
    elem_t x[LANES32] = {0}, residual[LANES32] = {0}, dy[LANES32] = {0}, relu_y[LANES32] = {0}, y[LANES32], g[LANES32];
    uint8_t mask[LANES32] = {0};
    const struct sweep few = {
        .x = padded(x, s.x + j, bytes),
        .residual = padded(residual, at_or_null(s.residual, j), bytes),
        .dy = padded(dy, at_or_null(s.dy, j), bytes),
        .relu_y = padded(relu_y, at_or_null(s.relu_y, j), bytes),
        .mask = padded(mask, s.mask ? s.mask + j : NULL, n),
        .floor = s.floor,
    };
    const struct lane_results r = sweep_lanes(&c, &few, 0, NEIGHBOURS);
    store_results(&r, y, dresidual ? g : NULL, 0);
    memcpy(out, y, bytes);
    if (dresidual) memcpy(dresidual, g, bytes);
}

/* Elements j .. j + n - 1 of the line, with coefficients k .. k + n - 1, or k for all. */
static ALWAYS_INLINE void sweep_run(const struct coefficients *restrict c, const struct sweep *s, size_t j, size_t k,
                                    size_t n, bool channel_line, elem_t *out, elem_t *dresidual) {
    if (n == 0) return;
    struct lane_coefficients v = lanes_of(c, k, channel_line);
    if (n < LANES32) {
        sweep_few(v, *s, j, n, out, dresidual);
        return;
    }
    /* The last vector overlaps the one before, and is read first: what it reads may be overwritten by then. */
    const size_t last = n - LANES32;
    struct lane_coefficients of_last = channel_line ? v : lanes_of(c, k + last, false);
    const struct lane_results end = sweep_lanes(&of_last, s, j + last, NEIGHBOURS);
    size_t i = 0;
#if defined(PYREG_BF16)
    for (; channel_line && !s->mask && i + 2 * LANES32 <= n; i += 2 * LANES32) { /* no shuffles */
        const struct lane_results even = sweep_lanes(&v, s, j + i, EVEN), odd = sweep_lanes(&v, s, j + i, ODD);
        store_pairs(out + i, even.out, odd.out);
        if (dresidual) store_pairs(dresidual + i, even.dresidual, odd.dresidual);
    }
#endif
    for (; i < last; i += LANES32) {
        if (!channel_line) v = lanes_of(c, k + i, false);
        const struct lane_results r = sweep_lanes(&v, s, j + i, NEIGHBOURS);
        store_results(&r, out, dresidual, i);
    }
    store_results(&end, out, dresidual, last);
}
#else
static ALWAYS_INLINE void sweep_run(const struct coefficients *restrict c, const struct sweep *s, size_t j, size_t k,
                                    size_t n, bool channel_line, elem_t *out, elem_t *dresidual) {
    const elem_t *x = s->x + j, *residual = at_or_null(s->residual, j), *dy = at_or_null(s->dy, j);
    const elem_t *relu_y = at_or_null(s->relu_y, j);
    const uint8_t *mask = s->mask ? s->mask + j : NULL;
#pragma GCC unroll 1
#pragma GCC ivdep
    for (size_t i = 0; i < n; i++) {
        const size_t m = channel_line ? k : k + i;
        const acc_t d = load(x[i]) - c->centre[m];
        if (dy) {
            elem_t g = dy[i];
            if (relu_y) g = load(relu_y[i]) > 0 ? g : 0;
            acc_t through_statistics = c->slope[m] * d + c->offset[m];
            if (mask) through_statistics = mask[i] ? through_statistics : 0;
            if (dresidual) dresidual[i] = g;
            out[i] = store(c->gain[m] * load(g) + through_statistics);
        } else {
            acc_t y = d * c->gain[m] + c->offset[m];
            if (residual) y += load(residual[i]);
            out[i] = store(s->floor > y ? s->floor : y);
        }
    }
}
#endif

/* Around the cache: a whole cache line goes through a buffer. */
static ALWAYS_INLINE void sweep_around(const struct coefficients *restrict c, const struct sweep *s, size_t j, size_t k,
                                       bool channel_line) {
    elem_t out[LINE] __attribute__((aligned(LINE_BYTES))), dresidual[LINE] __attribute__((aligned(LINE_BYTES)));
    sweep_run(c, s, j, k, LINE, channel_line, out, s->dresidual ? dresidual : NULL);
    stream_lines(s->out + j, out, sizeof out);
    if (!s->dresidual) return;
    if ((uintptr_t)(s->dresidual + j) % LINE_BYTES == 0)
        stream_lines(s->dresidual + j, dresidual, sizeof dresidual);
    else
        memcpy(s->dresidual + j, dresidual, sizeof dresidual);
}

/* n elements; coefficient l for all, or element j's is j % period. */
static ALWAYS_INLINE void sweep_line(const struct coefficients *restrict c, const struct sweep *s, size_t n, size_t l,
                                     size_t period, bool channel_line, bool stream) {
    size_t j = 0, k = l;
    if (stream) { /* up to the first whole line of the output */
        j = at_most((size_t)(-(uintptr_t)s->out % LINE_BYTES) / sizeof(elem_t), n);
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

/* Each set of operands in a function of its own: all loops in one would have the stack of all, for vectors that spill. */
#define SWEEP(name, backward, relu, masked, residual)                                                                  \
    static NOINLINE void name(const struct bn_block *b, const struct bn_coefficients *k) {                             \
        sweep(b, k, backward, relu, masked, residual);                                                                 \
    }
SWEEP(sweep_y, false, b->relu, false, false)
SWEEP(sweep_y_residual, false, b->relu, false, true)
SWEEP(sweep_dx, true, false, false, false)
SWEEP(sweep_dx_relu, true, true, false, false)
SWEEP(sweep_dx_relu_residual, true, true, false, true)
SWEEP(sweep_dx_masked, true, b->relu, b->of[BN_MASK].at, b->of[BN_DRESIDUAL].at) /* rare: asks at each element */
#undef SWEEP

/* y = gain * (x - centre) + offset [+ residual], [0 where below] */
static void bn_normalise(const struct bn_block *b, const struct bn_coefficients *k) {
    (b->of[BN_RESIDUAL].at ? sweep_y_residual : sweep_y)(b, k);
}

/* dx = gain * g + slope * (x - centre) + offset, dresidual = g, where g = dy, 0 where the ReLU's output y is not above
 * 0.  Elements outside the mask: dx = gain * g. */
static void bn_differentiate(const struct bn_block *b, const struct bn_coefficients *k) {
    const bool masked = b->of[BN_MASK].at, residual = b->of[BN_DRESIDUAL].at;
    if (masked || (residual && !b->relu))
        sweep_dx_masked(b, k);
    else
        (residual ? sweep_dx_relu_residual : b->relu ? sweep_dx_relu : sweep_dx)(b, k);
}

/* What bn_differentiate does where there is a slope, else bn_normalise, in double: for coefficients and differences
 * that a float does not hold. */
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
                const uint8_t *mask = b->of[BN_MASK].at;
                if (mask) mask += (ptrdiff_t)r * b->of[BN_MASK].stride + (ptrdiff_t)i;
                const bool counts = !b->relu || load(row(b, BN_Y, r)[i]) > 0;
                const elem_t g = counts ? row(b, BN_DY, r)[i] : 0;
                const double through_statistics = mask && !*mask ? 0 : c->slope[k] * d + c->offset[k];
                if (b->of[BN_DRESIDUAL].at) row(b, BN_DRESIDUAL, r)[i] = g;
                row(b, BN_DX, r)[i] = store((acc_t)(c->gain[k] * (double)load(g) + through_statistics));
            }
    }
}

#endif
