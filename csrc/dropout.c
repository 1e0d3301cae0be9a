/* Dropout: check arguments, cut into rows and chunks, make mask bits a tile at a time, apply them. */
#include "dispatch.h"
#include "kernels/half.h"
#include "machine.h"
#include "parallel.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Elements a thread claims at once: long enough to hide the claim, short enough to share out and to interrupt. */
enum { CHUNK = 16 * MASK_TILE };

/* ---- Masks ------------------------------------------------------------------------------------------------------- */

typedef void (*make_words)(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep);

/* Bits that have been made before; beyond the last there are zeros. */
static void read_packed(const struct draw *draw, uint64_t first, size_t words, uint32_t *keep) {
    const size_t from = 4 * (size_t)first, size = 4 * words;
    const size_t have = from < draw->num_bytes ? draw->num_bytes - from : 0, n = at_most(have, size);
    if (n)
        memcpy(keep, draw->bits + from, n); /* words and bytes have the same order of bits on little-endian machines */
    memset((char *)keep + n, 0, size - n);
}

static enum pyreg_status prepare(const struct pyreg_mask *mask, struct draw *draw, make_words *make) {
    if ((unsigned)mask->generator >= PYREG_NUM_GENERATORS) return PYREG_BAD_GENERATOR;
    if (!(mask->rate >= 0 && mask->rate <= 1)) return PYREG_BAD_RATE;
    const struct mask_kernels *kernels = dispatch_masks();
    const double keep = 1 - mask->rate;
    draw->key[0] = mask->key[0];
    draw->key[1] = mask->key[1];
    switch (mask->generator) {
    case PYREG_THREEFRY:
        draw->limit = (uint64_t)ceil((double)(float)keep * 0x1p23);
        *make = kernels->threefry;
        break;
    case PYREG_THREEFRY_X64:
        draw->limit = (uint64_t)ceil(keep * 0x1p52);
        *make = kernels->threefry_x64;
        break;
    case PYREG_PACKED:
        draw->bits = mask->bits;
        draw->num_bytes = mask->num_bytes;
        *make = read_packed;
        return PYREG_OK;
    default: { /* rounded to 64 bits; the largest double below 1 still fits */
        draw->limit = mask->rate < 1 ? (uint64_t)nearbyint(mask->rate * 0x1p64) : 0;
        *make = kernels->philox;
    }
    }
    kernels->prepare(draw);
    return PYREG_OK;
}

/* A window on the endless row of mask bits: a tile at any position.  Neighbouring rows share what it holds. */
struct window {
    uint64_t first;                                             /* index of bit 0, a multiple of MASK_GROUP */
    size_t bits;                                                /* that have been made */
    uint32_t keep[MASK_WORDS + 2] __attribute__((aligned(64))); /* readers may look one word too far */
};

/* Puts the bits of [index, index + n) into the window, n <= MASK_TILE, and returns the position of the first. */
static size_t look_at(struct window *w, const struct draw *draw, make_words make, uint64_t index, size_t n) {
    uint64_t at = index - w->first; /* indices are modulo 2^64 */
    if (at < w->bits && at + n <= w->bits) return (size_t)at;

    uint64_t first = index & ~(uint64_t)(MASK_GROUP - 1), skip = first - w->first;
    size_t have = skip < w->bits ? w->bits - (size_t)skip : 0;
    if (have) memmove(w->keep, w->keep + skip / 32, have / 8);
    size_t want = ((size_t)(index - first) + n + MASK_GROUP - 1) / MASK_GROUP * MASK_GROUP;
    make(draw, first / 32 + have / 32, (want - have) / 32, w->keep + have / 32);
    w->first = first;
    w->bits = want;
    return (size_t)(index - first);
}

static bool bit_at(const uint32_t *keep, size_t at) { return keep[at / 32] >> at % 32 & 1; }

/* The 32 bits from a position on. */
static uint32_t word_at(const uint32_t *keep, size_t at) { return keep_word(keep + at / 32, at % 32, 0); }

/* Puts 32 bits at a position; what was before it stays, what was behind is lost. */
static void put_word(uint32_t *keep, size_t at, uint32_t word) {
    uint64_t pair = (uint64_t)word << at % 32 | (keep[at / 32] & ((UINT32_C(1) << at % 32) - 1));
    keep[at / 32] = (uint32_t)pair;
    keep[at / 32 + 1] = (uint32_t)(pair >> 32);
}

