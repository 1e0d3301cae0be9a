/* 16 KB of stack are enough: calls with as many dims as there may be, on a stack that was painted before.
 *
 * Exit status 0: passed; 2: this machine lacks the instruction set, or a sanitizer wants stack of its own. */
#include "pyreg.h"
#include "sanitizers.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROMISED = 16384, STACK = 1 << 18, PAINT = 0xa5, LONG = 22, SIZE = 1 << LONG, AXIS = 20 };

static int64_t shape[PYREG_MAX_DIMS], forwards[PYREG_MAX_DIMS], backwards[PYREG_MAX_DIMS], bytes[PYREG_MAX_DIMS];
static char x[8 * SIZE], y[8 * SIZE], z[8 * SIZE], mask[SIZE];
static double statistics[6][2];
static int kind;
static enum pyreg_dtype dtype;
static char *entry;

/* LONG dims of 2 among those of 1, in C order; or the other way round. */
static void set_strides(int64_t size) {
    for (int d = 0, k = 0; d < PYREG_MAX_DIMS; d++) {
        const bool is_long = d % 2 == 0 && d < 2 * LONG;
        shape[d] = is_long ? 2 : 1;
        forwards[d] = is_long ? size << (LONG - 1 - k) : size;
        backwards[d] = is_long ? size << k++ : size;
        bytes[d] = forwards[d] / size;
    }
}

static void *call(void *status) {
    entry = __builtin_frame_address(0);
    const struct pyreg_dropout dropout = {.dtype = dtype,
                                          .ndim = PYREG_MAX_DIMS,
                                          .shape = shape,
                                          .scale = 1.5,
                                          .mask = {.generator = PYREG_THREEFRY, .key = {1, 2}, .rate = 0.3},
                                          .x = {x, backwards},
                                          .y = {y, forwards}};
    const struct pyreg_batchnorm norm = {
        .dtype = dtype, .ndim = PYREG_MAX_DIMS, .axis = AXIS, .shape = shape, .epsilon = 1e-5, .relu = true};
    const struct pyreg_batchnorm_forward forward = {
        .common = norm, .x = {x, forwards}, .y = {y, backwards}, .mean = statistics[0], .var = statistics[1]};
    const struct pyreg_batchnorm_backward backward = {.common = norm,
                                                      .dy = {x, forwards},
                                                      .x = {x, forwards},
                                                      .y = {y, forwards},
                                                      .dx = {z, backwards},
                                                      .mask = {mask, bytes},
                                                      .dresidual = {y, forwards},
                                                      .mean = statistics[2],
                                                      .var = statistics[3],
                                                      .dscale = statistics[4],
                                                      .dbias = statistics[5]};
    *(enum pyreg_status *)status = kind == 0   ? pyreg_dropout(&dropout)
                                   : kind == 1 ? pyreg_batchnorm_forward(&forward)
                                               : pyreg_batchnorm_backward(&backward);
    return NULL;
}

int main(void) {
    static const int64_t sizes[PYREG_NUM_DTYPES] = {4, 8, 2, 2};
    if (pyreg_init() != PYREG_OK || UNDER_ADDRESS_SANITIZER || UNDER_THREAD_SANITIZER) return 2;
    pyreg_set_num_threads(2);
    memset(mask, 1, sizeof mask);
    int failures = 0;
    for (dtype = 0; dtype < PYREG_NUM_DTYPES; dtype++)
        for (kind = 0; kind < 3; kind++) {
            char *stack = aligned_alloc(4096, STACK);
            memset(stack, PAINT, STACK);
            set_strides(sizes[dtype]);
            enum pyreg_status status = PYREG_NO_MEMORY;
            pthread_attr_t attributes;
            pthread_t thread;
            pthread_attr_init(&attributes);
            if (pthread_attr_setstack(&attributes, stack, STACK) || pthread_create(&thread, &attributes, call, &status))
                return 1;
            pthread_join(thread, NULL);
            const char *end = stack;
            while ((unsigned char)*end == PAINT) end++;
            const bool ok = status == PYREG_OK && entry - end <= PROMISED;
            if (!ok)
                fprintf(stderr, "failed: dtype %d, call %d: %s, %td bytes\n", (int)dtype, kind, pyreg_strerror(status),
                        entry - end);
            failures += !ok;
            if (getenv("VERBOSE")) printf("dtype %d, call %d: %td bytes\n", (int)dtype, kind, entry - end);
            free(stack);
        }
    return failures != 0;
}
