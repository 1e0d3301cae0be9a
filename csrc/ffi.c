/* XLA's handlers: check the call, decode it, call pyreg.h, translate the status.  XLA calls them from its own threads,
 * several at once, with subnormals flushed to zero; parallel.c takes that mode into its workers.
 *
 * A program says what it likes (jax.ffi.ffi_call, a damaged file): all that memory depends on is checked here. */
#include "ffi.h"

#include "strided.h"
#include "xla.h"

#include <stdatomic.h>
#include <string.h>

typedef const struct xla_buffer *buffer;

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

struct call {
    buffer *operands, *results;
    int64_t generator, axis; /* the attributes; 0 where the op has none of the name */
    double rate, epsilon;
    uint8_t relu; /* a byte of any value */
};

enum { GENERATOR = 1, AXIS = 2, RATE = 4, EPSILON = 8, RELU = 16 };

static const struct attribute {
    const char *name;
    int flag;
    enum xla_dtype dtype;
    size_t at, size; /* in struct call */
} ATTRIBUTES[] = {
    {"generator", GENERATOR, XLA_S64, offsetof(struct call, generator), sizeof(int64_t)},
    {"axis", AXIS, XLA_S64, offsetof(struct call, axis), sizeof(int64_t)},
    {"rate", RATE, XLA_F64, offsetof(struct call, rate), sizeof(double)},
    {"epsilon", EPSILON, XLA_F64, offsetof(struct call, epsilon), sizeof(double)},
    {"relu", RELU, XLA_PRED, offsetof(struct call, relu), sizeof(uint8_t)},
};

/* An op: returns what is wrong, or NULL.  Its operands and results: a letter for the dtype of each. */
struct op {
    const char *(*run)(const struct call *call);
    const char *operands, *results;
    int attributes;
};

static bool has_dtype(buffer a, char letter) {
    switch (letter) {
    case 'w': return a->dtype == XLA_U32;  /* words */
    case 'b': return a->dtype == XLA_U8;   /* bytes */
    case 'i': return a->dtype == XLA_S32;  /* integers */
    case 'm': return a->dtype == XLA_PRED; /* a mask */
    default: return true;                  /* x: the op looks at it */
    }
}

static const char *check_buffers(const struct xla_buffers *given, const char *wanted) {
    if (given->count != (int64_t)strlen(wanted)) return "the handler has another number of operands or results";
    for (int64_t i = 0; i < given->count; i++)
        if (!has_dtype(given->buffers[i], wanted[i])) return "an operand or a result has another dtype";
    return NULL;
}

static const char *read_attributes(const struct xla_attributes *given, int wanted, struct call *call) {
    for (int64_t i = 0; i < given->count; i++) {
        const struct attribute *a = ATTRIBUTES, *end = a + sizeof ATTRIBUTES / sizeof *ATTRIBUTES;
        const struct xla_span *name = given->names[i];
        while (a < end && !(strlen(a->name) == name->length && memcmp(a->name, name->text, name->length) == 0)) a++;
        if (a == end || !(wanted & a->flag)) return "the handler has no attribute of that name, or it is given twice";
        wanted &= ~a->flag;
        const struct xla_scalar *scalar = given->values[i];
        if (given->types[i] != XLA_SCALAR || scalar->dtype != a->dtype) return "an attribute has another type";
        memcpy((char *)call + a->at, scalar->value, a->size);
    }
    return wanted ? "an attribute is missing" : NULL;
}

static struct xla_error *error_of(const struct xla_call_frame *frame, const char *wrong) {
    if (!wrong) return NULL;
    struct xla_error_create_args args = {.struct_size = sizeof args, .message = wrong, .code = XLA_INVALID_ARGUMENT};
    if (wrong == pyreg_strerror(PYREG_NO_MEMORY)) args.code = XLA_RESOURCE_EXHAUSTED;
    return frame->api->error_create(&args);
}

/* A pyreg_pool's schedule(). */
static void schedule(void *context, void (*task)(void *), void *argument) {
    const struct xla_call_frame *frame = context;
    struct xla_schedule_args args = {sizeof args, NULL, frame->context, task, argument};
    struct xla_error *error = frame->api->schedule(&args);
    if (!error) return; /* else it has no pool, and the call does without help */
    struct xla_error_destroy_args destroy = {sizeof destroy, NULL, error};
    frame->api->error_destroy(&destroy);
}

