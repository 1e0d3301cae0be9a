/* XLA's handlers, for sanitizers: calls as XLA makes them, with operands that fit, or of any dtype and shape.  A call that
 * does not fit must be refused, and no call may touch a byte outside of its buffers: each is allocated for itself.
 *
 * Exit status 0 and no report: passed; 2: this machine lacks the instruction set. */
#include "ffi.h"
#include "pyreg.h"
#include "xla.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 10, MOST_DIMS = 70, CALLS = 20000 };

static int failures, refused, taken;

static void expect(bool ok, const char *what) {
    if (ok) return;
    failures++;
    fprintf(stderr, "failed: %s\n", what);
}

static uint64_t state = 1;

static int64_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)n);
}

/* ---- XLA's side ---- */
static struct xla_error *create(struct xla_error_create_args *args) {
    expect(args->message && args->code == XLA_INVALID_ARGUMENT, "an error has a message");
    return malloc(1);
}
static void destroy(struct xla_error_destroy_args *args) { free(args->error); }
static struct xla_error *schedule(struct xla_schedule_args *args) {
    if (below(2)) return malloc(1); /* no pool */
    args->task(args->argument);
    return NULL;
}
static const struct xla_api api = {
    .struct_size = sizeof api, .error_create = create, .error_destroy = destroy, .schedule = schedule};

struct frame {
    struct xla_call_frame frame;
    struct xla_buffer buffers[2][MOST], *pointers[2][MOST];
    int64_t dims[2][MOST][MOST_DIMS], integers[4];
    double number;
    int types[MOST];
    struct xla_scalar scalars[4];
    struct xla_span names[4];
    const struct xla_span *name_pointers[4];
    enum xla_attribute_type attribute_types[4];
    void *values[4];
};

static size_t bytes_of(enum xla_dtype dtype) {
    switch (dtype) {
    case XLA_PRED:
    case XLA_U8: return 1;
    case XLA_F16:
    case XLA_BF16: return 2;
    case XLA_S32:
    case XLA_U32:
    case XLA_F32: return 4;
    default: return 8;
    }
}

static void set_buffer(struct frame *f, int side, int i, enum xla_dtype dtype, int rank, const int64_t *dims) {
    struct xla_buffer *b = &f->buffers[side][i];
    *b = (struct xla_buffer){sizeof *b, NULL, dtype, NULL, rank, f->dims[side][i]};
    for (int d = 0; d < rank; d++) f->dims[side][i][d] = dims[d];
    f->pointers[side][i] = b;
}

static void add_attribute(struct frame *f, const char *name, enum xla_dtype dtype, const void *value) {
    const int i = (int)f->frame.attributes.count++;
    f->scalars[i] = (struct xla_scalar){dtype, value};
    f->names[i] = (struct xla_span){name, strlen(name)}, f->name_pointers[i] = &f->names[i];
    f->attribute_types[i] = XLA_SCALAR, f->values[i] = &f->scalars[i];
}

static bool is(const char *name, const char *part) { return strstr(name, part) != NULL; }

/* A call of a handler that fits: x is (3, 4, 6), its last two dims the window's or the problem's. */
static void set_up(struct frame *f, const char *name) {
    *f = (struct frame){0};
    const bool v1 = is(name, "_v1"), packed = is(name, "packed"), mask = is(name, "mask"), norm = is(name, "batch");
    const int64_t x[] = {3, 4, 6}, keys[] = {3, 2}, bits[] = {3, 3}, numbers[] = {1, 7}, words[] = {v1 ? 2 : 3, 2};
    const int64_t per_channel[] = {3, 6}, epsilon[] = {3, 3};
    static const enum xla_dtype floats[] = {XLA_F32, XLA_F64, XLA_F16, XLA_BF16};
    const enum xla_dtype dtype = floats[below(4)], statistics = dtype == XLA_F64 ? XLA_F64 : XLA_F32;
    int in = 0, out = 0;
    f->number = 0.5, f->integers[1] = 1;
    if (!norm) {
        if (!mask) set_buffer(f, 0, in++, dtype, 3, x);
        if (packed)
            set_buffer(f, 0, in++, XLA_U8, 2, bits);
        else
            set_buffer(f, 0, in++, XLA_U32, 2, keys);
        if (!v1) set_buffer(f, 0, in++, XLA_U32, 2, numbers);
        set_buffer(f, 0, in++, v1 ? XLA_S32 : XLA_U32, 2, words);
        if (mask)
            set_buffer(f, 1, out++, XLA_U8, 2, bits);
        else
            set_buffer(f, 1, out++, dtype, 3, x);
        if (!packed) add_attribute(f, "generator", XLA_S64, &f->integers[0]);
        if (v1) add_attribute(f, "rate", XLA_F64, &f->number);
    } else {
        const char *kinds = is(name, "forward") ? "xcc.mx" : "xccxccc.mx"; /* c: per channel; .: epsilon */
        for (const char *kind = kinds; *kind; kind++) {
            if (*kind == 'x') set_buffer(f, 0, in++, dtype, 3, x);
            if (*kind == 'c') set_buffer(f, 0, in++, statistics, 2, per_channel);
            if (*kind == 'm') set_buffer(f, 0, in++, XLA_PRED, 3, x);
            if (*kind == '.' && !v1) set_buffer(f, 0, in++, XLA_U32, 2, epsilon);
        }
        const char *results = is(name, "backward") ? "xccx" : v1 ? "xcc" : "xccc";
        for (; *results; results++)
            if (*results == 'x')
                set_buffer(f, 1, out++, dtype, 3, x);
            else
                set_buffer(f, 1, out++, statistics, 2, per_channel);
        add_attribute(f, "axis", XLA_S64, &f->integers[1]);
        if (v1) add_attribute(f, "epsilon", XLA_F64, &f->number);
        if (is(name, "forward")) add_attribute(f, "relu", XLA_PRED, &f->integers[0]);
    }
    struct xla_call_frame *frame = &f->frame;
    frame->struct_size = sizeof *frame, frame->api = &api, frame->stage = XLA_EXECUTE;
    frame->operands = (struct xla_buffers){sizeof frame->operands, NULL, in, f->types, f->pointers[0]};
    frame->results = (struct xla_buffers){sizeof frame->results, NULL, out, f->types, f->pointers[1]};
    frame->attributes.types = f->attribute_types, frame->attributes.names = f->name_pointers;
    frame->attributes.values = f->values;
}

