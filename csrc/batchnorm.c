/* Batch-norm: check arguments, cut into pieces, sum each piece, merge the sums over a fixed tree, sweep over the output.
 *
 * Bits: a piece is a function of the shape, and of x's strides; its columns add in order; pieces merge pairwise.  Which
 * thread does what, and whether a channel is finished before the next one starts, changes nothing. */
#include "arith.h"
#include "blocks.h"
#include "dispatch.h"
#include "machine.h"
#include "memory.h"
#include "parallel.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Lines of 7 x 7 are summed 1.5 times faster as rows of columns, which have no ends; but swept faster as lines, which
 * have one coefficient. */
enum { LONG_LINE = 64, SWEEP_LINE = 32 };

/* A piece: long enough that its few dozen flops per channel do not count, short enough for a core's own cache. */
enum { PIECE = 32768, ROW_PIECE = 65536, MIN_ROWS = 128 };

/* One sweep's sums lose (mean / std)^2 of the 2^53 that a double tells apart; a piece beyond this (mean / std > 1000)
 * is summed again with its mean subtracted.  float64 has no bits to spare: there a first guess is subtracted at once,
 * and the sum repeated when the guess is 4 std off. */
static const double extreme_f32 = 0x1p20, extreme_f64 = 16;

/* ---- A call ------------------------------------------------------------------------------------------------------ */

/* A view cut into pieces of its elements and tiles of its channels. */
struct grid {
    size_t lines, parts; /* rows of a piece; parts of a row that is longer than a piece */
    size_t pieces;
    size_t channels, tiles; /* of a tile; in all */
};

/* A piece's sums of each channel.  LOST: where there is a mask.  MOMENTS, the forward's: where the backward pass takes
 * the variance from x again. */
enum { COUNT, MEAN, DEVIATION, FORWARD_SUMS };
enum { SUM = 1, DBIAS, PRODUCT, LOST, MOMENTS };

struct batchnorm {
    const struct pass *pass;
    const struct pyreg_batchnorm *args;
    const struct kernels *kernels;
    const void *mean, *var, *dmean, *dvar; /* given */
    void *mean_out, *mean_low_out, *var_out, *dscale_out, *dbias_out;
    const struct view *sums, *sweep; /* what the sums read; what the elementwise sweep reads and writes */
    struct grid sums_grid, sweep_grid;
    bool masked, stream, writes;            /* writes: there is an output to be written */
    size_t num_sums, columns;               /* columns: that a thread's scratch memory has room for */
    double *partial;                        /* (pieces, num_sums, channels) */
    double *centre, *gain, *slope, *offset; /* (channels) */
    double *wide;                           /* (channels), 1 where the sweep has to be computed in double */
    bool any_wide, lost_variance;
};

/* A thread's scratch memory: sums of columns, then coefficients of columns; and blocks. */
enum { SUM_COLUMNS = 6, MASKED_SUM_COLUMNS = 8, SWEEP_COLUMNS = 4 };
struct scratch {
    double *column[MASKED_SUM_COLUMNS]; /* a value per column */
    void *narrow;                       /* coefficients for the loops; what the sums were is lost */
    void *pack;                         /* for a walk */
};

static size_t column_bytes(const struct batchnorm *bn) {
    const size_t column = bn->columns * sizeof(double);
    const size_t narrow = BN_NARROW * (bn->args->dtype == PYREG_F64 ? sizeof(double) : sizeof(float));
    return at_least((bn->masked ? MASKED_SUM_COLUMNS : SUM_COLUMNS) * column, SWEEP_COLUMNS * column + narrow);
}

static size_t scratch_bytes(const struct batchnorm *bn) {
    return column_bytes(bn) + at_least(bn->sums->pack_bytes, bn->sweep->pack_bytes);
}

static struct scratch scratch_of(const struct batchnorm *bn, void *memory) {
    struct scratch s;
    for (size_t k = 0; k < MASKED_SUM_COLUMNS; k++) s.column[k] = (double *)memory + k * bn->columns;
    s.narrow = s.column[SWEEP_COLUMNS];
    s.pack = (char *)memory + column_bytes(bn);
    return s;
}

