/* Batch-norm: check arguments, cut into pieces, sum each piece, merge the sums over a fixed tree, apply the result.
 *
 * Bits: a piece is a function of the shape, and of x's strides; its columns add in order; pieces merge pairwise.  Which
 * thread does what, and whether a channel is finished before the next one starts, changes nothing. */
#include "blocks.h"
#include "dispatch.h"
#include "machine.h"
#include "memory.h"
#include "parallel.h"

#include <math.h>

/* Lines of 7 x 7 are summed 1.5 times faster as rows of columns, which have no ends; but swept faster as lines, which
 * have one coefficient. */
enum { LONG_LINE = 64, SWEPT_LINE = 32 };

/* A piece: long enough that its few dozen flops a channel do not count, short enough to stay in a core's own cache. */
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

enum { NUM_SUMS = 4 };

struct batchnorm {
    const struct pass *pass;
    const struct pyreg_batchnorm *args;
    const struct kernels *kernels;
    const void *mean, *var, *dmean, *dvar; /* given */
    void *mean_out, *var_out, *dscale_out, *dbias_out;
    struct view sums, apply; /* what the sums read; what the elementwise sweep reads and writes */
    struct grid sums_grid, apply_grid;
    bool masked, stream, swept;             /* swept: there is an output to be written */
    double *partial;                        /* (pieces, NUM_SUMS, channels) */
    double *centre, *gain, *slope, *offset; /* (channels) */
};

/* What forward, inference and backward differ in.  All but apply work on channels [c, end). */
struct pass {
    void (*sum)(const struct batchnorm *bn, size_t piece, size_t c, size_t end);
    void (*merge)(double *into, const double *from, size_t channels, size_t c, size_t end);
    void (*finish)(const struct batchnorm *bn, size_t c, size_t end);
    void (*apply)(const struct kernels *kernels, const struct bn_block *b, const struct bn_coefficients *coefficients);
};

static size_t at_least(size_t a, size_t b) { return a > b ? a : b; }
static size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

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
    return bn->partial + piece * NUM_SUMS * bn->sums.channels;
}

/* ---- Pieces, and their columns ----------------------------------------------------------------------------------- */