/* ---- Values ------------------------------------------------------------------------------------------------------ */

/* float16 nearest to a double, rounded once: to odd in float first, which keeps what decides the second rounding. */
static float round_to_f16(double d) {
    float f = (float)d;
    if ((double)f != d) {
        uint32_t u = float_bits(f) - ((double)f > d);
        f = bits_float(u | 1);
    }
    return f16_to_float(float_to_f16(f));
}

/* XLA rounds keep first, to the dtype; then the quotient, taken in float. */
double pyreg_dropout_scale(enum pyreg_dtype dtype, double rate) {
    const double keep = 1 - rate;
    switch (dtype) {
    case PYREG_F64: return 1 / keep;
    case PYREG_F16: return f16_to_float(float_to_f16(1 / round_to_f16(keep)));
    case PYREG_BF16: return 1 / bf16_to_float(float_to_bf16((float)keep));
    default: return 1 / (float)keep;
    }
}

/* ---- The op ------------------------------------------------------------------------------------------------------ */

struct dim {
    int64_t length, x, y, mask; /* strides: of x and y in bytes, of the mask in elements */
};

/* Dims that make up a row: one of a run, and as many of two elements and more as make a group of bits. */
enum { MAX_INNER = 10 };
_Static_assert(1 << (MAX_INNER - 1) >= MASK_GROUP, "a row has room for the dims of a group");

struct dropout {
    enum { DRAW, COPY, KEEP_ALL, DROP_ALL } what;
    const struct kernels *kernels;
    make_words make;
    struct draw draw;
    double scale;
    uint64_t offset;
    char *x, *y;
    size_t size; /* of an element, in bytes */
    struct dim row, outer[PYREG_MAX_DIMS];
    struct dim inner[MAX_INNER]; /* what a row consists of, in memory order, innermost first; mask: stride in the row */
    size_t run;                  /* element j of a row has the mask bit j / run * row.mask + j % run * run_mask */
    int64_t run_mask;
    int num_outer, num_inner, cut; /* cut: the dim of inner of which a part is taken, the others as a whole */
    size_t whole;                  /* elements of those */
    size_t rows, part, rows_per_chunk, chunks_per_part; /* a chunk is some rows of one part of the row dim */
    size_t tile;                                        /* elements whose bits are made before they are applied */
    bool contiguous, large;                             /* large: past the cache */
};

/* Past the cache streaming stores take 0.6 to 1.2 times the time of ordinary ones, as the machine will have it: the
 * first chunks of large calls try both in turn.  `./run bench scaling --stores` times both at sizes around the
 * cache's. */
enum { TRIALS = 32 };
static struct {
    atomic_ullong chunks, ns;
} trials[2];

static bool choose_streaming(size_t chunk) {
    unsigned long long n[2], ns[2];
    for (int s = 0; s < 2; s++) n[s] = atomic_load(&trials[s].chunks), ns[s] = atomic_load(&trials[s].ns);
    if (n[0] < TRIALS || n[1] < TRIALS) return chunk % 2;
    return ns[1] * n[0] < ns[0] * n[1];
}

static void count_trial(bool streaming, uint64_t ns) {
    if (atomic_load(&trials[streaming].chunks) >= TRIALS) return;
    atomic_fetch_add(&trials[streaming].ns, ns);
    atomic_fetch_add(&trials[streaming].chunks, 1);
}

/* n elements; those of the tile are next to each other more often than not: then only one address has to be kept. */
static inline void copy_n(size_t size, size_t n, const char *from, int64_t from_stride, char *to, int64_t to_stride) {
    for (size_t j = 0; j < n; j++) memcpy(to + (int64_t)j * to_stride, from + (int64_t)j * from_stride, size);
}

static inline void copy_sized(size_t size, size_t n, const char *from, int64_t from_stride, char *to,
                              int64_t to_stride) {
    const int64_t next = (int64_t)size;
    if (to_stride == next && from_stride == next)
        memcpy(to, from, n * size);
    else if (to_stride == next)
        copy_n(size, n, from, from_stride, to, next);
    else if (from_stride == next)
        copy_n(size, n, from, next, to, to_stride);
    else
        copy_n(size, n, from, from_stride, to, to_stride);
}