/* What forward, inference and backward differ in.  All but sweep work on channels [c, end). */
struct pass {
    void (*sum)(const struct batchnorm *bn, size_t piece, size_t c, size_t end, const struct scratch *s);
    void (*merge)(const struct batchnorm *bn, double *into, const double *from, size_t c, size_t end);
    void (*finish)(struct batchnorm *bn, size_t c, size_t end);
    void (*sweep)(const struct kernels *kernels, const struct bn_block *b, const struct bn_coefficients *coefficients);
};

/* Statistics and parameters: float64 for float64 data, else float32. */
static double get(const struct batchnorm *bn, const void *p, size_t c) {
    return bn->args->dtype == PYREG_F64 ? ((const double *)p)[c] : (double)((const float *)p)[c];
}

static void put(const struct batchnorm *bn, void *p, size_t c, double v) {
    if (bn->args->dtype == PYREG_F64)
        ((double *)p)[c] = v;
    else
        ((float *)p)[c] = (float)v;
}

static double *partial(const struct batchnorm *bn, size_t piece) {
    return bn->partial + piece * bn->num_sums * bn->sums->channels;
}

/* ---- Pieces, and their columns ----------------------------------------------------------------------------------- */

static struct grid grid_of(const struct view *v) {
    struct grid g;
    const size_t row = v->line ? v->inner : v->channels * v->inner;
    g.parts = v->line ? divide_up(row, PIECE) : 1;
    g.lines = v->line ? at_least(PIECE / row, 1) : at_least(ROW_PIECE / row, MIN_ROWS);
    if (!v->line) g.lines -= g.lines % v->spread; /* whole groups of side-by-side rows */
    g.pieces = divide_up(v->outer, g.lines) * g.parts;
    g.channels = v->line ? at_least(ROW_PIECE / (at_most(g.lines, v->outer) * row), 1) : BN_COLUMNS / v->inner;
    g.tiles = divide_up(v->channels, g.channels);
    return g;
}

static struct region region_of(const struct view *v, const struct grid *g, size_t piece, size_t c, size_t end) {
    struct region r = {.channel = c, .channel_end = end};
    r.outer = piece / g->parts * g->lines;
    r.outer_end = at_most(r.outer + g->lines, v->outer);
    r.inner = g->parts > 1 ? piece % g->parts * PIECE : 0;
    r.inner_end = g->parts > 1 ? at_most(r.inner + PIECE, v->inner) : v->inner;
    return r;
}

/* Columns that the channels of a tile have, as many as are taken together. */
static size_t tile_columns(const struct view *v, const struct grid *g) {
    return view_columns(v, view_together(v, at_most(g->channels, v->channels)));
}

/* Sums of columns -> sums of channels, in place. */
static void fold(const struct view *v, size_t channels, double *a) {
    const size_t columns = view_columns(v, 1), across = v->line ? 1 : channels, places = v->line ? 1 : v->inner;
    if (columns == 1) return;
    for (size_t c = 0; c < channels; c++) {
        const double *first = a + (v->line ? c * columns : c * places);
        double total = 0;
        for (size_t p = 0; p < v->spread; p++)
            for (size_t i = 0; i < places; i++) total += first[p * across * places + i];
        a[c] = total;
    }
}

/* Values of channels -> the same in each of their columns. */
static void spread(const struct view *v, size_t channels, const double *values, double *columns) {
    const size_t across = v->line ? 1 : channels, places = v->line ? 1 : v->inner;
    for (size_t c = 0; c < channels; c++)
        for (size_t p = 0; p < v->spread; p++)
            for (size_t i = 0; i < places; i++)
                columns[(v->line ? c * v->spread : c * places) + p * across * places + i] = values[c];
}

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

/* Sums of x - origin and (x - origin)^2 over a region, and the count; origin NULL: 0. */
static void sum_region(const struct batchnorm *bn, struct region r, const double *origin, double *shift, double *count,
                       double *sum, double *square, void *pack) {
    const struct view *v = bn->sums;
    const size_t channels = r.channel_end - r.channel, columns = view_columns(v, channels);
    const size_t n = (r.outer_end - r.outer) * (r.inner_end - r.inner);
    for (size_t j = 0; j < columns; j++) count[j] = sum[j] = square[j] = shift[j] = 0;
    if (origin) spread(v, channels, origin, shift);
    struct walk w;
    for (walk_begin(&w, v, r, pack); walk_next(&w);) {
        if (bn->masked)
            bn->kernels->bn_masked_sums(&w.block, shift, count, sum, square);
        else if (origin)
            bn->kernels->bn_shifted_sums(&w.block, shift, sum, square);
        else
            bn->kernels->bn_sums(&w.block, sum, square);
    }
    fold(v, channels, sum);
    fold(v, channels, square);
    if (bn->masked)
        fold(v, channels, count);
    else
        for (size_t c = 0; c < channels; c++) count[c] = (double)n;
}

