#include "rows.h"

#include "arith.h"

#include <string.h>

/* Rows shorter than SHORT_ROW take longer than copies of several dims, whose inner loop is longer than SHORT_LOOP if it
 * can be.  Those go TILE_OF_DIMS elements at a time: few enough to keep their cache lines for the next row, and many
 * for the groups of bits that they use in part only. */
enum { SHORT_ROW = 32, SHORT_LOOP = 16, TILE_OF_DIMS = 2 * MASK_GROUP };

_Static_assert(1 << (MAX_BOX - 1) >= MASK_GROUP, "a row has room for the dims of a group, and for one of a run");

static int64_t magnitude(int64_t v) { return v == INT64_MIN ? INT64_MAX : v < 0 ? -v : v; }

static int64_t distance(const struct dim *d) { return magnitude(d->stride[X]) + magnitude(d->stride[Y]); }

static struct dim with_mask(struct dim d, size_t length, int64_t mask) {
    d.length = length;
    d.stride[MASK] = mask;
    return d;
}

static bool better_row(const struct dim *a, const struct dim *b) {
    const int64_t of_a = a->stride[MASK], of_b = b->stride[MASK];
    const bool a_neighbours = of_a == 1 || of_a == 0, b_neighbours = of_b == 1 || of_b == 0;
    return a_neighbours != b_neighbours ? a_neighbours : distance(a) <= distance(b);
}

/* ---- Rows of one dim --------------------------------------------------------------------------------------------- */

static void set_row(struct rows *rows, struct dim row) {
    rows->length = row.length;
    rows->bits.step = (uint64_t)row.stride[MASK];
    rows->inner[0] = with_mask(row, row.length, 1);
    rows->num_inner = 1;
    rows->cut = 0;
    rows->whole = 1;
}

static void set_outer(struct rows *rows, int n, const struct dim *dims, int row) {
    rows->num_outer = 0;
    rows->count = 1;
    for (int d = 0; d < n; d++) {
        if (d == row || dims[d].length == 1) continue;
        rows->num_outer = insert_dim(rows->outer, rows->num_outer, &dims[d], distance);
        rows->count *= dims[d].length;
    }
}

/* Short rows (whose bits are neighbours or one) that follow each other in x and y become the runs of a long one. */
static int join_short_rows(struct rows *rows, int n, struct dim *dims, int row) {
    const struct dim run = dims[row];
    const int64_t length = (int64_t)run.length, bits = run.stride[MASK];
    rows->bits.run = 1;
    rows->bits.run_step = 0;
    if (length >= MASK_GROUP || (bits != 0 && bits != 1)) return row;
    for (int d = 0; d < n; d++) {
        if (d == row || dims[d].stride[X] != run.stride[X] * length || dims[d].stride[Y] != run.stride[Y] * length)
            continue;
        const bool follow = bits == 1 && dims[d].stride[MASK] == length; /* their bits follow each other, too */
        dims[d] = with_mask(run, run.length * dims[d].length, follow ? 1 : dims[d].stride[MASK]);
        if (!follow) {
            rows->bits.run = run.length;
            rows->bits.run_step = (uint64_t)bits;
        }
        dims[row].length = 1;
        return d;
    }
    return row;
}

/* ---- Rows of several dims ---------------------------------------------------------------------------------------- */

/* Do the rows, in their order, use a group of bits up before they need the next one, and is none very short? */
static bool order_is_good(const struct rows *rows, int64_t worth) {
    const int64_t run = (int64_t)rows->bits.run, length = (int64_t)rows->length;
    const int64_t step = magnitude((int64_t)rows->bits.step);
    if (worth == 0 || (rows->num_outer == 0 && step <= 1)) return true;
    if (length < SHORT_ROW) return false;
    if (step > 1) return run * (step < MASK_GROUP ? MASK_GROUP / step : 1) >= worth;
    int64_t bits = step                  ? length / run
                   : rows->bits.run_step ? run
                                         : 1; /* of the rows so far, which follow each other */
    int64_t served = length;                  /* elements that they are for */
    for (int d = rows->num_outer - 1; d >= 0 && served < worth; d--) {
        const struct dim *outer = &rows->outer[d];
        if (outer->stride[MASK] != 0) {
            if (outer->stride[MASK] != bits) return false;
            bits *= (int64_t)outer->length;
        }
        served *= (int64_t)outer->length;
    }
    return true;
}