static atomic_bool use_xla_pool = true;

void pyreg_ffi_use_xla_pool(bool use) { atomic_store(&use_xla_pool, use); }

const int pyreg_ffi_api[2] = {XLA_API_MAJOR, XLA_API_MINOR};

/* XLA asks once which version a handler is for. */
static const char *fill_in(struct xla_metadata *metadata) {
    if (metadata->struct_size < offsetof(struct xla_metadata, traits) + sizeof metadata->traits)
        return "XLA's metadata is of an older version";
    metadata->version = (struct xla_version){sizeof metadata->version, NULL, XLA_API_MAJOR, XLA_API_MINOR};
    metadata->traits = 0;
    return NULL;
}

static const char *call_op(struct xla_call_frame *frame, const struct op *op) {
    if (frame->struct_size < sizeof *frame) return "XLA's call is of an older version";
    const struct xla_extension *extension = frame->extensions;
    if (extension && extension->type == XLA_METADATA)
        return fill_in(((const struct xla_metadata_extension *)extension)->metadata);
    if (frame->stage != XLA_EXECUTE) return "the handler only executes";

    struct call call = {.operands = (buffer *)frame->operands.buffers, .results = (buffer *)frame->results.buffers};
    const char *wrong = check_buffers(&frame->operands, op->operands);
    if (!wrong) wrong = check_buffers(&frame->results, op->results);
    if (!wrong) wrong = read_attributes(&frame->attributes, op->attributes, &call);
    if (wrong) return wrong;

    /* XLA's other threads help, and nothing interrupts (signals are Python's, and this is not a thread of Python's). */
    const struct pyreg_pool pool = {schedule, frame};
    const struct pyreg_pool *before = pyreg_use_pool(atomic_load(&use_xla_pool) ? &pool : NULL);
    const bool interrupts = pyreg_allow_interrupts(false);
    wrong = op->run(&call);
    pyreg_allow_interrupts(interrupts);
    pyreg_use_pool(before);
    return wrong;
}

/* ---- Buffers ----------------------------------------------------------------------------------------------------- */

static enum pyreg_dtype dtype_of(buffer x) {
    switch (x->dtype) {
    case XLA_F32: return PYREG_F32;
    case XLA_F64: return PYREG_F64;
    case XLA_F16: return PYREG_F16;
    case XLA_BF16: return PYREG_BF16;
    default: return PYREG_NUM_DTYPES; /* refused by pyreg_* */
    }
}

static size_t bytes_of(buffer x) { return x->dtype == XLA_F64 ? 8 : x->dtype == XLA_F32 ? 4 : 2; } /* of an element */