static struct grid grid_of(const struct view *v) {
    struct grid g;
    const size_t row = v->line ? v->inner : v->channels * v->inner;
    g.parts = v->line ? divide_up(row, PIECE) : 1;
    g.lines = v->line ? at_least(PIECE / row, 1) : at_least(ROW_PIECE / row, MIN_ROWS);
    if (!v->line) g.lines -= g.lines % v->phases; /* whole groups of side-by-side rows */
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

/* Sums of columns -> sums of channels, in place. */
static void fold(const struct view *v, size_t channels, double *a) {
    const size_t columns = view_columns(v, 1), across = v->line ? 1 : channels, places = v->line ? 1 : v->inner;
    if (columns == 1) return;
    for (size_t c = 0; c < channels; c++) {
        const double *first = a + (v->line ? c * columns : c * places);
        double total = 0;
        for (size_t p = 0; p < v->phases; p++)
            for (size_t i = 0; i < places; i++) total += first[p * across * places + i];
        a[c] = total;
    }
}

/* Values of channels -> the same in each of their columns. */
static void spread(const struct view *v, size_t channels, const double *values, double *columns) {
    const size_t across = v->line ? 1 : channels, places = v->line ? 1 : v->inner;
    for (size_t c = 0; c < channels; c++)
        for (size_t p = 0; p < v->phases; p++)
            for (size_t i = 0; i < places; i++)
                columns[(v->line ? c * v->phases : c * places) + p * across * places + i] = values[c];
}

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

struct sums {
    double count[BN_COLUMNS], sum[BN_COLUMNS], square[BN_COLUMNS];
};

/* Sums of x - origin and (x - origin)^2 over a region; origin NULL: 0. */
static void sum_region(const struct batchnorm *bn, struct region r, const double *origin, struct sums *s) {
    const struct view *v = &bn->sums;
    const size_t channels = r.channel_end - r.channel, columns = view_columns(v, channels);
    const size_t n = (r.outer_end - r.outer) * (r.inner_end - r.inner);
    double shift[BN_COLUMNS];
    for (size_t j = 0; j < columns; j++) s->count[j] = s->sum[j] = s->square[j] = shift[j] = 0;
    if (origin) spread(v, channels, origin, shift);
    struct walk w;
    for (walk_begin(&w, v, r); walk_next(&w);) {
        if (bn->masked)
            bn->kernels->bn_masked_sums(&w.block, shift, s->count, s->sum, s->square);
        else if (origin)
            bn->kernels->bn_shifted_sums(&w.block, shift, s->sum, s->square);
        else
            bn->kernels->bn_sums(&w.block, s->sum, s->square);
    }
    fold(v, channels, s->sum);
    fold(v, channels, s->square);
    if (bn->masked)
        fold(v, channels, s->count);
    else
        for (size_t c = 0; c < channels; c++) s->count[c] = (double)n;
}

/* Count, mean and sum of squared deviations of a piece's channels. */
static void sum_tile(const struct batchnorm *bn, struct region r, double *count, double *mean, double *deviation) {
    const size_t channels = r.channel_end - r.channel;
    const bool f64 = bn->args->dtype == PYREG_F64;
    const double extreme = f64 ? extreme_f64 : extreme_f32;
    struct sums s;
    double origin[BN_COLUMNS];
    bool repeat[BN_COLUMNS], any = false;
    for (size_t c = 0; c < channels; c++) /* a masked element may be anything: no guess */
        origin[c] = f64 && !bn->masked ? *(const double *)view_at(&bn->sums, BN_X, r.outer, r.channel + c, r.inner) : 0;
    sum_region(bn, r, f64 ? origin : NULL, &s);
    for (size_t c = 0; c < channels; c++) {
        double d = s.count[c] > 0 ? s.sum[c] / s.count[c] : 0;
        count[c] = s.count[c];
        mean[c] = origin[c] + d;
        deviation[c] = s.square[c] - s.sum[c] * d;
        repeat[c] = s.sum[c] * d > extreme * deviation[c];
        any |= repeat[c];
    }
    if (!any) return;
    for (size_t c = 0; c < channels; c++) origin[c] = mean[c];
    sum_region(bn, r, origin, &s);
    for (size_t c = 0; c < channels; c++) {
        if (!repeat[c]) continue;
        double d = s.sum[c] / s.count[c], square = s.square[c] - s.sum[c] * d;
        mean[c] = origin[c] + d;
        deviation[c] = square > 0 ? square : 0;
    }
}

static void forward_sum(const struct batchnorm *bn, size_t piece, size_t c, size_t end) {
    double *count = partial(bn, piece), *mean = count + bn->sums.channels, *deviation = mean + bn->sums.channels;
    for (size_t step; c < end; c += step) {
        step = view_together(&bn->sums, end - c);
        sum_tile(bn, region_of(&bn->sums, &bn->sums_grid, piece, c, c + step), count + c, mean + c, deviation + c);
    }
}

/* Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. */
static void forward_merge(double *into, const double *from, size_t channels, size_t c, size_t end) {
    double *count = into, *mean = into + channels, *deviation = into + 2 * channels;
    const double *count2 = from, *mean2 = from + channels, *deviation2 = from + 2 * channels;
    for (; c < end; c++) {
        double n = count[c] + count2[c], share = n > 0 ? count2[c] / n : 0, d = mean2[c] - mean[c];
        deviation[c] += deviation2[c] + d * d * (count[c] * share);
        mean[c] += d * share;
        count[c] = n;
    }
}

/* y = (x - mean) * gain + bias, as (x - centre) * gain + offset: centre is the mean in the precision of the elements,
 * and what it lacks goes into the offset. */
static void set_coefficients(const struct batchnorm *bn, size_t c, double mean, double var) {
    const struct pyreg_batchnorm *args = bn->args;
    double scale = args->scale ? get(bn, args->scale, c) : 1, bias = args->bias ? get(bn, args->bias, c) : 0;
    bn->gain[c] = scale / sqrt(var + args->epsilon);
    bn->centre[c] = args->dtype == PYREG_F64 ? mean : (double)(float)mean;
    bn->offset[c] = mean == bn->centre[c] ? bias : bias - (mean - bn->centre[c]) * bn->gain[c];
}

static void forward_finish(const struct batchnorm *bn, size_t c, size_t end) {
    const double *count = bn->partial, *mean = count + bn->sums.channels, *deviation = mean + bn->sums.channels;
    for (; c < end; c++) {
        double var = deviation[c] / count[c], m = count[c] > 0 ? mean[c] : NAN;
        put(bn, bn->mean_out, c, m);
        put(bn, bn->var_out, c, var);
        set_coefficients(bn, c, m, var);
    }
}

static void normalise(const struct kernels *kernels, const struct bn_block *b, const struct bn_coefficients *k) {
    kernels->bn_normalise(b, k);
}

static const struct pass forward = {forward_sum, forward_merge, forward_finish, normalise};

/* ---- Inference --------------------------------------------------------------------------------------------------- */

static void inference_finish(const struct batchnorm *bn, size_t c, size_t end) {
    for (; c < end; c++) set_coefficients(bn, c, get(bn, bn->mean, c), get(bn, bn->var, c));
}

static const struct pass inference = {NULL, NULL, inference_finish, normalise};

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

/* float32 products are exact in double: x needs no shift.  float64: x - mean. */
static double backward_origin(const struct batchnorm *bn, size_t c) {
    return bn->args->dtype == PYREG_F64 ? get(bn, bn->mean, c) : 0;
}

/* count, sum of x - origin over the mask, sum of dy, sum of dy * (x - origin), for channels [c, end) of one walk. */
static void gradient_tile(const struct batchnorm *bn, struct region r, double *const out[NUM_SUMS]) {
    const struct view *v = &bn->sums;
    const size_t channels = r.channel_end - r.channel, columns = view_columns(v, channels);
    double origin[BN_COLUMNS], shift[BN_COLUMNS], sums[NUM_SUMS][BN_COLUMNS], ignored[BN_COLUMNS];
    for (size_t j = 0; j < columns; j++) sums[0][j] = sums[1][j] = sums[2][j] = sums[3][j] = ignored[j] = 0;
    for (size_t c = 0; c < channels; c++) origin[c] = backward_origin(bn, r.channel + c);
    spread(v, channels, origin, shift);
    struct walk w;
    for (walk_begin(&w, v, r); walk_next(&w);) {
        w.block.relu = bn->args->relu;
        bn->kernels->bn_gradient_sums(&w.block, shift, bn->masked ? ignored : sums[1], sums[2], sums[3]);
        if (bn->masked) bn->kernels->bn_masked_sums(&w.block, shift, sums[0], sums[1], ignored);
    }
    for (int k = 0; k < NUM_SUMS; k++) {
        fold(v, channels, sums[k]);
        for (size_t c = 0; c < channels; c++) out[k][c] = sums[k][c];
    }
    if (!bn->masked)
        for (size_t c = 0; c < channels; c++) out[0][c] = (double)((r.outer_end - r.outer) * (r.inner_end - r.inner));
}

static void backward_sum(const struct batchnorm *bn, size_t piece, size_t c, size_t end) {
    const size_t channels = bn->sums.channels;
    double *at = partial(bn, piece);
    for (size_t step; c < end; c += step) {
        step = view_together(&bn->sums, end - c);
        double *const out[NUM_SUMS] = {at + c, at + channels + c, at + 2 * channels + c, at + 3 * channels + c};
        gradient_tile(bn, region_of(&bn->sums, &bn->sums_grid, piece, c, c + step), out);
    }
}

static void backward_merge(double *into, const double *from, size_t channels, size_t c, size_t end) {
    for (size_t k = 0; k < NUM_SUMS; k++)
        for (size_t j = c; j < end; j++) into[k * channels + j] += from[k * channels + j];
}

/* dx = gain * (dy - dbias / n - xhat * dscale / n), as gain * dy + slope * (x - centre) + offset; with dmean and dvar,
 * the gradients of the outputs mean and var, + dmean / n + dvar * 2 (x - mean) / n.  The mean is taken from x again: as
 * float32 it may be a good part of a std off. */
static void backward_finish(const struct batchnorm *bn, size_t c, size_t end) {
    const struct pyreg_batchnorm *args = bn->args;
    const size_t channels = bn->sums.channels;
    const double *count = bn->partial, *sum = count + channels, *dbias = sum + channels, *product = dbias + channels;
    for (; c < end; c++) {
        double n = count[c], correction = sum[c] / n, mean = backward_origin(bn, c) + correction;
        double rstd = 1 / sqrt(get(bn, bn->var, c) + args->epsilon);
        double gain = (args->scale ? get(bn, args->scale, c) : 1) * rstd;
        double dscale = (product[c] - correction * dbias[c]) * rstd;
        double slope = -gain * rstd * dscale / n, offset = -gain * dbias[c] / n;
        if (bn->dmean) offset += get(bn, bn->dmean, c) / n;
        if (bn->dvar) slope += 2 * get(bn, bn->dvar, c) / n;
        bn->gain[c] = gain;
        bn->slope[c] = slope;
        bn->centre[c] = args->dtype == PYREG_F64 ? mean : (double)(float)mean;
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
            bn->pass->merge(partial(bn, p), partial(bn, p + step), bn->sums.channels, c, end);
}

static void apply(const struct batchnorm *bn, size_t piece, size_t c, size_t end) {
    const struct view *v = &bn->apply;
    for (size_t step; c < end; c += step) {
        step = view_together(v, end - c);
        double columns[4][BN_COLUMNS];
        struct bn_coefficients k = {bn->centre + c, bn->gain + c, bn->slope ? bn->slope + c : NULL, bn->offset + c};
        if (view_columns(v, 1) > 1 && !v->line) {
            spread(v, step, k.centre, columns[0]);
            spread(v, step, k.gain, columns[1]);
            if (k.slope) spread(v, step, k.slope, columns[2]);
            spread(v, step, k.offset, columns[3]);
            k = (struct bn_coefficients){columns[0], columns[1], columns[2], columns[3]};
        }
        struct walk w;
        for (walk_begin(&w, v, region_of(v, &bn->apply_grid, piece, c, c + step)); walk_next(&w);) {
            w.block.relu = bn->args->relu;
            w.block.stream = bn->stream && !w.packed[bn->slope ? BN_DX : BN_Y];
            bn->pass->apply(bn->kernels, &w.block, &k);
        }
    }
    if (bn->stream) bn->kernels->stream_end();
}

static void sum_chunk(void *work, size_t chunk) {
    const struct batchnorm *bn = work;
    const struct grid *g = &bn->sums_grid;
    size_t c = chunk % g->tiles * g->channels;
    bn->pass->sum(bn, chunk / g->tiles, c, at_most(c + g->channels, bn->sums.channels));
}

enum { FINISH_CHANNELS = 64 };

static void finish_chunk(void *work, size_t chunk) {
    const struct batchnorm *bn = work;
    size_t c = chunk * FINISH_CHANNELS, end = at_most(c + FINISH_CHANNELS, bn->sums.channels);
    merge(bn, c, end);
    bn->pass->finish(bn, c, end);
}

/* The last chunk first: the end of what the sums read is still in the cache. */
static void apply_chunk(void *work, size_t chunk) {
    const struct batchnorm *bn = work;
    const struct grid *g = &bn->apply_grid;
    chunk = g->pieces * g->tiles - 1 - chunk;
    size_t c = chunk % g->tiles * g->channels;
    apply(bn, chunk / g->tiles, c, at_most(c + g->channels, bn->apply.channels));
}

/* All of a few channels, from the sums to the result, while they are in the cache. */
static void tile_chunk(void *work, size_t chunk) {
    const struct batchnorm *bn = work;
    const struct grid *g = &bn->sums_grid;
    size_t c = chunk * g->channels, end = at_most(c + g->channels, bn->sums.channels);
    for (size_t p = 0; bn->pass->sum && p < g->pieces; p++) bn->pass->sum(bn, p, c, end);
    merge(bn, c, end);
    bn->pass->finish(bn, c, end);
    for (size_t p = bn->swept ? bn->apply_grid.pieces : 0; p-- > 0;) apply(bn, p, c, end);
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static enum pyreg_status check(const struct pyreg_batchnorm *args, size_t *elements) {
    if ((unsigned)args->dtype >= PYREG_NUM_DTYPES) return PYREG_BAD_DTYPE;
    if (args->ndim < 1 || args->ndim > PYREG_MAX_DIMS) return PYREG_BAD_SHAPE;
    if (args->axis < 0 || args->axis >= args->ndim) return PYREG_BAD_AXIS;
    int64_t count = 1;
    bool empty = false;
    for (int d = 0; d < args->ndim; d++) {
        if (args->shape[d] < 0) return PYREG_BAD_SHAPE;
        empty |= args->shape[d] == 0;
        if (__builtin_mul_overflow(count, args->shape[d] ? args->shape[d] : 1, &count)) return PYREG_BAD_SHAPE;
    }
    *elements = empty ? 0 : (size_t)count;
    return PYREG_OK;
}

/* Fills in bn's views and runs its phases.  Operands the sums read come first in `sums`, the sweep's in `swept`; ns: an
 * element's, roughly, in the last-level cache (`./run bench roofline`). */
static enum pyreg_status run(struct batchnorm *bn, const struct operand *sums, const struct operand *swept,
                             size_t elements, double ns) {
    const struct pyreg_batchnorm *args = bn->args;
    view_init(&bn->sums, args->ndim, args->shape, args->axis, sums, BN_X, bn->pass->sum ? LONG_LINE : SWEPT_LINE);
    view_init(&bn->apply, args->ndim, args->shape, args->axis, swept, BN_X, SWEPT_LINE);
    bn->kernels = dispatch_kernels(args->dtype);
    bn->masked = bn->sums.size[BN_MASK];
    bn->swept = bn->apply.size[BN_Y] || bn->apply.size[BN_DX];
    bn->sums_grid = grid_of(&bn->sums);
    bn->apply_grid = grid_of(&bn->apply);

    const size_t channels = bn->sums.channels;
    const size_t sums_bytes = bn->pass->sum ? bn->sums_grid.pieces * NUM_SUMS : 0;
    double *scratch = memory_alloc((sums_bytes + 4) * channels, sizeof(double));
    if (!scratch) return PYREG_NO_MEMORY;
    bn->centre = scratch;
    bn->gain = scratch + channels;
    bn->offset = scratch + 2 * channels;
    bn->slope = bn->pass == &backward ? scratch + 3 * channels : NULL;
    bn->partial = scratch + 4 * channels;

    /* In bn->apply's operands.  Where no cache holds them, storing around it is quicker; where one does it takes up to
     * 1.7 times as long: `./run bench scaling --stores`. */
    size_t bytes = 0;
    for (int k = 0; k < BN_OPERANDS; k++) bytes += elements * bn->apply.size[k];
    bn->stream = bytes > machine_cache_bytes();

    struct phase phases[3];
    size_t num = 0;
    const double work_ns = ns * (double)elements;
    const size_t threads = parallel_pays(work_ns) ? (size_t)pyreg_get_num_threads() : 1;
    /* Lines of a channel are worth finishing while they are in the cache, if all threads find enough of them. */
    const struct grid *g = &bn->sums_grid;
    const bool tiled = g->tiles * g->pieces == 1 ||
                       ((bn->sums.line || bn->sums.inner > 1) && (threads == 1 || g->tiles >= 4 * threads));
    if (tiled) {
        phases[num++] = (struct phase){bn->sums_grid.tiles, tile_chunk};
    } else {
        if (bn->pass->sum) phases[num++] = (struct phase){bn->sums_grid.pieces * bn->sums_grid.tiles, sum_chunk};
        phases[num++] = (struct phase){divide_up(channels, FINISH_CHANNELS), finish_chunk};
        if (bn->swept) phases[num++] = (struct phase){bn->apply_grid.pieces * bn->apply_grid.tiles, apply_chunk};
    }
    enum pyreg_status status = parallel_run(phases, num, bn, work_ns);
    memory_free(scratch);
    return status;
}

static void fill_nan(const struct batchnorm *bn, void *p) {
    for (int64_t c = 0; c < bn->args->shape[bn->args->axis]; c++) put(bn, p, (size_t)c, NAN);
}

enum pyreg_status pyreg_batchnorm_forward(const struct pyreg_batchnorm *args, const void *x, const int64_t *x_strides,
                                          const bool *mask, const int64_t *mask_strides, const void *residual,
                                          const int64_t *residual_strides, void *y, const int64_t *y_strides,
                                          void *mean, void *var) {
    size_t elements;
    enum pyreg_status status = check(args, &elements);
    if (status) return status;
    struct batchnorm bn = {.pass = &forward, .args = args, .mean_out = mean, .var_out = var};
    if (elements == 0) { /* means of nothing */
        fill_nan(&bn, mean);
        fill_nan(&bn, var);
        return PYREG_OK;
    }
    const size_t size = dispatch_bytes(args->dtype);
    const struct operand in = {x, x_strides, size, false};
    const struct operand sums[BN_OPERANDS] = {[BN_X] = in, [BN_MASK] = {mask, mask_strides, 1, false}};
    const struct operand swept[BN_OPERANDS] = {
        [BN_X] = in, [BN_RESIDUAL] = {residual, residual_strides, size, false}, [BN_Y] = {y, y_strides, size, true}};
    return run(&bn, sums, swept, elements, 0.5);
}

enum pyreg_status pyreg_batchnorm_inference(const struct pyreg_batchnorm *args, const void *x, const int64_t *x_strides,
                                            const void *mean, const void *var, const void *residual,
                                            const int64_t *residual_strides, void *y, const int64_t *y_strides) {
    size_t elements;
    enum pyreg_status status = check(args, &elements);
    if (status || elements == 0) return status;
    struct batchnorm bn = {.pass = &inference, .args = args, .mean = mean, .var = var};
    const size_t size = dispatch_bytes(args->dtype);
    const struct operand swept[BN_OPERANDS] = {[BN_X] = {x, x_strides, size, false},
                                               [BN_RESIDUAL] = {residual, residual_strides, size, false},
                                               [BN_Y] = {y, y_strides, size, true}};
    return run(&bn, swept, swept, elements, 0.3);
}

enum pyreg_status pyreg_batchnorm_backward(const struct pyreg_batchnorm *args, const void *dy,
                                           const int64_t *dy_strides, const void *x, const int64_t *x_strides,
                                           const bool *mask, const int64_t *mask_strides, const void *y,
                                           const int64_t *y_strides, const void *mean, const void *var,
                                           const void *dmean, const void *dvar, void *dx, const int64_t *dx_strides,
                                           void *dresidual, const int64_t *dresidual_strides, void *dscale,
                                           void *dbias) {
    size_t elements;
    enum pyreg_status status = check(args, &elements);
    if (status) return status;
    struct batchnorm bn = {.pass = &backward,
                           .args = args,
                           .mean = mean,
                           .var = var,
                           .dmean = dmean,
                           .dvar = dvar,
                           .dscale_out = dscale,
                           .dbias_out = dbias};
    if (elements == 0) { /* sums of nothing */
        for (int64_t c = 0; c < args->shape[args->axis]; c++) {
            put(&bn, dscale, (size_t)c, 0);
            put(&bn, dbias, (size_t)c, 0);
        }
        return PYREG_OK;
    }
    const size_t size = dispatch_bytes(args->dtype);
    struct operand read[BN_OPERANDS] = {[BN_X] = {x, x_strides, size, false},
                                        [BN_DY] = {dy, dy_strides, size, false},
                                        [BN_MASK] = {mask, mask_strides, 1, false},
                                        [BN_Y] = {args->relu ? y : NULL, y_strides, size, false}};
    struct operand swept[BN_OPERANDS];
    for (int k = 0; k < BN_OPERANDS; k++) swept[k] = read[k];
    swept[BN_DX] = (struct operand){dx, dx_strides, size, true};
    swept[BN_DRESIDUAL] = (struct operand){dresidual, dresidual_strides, size, true};
    return run(&bn, read, swept, elements, 0.8);
}