/* Count, mean and sum of squared deviations of a piece's channels. */
static void sum_tile(const struct batchnorm *bn, struct region r, double *count, double *mean, double *deviation,
                     const struct scratch *s) {
    const size_t channels = r.channel_end - r.channel;
    const bool f64 = bn->args->dtype == PYREG_F64;
    const double extreme = f64 ? extreme_f64 : extreme_f32;
    double *origin = s->column[0], *shift = s->column[1], *repeat = s->column[2];
    double *n = s->column[3], *sum = s->column[4], *square = s->column[5];
    bool any = false;
    for (size_t c = 0; c < channels; c++) /* a masked element may be anything: no guess */
        origin[c] = f64 && !bn->masked ? *(const double *)view_at(bn->sums, BN_X, r.outer, r.channel + c, r.inner) : 0;
    sum_region(bn, r, f64 ? origin : NULL, shift, n, sum, square, s->pack);
    for (size_t c = 0; c < channels; c++) {
        double d = n[c] > 0 ? sum[c] / n[c] : 0;
        count[c] = n[c];
        mean[c] = origin[c] + d;
        deviation[c] = square[c] - sum[c] * d;
        repeat[c] = sum[c] * d > extreme * deviation[c];
        any |= repeat[c] != 0;
    }
    if (!any) return;
    for (size_t c = 0; c < channels; c++) origin[c] = mean[c];
    sum_region(bn, r, origin, shift, n, sum, square, s->pack);
    for (size_t c = 0; c < channels; c++) {
        if (repeat[c] == 0) continue;
        double d = sum[c] / n[c], rest = square[c] - sum[c] * d;
        mean[c] = origin[c] + d;
        deviation[c] = rest > 0 ? rest : 0;
    }
}

/* at: COUNT, MEAN, DEVIATION of all channels. */
static void sum_moments(const struct batchnorm *bn, double *at, size_t piece, size_t c, size_t end,
                        const struct scratch *s) {
    const size_t channels = bn->sums->channels;
    for (size_t step; c < end; c += step) {
        step = view_together(bn->sums, end - c);
        sum_tile(bn, region_of(bn->sums, &bn->sums_grid, piece, c, c + step), at + COUNT * channels + c,
                 at + MEAN * channels + c, at + DEVIATION * channels + c, s);
    }
}

static void forward_sum(const struct batchnorm *bn, size_t piece, size_t c, size_t end, const struct scratch *s) {
    sum_moments(bn, partial(bn, piece), piece, c, end, s);
}

/* Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. */
static void forward_merge(const struct batchnorm *bn, double *into, const double *from, size_t c, size_t end) {
    const size_t channels = bn->sums->channels;
    double *count = into + COUNT * channels, *mean = into + MEAN * channels, *deviation = into + DEVIATION * channels;
    const double *count2 = from + COUNT * channels, *mean2 = from + MEAN * channels;
    const double *deviation2 = from + DEVIATION * channels;
    for (; c < end; c++) {
        double n = count[c] + count2[c], share = n > 0 ? count2[c] / n : 0, d = mean2[c] - mean[c];
        deviation[c] += deviation2[c] + d * d * (count[c] * share);
        mean[c] += d * share;
        count[c] = n;
    }
}

/* Is v > 0 more or less than a float holds in full precision? */
static bool float_lacks(double v) { return v < FLT_MIN || v > FLT_MAX; }

/* Where `wide`, the sweep of the channel is computed in double: what is in float overflows or underflows. */
static void set_centre(struct batchnorm *bn, size_t c, double mean, bool wide) {
    wide &= bn->args->dtype != PYREG_F64;
    bn->wide[c] = wide;
    bn->centre[c] = wide || bn->args->dtype == PYREG_F64 ? mean : (double)(float)mean;
    if (wide) __atomic_store_n(&bn->any_wide, true, __ATOMIC_RELAXED);
}

/* y = (x - mean) * gain + bias, as (x - centre) * gain + offset: centre is the mean in the precision of the elements,
 * and what it lacks goes into the offset. */
