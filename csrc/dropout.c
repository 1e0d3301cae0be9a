/* Dropout: check arguments, plan the rows, make mask bits a tile at a time, apply them. */
#include "arith.h"
#include "dispatch.h"
#include "kernels/half.h"
#include "machine.h"
#include "mask_bits.h"
#include "parallel.h"
#include "rows.h"

#include <string.h>

/* ---- The scale --------------------------------------------------------------------------------------------------- */

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

struct dropout {
    enum { DRAW, COPY, KEEP_ALL, DROP_ALL } what;
    const struct kernels *kernels;
    struct mask_source source;
    double scale;
    uint64_t offset;
    char *x, *y;
    size_t size; /* of an element, in bytes */
    struct rows rows;
    size_t tile; /* elements whose bits are made before they are applied */
    bool stream; /* write around the cache */
};

/* n <= MASK_TILE elements, from j on, of a row whose mask bits start at `index`. */
static void dropout_tile(const struct dropout *op, struct mask_span *span, const char *x, char *y, uint64_t index,
                         size_t j, size_t n, bool stream) {
    const bool in_memory = op->rows.contiguous; /* else x is a tile that has just been filled */
    if (op->what == COPY) {
        if (y != x) memcpy(y, x, n * op->size);
    } else if (op->what == DROP_ALL) {
        memset(y, 0, n * op->size);
    } else if (op->what == DRAW && op->rows.neighbours) {
        struct upcoming next = {x, in_memory ? n * op->size : 0};
        size_t at = mask_span_cover(span, index + j, n, &next);
        op->kernels->dropout(x, y, n, span->keep + at / 32, at % 32, op->scale, next.bytes, stream);
    } else {
        uint32_t keep[GATHERED_WORDS] = {0};
        if (op->what == KEEP_ALL)
            memset(keep, 0xff, sizeof keep);
        else
            mask_gather(span, &op->rows.bits, index, j, n, keep);
        op->kernels->dropout(x, y, n, keep, 0, op->scale, in_memory, stream);
    }
}

/* Elements j .. end - 1 of a row. */
static void dropout_row(const struct dropout *op, struct mask_span *span, const char *x, char *y, uint64_t index,
                        size_t j, size_t end) {
    x += j * op->size, y += j * op->size;
    for (size_t n; j < end; j += n, x += n * op->size, y += n * op->size) {
        n = at_most(op->tile, end - j);
        size_t over =
            (uintptr_t)y % LINE_BYTES; /* long rows go on from a cache line: full speed, and streams need it */
        if (over && over % op->size == 0 && end - j > MASK_TILE) n = (LINE_BYTES - over) / op->size;
        dropout_tile(op, span, x, y, index, j, n, op->stream && !over);
    }
}

/* The same where elements are not neighbours, by way of a tile that has room for them. */
static void dropout_strided_row(const struct dropout *op, struct mask_span *span, const char *x, char *y,
                                uint64_t index, size_t j, size_t end, char *tile) {
    if (op->what != DROP_ALL) rows_copy_in(&op->rows, op->size, x, j, end - j, tile);
    char *at = tile;
    for (size_t i = j, n; i < end; i += n, at += n * op->size) {
        n = at_most(MASK_TILE, end - i);
        dropout_tile(op, span, at, at, index, i, n, false);
    }
    rows_copy_out(&op->rows, op->size, y, j, end - j, tile);
}

static void dropout_chunk(void *work, size_t chunk, void *tile) {
    const struct dropout *op = work;
    const struct rows *rows = &op->rows;
    struct mask_span span;
    mask_span_init(&span, &op->source);
    const size_t from = chunk / rows->chunks_per_part * rows->part, to = at_most(from + rows->part, rows->length);
    size_t r = chunk % rows->chunks_per_part * rows->per_chunk;
    const size_t end = at_most(r + rows->per_chunk, rows->count);
    for (; r < end; r++) {
        int64_t at[ROW_OPERANDS] = {0};
        add_offsets(rows->outer, rows->num_outer, r, ROW_OPERANDS, at);
        const uint64_t index = op->offset + (uint64_t)at[MASK];
        if (rows->contiguous)
            dropout_row(op, &span, op->x + at[X], op->y + at[Y], index, from, to);
        else
            dropout_strided_row(op, &span, op->x + at[X], op->y + at[Y], index, from, to, tile);
    }
    if (op->stream) op->kernels->stream_end();
}

enum pyreg_status pyreg_dropout(const struct pyreg_dropout *args) {
    struct dropout op;
    size_t elements;
    if ((unsigned)args->dtype >= PYREG_NUM_DTYPES) return PYREG_BAD_DTYPE;
    enum pyreg_status status = count_elements(args->ndim, args->shape, &elements);
    if (!status) status = mask_source_init(&op.source, &args->mask);
    if (status || elements == 0) return status;

