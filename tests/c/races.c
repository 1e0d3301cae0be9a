/* Several threads that call at once, each with threads of its own, while others set the number of threads and interrupt:
 * every result that is not interrupted is that of one thread alone.  For ThreadSanitizer, which tells of races.
 *
 *   races [rounds]       exit status 0 and no report: passed; 2: this machine lacks the instruction set */
#include "pyreg.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLERS = 4, KINDS = 5, ROWS = 6000, CHANNELS = 33, N = ROWS * CHANNELS };

static const int64_t strides[2] = {4 * CHANNELS, 4};
static float x[N], dy[N];

struct results {
    float y[N], dx[N], mean[CHANNELS], var[CHANNELS], dscale[CHANNELS], dbias[CHANNELS];
    uint8_t mask[N];
};

/* One call of some kind, on so many rows. */
static enum pyreg_status call(int kind, int64_t rows, struct results *r) {
    const int64_t part[2] = {rows, CHANNELS};
    const enum pyreg_generator generator = kind == 1 ? PYREG_THREEFRY : PYREG_PHILOX;
    const struct pyreg_dropout dropout = {
        .dtype = PYREG_F32,
        .ndim = 2,
        .shape = part,
        .mask = {.generator = generator, .key = {3, (uint32_t)rows}, .rate = 0.3, .offset = 5},
        .scale = pyreg_dropout_scale(PYREG_F32, 0.3),
        .x = {x, strides},
        .y = {r->y, strides},
    };
    const struct pyreg_batchnorm_forward forward = {
        .common = {.dtype = PYREG_F32, .ndim = 2, .axis = 1, .shape = part, .epsilon = 1e-5},
        .x = {x, strides},
        .y = {r->y, strides},
        .mean = r->mean,
        .var = r->var,
    };
    const struct pyreg_batchnorm_backward backward = {
        .common = forward.common,
        .dy = {dy, strides},
        .x = forward.x,
        .dx = {r->dx, strides},
        .mean = r->mean,
        .var = r->var,
        .dscale = r->dscale,
        .dbias = r->dbias,
    };
    if (kind < 2) return pyreg_dropout(&dropout);
    if (kind == 2) return pyreg_dropout_mask(&dropout.mask, (size_t)(rows * CHANNELS), rows % 2, r->mask);
    const enum pyreg_status status = pyreg_batchnorm_forward(&forward);
    return kind == 3 || status != PYREG_OK ? status : pyreg_batchnorm_backward(&backward);
}

static const int64_t sizes[] = {1, 40, 2500, ROWS};
enum { SIZES = sizeof sizes / sizeof sizes[0] };
static struct results *wanted[KINDS][SIZES];

static int rounds = 100;
static atomic_int wrong, interrupted;
static atomic_bool done;
static _Thread_local unsigned asked;

static bool interrupt_now_and_then(void) { return ++asked % 3 == 0; }

static void *caller(void *number) {
    unsigned random = (unsigned)(uintptr_t)number;
    struct results *r = malloc(sizeof *r);
    pyreg_use_threads((int)(random % 3) * 2); /* 0: as the process */
    pyreg_allow_interrupts(random % 2);
    for (int i = 0; i < rounds; i++) {
        random = random * 1664525u + 1013904223u;
        const unsigned kind = (random >> 8) % KINDS, size = (random >> 16) % SIZES;
        memset(r, 0, sizeof *r);
        const enum pyreg_status status = call((int)kind, sizes[size], r);
        if (status == PYREG_INTERRUPTED)
            atomic_fetch_add(&interrupted, 1);
        else if (status || memcmp(r, wanted[kind][size], sizeof *r))
            atomic_fetch_add(&wrong, 1);
    }
    free(r);
    return NULL;
}

static void *meddler(void *unused) {
    (void)unused;
    for (int n = 0; !atomic_load(&done); n = (n + 1) % 6) {
        pyreg_set_num_threads(n);
        pyreg_set_parallel_from(n % 2 ? 0 : 1e3);
        pyreg_set_cache_bytes(n == 3 ? 1 : 0);
        pyreg_set_interrupt_check(n % 3 ? interrupt_now_and_then : NULL);
        if (pyreg_get_num_threads() < 1) atomic_fetch_add(&wrong, 1);
    }
    return NULL;
}

int main(int count, char **arguments) {
    if (pyreg_init() != PYREG_OK) return 2;
    if (count > 1) rounds = atoi(arguments[1]);
    for (int i = 0; i < N; i++) x[i] = (float)(i * 37 % 501 - 250) / 64, dy[i] = (float)(i * 53 % 401 - 200) / 32;
    pyreg_set_num_threads(1);
    for (int kind = 0; kind < KINDS; kind++)
        for (int s = 0; s < SIZES; s++) {
            wanted[kind][s] = calloc(1, sizeof *wanted[kind][s]);
            if (call(kind, sizes[s], wanted[kind][s])) return 1;
        }
    pthread_t callers[CALLERS], other;
    pthread_create(&other, NULL, meddler, NULL);
    for (uintptr_t i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, caller, (void *)i);
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL);
    atomic_store(&done, true);
    pthread_join(other, NULL);
    for (int kind = 0; kind < KINDS; kind++)
        for (int s = 0; s < SIZES; s++) free(wanted[kind][s]);
    if (wrong) fprintf(stderr, "%d calls gave other results on %s\n", wrong, pyreg_isa_name());
    return wrong != 0;
}