static void set_coefficients(struct batchnorm *bn, size_t c, double mean, double var, bool wide) {
    const struct pyreg_batchnorm *args = bn->args;
    double scale = args->scale ? get(bn, args->scale, c) : 1, bias = args->bias ? get(bn, args->bias, c) : 0;
    bn->gain[c] = scale / sqrt(var + args->epsilon);
    set_centre(bn, c, mean, wide);
    bn->offset[c] = mean == bn->centre[c] ? bias : bias - (mean - bn->centre[c]) * bn->gain[c];
}

static void forward_finish(struct batchnorm *bn, size_t c, size_t end) {
    const size_t channels = bn->sums->channels;
    const double *count = bn->partial + COUNT * channels, *mean = bn->partial + MEAN * channels;
    const double *deviation = bn->partial + DEVIATION * channels;
    for (; c < end; c++) {
        double var = deviation[c] / count[c], m = count[c] > 0 ? mean[c] : NAN;
        /* No x - mean is above the root of their squares' sum. */
        const bool wide = float_lacks(var + bn->args->epsilon) || deviation[c] > (double)FLT_MAX * (double)FLT_MAX;
        set_coefficients(bn, c, m, var, wide); /* first, because scale and bias may lie where the results go */
        put(bn, bn->mean_out, c, m);
        if (bn->mean_low_out) put(bn, bn->mean_low_out, c, m - get(bn, bn->mean_out, c));
        put(bn, bn->var_out, c, var);
    }
}

static void normalise(const struct kernels *kernels, const struct bn_block *b, const struct bn_coefficients *k) {
    kernels->bn_normalise(b, k);
}

static const struct pass forward = {forward_sum, forward_merge, forward_finish, normalise};

/* ---- Inference --------------------------------------------------------------------------------------------------- */

static void inference_finish(struct batchnorm *bn, size_t c, size_t end) {
    for (; c < end; c++) set_coefficients(bn, c, get(bn, bn->mean, c), get(bn, bn->var, c), false);
}

static const struct pass inference = {NULL, NULL, inference_finish, normalise};

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

/* float32 products are exact in double: x needs no shift.  float64: x - mean. */
static double backward_origin(const struct batchnorm *bn, size_t c) {
    return bn->args->dtype == PYREG_F64 ? get(bn, bn->mean, c) : 0;
}

/* Count and sum of x - origin over the mask, sum of dy, sum of dy * (x - origin), and the sum of those dy that are lost
 * to the product, for channels [c, end) of one walk. */
static void gradient_tile(const struct batchnorm *bn, struct region r, double *const out[MOMENTS],
                          const struct scratch *s) {
    const struct view *v = bn->sums;
    const size_t channels = r.channel_end - r.channel, columns = view_columns(v, channels);
    double *const *column = s->column, *shift = column[0], *origin = column[1], *ignored = column[2];
    double *const sums[MOMENTS] = {[SUM] = column[3], column[4], column[5], [COUNT] = column[6], [LOST] = column[7]};
    for (size_t j = 0; j < columns; j++) sums[SUM][j] = sums[DBIAS][j] = sums[PRODUCT][j] = 0;
    for (size_t j = 0; bn->masked && j < columns; j++) sums[COUNT][j] = sums[LOST][j] = ignored[j] = 0;
    for (size_t c = 0; c < channels; c++) origin[c] = backward_origin(bn, r.channel + c);
    spread(v, channels, origin, shift);
    struct walk w;
    for (walk_begin(&w, v, r, s->pack); walk_next(&w);) {
        w.block.relu = bn->args->relu;
        bn->kernels->bn_gradient_sums(&w.block, shift, bn->masked ? ignored : sums[SUM], sums[DBIAS], sums[PRODUCT]);
        if (bn->masked) bn->kernels->bn_masked_sums(&w.block, shift, sums[COUNT], sums[SUM], ignored);
    }
    bool finite = true;
    for (size_t j = 0; bn->masked && j < columns; j++) finite &= __builtin_isfinite(sums[PRODUCT][j]);
    if (!finite) { /* perhaps by what is masked: once more without that */
        for (size_t j = 0; j < columns; j++) sums[DBIAS][j] = sums[PRODUCT][j] = 0;
        for (walk_begin(&w, v, r, s->pack); walk_next(&w);) {
            w.block.relu = bn->args->relu;
            bn->kernels->bn_finite_gradient_sums(&w.block, shift, sums[DBIAS], sums[PRODUCT], sums[LOST]);
        }
    }
    for (int k = bn->masked ? COUNT : SUM; k <= (bn->masked ? LOST : PRODUCT); k++) {
        fold(v, channels, sums[k]);
        for (size_t c = 0; c < channels; c++) out[k][c] = sums[k][c];
    }
    if (!bn->masked)
        for (size_t c = 0; c < channels; c++)
            out[COUNT][c] = (double)((r.outer_end - r.outer) * (r.inner_end - r.inner));
}