/* The dim goes around those that the row has, as the one that is cut. */
static void add_inner(struct rows *rows, struct dim *dim) {
    int at = rows->num_inner++;
    rows->whole = rows->length;
    for (; at > 0 && distance(&rows->inner[at - 1]) > distance(dim); at--) rows->inner[at] = rows->inner[at - 1];
    rows->inner[at] = with_mask(*dim, dim->length, (int64_t)rows->length);
    rows->cut = at;
    rows->length *= dim->length;
    dim->length = 1;
}

/* Another row: dims whose bits follow each other, until they are a group, and inside of them the dim of elements next
 * to each other, if these share a bit. */
static void plan_long_rows(struct rows *rows, struct dim *dims) {
    const struct dim row = rows->inner[0];
    const size_t run = rows->bits.run;
    int n = rows->num_outer, nearest = 0;
    memcpy(dims, rows->outer, (size_t)n * sizeof *dims);
    if (run > 1) dims[n++] = with_mask(row, run, (int64_t)rows->bits.run_step);
    dims[n] = with_mask(row, row.length / run, (int64_t)rows->bits.step);
    dims[n].stride[X] *= (int64_t)run, dims[n++].stride[Y] *= (int64_t)run;
    for (int d = 1; d < n; d++)
        if (distance(&dims[d]) < distance(&dims[nearest])) nearest = d;

    rows->length = 1;
    rows->num_inner = 0;
    const size_t elements = dims[nearest].length;
    const bool shared = dims[nearest].stride[MASK] == 0 && elements >= SHORT_LOOP && elements < MASK_GROUP;
    if (shared) add_inner(rows, &dims[nearest]);
    size_t bits = 1;
    for (int d = 0; d < n && rows->length < MASK_GROUP; d++) {
        if (dims[d].length == 1 || dims[d].stride[MASK] != (int64_t)bits) continue;
        bits *= dims[d].length;
        add_inner(rows, &dims[d]);
        d = -1; /* the next one may be anywhere */
    }
    if (rows->num_inner < 2 && bits < MASK_GROUP && bits <= row.length) { /* there is none that is longer */
        const uint64_t step = rows->bits.step;
        set_row(rows, with_mask(row, row.length, (int64_t)step));
        return;
    }
    rows->bits = (struct mask_row){.run = shared ? elements : 1, .step = 1, .run_step = 0};
    if (rows->num_inner == 1) {
        set_row(rows, with_mask(rows->inner[0], bits, 1));
    } else if (rows->inner[0].length < SHORT_LOOP && rows->inner[0].length < rows->inner[1].length) {
        const struct dim first = rows->inner[0];
        rows->inner[0] = rows->inner[1];
        rows->inner[1] = first;
        if (rows->cut < 2) rows->cut = 1 - rows->cut;
    }
    set_outer(rows, n, dims, -1);
}

/* ---- The plan ---------------------------------------------------------------------------------------------------- */

/* Fewest and longest rows: dims of length 1 go, neighbours that are one dim in x, y and mask are merged; the row is the
 * dim of neighbouring mask bits (or of one mask bit), the others come in memory order. */