static void copy_strided(size_t size, size_t n, const char *from, int64_t from_stride, char *to, int64_t to_stride) {
    switch (size) {
    case 2: copy_sized(2, n, from, from_stride, to, to_stride); break;
    case 4: copy_sized(4, n, from, from_stride, to, to_stride); break;
    default: copy_sized(8, n, from, from_stride, to, to_stride); break;
    }
}

/* Copies elements j .. j + n - 1 of a row of x into a tile, or of y out of it. */
static void copy_elements(const struct dropout *op, char *row, size_t j, size_t n, char *tile, bool in) {
    const int64_t size = (int64_t)op->size;
    size_t at[MAX_INNER] = {0}, length[MAX_INNER];
    int64_t stride[MAX_INNER], tile_stride[MAX_INNER];
    for (int d = 0; d < op->num_inner; d++) {
        length[d] = (size_t)op->inner[d].length;
        stride[d] = in ? op->inner[d].x : op->inner[d].y;
        tile_stride[d] = op->inner[d].mask * size;
        if (d != op->cut) continue;
        row += (int64_t)(j / op->whole) * stride[d];
        length[d] = n / op->whole;
    }
    for (int d = 0; d < op->num_inner;) {
        if (in)
            copy_strided(op->size, length[0], row, stride[0], tile, tile_stride[0]);
        else
            copy_strided(op->size, length[0], tile, tile_stride[0], row, stride[0]);
        for (d = 1; d < op->num_inner; d++) {
            row += stride[d], tile += tile_stride[d];
            if (++at[d] < length[d]) break;
            row -= (int64_t)length[d] * stride[d], tile -= (int64_t)length[d] * tile_stride[d];
            at[d] = 0;
        }
    }
}

/* n bits: each of those from `at` on in from[] fills a run; the first has been used `skip` times. */
static void spread_bits(const uint32_t *from, size_t at, size_t run, size_t skip, size_t n, uint32_t *keep) {
    for (size_t j = 0; j < n; j += run - skip, skip = 0, at++) {
        const uint32_t word = -(uint32_t)bit_at(from, at);
        for (size_t k = skip; k < run && j + k - skip < n; k += 32) put_word(keep, j + k - skip, word);
    }
}

/* n bits, of which the first `period` are there. */
static void repeat_bits(size_t period, size_t n, uint32_t *keep) {
    for (size_t j = period, bits; j < n; j += bits) {
        bits = at_most(period, 32);
        put_word(keep, j, word_at(keep, j - period));
        if (period < 32) period *= 2;
    }
}

/* The bits of n <= MASK_TILE elements, from j on, of a row whose bits start at `index` and are not just neighbours. */
static void gather_bits(const struct dropout *op, struct window *w, uint64_t index, size_t j, size_t n,
                        uint32_t *keep) {
    const size_t run = op->run;
    const uint64_t step = (uint64_t)op->row.mask, run_step = (uint64_t)op->run_mask;
    size_t skip = j % run;
    index += j / run * step;
    if (step == 1 && run_step == 0) {
        size_t at = look_at(w, &op->draw, op->make, index, (skip + n - 1) / run + 1);
        spread_bits(w->keep, at, run, skip, n, keep);
        return;
    }
    const size_t own = step == 0 && run < n ? run : n; /* the rest repeats them */
    for (size_t k = 0, bits; k < own; k += bits, skip = 0, index += step) {
        bits = at_most(run - skip, n - k);
        size_t at = look_at(w, &op->draw, op->make, index + skip * run_step, run_step ? bits : 1);
        for (size_t b = 0; b < bits; b += 32)
            put_word(keep, k + b, run_step ? word_at(w->keep, at + b) : -(uint32_t)bit_at(w->keep, at));
    }
    repeat_bits(own, n, keep);
}