static void backward_sum(const struct batchnorm *bn, size_t piece, size_t c, size_t end, const struct scratch *s) {
    const size_t channels = bn->sums->channels;
    double *at = partial(bn, piece);
    if (bn->lost_variance) sum_moments(bn, at + MOMENTS * channels, piece, c, end, s);
    for (size_t step; c < end; c += step) {
        step = view_together(bn->sums, end - c);
        double *out[MOMENTS];
        for (size_t k = 0; k < MOMENTS; k++) out[k] = at + k * channels + c;
        gradient_tile(bn, region_of(bn->sums, &bn->sums_grid, piece, c, c + step), out, s);
    }
}

static void backward_merge(const struct batchnorm *bn, double *into, const double *from, size_t c, size_t end) {
    const size_t channels = bn->sums->channels;
    for (size_t k = 0; k <= (bn->masked ? LOST : PRODUCT); k++)
        for (size_t j = c; j < end; j++) into[k * channels + j] += from[k * channels + j];
    if (bn->lost_variance) forward_merge(bn, into + MOMENTS * channels, from + MOMENTS * channels, c, end);
}

/* Has float lost a variance that the data have?  Then it is taken from x again. */
static bool lost_variance(const struct batchnorm *bn) {
    const float *var = bn->var, least = FLT_MIN - (float)bn->args->epsilon;
    int lost = 0;
    if (bn->args->dtype == PYREG_F64) return false;
    for (size_t c = 0; c < bn->sums->channels; c++) lost |= (var[c] < least) | (var[c] > FLT_MAX);
    return lost;
}

/* dx = gain * (dy - dbias / n - xhat * dscale / n), as gain * dy + slope * (x - centre) + offset; with dmean and dvar,
 * the gradients of the outputs mean and var, + dmean / n + dvar * 2 (x - mean) / n.  The mean is taken from x again: as
 * float32 it may be a good part of a std off. */
static void backward_finish(struct batchnorm *bn, size_t c, size_t end) {
    const struct pyreg_batchnorm *args = bn->args;
    const size_t channels = bn->sums->channels;
    const double *count = bn->partial + COUNT * channels, *sum = bn->partial + SUM * channels;
    const double *dbias = bn->partial + DBIAS * channels, *product = bn->partial + PRODUCT * channels;
    const double *lost = bn->partial + LOST * channels, *deviation = bn->partial + (MOMENTS + DEVIATION) * channels;
    for (; c < end; c++) {
        double n = count[c], correction = sum[c] / n, mean = backward_origin(bn, c) + correction;
        double var = get(bn, bn->var, c), dy = bn->masked ? dbias[c] - lost[c] : dbias[c];
        if (bn->lost_variance && float_lacks(var + args->epsilon)) var = deviation[c] / n;
        double square = var + args->epsilon, rstd = 1 / sqrt(square);
        double gain = (args->scale ? get(bn, args->scale, c) : 1) * rstd;
        double dscale = (product[c] - correction * dy) * rstd;
        double slope = -gain * rstd * dscale / n, offset = -gain * dbias[c] / n;
        if (bn->dmean) offset += get(bn, bn->dmean, c) / n;
        if (bn->dvar) slope += 2 * get(bn, bn->dvar, c) / n;
        bn->gain[c] = gain;
        bn->slope[c] = slope;
        const bool far = square < 0x1p-64 || square > 0x1p64; /* the slope goes with its inverse */
        /* Near the largest float terms may overflow, and yet cancel, or be times 0.  No xhat is above the root of n. */
        const double most = fabs(gain * dscale);
        const bool large =
            fabs(offset) > FLT_MAX || fabs(slope) > FLT_MAX || (most > FLT_MAX && most > FLT_MAX * sqrt(n));
        set_centre(bn, c, mean, large || float_lacks(square) || (far && slope != 0 && float_lacks(fabs(slope))));
        bn->offset[c] = offset - slope * (mean - bn->centre[c]);
        put(bn, bn->dscale_out, c, dscale);
        put(bn, bn->dbias_out, c, dbias[c]);
    }
}

