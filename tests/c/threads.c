/* The C library alone, for sanitizers: many threads that call at once, with different numbers of threads, with its pool,
 * with OpenMP's teams and with another pool, are stopped, and fork in the midst of calls.
 *
 *   cmake -B build/san -DPYREG_SANITIZE=thread && cmake --build build/san && ctest --test-dir build/san
 *
 * Exit status 0 and no report: passed; 2: this machine lacks the instruction set. */
#include "pyreg.h"
#include "sanitizers.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALLERS = 8, ROUNDS = 30, N = 4000, CHANNELS = 50, SIZE = N * CHANNELS };

static float x[SIZE], want_dropout[SIZE], want_norm[SIZE];
static atomic_int failures;

static void expect(bool ok, const char *what) {
    if (ok) return;
    atomic_fetch_add(&failures, 1);
    fprintf(stderr, "failed: %s\n", what);
}

static const int64_t shape[2] = {N, CHANNELS}, strides[2] = {CHANNELS * 4, 4};

static const struct pyreg_dropout of_x = {
    .dtype = PYREG_F32,
    .ndim = 2,
    .shape = shape,
    .mask = {.generator = PYREG_PHILOX, .key = {1, 2}, .rate = 0.3},
    .scale = 1,
    .x = {x, strides},
};

static enum pyreg_status dropout(float *y) {
    struct pyreg_dropout args = of_x;
    args.y = (struct pyreg_array){y, strides};
    return pyreg_dropout(&args);
}

static enum pyreg_status norm(float *y) {
    float mean[CHANNELS], var[CHANNELS];
    return pyreg_batchnorm_forward(&(struct pyreg_batchnorm_forward){
        .common = {.dtype = PYREG_F32, .ndim = 2, .axis = 1, .shape = shape, .epsilon = 1e-5},
        .x = {x, strides},
        .y = {y, strides},
        .mean = mean,
        .var = var,
    });
}

/* Pools whose threads come at once, late or never, or that have none. */
struct errand {
    void (*task)(void *argument);
    void *argument;
};

static void *run_errand(void *memory) {
    struct errand errand = *(struct errand *)memory;
    free(memory);
    errand.task(errand.argument);
    return NULL;
}

static void *run_late(void *memory) {
    usleep(3000);
    return run_errand(memory);
}

static void schedule(void *context, void (*task)(void *), void *argument) {
    static atomic_uint turn;
    (void)context;
    struct errand *errand = malloc(sizeof *errand);
    *errand = (struct errand){task, argument};
    const unsigned kind = atomic_fetch_add(&turn, 1) % 4;
    pthread_t thread;
    if (kind == 0 && pthread_create(&thread, NULL, run_errand, errand) == 0)
        pthread_detach(thread);
    else if (kind == 1 && pthread_create(&thread, NULL, run_late, errand) == 0)
        pthread_detach(thread);
    else if (kind == 2)
        run_errand(errand);
    else
        free(errand);
}

static void *caller(void *number) {
    float *y = malloc(sizeof x);
    const struct pyreg_pool pool = {schedule, NULL};
    expect(pyreg_use_pool((intptr_t)number % 3 ? NULL : &pool) == NULL, "no pool before");
    /* ThreadSanitizer does not see how OpenMP's threads wait for each other. */
    pyreg_use_team(!UNDER_THREAD_SANITIZER && (intptr_t)number % 2);
    for (int round = 0; round < ROUNDS; round++) {
        pyreg_use_threads((int)(intptr_t)number % 5);
        if (round == ROUNDS / 2) pyreg_set_num_threads(3 + (int)(intptr_t)number % 3);
        expect(dropout(y) == PYREG_OK && memcmp(y, want_dropout, sizeof x) == 0, "dropout");
        expect(norm(y) == PYREG_OK && memcmp(y, want_norm, sizeof x) == 0, "batch-norm");
    }
    free(y);
    return NULL;
}

static void all_callers(void) {
    pthread_t threads[CALLERS];
    for (intptr_t i = 0; i < CALLERS; i++) pthread_create(&threads[i], NULL, caller, (void *)i);
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
}

static int checks;

static bool stop(void) { return ++checks; }

/* The statistics of x again and again. */
static enum pyreg_status long_sums(int64_t times) {
    float mean[CHANNELS], var[CHANNELS];
    const int64_t long_shape[3] = {times, N, CHANNELS}, again[3] = {0, CHANNELS * 4, 4};
    return pyreg_batchnorm_forward(&(struct pyreg_batchnorm_forward){
        .common = {.dtype = PYREG_F32, .ndim = 3, .axis = 2, .shape = long_shape, .epsilon = 1e-5},
        .x = {x, again},
        .mean = mean,
        .var = var,
    });
}

#if !UNDER_THREAD_SANITIZER
static pid_t child = -1;

static bool fork_once(void) {
    if (checks++ == 0) child = fork();
    return false;
}

/* Dropout of one row again and again, into one row. */
static enum pyreg_status long_call(int64_t rows, float *y) {
    const int64_t long_shape[2] = {rows, SIZE}, again[2] = {0, 4}, same_mask[2] = {0, 1};
    struct pyreg_dropout args = of_x;
    args.shape = long_shape, args.mask.generator = PYREG_THREEFRY, args.mask_strides = same_mask;
    args.x.strides = again, args.y = (struct pyreg_array){y, again};
    return pyreg_dropout(&args);
}
#endif

int main(void) {
    if (pyreg_init() != PYREG_OK) return 2;
    for (int i = 0; i < SIZE; i++) x[i] = (float)(i * 7919 % 1000) / 100 - 5;
    float *y = malloc(sizeof x);
    pyreg_set_num_threads(1);
    expect(dropout(want_dropout) == PYREG_OK && norm(want_norm) == PYREG_OK, "serial");
    pyreg_set_parallel_from(0);
    pyreg_set_num_threads(4);
    expect(!pyreg_follow_openmp("no such library"), "nothing to follow");
    const char *openmp = pyreg_openmp_library();
    expect(pyreg_follow_openmp(openmp) == (strcmp(openmp, "none") != 0), "OpenMP again");
    all_callers();

    pyreg_set_interrupt_check(stop);
    expect(long_sums(100000) == PYREG_INTERRUPTED && checks == 1, "stopped");
#if !UNDER_THREAD_SANITIZER /* which lets no threads start in a child, and sees that rows are written twice at once */
    checks = 0;
    pyreg_set_interrupt_check(fork_once);
    expect(long_call(1, want_dropout) == PYREG_OK, "one row");
    for (int64_t rows = 20; !checks; rows *= 2) expect(long_call(rows, y) == PYREG_OK, "forked");
    /* From here on in both processes.  Rows are written by several threads at once, all with the same values. */
    expect(memcmp(y, want_dropout, sizeof x) == 0, "the call that forked");
    pyreg_set_interrupt_check(NULL);
    pyreg_set_num_threads(1);
    expect(dropout(want_dropout) == PYREG_OK, "serial, after the fork");
    pyreg_set_num_threads(4);
    all_callers();
    if (child == 0) _exit(failures != 0);
    int status = 1;
    expect(waitpid(child, &status, 0) == child && status == 0, "the child");
#endif
    free(y);
    return failures != 0;
}