/* n <= MASK_TILE elements, from j on, of a row whose mask bits start at `index`. */
static void dropout_tile(const struct dropout *op, struct window *w, const char *in, char *out, uint64_t index,
                         size_t j, size_t n, bool stream) {
    if (op->what == COPY) {
        if (out != in) memcpy(out, in, n * op->size);
    } else if (op->what == DROP_ALL) {
        memset(out, 0, n * op->size);
    } else if (op->what == DRAW && op->run == 1 && op->row.mask == 1) {
        size_t at = look_at(w, &op->draw, op->make, index + j, n);
        op->kernels->dropout(in, out, n, w->keep + at / 32, at % 32, op->scale, stream);
    } else {
        uint32_t keep[MASK_TILE / 32 + 2] = {0};
        if (op->what == KEEP_ALL)
            memset(keep, 0xff, sizeof keep);
        else
            gather_bits(op, w, index, j, n, keep);
        op->kernels->dropout(in, out, n, keep, 0, op->scale, stream);
    }
}

/* Elements from .. to - 1 of a row. */
static void dropout_row(const struct dropout *op, struct window *w, const char *x, char *y, uint64_t index, size_t from,
                        size_t to, bool stream) {
    x += from * op->size, y += from * op->size;
    for (size_t j = from, n; j < to; j += n) {
        n = at_most(op->tile, to - j);
        size_t over = (uintptr_t)y % 64; /* long rows go on from a cache line: full speed, and streaming needs it */
        if (over && to - j > MASK_TILE) n = (64 - over) / op->size;
        dropout_tile(op, w, x, y, index, j, n, stream && !over);
        x += n * op->size, y += n * op->size;
    }
}

/* The same by way of a tile that has room for them. */
static void dropout_strided_row(const struct dropout *op, struct window *w, char *x, char *y, uint64_t index,
                                size_t from, size_t to, char *tile) {
    if (op->what != DROP_ALL) copy_elements(op, x, from, to - from, tile, true);
    char *at = tile;
    for (size_t j = from, n; j < to; j += n, at += n * op->size) {
        n = at_most(MASK_TILE, to - j);
        dropout_tile(op, w, at, at, index, j, n, false);
    }
    copy_elements(op, y, from, to - from, tile, false);
}

static void dropout_chunk(void *work, size_t chunk, void *scratch) {
    const struct dropout *op = work;
    struct window w;
    w.first = w.bits = 0;
    const bool stream = op->large && choose_streaming(chunk);
    const uint64_t start = op->large ? clock_ns() : 0;
    const size_t from = chunk / op->chunks_per_part * op->part, length = (size_t)op->row.length;
    const size_t to = length < from + op->part ? length : from + op->part;
    size_t r = chunk % op->chunks_per_part * op->rows_per_chunk;
    const size_t end = at_most(r + op->rows_per_chunk, op->rows);
    for (; r < end; r++) {
        char *x = op->x, *y = op->y;
        uint64_t index = op->offset;
        size_t rest = r;
        for (int d = op->num_outer - 1; d >= 0; d--) {
            const struct dim *dim = &op->outer[d];
            int64_t j = (int64_t)(rest % (size_t)dim->length);
            rest /= (size_t)dim->length;
            x += j * dim->x, y += j * dim->y, index += (uint64_t)j * (uint64_t)dim->mask;
        }
        if (op->contiguous)
            dropout_row(op, &w, x, y, index, from, to, stream);
        else
            dropout_strided_row(op, &w, x, y, index, from, to, scratch);
    }
    if (stream) op->kernels->stream_end();
    if (op->large) count_trial(stream, clock_ns() - start);
}

static int64_t magnitude(int64_t v) { return v < 0 ? -v : v; }

static int64_t distance(struct dim d) { return magnitude(d.x) + magnitude(d.y); }

static bool better_row(struct dim a, struct dim b) {
    bool a_neighbours = a.mask == 1 || a.mask == 0, b_neighbours = b.mask == 1 || b.mask == 0;
    return a_neighbours != b_neighbours ? a_neighbours : distance(a) <= distance(b);
}

/* Rows shorter than SHORT_ROW take longer than copies of several dims, whose inner loop is longer than SHORT_LOOP if it
 * can be.  Those go TILE_OF_DIMS elements at a time: few enough to keep their cache lines for the next row, and many for
 * the groups of bits that they use in part only. */
enum { SHORT_ROW = 32, SHORT_LOOP = 16, LINE_BYTES = 64, TILE_OF_DIMS = 2 * MASK_GROUP };