    const double rate = args->mask.rate;
    op.what = rate == 0 ? (args->scale == 1 ? COPY : KEEP_ALL) : rate == 1 ? DROP_ALL : DRAW;
    op.kernels = dispatch_kernels(args->dtype);
    op.scale = args->scale;
    op.offset = args->mask.offset;
    op.x = args->x.data;
    op.y = args->y.data;
    op.size = dispatch_bytes(args->dtype);

    const bool fast = args->mask.generator == PYREG_PHILOX || args->mask.generator == PYREG_PACKED;
    const size_t worth = op.what != DRAW ? 0 : fast ? 3 * MASK_GROUP / 8 : 3 * MASK_GROUP / 4;
    rows_plan(&op.rows, args, op.size, worth);
    /* Short where bits take long: the CPU then has a tile's writes on their way while it makes the bits of the next. */
    op.tile = op.rows.neighbours && !op.rows.shared && !fast ? MASK_GROUP : MASK_TILE;
    const size_t bytes = elements * op.size;
    op.stream = op.rows.contiguous && op.what == DRAW && op.x != op.y && machine_stores_around(2 * bytes);

    /* The room behind a tile is for what the loop asks for ahead: other memory may not be there, and is looked for. */
    const size_t tile_bytes = op.rows.contiguous ? 0 : op.rows.part * op.size + PREFETCH_BYTES + LINE_BYTES;
    const struct phase phase = {rows_chunks(&op.rows), dropout_chunk};
    const double ns = fast ? 0.2 : 1.0; /* an element, roughly: `./run bench roofline`, column core */
    return parallel_run(&phase, 1, &op, tile_bytes, ns * (double)elements + 0.05 * (double)bytes);
}

/* ---- The mask alone ---------------------------------------------------------------------------------------------- */

struct mask_op {
    struct mask_source source;
    uint64_t offset;
    size_t n;
    bool packed;
    uint8_t *out;
};

/* Bit b of the lowest eight in byte b.  Each of the first seven moves up by 7 b; where no bit meets another. */
static uint64_t bytes_of(uint32_t bits) {
    return ((uint64_t)(bits & 0x7f) * 0x40810204081 & 0x0101010101010101) | (uint64_t)(bits & 0x80) << 49;
}

/* n <= 32 bits, one per byte. */
static void put_bytes(uint32_t word, size_t n, uint8_t *out) {
    for (size_t b = 0; b < n; b += 8) {
        uint64_t bytes = bytes_of(word >> b);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        bytes = __builtin_bswap64(bytes);
#endif
        memcpy(out + b, &bytes, at_most(n - b, 8));
    }
}

/* The same, eight per byte. */
static void put_bits(uint32_t word, size_t n, uint8_t *out) {
    for (size_t b = 0; b < n; b += 8) out[b / 8] = (uint8_t)(word >> b);
}

static void mask_chunk(void *work, size_t chunk, void *scratch) {
    (void)scratch;
    const struct mask_op *op = work;
    struct mask_span span;
    mask_span_init(&span, &op->source);
    size_t j = chunk * MASK_CHUNK, end = at_most(j + MASK_CHUNK, op->n);
    for (size_t n; j < end; j += n) {
        n = at_most(end - j, MASK_TILE);
        const size_t at = mask_span_cover(&span, op->offset + j, n, &NOTHING), whole = n / 32;
        const uint32_t *keep = span.keep + at / 32;
        const uint32_t last = keep_word(keep, at % 32, whole) & ((UINT32_C(1) << n % 32) - 1);
        if (op->packed) {
            uint8_t *out = op->out + j / 8;
            for (size_t w = 0; w < whole; w++) put_bits(keep_word(keep, at % 32, w), 32, out + 4 * w);
            put_bits(last, n % 32, out + 4 * whole);
        } else {
            uint8_t *out = op->out + j;
            for (size_t w = 0; w < whole; w++) put_bytes(keep_word(keep, at % 32, w), 32, out + 32 * w);
            put_bytes(last, n % 32, out + 32 * whole);
        }
    }
}

enum pyreg_status pyreg_dropout_mask(const struct pyreg_mask *mask, size_t n, bool packed, uint8_t *out) {
    struct mask_op op = {.offset = mask->offset, .n = n, .packed = packed, .out = out};
    enum pyreg_status status = mask_source_init(&op.source, mask);
    if (status) return status;
    if (mask->rate == 0 || mask->rate == 1) { /* nothing is drawn */
        memset(out, mask->rate == 1 ? 0 : packed ? 0xff : 1, packed ? divide_up(n, 8) : n);
        if (packed && mask->rate == 0 && n % 8) out[n / 8] = (uint8_t)((1u << n % 8) - 1);
        return PYREG_OK;
    }
    const struct phase phase = {divide_up(n, MASK_CHUNK), mask_chunk};
    return parallel_run(&phase, 1, &op, 0, (double)n);
}
