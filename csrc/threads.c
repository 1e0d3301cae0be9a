#include "threads.h"

#include "machine.h"
#include "pyreg.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

static atomic_int process_threads; /* pyreg_set_num_threads */
static own_t thread_threads;       /* pyreg_use_threads */
static own_t thread_limit;         /* pyreg_limit_threads */

/* ---- OpenMP ------------------------------------------------------------------------------------------------------ */

static int openmp_default; /* what OpenMP allowed when the library was loaded */
static bool openmp_asked;  /* was that a wish, and not the CPUs that the loading thread may use? */
#ifdef _OPENMP
#include <omp.h>

/* Where OpenMP binds threads to places (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), it pins the thread that loads it
 * and each that opens a region to the first of them.  That is no limit on us; only all the places together are. */
static bool openmp_binds;
static atomic_bool main_unpinned; /* pyreg_unpinned */

void pyreg_unpinned(void) { atomic_store(&main_unpinned, true); }

static void add_place(int place, struct cpus *cpus) {
    int n = omp_get_place_num_procs(place), ids[MAX_CPUS];
    if (n > MAX_CPUS) return;
    omp_get_place_proc_ids(place, ids);
    for (int i = 0; i < n; i++) cpus_add(cpus, ids[i]);
}

/* The CPUs that calls from this thread may use: its own, or those of the process if it was OpenMP that pinned it. */
static void read_cpus(struct cpus *cpus) {
    struct cpus first = {{0}};
    cpus_of_thread(cpus);
    if (!cpus_count(cpus) || !openmp_binds) return;
    add_place(0, &first);
    if (!cpus_equal(cpus, &first)) return;
    struct cpus process;
    cpus_of_process(&process);
    if (!cpus_count(&process)) return;
    *cpus = process;
    if (!atomic_load(&main_unpinned) && cpus_equal(cpus, &first))
        for (int p = 0; p < omp_get_num_places(); p++) add_place(p, cpus);
}

static int openmp_threads(void) { return omp_get_max_threads(); }

static int openmp_limit(void) { return omp_get_thread_limit(); }

static void openmp_init(void) {
    openmp_default = omp_get_max_threads();
    openmp_binds = omp_get_proc_bind() != omp_proc_bind_false && omp_get_num_places() > 0;
    struct cpus cpus;
    read_cpus(&cpus);
    const char *asked = getenv("OMP_NUM_THREADS");
    openmp_asked = (asked && *asked) || openmp_default != cpus_count(&cpus);
}

static bool openmp_takes_thread(void) { return omp_in_parallel(); }

int pyreg_openmp_version(void) { return _OPENMP; }

const char *pyreg_openmp_library(void) {
    const char *file = platform_library((void *)(intptr_t)omp_get_max_threads);
    return file ? file : "unknown";
}

#else /* only its best known setting is heeded: programs set that to share the CPUs out */
static void read_cpus(struct cpus *cpus) { cpus_of_thread(cpus); }

static int openmp_threads(void) { return openmp_default; }

static int openmp_limit(void) { return INT_MAX; }

static void openmp_init(void) {
    const char *asked = getenv("OMP_NUM_THREADS");
    const long n = asked ? strtol(asked, NULL, 10) : 0;
    openmp_asked = n > 0 && n < INT_MAX;
    openmp_default = openmp_asked ? (int)n : INT_MAX;
}

void pyreg_unpinned(void) {}

static bool openmp_takes_thread(void) { return false; }

int pyreg_openmp_version(void) { return 0; }

const char *pyreg_openmp_library(void) { return "none"; }
#endif

/* ---- A team ------------------------------------------------------------------------------------------------------ */

/* Of the OpenMP library that a program's other code uses, which need not be one that this library is linked with: gcc's
 * entry to a region, which LLVM's and Intel's libraries have, too. */
typedef void gomp_parallel(void (*work)(void *), void *argument, unsigned count, unsigned flags);
static gomp_parallel *_Atomic team_parallel;
static int (*_Atomic team_in_parallel)(void);

bool pyreg_team_library(const char *file) {
    gomp_parallel *parallel = (gomp_parallel *)(intptr_t)platform_function(file, "GOMP_parallel");
    int (*in_parallel)(void) = (int (*)(void))(intptr_t)platform_function(file, "omp_in_parallel");
    if (!parallel || !in_parallel) return false;
    atomic_store(&team_in_parallel, in_parallel);
    atomic_store(&team_parallel, parallel);
    return true;
}

bool threads_have_team(void) { return atomic_load(&team_parallel) != NULL; }

void threads_team(int count, void (*work)(void *), void *argument) {
    atomic_load (&team_parallel)(work, argument, (unsigned)count, 0);
}

bool threads_taken(void) {
    int (*in_parallel)(void) = atomic_load(&team_in_parallel);
    return openmp_takes_thread() || (in_parallel && in_parallel());
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

AT_LOAD static void at_load(void) {
    own_init(&thread_threads);
    own_init(&thread_limit);
    openmp_init();
}

static int number_of(own_t own) { return (int)(intptr_t)own_get(own); }

struct threads threads_for_call(void) {
    struct threads t;
    int openmp = openmp_threads(), asked = number_of(thread_threads);
    if (!asked) asked = atomic_load(&process_threads);
    read_cpus(&t.cpus);
    int cpus = cpus_count(&t.cpus);
    if (!cpus) cpus = platform_cpus();
    cpus = (int)fmax(1, fmin(cpus, ceil(machine_quota())));
    t.count = asked ? asked : cpus;
    if (((!asked && openmp_asked) || openmp != openmp_default) && openmp < t.count) t.count = openmp;
    const int allowed = number_of(thread_limit), limit = openmp_limit();
    if (allowed && allowed < t.count) t.count = allowed;
    if (t.count > limit) t.count = limit;
    t.useful = t.count > cpus ? t.count : cpus;
    if (t.useful > limit) t.useful = limit;
    return t;
}

int pyreg_get_num_threads(void) { return threads_for_call().count; }

void pyreg_set_num_threads(int n) { atomic_store(&process_threads, n > 0 ? n : 0); }

static int exchange(own_t own, int n) {
    const int old = number_of(own);
    own_set(own, (void *)(intptr_t)(n > 0 ? n : 0));
    return old;
}

int pyreg_use_threads(int n) { return exchange(thread_threads, n); }

int pyreg_limit_threads(int n) { return exchange(thread_limit, n); }