/* Short rows (whose bits are neighbours or one) that follow each other in x and y become the runs of a long one. */
static int join_short_rows(struct dropout *op, int n, struct dim *dims, int row) {
    const struct dim run = dims[row];
    op->run = 1;
    op->run_mask = 0;
    if (run.length >= MASK_GROUP || (run.mask != 0 && run.mask != 1)) return row;
    for (int d = 0; d < n; d++) {
        if (d == row || dims[d].x != run.x * run.length || dims[d].y != run.y * run.length) continue;
        dims[d] = (struct dim){run.length * dims[d].length, run.x, run.y, dims[d].mask};
        if (run.mask == 1 && dims[d].mask == run.length) { /* their bits follow each other, too */
            dims[d].mask = 1;
        } else {
            op->run = (size_t)run.length;
            op->run_mask = run.mask;
        }
        dims[row].length = 1;
        return d;
    }
    return row;
}

/* Insertion sort by memory stride, largest first, stable. */
static void add_outer(struct dropout *op, struct dim dim) {
    if (dim.length == 1) return;
    int at = op->num_outer++;
    for (; at > 0 && distance(op->outer[at - 1]) < distance(dim); at--) op->outer[at] = op->outer[at - 1];
    op->outer[at] = dim;
    op->rows *= (size_t)dim.length;
}

/* Do the rows, in their order, use a group of bits up before they need the next one, and is none very short? */
static bool order_is_good(const struct dropout *op, bool fast) {
    const int64_t run = (int64_t)op->run, length = op->row.length, step = magnitude(op->row.mask);
    const int64_t enough = fast ? 3 * MASK_GROUP / 8 : 3 * MASK_GROUP / 4; /* elements for which a group may be made */
    if (op->num_outer == 0 && step <= 1) return true;
    if (length < SHORT_ROW) return false;
    if (step > 1) return run * (step < MASK_GROUP ? MASK_GROUP / step : 1) >= enough;
    int64_t bits = step ? length / run : op->run_mask ? run : 1; /* of the rows so far, which follow each other */
    int64_t served = length;                                     /* elements that they are for */
    for (int d = op->num_outer - 1; d >= 0 && served < enough; d--) {
        if (op->outer[d].mask != 0) {
            if (op->outer[d].mask != bits) return false;
            bits *= op->outer[d].length;
        }
        served *= op->outer[d].length;
    }
    return true;
}

static void set_row(struct dropout *op, struct dim row) {
    op->row = row;
    op->inner[0] = (struct dim){row.length, row.x, row.y, 1};
    op->num_inner = 1;
    op->cut = 0;
    op->whole = 1;
}

/* The dim goes around those that the row has, as the one that is cut. */
static void add_inner(struct dropout *op, struct dim *dim) {
    int at = op->num_inner++;
    op->whole = (size_t)op->row.length;
    for (; at > 0 && distance(op->inner[at - 1]) > distance(*dim); at--) op->inner[at] = op->inner[at - 1];
    op->inner[at] = (struct dim){dim->length, dim->x, dim->y, op->row.length};
    op->cut = at;
    op->row.length *= dim->length;
    dim->length = 1;
}

/* Another row: dims whose bits follow each other, until they are a group, and inside of them the dim of elements next to
 * each other, if these share a bit. */
static void plan_long_rows(struct dropout *op, struct dim *dims) {
    const struct dim row = op->row;
    const int64_t run = (int64_t)op->run;
    int n = op->num_outer, nearest = 0;
    memcpy(dims, op->outer, (size_t)n * sizeof *dims);
    if (run > 1) dims[n++] = (struct dim){run, row.x, row.y, op->run_mask};
    dims[n++] = (struct dim){row.length / run, row.x * run, row.y * run, row.mask};
    for (int d = 1; d < n; d++)
        if (distance(dims[d]) < distance(dims[nearest])) nearest = d;

    op->row = (struct dim){.length = 1, .mask = 1};
    op->num_inner = 0;
    const int64_t elements = dims[nearest].length;
    const bool shared = dims[nearest].mask == 0 && elements >= SHORT_LOOP && elements < MASK_GROUP;
    if (shared) add_inner(op, &dims[nearest]);
    int64_t bits = 1;
    for (int d = 0; d < n && op->row.length < MASK_GROUP; d++) {
        if (dims[d].length == 1 || dims[d].mask != bits) continue;
        bits *= dims[d].length;
        add_inner(op, &dims[d]);
        d = -1; /* the next one may be anywhere */
    }
    if (op->num_inner < 2 && bits < MASK_GROUP && bits <= row.length) { /* there is none that is longer */
        set_row(op, row);
        return;
    }
    op->run = shared ? (size_t)elements : 1;
    op->run_mask = 0;
    if (op->num_inner == 1)
        set_row(op, (struct dim){bits, op->inner[0].x, op->inner[0].y, 1});
    else if (op->inner[0].length < SHORT_LOOP && op->inner[0].length < op->inner[1].length) {
        const struct dim first = op->inner[0];
        op->inner[0] = op->inner[1];
        op->inner[1] = first;
        if (op->cut < 2) op->cut = 1 - op->cut;
    }
    op->num_outer = 0;
    op->rows = 1;
    for (int d = 0; d < n; d++) add_outer(op, dims[d]);
}

