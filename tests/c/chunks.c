/* Each chunk of a phase runs once, and phases run one after the other, for any number of threads and of chunks. */
#include "parallel.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum { MOST = 1000 };

struct work {
    atomic_int runs[MAX_PHASES][MOST];
    atomic_size_t done[MAX_PHASES];
    atomic_int early; /* chunks that ran before the phase in front of theirs was done */
    size_t chunks[MAX_PHASES];
};

static void run(struct work *work, int phase, size_t chunk) {
    if (phase > 0 && atomic_load(&work->done[phase - 1]) != work->chunks[phase - 1]) atomic_fetch_add(&work->early, 1);
    for (volatile int k = 0; k < 1000; k++) continue; /* long enough that others come and help */
    atomic_fetch_add(&work->runs[phase][chunk], 1);
    atomic_fetch_add(&work->done[phase], 1);
}

static void run0(void *work, size_t chunk, void *scratch) { (void)scratch, run(work, 0, chunk); }
static void run1(void *work, size_t chunk, void *scratch) { (void)scratch, run(work, 1, chunk); }
static void run2(void *work, size_t chunk, void *scratch) { (void)scratch, run(work, 2, chunk); }

int main(void) {
    static const size_t counts[] = {1, 2, 3, 16, 17, MOST};
    enum { COUNTS = sizeof counts / sizeof *counts };
    static const int threads[] = {1, 2, 3, 17, 40};
    static struct work work;
    if (pyreg_init() != PYREG_OK) return 2;
    pyreg_set_parallel_from(0);
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++)
        for (int c = 0; c < COUNTS * COUNTS * COUNTS; c++) {
            memset(&work, 0, sizeof work);
            const struct phase phases[MAX_PHASES] = {{work.chunks[0] = counts[c % COUNTS], run0},
                                                     {work.chunks[1] = counts[c / COUNTS % COUNTS], run1},
                                                     {work.chunks[2] = counts[c / COUNTS / COUNTS], run2}};
            pyreg_set_num_threads(threads[t]);
            bool ok = parallel_run(phases, MAX_PHASES, &work, 0, 1) == PYREG_OK && atomic_load(&work.early) == 0;
            for (int p = 0; p < MAX_PHASES; p++)
                for (size_t k = 0; k < MOST; k++) ok &= atomic_load(&work.runs[p][k]) == (k < work.chunks[p]);
            if (!ok) {
                fprintf(stderr, "failed: %d threads, phases of %zu, %zu and %zu chunks\n", threads[t], work.chunks[0],
                        work.chunks[1], work.chunks[2]);
                return 1;
            }
        }
    return 0;
}
