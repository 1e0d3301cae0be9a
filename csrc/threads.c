#define _GNU_SOURCE
#include "threads.h"

#include "machine.h"
#include "pyreg.h"

#include <dlfcn.h>
#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

static int openmp_default;           /* what OpenMP allowed when the library was loaded */
static bool openmp_asked;            /* was that a wish, and not the CPUs that the loading thread may use? */
static atomic_int process_threads;   /* pyreg_set_num_threads */
static pthread_key_t thread_threads; /* pyreg_use_threads.  A key, as the first use of a _Thread_local may allocate, and
                                      * ends the process where it cannot */

/* Where OpenMP binds threads to places (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), it pins the thread that loads it
 * and each that opens a region to the first of them.  That is no limit on us; only all the places together are. */
static bool openmp_binds;
static atomic_bool main_unpinned; /* pyreg_unpinned */

void pyreg_unpinned(void) { atomic_store(&main_unpinned, true); }

static void add_place(int place, cpu_set_t *cpus) {
    int n = omp_get_place_num_procs(place), ids[CPU_SETSIZE];
    if (n > CPU_SETSIZE) return;
    omp_get_place_proc_ids(place, ids);
    for (int i = 0; i < n; i++) CPU_SET((size_t)ids[i], cpus);
}

/* The CPUs that calls from this thread may use: its own, or those of the process if it was OpenMP that pinned it. */
static void read_cpus(cpu_set_t *cpus) {
    cpu_set_t first;
    CPU_ZERO(cpus);
    if (sched_getaffinity(0, sizeof *cpus, cpus) != 0 || !openmp_binds) return;
    CPU_ZERO(&first);
    add_place(0, &first);
    if (!CPU_EQUAL(cpus, &first)) return;
    if (sched_getaffinity(getpid(), sizeof *cpus, cpus) != 0) return;
    if (!atomic_load(&main_unpinned) && CPU_EQUAL(cpus, &first))
        for (int p = 0; p < omp_get_num_places(); p++) add_place(p, cpus);
}

__attribute__((constructor)) static void at_load(void) {
    pthread_key_create(&thread_threads, NULL);
    openmp_default = omp_get_max_threads();
    openmp_binds = omp_get_proc_bind() != omp_proc_bind_false && omp_get_num_places() > 0;
    cpu_set_t cpus;
    read_cpus(&cpus);
    const char *asked = getenv("OMP_NUM_THREADS");
    openmp_asked = (asked && *asked) || openmp_default != CPU_COUNT(&cpus);
}

static int at_most(int a, int b) { return a < b ? a : b; }

struct threads threads_for_call(void) {
    struct threads t;
    int openmp = omp_get_max_threads(), asked = (int)(intptr_t)pthread_getspecific(thread_threads);
    if (!asked) asked = atomic_load(&process_threads);
    read_cpus(&t.cpus);
    int cpus = CPU_COUNT(&t.cpus);
    if (!cpus) cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    cpus = (int)fmax(1, fmin(cpus, ceil(machine_quota())));
    t.count = asked ? asked : cpus;
    if ((!asked && openmp_asked) || openmp != openmp_default) t.count = at_most(t.count, openmp);
    t.count = at_most(t.count, omp_get_thread_limit());
    t.useful = at_most(t.count > cpus ? t.count : cpus, omp_get_thread_limit());
    return t;
}

bool threads_taken(void) { return omp_in_parallel(); }

int pyreg_get_num_threads(void) { return threads_for_call().count; }

void pyreg_set_num_threads(int n) { atomic_store(&process_threads, n > 0 ? n : 0); }

int pyreg_use_threads(int n) {
    int old = (int)(intptr_t)pthread_getspecific(thread_threads);
    pthread_setspecific(thread_threads, (void *)(intptr_t)(n > 0 ? n : 0));
    return old;
}

int pyreg_openmp_version(void) { return _OPENMP; }

const char *pyreg_openmp_library(void) {
    Dl_info info;
    return dladdr((void *)(intptr_t)omp_get_max_threads, &info) ? info.dli_fname : "unknown";
}