/* Fewest and longest rows: dims of length 1 go, neighbours that are one dim in x, y and mask are merged; the row is the
 * dim of neighbouring mask bits (or of one mask bit), the others come in memory order. */
static void plan_rows(struct dropout *op, int ndim, struct dim *dims, bool fast) {
    int n = 0, row = 0;
    for (int d = 0; d < ndim; d++) {
        if (dims[d].length == 1) continue;
        struct dim in = dims[d], *out = &dims[n - (n > 0)];
        if (n && out->x == in.x * in.length && out->y == in.y * in.length && out->mask == in.mask * in.length) {
            in.length *= out->length;
            n--;
        }
        dims[n++] = in;
    }
    const int64_t size = (int64_t)op->size;
    if (n == 0) dims[n++] = (struct dim){1, size, size, 1};
    for (int d = 1; d < n; d++)
        if (better_row(dims[d], dims[row])) row = d;
    row = join_short_rows(op, n, dims, row);
    set_row(op, dims[row]);
    op->num_outer = 0;
    op->rows = 1;
    for (int d = 0; d < n; d++)
        if (d != row) add_outer(op, dims[d]);
    if (op->what == DRAW && !order_is_good(op, fast)) plan_long_rows(op, dims);
    op->contiguous = op->num_inner == 1 && op->row.x == size && op->row.y == size;
    /* Rows that share their bits take turns: each tile of bits is made once for all rows of a chunk. */
    const bool neighbours = op->run == 1 && op->row.mask == 1;
    const bool same_bits = neighbours && op->num_outer && op->outer[op->num_outer - 1].mask == 0;
    /* Short where bits take longer than memory: the loop that applies them prefetches what the next ones will need. */
    op->tile = neighbours && !same_bits && !fast ? MASK_GROUP : MASK_TILE;
    op->part = same_bits ? MASK_TILE : CHUNK;
    const bool near = magnitude(op->row.x) <= LINE_BYTES && magnitude(op->row.y) <= LINE_BYTES;
    if (!op->contiguous)
        op->part = near && neighbours ? MASK_TILE : MASK_GROUP; /* a column of cache lines is used up before the next */
    if (op->num_inner > 1) {
        const size_t line = op->cut == 0 ? LINE_BYTES / op->size : 1; /* of elements that are next to each other */
        op->part = op->whole * at_least(divide_up(TILE_OF_DIMS, op->whole), line);
    }
    if ((int64_t)op->part > op->row.length) op->part = (size_t)op->row.length;
    op->rows_per_chunk = CHUNK / op->part;
    op->chunks_per_part = (op->rows + op->rows_per_chunk - 1) / op->rows_per_chunk;
}

