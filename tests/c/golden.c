/* Hashes of masks, dropout and batch-norm of fixed inputs: the same on every machine.
 *
 *   golden > tests/data/golden.txt       after a change that CHANGELOG tells of
 *   golden tests/data/golden.txt         what differs from it; exit status 1 if anything does
 *
 * PYREG_ISA chooses the instruction set; exit status 2: this machine lacks it. */
#include "pyreg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const dtype_names[PYREG_NUM_DTYPES] = {"float32", "float64", "float16", "bfloat16"};
static const char *const generator_names[PYREG_PACKED] = {"philox", "threefry", "threefry_x64"};
static const size_t size_of[PYREG_NUM_DTYPES] = {4, 8, 2, 2};

/* ---- Inputs ------------------------------------------------------------------------------------------------------ */

static uint64_t state;
static uint32_t next_random(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Numbers in (-2, 2) of which each dtype holds all digits. */
static void fill(enum pyreg_dtype dtype, char *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = next_random();
        const float f = (float)((int)(u % 255) - 127) / 64;
        const double d = (double)f;
        uint32_t bits;
        memcpy(&bits, &f, 4);
        const uint32_t sign = bits >> 16 & 0x8000;
        const uint32_t f16 = f == 0 ? 0 : (bits >> 13 & 0x3ff) | ((bits >> 23 & 0xff) - 112) << 10;
        const uint16_t half = (uint16_t)(sign | (dtype == PYREG_BF16 ? bits >> 16 & 0x7fff : f16));
        const void *from = dtype == PYREG_F64 ? (const void *)&d : dtype == PYREG_F32 ? (const void *)&f : &half;
        memcpy(x + i * size_of[dtype], from, size_of[dtype]);
    }
}

static void *fresh(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p) abort();
    return p;
}

static void *filled(enum pyreg_dtype dtype, size_t n) {
    char *x = fresh(n * size_of[dtype]);
    fill(dtype, x, n);
    return x;
}

/* ---- Lines ------------------------------------------------------------------------------------------------------- */

static FILE *wanted; /* or NULL: print */
static int differ;

/* FNV-1a of elements of `size` bytes, of each the least significant byte first. */
static uint64_t hash(uint64_t h, const void *p, size_t bytes, size_t size) {
    const size_t reversed = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? size - 1 : 0;
    for (size_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)p)[i ^ reversed]) * 1099511628211u;
    return h;
}
static const uint64_t empty = 14695981039346656037u;

static void report(const char *name, uint64_t h) {
    char line[200], want[200];
    snprintf(line, sizeof line, "%s %016llx\n", name, (unsigned long long)h);
    if (!wanted) {
        fputs(line, stdout);
    } else if (!fgets(want, sizeof want, wanted) || strcmp(line, want)) {
        fprintf(stderr, "on %s: %s", pyreg_isa_name(), line);
        differ = 1;
    }
}

static void must(enum pyreg_status status) {
    if (status == PYREG_OK) return;
    fprintf(stderr, "%s\n", pyreg_strerror(status));
    exit(3);
}

/* ---- Layouts of three dims: strides of x in elements, the first element, and how many there are ------------------ */

struct layout {
    const char *name;
    int64_t strides[3];
    size_t first, length;
};

enum { NUM_LAYOUTS = 4 };

static struct layout layout_of(int which, const int64_t *n) {
    const size_t all = (size_t)(n[0] * n[1] * n[2]);
    const struct layout layouts[NUM_LAYOUTS] = {
        {"rows", {n[1] * n[2], n[2], 1}, 0, all},
        {"columns", {1, n[0], n[0] * n[1]}, 0, all},
        {"steps", {2 * n[1] * n[2] + 6, 2 * n[2], 2}, 0, 2 * all + 6 * (size_t)n[0]},
        {"backwards", {-n[1] * n[2], n[2], -1}, (size_t)((n[0] - 1) * n[1] * n[2] + n[2] - 1), all},
    };
    return layouts[which];
}

static void in_bytes(enum pyreg_dtype dtype, const struct layout *l, int64_t strides[3]) {
    for (int d = 0; d < 3; d++) strides[d] = l->strides[d] * (int64_t)size_of[dtype];
}

/* ---- Ops --------------------------------------------------------------------------------------------------------- */

static const double rates[] = {0.5, 0.1, 0.999, 0x1p-20, 1. / 3};
enum { NUM_RATES = sizeof rates / sizeof rates[0] };

static void masks(size_t n) {
    for (int g = 0; g < PYREG_PACKED; g++)
        for (int k = 0; k < NUM_RATES; k++) {
            static const uint64_t offsets[] = {0, 0x7fffffc1, 0xffffff85, 0x7fffffffffffff03, 12345678901234567};
            const struct pyreg_mask mask = {
                .generator = (enum pyreg_generator)g,
                .key = {0x9e3779b9 * (uint32_t)k, 7},
                .rate = rates[k],
                .offset = offsets[k],
            };
            uint8_t *bytes = fresh(n), *packed = fresh((n + 7) / 8);
            must(pyreg_dropout_mask(&mask, n, false, bytes));
            must(pyreg_dropout_mask(&mask, n, true, packed));
            char name[100];
            snprintf(name, sizeof name, "mask %zu %s %g", n, generator_names[g], rates[k]);
            report(name, hash(hash(empty, bytes, n, 1), packed, (n + 7) / 8, 1));
            free(bytes), free(packed);
        }
}