void rows_plan(struct rows *rows, const struct pyreg_dropout *args, size_t size, size_t worth) {
    struct dim dims[PYREG_MAX_DIMS + 1]; /* plan_long_rows takes a row apart, into two */
    int n = 0, row = 0;
    int64_t in_c_order[PYREG_MAX_DIMS];
    const int64_t *mask = args->mask_strides ? args->mask_strides : in_c_order;
    if (!args->mask_strides) c_strides((size_t)args->ndim, args->shape, 1, in_c_order);
    for (int d = 0; d < args->ndim; d++) {
        const struct dim dim = {(size_t)args->shape[d],
                                {[X] = args->x.strides[d], [Y] = args->y.strides[d], [MASK] = mask[d]}};
        if (dim.length != 1) n = append_dim(dims, n, &dim);
    }
    const int64_t next = (int64_t)size;
    if (n == 0) dims[n++] = (struct dim){1, {[X] = next, [Y] = next, [MASK] = 1}};
    for (int d = 1; d < n; d++)
        if (better_row(&dims[d], &dims[row])) row = d;
    row = join_short_rows(rows, n, dims, row);
    set_row(rows, dims[row]);
    set_outer(rows, n, dims, row);
    if (!order_is_good(rows, (int64_t)worth)) plan_long_rows(rows, dims);

    const struct dim *last = rows->num_outer ? &rows->outer[rows->num_outer - 1] : NULL, *inner = &rows->inner[0];
    rows->contiguous = rows->num_inner == 1 && inner->stride[X] == next && inner->stride[Y] == next;
    rows->neighbours = rows->bits.run == 1 && rows->bits.step == 1;
    rows->shared = rows->neighbours && last && last->stride[MASK] == 0;

    const bool near = magnitude(inner->stride[X]) <= LINE_BYTES && magnitude(inner->stride[Y]) <= LINE_BYTES;
    if (rows->contiguous) /* rows that share their bits take turns: a tile of bits is made once for those of a chunk */
        rows->part = rows->shared ? MASK_TILE : MASK_CHUNK;
    else if (rows->num_inner > 1) {
        const size_t line = rows->cut == 0 ? LINE_BYTES / size : 1; /* of elements that are next to each other */
        rows->part = rows->whole * at_least(divide_up(TILE_OF_DIMS, rows->whole), line);
    } else /* a column of cache lines is used up before the next */
        rows->part = near && rows->neighbours ? MASK_TILE : MASK_GROUP;
    rows->part = at_most(rows->part, rows->length);
    rows->per_chunk = MASK_CHUNK / rows->part;
    rows->chunks_per_part = divide_up(rows->count, rows->per_chunk);
}

size_t rows_chunks(const struct rows *rows) { return divide_up(rows->length, rows->part) * rows->chunks_per_part; }

/* ---- Copies ------------------------------------------------------------------------------------------------------ */

/* The box of a part of a row, from the array to the tile; returns where the part begins in the array. */
static int64_t box_of(const struct rows *rows, size_t size, size_t j, size_t n, int operand, struct box *box) {
    int64_t begin = 0;
    box->size = size;
    box->ndim = rows->num_inner;
    for (int d = 0; d < rows->num_inner; d++) {
        box->length[d] = rows->inner[d].length;
        box->from_stride[d] = rows->inner[d].stride[operand];
        box->to_stride[d] = rows->inner[d].stride[MASK] * (int64_t)size;
        if (d != rows->cut) continue;
        begin = (int64_t)(j / rows->whole) * box->from_stride[d];
        box->length[d] = n / rows->whole;
    }
    return begin;
}

void rows_copy_in(const struct rows *rows, size_t size, const char *x, size_t j, size_t n, char *tile) {
    struct box box;
    const int64_t begin = box_of(rows, size, j, n, X, &box);
    copy_box(&box, tile, x + begin);
}

void rows_copy_out(const struct rows *rows, size_t size, char *y, size_t j, size_t n, const char *tile) {
    struct box box;
    const int64_t begin = box_of(rows, size, j, n, Y, &box);
    for (int d = 0; d < box.ndim; d++) {
        const int64_t in_array = box.from_stride[d];
        box.from_stride[d] = box.to_stride[d];
        box.to_stride[d] = in_array;
    }
    copy_box(&box, y + begin, tile);
}