/* Something that XLA may say of a program that was never checked. */
static void damage(struct frame *f) {
    static const enum xla_dtype dtypes[] = {XLA_PRED, XLA_S32, XLA_S64, XLA_U8,  XLA_U32,
                                            XLA_F16,  XLA_F32, XLA_F64, XLA_BF16};
    static const int64_t lengths[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 100};
    struct xla_call_frame *frame = &f->frame;
    const int side = below(4) == 0;
    int64_t count = 0;
    while (count < MOST && f->pointers[side][count]) count++;
    const int i = (int)below(count);
    struct xla_buffer *b = &f->buffers[side][i];
    int64_t *dims = f->dims[side][i];
    switch (below(8)) {
    case 0: b->dtype = dtypes[below(9)]; break;
    case 1: b->rank = below(5); break; /* what was not set is 0 */
    case 2:
        b->rank = below(MOST_DIMS);
        for (int64_t d = 0; d < b->rank; d++) dims[d] = 1;
        break;
    case 3: frame->operands.count = below(frame->operands.count + 1); break;
    case 4: frame->attributes.count = below(frame->attributes.count + 1); break;
    case 5: f->integers[below(2)] = below(9) - 4; break;
    case 6: f->number = (double)below(5) - 1; break;
    default:
        if (b->rank) dims[below(b->rank)] = lengths[below(10)];
    }
}

static void allocate(struct frame *f, bool any_words) {
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < MOST && f->pointers[side][i]; i++) {
            struct xla_buffer *b = f->pointers[side][i];
            size_t n = bytes_of(b->dtype);
            for (int64_t d = 0; d < b->rank; d++) n *= (size_t)b->dims[d];
            b->data = n ? malloc(n) : NULL;
            if (n) memset(b->data, 1, n);
            if (n < 16 || (b->dtype != XLA_U32 && b->dtype != XLA_S32)) continue;
            for (size_t w = 0; w < n / 4; w++) /* a window, keys or numbers */
                ((uint32_t *)b->data)[w] = any_words ? (uint32_t)below((int64_t)1 << (1 + below(32)))
                                                     : (w == 2   ? 4
                                                        : w == 3 ? 6
                                                                 : 0);
        }
}

static void release(struct frame *f) {
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < MOST; i++) free(f->buffers[side][i].data);
}

static bool call(const struct pyreg_ffi_handler *handler, struct frame *f) {
    struct xla_error *(*run)(struct xla_call_frame *) =
        (struct xla_error * (*)(struct xla_call_frame *)) handler->handler;
    struct xla_error *error = run(&f->frame);
    free(error);
    return !error;
}

int main(void) {
    if (pyreg_init() != PYREG_OK) return 2;
    static struct frame f;
    for (const struct pyreg_ffi_handler *handler = pyreg_ffi_handlers; handler->name; handler++) {
        set_up(&f, handler->name);
        allocate(&f, false);
        expect(call(handler, &f), handler->name);
        f.frame.stage = (enum xla_stage)0;
        expect(!call(handler, &f), "another stage");
        struct xla_metadata metadata = {.struct_size = sizeof metadata};
        struct xla_metadata_extension extension = {{sizeof extension, XLA_METADATA, NULL}, &metadata};
        f.frame.extensions = &extension.head;
        expect(call(handler, &f) && metadata.version.minor == pyreg_ffi_api[1], "the version");
        f.frame.struct_size = 8;
        expect(!call(handler, &f), "a short call");
        release(&f);
        for (int i = 0; i < CALLS; i++) {
            set_up(&f, handler->name);
            for (int64_t j = below(3); j >= 0; j--) damage(&f);
            allocate(&f, below(2));
            *(call(handler, &f) ? &taken : &refused) += 1;
            release(&f);
        }
    }
    printf("%d calls refused, %d taken, %d failures\n", refused, taken, failures);
    expect(refused > taken / 2 && taken > CALLS / 2, "some of both");
    return failures != 0;
}