static void dropout(enum pyreg_dtype dtype, const int64_t *shape) {
    for (int g = 0; g < PYREG_PACKED; g++)
        for (int which = 0; which < NUM_LAYOUTS; which++) {
            const struct layout l = layout_of(which, shape);
            const size_t size = size_of[dtype];
            int64_t strides[3];
            in_bytes(dtype, &l, strides);
            uint64_t h = empty;
            for (int shared = 0; shared < 3; shared++) { /* 2: along the last dim; 1: along the first */
                const int64_t by_first[3] = {0, shape[2], 1}, by_last[3] = {shape[1], 1, 0};
                const int64_t *const mask_strides = shared == 0 ? NULL : shared == 1 ? by_first : by_last;
                const double rate = rates[(which + shared) % NUM_RATES];
                char *x = filled(dtype, l.length);
                const struct pyreg_dropout args = {
                    .dtype = dtype,
                    .ndim = 3,
                    .shape = shape,
                    .mask = {.generator = (enum pyreg_generator)g, .key = {1, 2}, .rate = rate, .offset = 99},
                    .scale = shared != 1 ? pyreg_dropout_scale(dtype, rate) : 1,
                    .x = {x + l.first * size, strides},
                    .y = {x + l.first * size, strides},
                    .mask_strides = mask_strides,
                };
                must(pyreg_dropout(&args));
                h = hash(h, x, l.length * size, size);
                free(x);
            }
            char name[100];
            snprintf(name, sizeof name, "dropout %s %s (%d, %d, %d) in %s", dtype_names[dtype], generator_names[g],
                     (int)shape[0], (int)shape[1], (int)shape[2], l.name);
            report(name, h);
        }
}

static void batchnorm(enum pyreg_dtype dtype, const int64_t *shape) {
    for (int which = 0; which < NUM_LAYOUTS; which++)
        for (int option = 0; option < 4; option++) {
            const bool relu = option & 1, masked = option & 2;
            const struct layout l = layout_of(which, shape);
            const size_t size = size_of[dtype], channels = (size_t)shape[1];
            const enum pyreg_dtype of_statistics = dtype == PYREG_F64 ? PYREG_F64 : PYREG_F32;
            const size_t bytes = channels * size_of[of_statistics];
            int64_t strides[3];
            in_bytes(dtype, &l, strides);
            char *x = filled(dtype, l.length), *dy = filled(dtype, l.length), *residual = filled(dtype, l.length);
            char *y = fresh(l.length * size), *dx = fresh(l.length * size), *dresidual = fresh(l.length * size);
            void *scale = filled(of_statistics, channels), *bias = filled(of_statistics, channels);
            void *mean = fresh(bytes), *var = fresh(bytes), *dscale = fresh(bytes), *dbias = fresh(bytes);
            bool *mask = fresh((size_t)shape[0] * channels);
            for (size_t i = 0; i < (size_t)shape[0] * channels; i++) mask[i] = i < channels || next_random() % 4;
            const int64_t mask_strides[3] = {shape[1], 1, 0};
            const struct pyreg_batchnorm common = {
                .dtype = dtype,
                .ndim = 3,
                .axis = 1,
                .shape = shape,
                .epsilon = 0x1p-10,
                .relu = relu,
                .scale = scale,
                .bias = bias,
            };
            const size_t at = l.first * size;
            const struct pyreg_batchnorm_forward forward = {
                .common = common,
                .x = {x + at, strides},
                .mask = {masked ? mask : NULL, mask_strides},
                .residual = {relu ? residual + at : NULL, strides},
                .y = {y + at, strides},
                .mean = mean,
                .var = var,
            };
            must(pyreg_batchnorm_forward(&forward));
            const struct pyreg_batchnorm_backward backward = {
                .common = common,
                .dy = {dy + at, strides},
                .x = forward.x,
                .mask = forward.mask,
                .y = forward.y,
                .dx = {dx + at, strides},
                .dresidual = {relu ? dresidual + at : NULL, strides},
                .mean = mean,
                .var = var,
                .dscale = dscale,
                .dbias = dbias,
            };
            must(pyreg_batchnorm_backward(&backward));
            uint64_t h = empty;
            for (int k = 0; k < 3; k++) h = hash(h, (char *[]){y, dx, dresidual}[k], l.length * size, size);
            for (int k = 0; k < 4; k++)
                h = hash(h, (void *[]){mean, var, dscale, dbias}[k], bytes, size_of[of_statistics]);
            const struct pyreg_batchnorm_inference inference = {
                .common = common,
                .x = forward.x,
                .residual = forward.residual,
                .y = forward.x,
                .mean = mean,
                .var = var,
            };
            must(pyreg_batchnorm_inference(&inference));
            h = hash(h, x, l.length * size, size);
            char name[100];
            snprintf(name, sizeof name, "batchnorm %s (%d, %d, %d) in %s%s%s", dtype_names[dtype], (int)shape[0],
                     (int)shape[1], (int)shape[2], l.name, masked ? ", masked" : "", relu ? ", relu" : "");
            report(name, h);
            void *all[] = {x, dy, residual, y, dx, dresidual, scale, bias, mean, var, dscale, dbias, mask};
            for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) free(all[k]);
        }
}

int main(int count, char **arguments) {
    static const int64_t shapes[][3] = {{3, 5, 7}, {2, 3, 1100}, {70, 33, 1}, {9, 40, 17}, {600, 2, 5}};
    if (pyreg_init() != PYREG_OK) return 2;
    if (count > 1 && !(wanted = fopen(arguments[1], "r"))) {
        perror(arguments[1]);
        return 3;
    }
    masks(1), masks(1003), masks(9001);
    for (enum pyreg_dtype dtype = 0; dtype < PYREG_NUM_DTYPES; dtype++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            state = s;
            dropout(dtype, shapes[s]);
            batchnorm(dtype, shapes[s]);
        }
    if (wanted) fclose(wanted);
    return differ;
}