enum pyreg_status pyreg_dropout(enum pyreg_dtype dtype, const struct pyreg_mask *mask, double scale, int ndim,
                                const int64_t *shape, const void *x, const int64_t *x_strides, void *y,
                                const int64_t *y_strides, const int64_t *mask_strides) {
    struct dropout op;
    if ((unsigned)dtype >= PYREG_NUM_DTYPES) return PYREG_BAD_DTYPE;
    if (ndim < 0 || ndim > PYREG_MAX_DIMS) return PYREG_BAD_SHAPE;
    enum pyreg_status status = prepare(mask, &op.draw, &op.make);
    if (status) return status;

    struct dim dims[PYREG_MAX_DIMS + 1];
    int64_t count = 1;
    bool empty = false;
    for (int d = ndim - 1; d >= 0; d--) {
        if (shape[d] < 0) return PYREG_BAD_SHAPE;
        if (shape[d] == 0) empty = true;
        dims[d] = (struct dim){shape[d], x_strides[d], y_strides[d], mask_strides ? mask_strides[d] : count};
        if (__builtin_mul_overflow(count, shape[d] ? shape[d] : 1, &count)) return PYREG_BAD_SHAPE;
    }
    if (empty) return PYREG_OK;

    op.what = mask->rate == 0 ? (scale == 1 ? COPY : KEEP_ALL) : mask->rate == 1 ? DROP_ALL : DRAW;
    op.kernels = dispatch_kernels(dtype);
    op.scale = scale;
    op.offset = mask->offset;
    op.x = (char *)(uintptr_t)x;
    op.y = y;
    op.size = dispatch_bytes(dtype);
    const bool fast = mask->generator == PYREG_PHILOX || mask->generator == PYREG_PACKED;
    plan_rows(&op, ndim, dims, fast);
    const size_t bytes = (size_t)count * op.size;
    op.large =
        op.contiguous && op.what == DRAW && x != y && (uintptr_t)y % op.size == 0 && 2 * bytes > machine_cache_bytes();

    /* The room behind a tile is for what the loop asks for ahead: other memory may not be there, and is looked for. */
    const size_t tile_bytes = op.contiguous ? 0 : op.part * op.size + PREFETCH_BYTES + LINE_BYTES;
    const struct phase phase = {
        (size_t)((op.row.length + (int64_t)op.part - 1) / (int64_t)op.part) * op.chunks_per_part, dropout_chunk};
    const double ns = fast ? 0.2 : 1.0; /* an element, roughly: `./run bench roofline`, column core */
    return parallel_run(&phase, 1, &op, tile_bytes, ns * (double)count + 0.05 * (double)bytes);
}

/* ---- The mask alone ---------------------------------------------------------------------------------------------- */

struct mask_op {
    struct draw draw;
    make_words make;
    const struct pyreg_mask *mask;
    size_t n;
    bool packed;
    uint8_t *out;
};

static void mask_chunk(void *work, size_t chunk, void *scratch) {
    (void)scratch;
    const struct mask_op *op = work;
    struct window w;
    w.first = w.bits = 0;
    size_t j = chunk * CHUNK, end = at_most(j + CHUNK, op->n);
    for (size_t n; j < end; j += n) {
        n = at_most(end - j, MASK_TILE);
        size_t at = look_at(&w, &op->draw, op->make, op->mask->offset + j, n);
        for (size_t k = 0; k < n; k += 32) {
            uint32_t word = keep_word(w.keep + at / 32, at % 32, k / 32);
            size_t bits = at_most(n - k, 32);
            if (!op->packed) {
                for (size_t b = 0; b < bits; b++) op->out[j + k + b] = word >> b & 1;
                continue;
            }
            if (bits < 32) word &= (UINT32_C(1) << bits) - 1;
            for (size_t b = 0; b < bits; b += 8) op->out[(j + k + b) / 8] = (uint8_t)(word >> b);
        }
    }
}

enum pyreg_status pyreg_dropout_mask(const struct pyreg_mask *mask, size_t n, bool packed, uint8_t *out) {
    struct mask_op op = {.mask = mask, .n = n, .packed = packed, .out = out};
    enum pyreg_status status = prepare(mask, &op.draw, &op.make);
    if (status) return status;
    if (mask->rate == 0 || mask->rate == 1) { /* nothing is drawn */
        memset(out, mask->rate == 1 ? 0 : packed ? 0xff : 1, packed ? (n + 7) / 8 : n);
        if (packed && mask->rate == 0 && n % 8) out[n / 8] = (uint8_t)((1u << n % 8) - 1);
        return PYREG_OK;
    }
    const struct phase phase = {(n + CHUNK - 1) / CHUNK, mask_chunk};
    return parallel_run(&phase, 1, &op, 0, (double)n);
}

/* ---- The generators alone ---------------------------------------------------------------------------------------- */

void pyreg_philox4x32_10(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]) {
    dispatch_masks()->philox_block(key, counter, out);
}

void pyreg_threefry2x32_20(const uint32_t key[2], const uint32_t counter[2], uint32_t out[2]) {
    dispatch_masks()->threefry_block(key, counter, out);
}