static void differentiate(const struct kernels *kernels, const struct bn_block *b, const struct bn_coefficients *k) {
    kernels->bn_differentiate(b, k);
}

static const struct pass backward = {backward_sum, backward_merge, backward_finish, differentiate};

/* ---- Phases ------------------------------------------------------------------------------------------------------ */

/* Pairwise: pieces 0 and 1, 2 and 3, ...; then 0 and 2, ... */
static void merge(const struct batchnorm *bn, size_t c, size_t end) {
    if (!bn->pass->merge) return;
    for (size_t step = 1; step < bn->sums_grid.pieces; step *= 2)
        for (size_t p = 0; p + step < bn->sums_grid.pieces; p += 2 * step)
            bn->pass->merge(bn, partial(bn, p), partial(bn, p + step), c, end);
}

/* How many of the channels [c, end) a sweep takes together: neighbours that are computed in the same way. */
static size_t sweep_together(const struct batchnorm *bn, size_t c, size_t end) {
    const size_t step = view_together(bn->sweep, end - c);
    if (!__atomic_load_n(&bn->any_wide, __ATOMIC_RELAXED)) return step;
    for (size_t k = 1; k < step; k++)
        if (bn->wide[c + k] != bn->wide[c]) return k;
    return step;
}

static void sweep(const struct batchnorm *bn, size_t piece, size_t c, size_t end, const struct scratch *s) {
    const struct view *v = bn->sweep;
    double *const *columns = s->column;
    for (size_t step; c < end; c += step) {
        step = sweep_together(bn, c, end);
        struct bn_coefficients k = {bn->centre + c, bn->gain + c, bn->slope ? bn->slope + c : NULL, bn->offset + c,
                                    s->narrow};
        if (view_columns(v, 1) > 1 && !v->line) {
            spread(v, step, k.centre, columns[0]);
            spread(v, step, k.gain, columns[1]);
            if (k.slope) spread(v, step, k.slope, columns[2]);
            spread(v, step, k.offset, columns[3]);
            k = (struct bn_coefficients){columns[0], columns[1], k.slope ? columns[2] : NULL, columns[3], s->narrow};
        }
        struct walk w;
        for (walk_begin(&w, v, region_of(v, &bn->sweep_grid, piece, c, c + step), s->pack); walk_next(&w);) {
            w.block.relu = bn->args->relu;
            w.block.stream = bn->stream && !w.packed[bn->slope ? BN_DX : BN_Y];
            if (bn->wide[c] != 0)
                bn->kernels->bn_sweep_wide(&w.block, &k);
            else
                bn->pass->sweep(bn->kernels, &w.block, &k);
        }
    }
    if (bn->stream) bn->kernels->stream_end();
}

static void sum_chunk(void *work, size_t chunk, void *memory) {
    const struct batchnorm *bn = work;
    const struct scratch s = scratch_of(bn, memory);
    const struct grid *g = &bn->sums_grid;
    size_t c = chunk % g->tiles * g->channels;
    bn->pass->sum(bn, chunk / g->tiles, c, at_most(c + g->channels, bn->sums->channels), &s);
}

enum { FINISH_CHANNELS = 64 };

static void finish_chunk(void *work, size_t chunk, void *memory) {
    (void)memory;
    struct batchnorm *bn = work;
    size_t c = chunk * FINISH_CHANNELS, end = at_most(c + FINISH_CHANNELS, bn->sums->channels);
    merge(bn, c, end);
    bn->pass->finish(bn, c, end);
}

/* The last chunk first: the end of what the sums read is still in the cache. */
static void sweep_chunk(void *work, size_t chunk, void *memory) {
    const struct batchnorm *bn = work;
    const struct scratch s = scratch_of(bn, memory);
    const struct grid *g = &bn->sweep_grid;
    chunk = g->pieces * g->tiles - 1 - chunk;
    size_t c = chunk % g->tiles * g->channels;
    sweep(bn, chunk / g->tiles, c, at_most(c + g->channels, bn->sweep->channels), &s);
}