static bool same(int64_t n, const int64_t *a, const int64_t *b) {
    return n == 0 || memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

static bool is_like(buffer a, buffer x) {
    return a->dtype == x->dtype && a->rank == x->rank && same(a->rank, a->dims, x->dims);
}

static int64_t product(int64_t n, const int64_t *dims) {
    int64_t elements = 1;
    for (int64_t d = 0; d < n; d++) elements *= dims[d];
    return elements;
}

static bool is_absent(buffer a) { return product(a->rank, a->dims) == 0; }

static int64_t last_dim(buffer a) { return a->rank > 0 ? a->dims[a->rank - 1] : -1; }

static char *at(buffer x, int64_t offset) { return (char *)x->data + offset; }

/* A number as an operand: the words of a double, low one first. */
static double number_at(const uint32_t *words) {
    const uint64_t bits = (uint64_t)words[1] << 32 | words[0];
    double number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* ---- Dropout ----------------------------------------------------------------------------------------------------- */

/* Operands: x, y: (batch..., inner...).  keys: (batch..., 2), or bits: (batch..., bytes), a packed mask; numbers:
 * (batch..., NUMBERS).  These have 1 in place of a batch dim that shares what they say.  window: (3, inner dims): how
 * many parts as long as x's lie in front of it in each dim of the array that the mask is for; and the mask's shape
 * there, low and high words, 1 for a dim along which it is broadcast.
 *
 * Version 1 has the rate as an attribute instead of numbers, and the window (2, inner dims) of int32: where x begins,
 * and the mask's shape. */

/* The rate's words, and the scale's; what is behind them is for JAX operations. */
enum { RATE_AT = 0, SCALE_AT = 2, NUMBERS = 7 };

/* The operands that say what the mask is, NULL where the op has none: keys or bits, numbers or `rate`. */
struct source {
    buffer keys, bits, numbers, window;
    int64_t generator;
    double rate;
};

/* Where the inner dims of x lie in the array that the mask is for. */
struct window {
    int64_t inner;
    uint64_t first; /* index of x's first element in the mask */
    int64_t strides[PYREG_MAX_DIMS];
    size_t elements; /* of the mask */
};

/* Returns what is wrong with the source, or NULL.  x: NULL, if it is all of the array. */
static const char *check_source(const struct source *s, buffer x, struct window *w) {
    if (s->keys && (last_dim(s->keys) != 2 || s->generator < 0 || s->generator >= PYREG_PACKED))
        return "the keys have another shape, or the generator is unknown";
    if (s->bits && s->bits->rank == 0) return "the mask's bits have another shape";
    if (s->numbers && last_dim(s->numbers) != NUMBERS) return "the numbers have another shape";

    const buffer window = s->window;
    const bool is_v1 = window->dtype == XLA_S32;
    if (window->rank != 2 || window->dims[0] != (is_v1 ? 2 : 3) || window->dims[1] > PYREG_MAX_DIMS)
        return "the window has another shape";
    const int64_t n = w->inner = window->dims[1];
    if (x && x->rank < n) return "x has fewer dims than the window";
    int64_t first[PYREG_MAX_DIMS], lengths[PYREG_MAX_DIMS] = {0}; /* for gcc, which warns */
    for (int64_t d = 0; d < n; d++) {
        if (is_v1) {
            const int32_t *integers = window->data;
            first[d] = integers[d], lengths[d] = integers[n + d];
        } else {
            const uint32_t *words = window->data;
            first[d] = x ? (int64_t)(words[d] * (uint64_t)x->dims[x->rank - n + d]) : 0;
            lengths[d] = (int64_t)((uint64_t)words[2 * n + d] << 32 | words[n + d]);
        }
    }
    if (count_elements((int)n, lengths, &w->elements) != PYREG_OK)
        return "the mask's shape in the window is negative, or has 2^63 elements or more";
    c_strides((size_t)n, lengths, 1, w->strides);
    w->first = 0;
    for (int64_t d = 0; d < n; d++) {
        if (lengths[d] == 1) w->strides[d] = 0;
        w->first += (uint64_t)first[d] * (uint64_t)w->strides[d];
    }
    return NULL;
}

/* Operands of a source have a row for each part of a batch, but one for all along a dim of 1. */
static bool has_own_row(buffer rows, int64_t d) { return rows && rows->dims[d] != 1; }

static bool rows_fit(buffer rows, int64_t batch, const int64_t *dims) {
    if (!rows) return true;
    if (rows->rank != batch + 1) return false;
    for (int64_t d = 0; d < batch; d++)
        if (has_own_row(rows, d) && rows->dims[d] != dims[d]) return false;
    return true;
}

/* From row to row along each dim of a batch that they fit. */
static void set_row_steps(buffer rows, int64_t batch, int64_t *steps) {
    if (rows) c_strides((size_t)batch, rows->dims, 1, steps);
    for (int64_t d = 0; d < batch; d++)
        if (!has_own_row(rows, d)) steps[d] = 0;
}

/* The parts of a batch with a mask of their own, in C order. */
struct parts {
    struct dim dims[PYREG_MAX_DIMS]; /* strides: in the array; from row to row of keys or bits, and of numbers */
    int num_dims;
    size_t count;
};

/* Returns whether the source's rows fit the first `batch` dims of an array with these strides, of which those with a
 * row of their own become parts (all: even the others). */
static bool set_parts(struct parts *parts, const struct source *s, int64_t batch, const int64_t *dims,
                      const int64_t *strides, bool all) {
    const buffer rows = s->keys ? s->keys : s->bits;
    if (!rows_fit(rows, batch, dims) || !rows_fit(s->numbers, batch, dims)) return false;
    int64_t steps[PYREG_MAX_DIMS], number_steps[PYREG_MAX_DIMS];
    set_row_steps(rows, batch, steps), set_row_steps(s->numbers, batch, number_steps);
    parts->num_dims = 0, parts->count = 1;
    for (int64_t d = 0; d < batch; d++)
        if (all || has_own_row(rows, d) || has_own_row(s->numbers, d)) {
            parts->count *= (size_t)dims[d];
            parts->dims[parts->num_dims++] = (struct dim){(size_t)dims[d], {strides[d], steps[d], number_steps[d]}};
        }
    return true;
}

/* The mask of a part, and its scale where the numbers say it.  Returns where the part begins in the array. */
static int64_t set_part(const struct parts *parts, size_t part, const struct source *s, struct pyreg_mask *mask,
                        double *scale) {
    int64_t place[3] = {0, 0, 0}; /* in the array, in keys or bits, in numbers */
    add_offsets(parts->dims, parts->num_dims, part, 3, place);
    mask->generator = s->keys ? (enum pyreg_generator)s->generator : PYREG_PACKED;
    mask->rate = s->rate;
    if (s->keys) {
        memcpy(mask->key, (const uint32_t *)s->keys->data + 2 * place[1], sizeof mask->key);
    } else {
        mask->num_bytes = (size_t)last_dim(s->bits);
        mask->bits = s->bits->data;
        if (mask->num_bytes) mask->bits += (size_t)place[1] * mask->num_bytes;
    }
    if (s->numbers) { /* A traced rate may be anything: as in Flax less than 0 keeps all, more than 1 nothing, and NaN */
        const uint32_t *words = (const uint32_t *)s->numbers->data + NUMBERS * place[2];
        const double rate = number_at(words + RATE_AT);
        mask->rate = rate < 0 ? 0 : rate <= 1 ? rate : 1;
        *scale = number_at(words + SCALE_AT);
    }
    return place[0];
}

/* One call of pyreg_dropout for each part of x with a mask of its own. */
static const char *dropout_each(buffer x, buffer y, const struct source *s) {
    struct window window;
    const char *wrong = check_source(s, x, &window);
    if (wrong) return wrong;
    if (dtype_of(x) == PYREG_NUM_DTYPES) return pyreg_strerror(PYREG_BAD_DTYPE);
    if (x->rank > PYREG_MAX_DIMS) return "x has another number of dims";
    if (!is_like(y, x)) return "y is not like x";
    int64_t strides[PYREG_MAX_DIMS];
    c_strides((size_t)x->rank, x->dims, bytes_of(x), strides);
    const int64_t batch = x->rank - window.inner;
    struct parts parts;
    if (!set_parts(&parts, s, batch, x->dims, strides, false))
        return "the key, the mask's bits or the numbers have batch dims that are not those of x";
    if (is_absent(x)) return NULL;
    if (window.elements == 0) return "the mask has no element, x has";

    const buffer rows = s->keys ? s->keys : s->bits;
    int64_t shape[PYREG_MAX_DIMS], x_strides[PYREG_MAX_DIMS], mask_strides[PYREG_MAX_DIMS]; /* of a part */
    int ndim = 0;
    for (int64_t d = 0; d < x->rank; d++) {
        if (d < batch && (has_own_row(rows, d) || has_own_row(s->numbers, d))) continue;
        shape[ndim] = x->dims[d], x_strides[ndim] = strides[d];
        mask_strides[ndim++] = d < batch ? 0 : window.strides[d - batch];
    }
    struct pyreg_dropout args = {.dtype = dtype_of(x), .ndim = ndim, .shape = shape, .mask_strides = mask_strides};
    args.mask.offset = window.first;
    args.scale = s->numbers ? 0 : pyreg_dropout_scale(args.dtype, s->rate);
    for (size_t part = 0; part < parts.count; part++) {
        const int64_t place = set_part(&parts, part, s, &args.mask, &args.scale);
        args.x = (struct pyreg_array){at(x, place), x_strides}, args.y = (struct pyreg_array){at(y, place), x_strides};
        const enum pyreg_status status = pyreg_dropout(&args);
        if (status != PYREG_OK) return pyreg_strerror(status);
    }
    return NULL;
}

/* The packed masks of all keys and rates, a row of bits for each. */
static const char *mask_each(buffer bits, const struct source *s) {
    struct window window;
    const char *wrong = check_source(s, NULL, &window);
    if (wrong) return wrong;
    if (bits->rank == 0 || bits->rank > PYREG_MAX_DIMS ||
        (uint64_t)last_dim(bits) != window.elements / 8 + (window.elements % 8 != 0))
        return "the bits have another shape than the mask";
    int64_t strides[PYREG_MAX_DIMS];
    c_strides((size_t)bits->rank, bits->dims, 1, strides);
    struct parts parts;
    if (!set_parts(&parts, s, bits->rank - 1, bits->dims, strides, true))
        return "the key or the numbers have batch dims that are not those of the bits";
    if (is_absent(bits)) return NULL;
    struct pyreg_mask mask = {.offset = 0};
    double scale;
    for (size_t part = 0; part < parts.count; part++) {
        const int64_t place = set_part(&parts, part, s, &mask, &scale);
        const enum pyreg_status status = pyreg_dropout_mask(&mask, window.elements, true, (uint8_t *)at(bits, place));
        if (status != PYREG_OK) return pyreg_strerror(status);
    }
    return NULL;
}

static const char *dropout(const struct call *c) {
    return dropout_each(
        c->operands[0], c->results[0],
        &(struct source){
            .keys = c->operands[1], .numbers = c->operands[2], .window = c->operands[3], .generator = c->generator});
}

static const char *dropout_packed(const struct call *c) {
    return dropout_each(c->operands[0], c->results[0],
                        &(struct source){.bits = c->operands[1], .numbers = c->operands[2], .window = c->operands[3]});
}

static const char *dropout_mask(const struct call *c) {
    return mask_each(c->results[0], &(struct source){.keys = c->operands[0],
                                                     .numbers = c->operands[1],
                                                     .window = c->operands[2],
                                                     .generator = c->generator});
}

static const char *dropout_v1(const struct call *c) {
    return dropout_each(
        c->operands[0], c->results[0],
        &(struct source){.keys = c->operands[1], .window = c->operands[2], .generator = c->generator, .rate = c->rate});
}

static const char *dropout_packed_v1(const struct call *c) {
    return dropout_each(c->operands[0], c->results[0],
                        &(struct source){.bits = c->operands[1], .window = c->operands[2], .rate = c->rate});
}

static const char *dropout_mask_v1(const struct call *c) {
    return mask_each(
        c->results[0],
        &(struct source){.keys = c->operands[0], .window = c->operands[1], .generator = c->generator, .rate = c->rate});
}

/* ---- Batch-norm --------------------------------------------------------------------------------------------------
 * All operands have the same leading batch dims, of problems of their own.  Behind them x and what is like it have the
 * array's dims, statistics and parameters one, epsilon the words of a number.  An operand without elements is absent.
 *
 * Version 1 has epsilon as an attribute, and no low part of the mean. */

enum { EPSILON_WORDS = 3 }; /* a double's, and one for JAX operations */

/* A batch of problems, and the sizes of one. */
struct problems {
    buffer x, epsilon; /* epsilon NULL: that in `common` */
    int64_t batch;
    int64_t strides[PYREG_MAX_DIMS], mask_strides[PYREG_MAX_DIMS];
    int64_t count, elements, channels;
    struct pyreg_batchnorm common;
    const char *wrong; /* what does not fit; then nothing else is to be used */
};

static void check(struct problems *p, bool fits) {
    if (!p->wrong && !fits) p->wrong = "an operand or a result does not have the shape or dtype that goes with x";
}

static bool has_row(const struct problems *p, buffer a, int64_t length) {
    return a->rank == p->batch + 1 && same(p->batch, a->dims, p->x->dims) && last_dim(a) == length;
}

/* Arrays like x; or a mask of its shape; or values per channel. */
static void check_array(struct problems *p, buffer a) { check(p, is_like(a, p->x)); }

static void check_values(struct problems *p, buffer a) {
    check(p, a->dtype == (p->x->dtype == XLA_F64 ? XLA_F64 : XLA_F32) && has_row(p, a, p->channels));
}

static void check_optional_array(struct problems *p, buffer a) {
    if (!is_absent(a)) check_array(p, a);
}

static void check_optional_mask(struct problems *p, buffer a) {
    check(p, is_absent(a) || (a->rank == p->x->rank && same(a->rank, a->dims, p->x->dims)));
}

static void check_optional_values(struct problems *p, buffer a) {
    if (!is_absent(a)) check_values(p, a);
}

/* statistic: an operand with a value per channel. */
static void set_problems(struct problems *p, const struct call *c, buffer x, buffer statistic, buffer epsilon,
                         bool relu) {
    p->x = x, p->epsilon = epsilon, p->wrong = NULL;
    p->batch = statistic->rank - 1;
    const int64_t ndim = x->rank - p->batch;
    if (dtype_of(x) == PYREG_NUM_DTYPES) {
        p->wrong = pyreg_strerror(PYREG_BAD_DTYPE);
    } else if (p->batch < 0 || ndim <= 0 || ndim > PYREG_MAX_DIMS) {
        p->wrong = "x has another number of dims";
    } else if (c->axis < 0 || c->axis >= ndim) {
        p->wrong = pyreg_strerror(PYREG_BAD_AXIS);
    } else {
        const int64_t *shape = x->dims + p->batch;
        c_strides((size_t)ndim, shape, bytes_of(x), p->strides);
        c_strides((size_t)ndim, shape, 1, p->mask_strides);
        p->channels = shape[c->axis];
        p->count = product(p->batch, x->dims), p->elements = product(ndim, shape);
        p->common = (struct pyreg_batchnorm){.dtype = dtype_of(x),
                                             .ndim = (int)ndim,
                                             .axis = (int)c->axis,
                                             .shape = shape,
                                             .epsilon = c->epsilon,
                                             .relu = relu};
        check_values(p, statistic);
        if (epsilon) check(p, has_row(p, epsilon, EPSILON_WORDS));
    }
}

/* Operands of problem i; NULL if absent. */
static char *part_of(buffer a, int64_t i, int64_t elements, size_t size) {
    return is_absent(a) ? NULL : at(a, i * elements * (int64_t)size);
}

static struct pyreg_array array(const struct problems *p, buffer a, int64_t i) {
    return (struct pyreg_array){part_of(a, i, p->elements, bytes_of(a)), p->strides};
}

static struct pyreg_array mask_array(const struct problems *p, buffer a, int64_t i) {
    return (struct pyreg_array){part_of(a, i, p->elements, 1), p->mask_strides};
}

static void *values(const struct problems *p, buffer a, int64_t i) { return part_of(a, i, p->channels, bytes_of(a)); }

static struct pyreg_batchnorm common(const struct problems *p, buffer scale, buffer bias, int64_t i) {
    struct pyreg_batchnorm common = p->common;
    common.scale = values(p, scale, i);
    if (bias) common.bias = values(p, bias, i);
    if (p->epsilon) common.epsilon = number_at((const uint32_t *)p->epsilon->data + i * EPSILON_WORDS);
    return common;
}

/* epsilon, mean_low: NULL in version 1. */
static const char *forward_each(const struct call *c, buffer x, buffer scale, buffer bias, buffer epsilon, buffer mask,
                                buffer residual, buffer y, buffer mean, buffer mean_low, buffer var) {
    struct problems p;
    set_problems(&p, c, x, mean, epsilon, c->relu != 0);
    if (p.wrong) return p.wrong;
    check_optional_values(&p, scale), check_optional_values(&p, bias);
    check_optional_mask(&p, mask), check_optional_array(&p, residual);
    check_optional_array(&p, y), check_values(&p, var);
    if (mean_low) check_values(&p, mean_low);
    if (p.wrong) return p.wrong;
    for (int64_t i = 0; i < p.count; i++) {
        const struct pyreg_batchnorm_forward args = {.common = common(&p, scale, bias, i),
                                                     .x = array(&p, x, i),
                                                     .mask = mask_array(&p, mask, i),
                                                     .residual = array(&p, residual, i),
                                                     .y = array(&p, y, i),
                                                     .mean = values(&p, mean, i),
                                                     .mean_low = mean_low ? values(&p, mean_low, i) : NULL,
                                                     .var = values(&p, var, i)};
        const enum pyreg_status status = pyreg_batchnorm_forward(&args);
        if (status != PYREG_OK) return pyreg_strerror(status);
    }
    return NULL;
}

/* operands: dy, dmean, dvar, x, mean, var, scale; results: dx, dscale, dbias, dresidual. */
static const char *backward_each(const struct call *c, buffer epsilon, buffer mask, buffer y) {
    const buffer dy = c->operands[0], dmean = c->operands[1], dvar = c->operands[2], x = c->operands[3];
    const buffer mean = c->operands[4], var = c->operands[5], scale = c->operands[6];
    const buffer dx = c->results[0], dscale = c->results[1], dbias = c->results[2], dresidual = c->results[3];
    struct problems p;
    set_problems(&p, c, x, mean, epsilon, !is_absent(y));
    if (p.wrong) return p.wrong;
    check_array(&p, dy), check_optional_array(&p, y), check_array(&p, dx), check_optional_array(&p, dresidual);
    check_optional_values(&p, dmean), check_optional_values(&p, dvar), check_values(&p, var);
    check_optional_values(&p, scale), check_values(&p, dscale), check_values(&p, dbias), check_optional_mask(&p, mask);
    if (p.wrong) return p.wrong;
    for (int64_t i = 0; i < p.count; i++) {
        const struct pyreg_batchnorm_backward args = {.common = common(&p, scale, NULL, i),
                                                      .dy = array(&p, dy, i),
                                                      .x = array(&p, x, i),
                                                      .mask = mask_array(&p, mask, i),
                                                      .y = array(&p, y, i),
                                                      .dx = array(&p, dx, i),
                                                      .dresidual = array(&p, dresidual, i),
                                                      .mean = values(&p, mean, i),
                                                      .var = values(&p, var, i),
                                                      .dmean = values(&p, dmean, i),
                                                      .dvar = values(&p, dvar, i),
                                                      .dscale = values(&p, dscale, i),
                                                      .dbias = values(&p, dbias, i)};
        const enum pyreg_status status = pyreg_batchnorm_backward(&args);
        if (status != PYREG_OK) return pyreg_strerror(status);
    }
    return NULL;
}

static const char *batch_norm_forward(const struct call *c) {
    const buffer *in = c->operands, *out = c->results;
    return forward_each(c, in[0], in[1], in[2], in[3], in[4], in[5], out[0], out[1], out[2], out[3]);
}

static const char *batch_norm_backward(const struct call *c) {
    return backward_each(c, c->operands[7], c->operands[8], c->operands[9]);
}

static const char *batch_norm_forward_v1(const struct call *c) {
    const buffer *in = c->operands, *out = c->results;
    return forward_each(c, in[0], in[1], in[2], NULL, in[3], in[4], out[0], out[1], NULL, out[2]);
}

static const char *batch_norm_backward_v1(const struct call *c) {
    return backward_each(c, NULL, c->operands[7], c->operands[8]);
}

/* ---- Handlers: XLA gives them no context, so each op has a function of its own ----------------------------------- */

#define HANDLER(name, operands, results, attributes)                                                                   \
    static struct xla_error *handle_##name(struct xla_call_frame *frame) {                                             \
        static const struct op op = {name, operands, results, attributes};                                             \
        return error_of(frame, call_op(frame, &op));                                                                   \
    }
HANDLER(dropout, "xwww", "x", GENERATOR)
HANDLER(dropout_mask, "www", "b", GENERATOR)
HANDLER(dropout_packed, "xbww", "x", 0)
HANDLER(batch_norm_forward, "xxxwmx", "xxxx", AXIS | RELU)
HANDLER(batch_norm_backward, "xxxxxxxwmx", "xxxx", AXIS)
HANDLER(dropout_v1, "xwi", "x", GENERATOR | RATE)
HANDLER(dropout_mask_v1, "wi", "b", GENERATOR | RATE)
HANDLER(dropout_packed_v1, "xbi", "x", RATE)
HANDLER(batch_norm_forward_v1, "xxxmx", "xxx", AXIS | EPSILON | RELU)
HANDLER(batch_norm_backward_v1, "xxxxxxxmx", "xxxx", AXIS | EPSILON)

const struct pyreg_ffi_handler pyreg_ffi_handlers[] = {
    {"pyreg_dropout_v2", (void *)handle_dropout},
    {"pyreg_dropout_mask_v2", (void *)handle_dropout_mask},
    {"pyreg_dropout_packed_v2", (void *)handle_dropout_packed},
    {"pyreg_batch_norm_forward_v2", (void *)handle_batch_norm_forward},
    {"pyreg_batch_norm_backward_v2", (void *)handle_batch_norm_backward},
    {"pyreg_dropout_v1", (void *)handle_dropout_v1},
    {"pyreg_dropout_mask_v1", (void *)handle_dropout_mask_v1},
    {"pyreg_dropout_packed_v1", (void *)handle_dropout_packed_v1},
    {"pyreg_batch_norm_forward_v1", (void *)handle_batch_norm_forward_v1},
    {"pyreg_batch_norm_backward_v1", (void *)handle_batch_norm_backward_v1},
    {NULL, NULL},
};