/* All of a few channels, from the sums to the result, while they are in the cache. */
static void tile_chunk(void *work, size_t chunk, void *memory) {
    struct batchnorm *bn = work;
    const struct scratch s = scratch_of(bn, memory);
    const struct grid *g = &bn->sums_grid;
    size_t c = chunk * g->channels, end = at_most(c + g->channels, bn->sums->channels);
    for (size_t p = 0; bn->pass->sum && p < g->pieces; p++) {
        if (p && parallel_stop()) return;
        bn->pass->sum(bn, p, c, end, &s);
    }
    merge(bn, c, end);
    bn->pass->finish(bn, c, end);
    for (size_t p = bn->writes ? bn->sweep_grid.pieces : 0; p-- > 0;) {
        if (p && parallel_stop()) return;
        sweep(bn, p, c, end, &s);
    }
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static enum pyreg_status check(const struct pyreg_batchnorm *args, size_t *elements) {
    if ((unsigned)args->dtype >= PYREG_NUM_DTYPES) return PYREG_BAD_DTYPE;
    if (args->ndim < 1) return PYREG_BAD_SHAPE;
    const enum pyreg_status status = count_elements(args->ndim, args->shape, elements);
    return !status && (args->axis < 0 || args->axis >= args->ndim) ? PYREG_BAD_AXIS : status;
}

/* Fills in bn's views and runs its phases.  Operands the sums read come first in `sums`, the sweep's in `sweep`; ns: of
 * an element, roughly, in the last-level cache (`./run bench roofline`). */
static enum pyreg_status run(struct batchnorm *bn, const struct operand *sums, const struct operand *sweep,
                             size_t elements, double ns) {
    const struct pyreg_batchnorm *args = bn->args;
    struct view sums_view, sweep_view; /* outside of bn, because they are long, and bn is cleared first */
    view_init(&sums_view, args->ndim, args->shape, args->axis, sums, bn->pass->sum ? LONG_LINE : SWEEP_LINE);
    view_init(&sweep_view, args->ndim, args->shape, args->axis, sweep, SWEEP_LINE);
    bn->sums = &sums_view;
    bn->sweep = &sweep_view;
    bn->kernels = dispatch_kernels(args->dtype);
    bn->masked = bn->sums->size[BN_MASK];
    bn->writes = bn->sweep->size[BN_Y] || bn->sweep->size[BN_DX];
    bn->sums_grid = grid_of(bn->sums);
    bn->sweep_grid = grid_of(bn->sweep);

    const size_t channels = bn->sums->channels;
    bn->lost_variance = bn->pass == &backward && lost_variance(bn);
    bn->num_sums = bn->pass == &inference ? 0 : bn->pass == &forward ? FORWARD_SUMS : bn->masked ? MOMENTS : LOST;
    if (bn->lost_variance) bn->num_sums = MOMENTS + FORWARD_SUMS;
    double *values = memory_alloc((bn->sums_grid.pieces * bn->num_sums + 5) * channels, sizeof(double));
    if (!values) return PYREG_NO_MEMORY;
    bn->centre = values;
    bn->gain = values + channels;
    bn->offset = values + 2 * channels;
    bn->slope = bn->pass == &backward ? values + 3 * channels : NULL;
    bn->wide = values + 4 * channels;
    bn->partial = values + 5 * channels;
    bn->columns = at_least(tile_columns(bn->sums, &bn->sums_grid), tile_columns(bn->sweep, &bn->sweep_grid));

    /* In bn->sweep's operands. */
    size_t bytes = 0;
    for (int k = 0; k < BN_OPERANDS; k++) bytes += elements * bn->sweep->size[k];
    bn->stream = machine_stores_around(bytes);

    struct phase phases[MAX_PHASES];
    size_t num = 0;
    const double work_ns = ns * (double)elements;
    const size_t threads = parallel_pays(work_ns) ? (size_t)pyreg_get_num_threads() : 1;
    /* Lines of a channel are worth finishing while they are in the cache, if all threads find enough of them. */
    const struct grid *g = &bn->sums_grid;
    const bool tiled = g->tiles * g->pieces == 1 ||
                       ((bn->sums->line || bn->sums->inner > 1) && (threads == 1 || g->tiles >= 4 * threads));
    if (tiled) {
        phases[num++] = (struct phase){bn->sums_grid.tiles, tile_chunk};
    } else {
        if (bn->pass->sum) phases[num++] = (struct phase){bn->sums_grid.pieces * bn->sums_grid.tiles, sum_chunk};
        phases[num++] = (struct phase){divide_up(channels, FINISH_CHANNELS), finish_chunk};
        if (bn->writes) phases[num++] = (struct phase){bn->sweep_grid.pieces * bn->sweep_grid.tiles, sweep_chunk};
    }
    enum pyreg_status status = parallel_run(phases, num, bn, scratch_bytes(bn), work_ns);
    memory_free(values);
    return status;
}

/* Of channels that have no elements. */
static void fill(const struct batchnorm *bn, void *p, double v) {
    const struct pyreg_batchnorm *args = bn->args;
    for (size_t c = 0; p && c < (size_t)args->shape[args->axis]; c++) put(bn, p, c, v);
}

/* The sweep of forward and inference. */
static void set_normalise_operands(struct operand *sweep, size_t size, struct pyreg_array x,
                                   struct pyreg_array residual, struct pyreg_array y) {
    memset(sweep, 0, BN_OPERANDS * sizeof *sweep);
    sweep[BN_X] = (struct operand){x, size, false};
    sweep[BN_RESIDUAL] = (struct operand){residual, size, false};
    sweep[BN_Y] = (struct operand){y, size, true};
}

enum pyreg_status pyreg_batchnorm_forward(const struct pyreg_batchnorm_forward *args) {
    size_t elements;
    enum pyreg_status status = check(&args->common, &elements);
    if (status) return status;
    struct batchnorm bn = {.pass = &forward,
                           .args = &args->common,
                           .mean_out = args->mean,
                           .mean_low_out = args->mean_low,
                           .var_out = args->var};
    if (elements == 0) { /* means of nothing */
        fill(&bn, args->mean, NAN);
        fill(&bn, args->mean_low, NAN);
        fill(&bn, args->var, NAN);
        return PYREG_OK;
    }
    const size_t size = dispatch_bytes(args->common.dtype);
    const struct operand sums[BN_OPERANDS] = {[BN_X] = {args->x, size, false}, [BN_MASK] = {args->mask, 1, false}};
    struct operand sweep[BN_OPERANDS];
    set_normalise_operands(sweep, size, args->x, args->residual, args->y);
    return run(&bn, sums, sweep, elements, 0.5);
}

enum pyreg_status pyreg_batchnorm_inference(const struct pyreg_batchnorm_inference *args) {
    size_t elements;
    enum pyreg_status status = check(&args->common, &elements);
    if (status || elements == 0) return status;
    struct batchnorm bn = {.pass = &inference, .args = &args->common, .mean = args->mean, .var = args->var};
    struct operand sweep[BN_OPERANDS];
    set_normalise_operands(sweep, dispatch_bytes(args->common.dtype), args->x, args->residual, args->y);
    return run(&bn, sweep, sweep, elements, 0.3);
}

enum pyreg_status pyreg_batchnorm_backward(const struct pyreg_batchnorm_backward *args) {
    size_t elements;
    enum pyreg_status status = check(&args->common, &elements);
    if (status) return status;
    struct batchnorm bn = {.pass = &backward,
                           .args = &args->common,
                           .mean = args->mean,
                           .var = args->var,
                           .dmean = args->dmean,
                           .dvar = args->dvar,
                           .dscale_out = args->dscale,
                           .dbias_out = args->dbias};
    if (elements == 0) { /* sums of nothing */
        fill(&bn, args->dscale, 0);
        fill(&bn, args->dbias, 0);
        return PYREG_OK;
    }
    const size_t size = dispatch_bytes(args->common.dtype);
    const struct pyreg_array none = {NULL, NULL};
    const struct operand sums[BN_OPERANDS] = {[BN_X] = {args->x, size, false},
                                              [BN_DY] = {args->dy, size, false},
                                              [BN_MASK] = {args->mask, 1, false},
                                              [BN_Y] = {args->common.relu ? args->y : none, size, false}};
    struct operand sweep[BN_OPERANDS];
    memcpy(sweep, sums, sizeof sweep);
    sweep[BN_DX] = (struct operand){args->dx, size, true};
    sweep[BN_DRESIDUAL] = (struct operand){args->dresidual, size, true};
    return run(&bn, sums, sweep, elements, 0.8);
}
