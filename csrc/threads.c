#include "threads.h"

#include "machine.h"
#include "pyreg.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static atomic_int process_threads; /* pyreg_set_num_threads */
static own_t thread_threads;       /* pyreg_use_threads */
static own_t thread_limit;         /* pyreg_limit_threads */

/* ---- OpenMP ------------------------------------------------------------------------------------------------------ */

/* An OpenMP library: its settings, and gcc's entry to a region, which LLVM's and Intel's have, too. */
struct openmp {
    int (*max_threads)(void), (*thread_limit)(void), (*in_parallel)(void);
    void (*parallel)(void (*work)(void *), void *argument, unsigned count, unsigned flags);
    /* Where it binds threads to places (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), it pins the thread that loads it
     * and each that opens a region to the first of them.  That is no limit on us; only all the places together are. */
    bool binds;
    int (*num_places)(void), (*place_num_procs)(int place);
    void (*place_proc_ids)(int place, int *ids);
    int before; /* how many threads it allowed when it was found */
    bool asked; /* was that a wish, and not the CPUs that the thread may use? */
    const char *file;
};
static const struct openmp *_Atomic openmp; /* the one that is followed; NULL: none */
static int env_threads, env_limit; /* OMP_NUM_THREADS and OMP_THREAD_LIMIT, for where there is none; 0: not set */
static atomic_bool main_unpinned;  /* pyreg_unpinned */

void pyreg_unpinned(void) { atomic_store(&main_unpinned, true); }

static void add_place(const struct openmp *o, int place, struct cpus *cpus) {
    int n = o->place_num_procs(place), ids[MAX_CPUS];
    if (n > MAX_CPUS) return;
    o->place_proc_ids(place, ids);
    for (int i = 0; i < n; i++) cpus_add(cpus, ids[i]);
}

/* The CPUs that calls from this thread may use: its own, or those of the process if it was OpenMP that pinned it. */
static void read_cpus(const struct openmp *o, struct cpus *cpus) {
    struct cpus first = {{0}};
    cpus_of_thread(cpus);
    if (!cpus_count(cpus) || !o || !o->binds) return;
    add_place(o, 0, &first);
    if (!cpus_equal(cpus, &first)) return;
    struct cpus process;
    cpus_of_process(&process);
    if (!cpus_count(&process)) return;
    *cpus = process;
    if (!atomic_load(&main_unpinned) && cpus_equal(cpus, &first))
        for (int p = 0; p < o->num_places(); p++) add_place(o, p, cpus);
}

#define FIND(field, name) field = (__typeof__(field))(intptr_t)platform_function(file, name)

bool pyreg_follow_openmp(const char *file) {
    struct openmp found = {.before = 0};
    FIND(found.max_threads, "omp_get_max_threads");
    FIND(found.thread_limit, "omp_get_thread_limit");
    FIND(found.in_parallel, "omp_in_parallel");
    FIND(found.parallel, "GOMP_parallel");
    if (!found.max_threads || !found.thread_limit || !found.in_parallel || !found.parallel) return false;
    const struct openmp *now = atomic_load(&openmp);
    if (now && now->max_threads == found.max_threads) return true;
    struct openmp *o = malloc(sizeof *o); /* for good: another thread may use it */
    if (!o) return false;
    *o = found;
    o->before = o->max_threads();
    int (*proc_bind)(void);
    FIND(proc_bind, "omp_get_proc_bind");
    FIND(o->num_places, "omp_get_num_places");
    FIND(o->place_num_procs, "omp_get_place_num_procs");
    FIND(o->place_proc_ids, "omp_get_place_proc_ids");
    if (proc_bind && o->num_places && o->place_num_procs && o->place_proc_ids)
        o->binds = proc_bind() != 0 && o->num_places() > 0;
    struct cpus cpus;
    read_cpus(o, &cpus);
    o->asked = env_threads || o->before != cpus_count(&cpus);
    o->file = platform_library((void *)(intptr_t)o->max_threads);
    atomic_store(&openmp, o);
    return true;
}

static int env_number(const char *name) {
    const char *text = getenv(name);
    const long n = text ? strtol(text, NULL, 10) : 0;
    return n > 0 && n < INT_MAX ? (int)n : 0;
}

static void openmp_init(void) {
    env_threads = env_number("OMP_NUM_THREADS"), env_limit = env_number("OMP_THREAD_LIMIT");
#ifdef _OPENMP
    if (pyreg_follow_openmp(platform_library((void *)(intptr_t)omp_get_max_threads))) return;
#endif
    /* Those that the process has loaded by now. */
    static const char *const names[] = {"libgomp.so.1", "libomp.so.5", "libiomp5.so", "libomp.dylib", "libiomp5.dylib"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (pyreg_follow_openmp(names[i])) return;
}

bool threads_have_team(void) { return atomic_load(&openmp) != NULL; }

void threads_team(int count, void (*work)(void *), void *argument) {
    atomic_load(&openmp)->parallel(work, argument, (unsigned)count, 0);
}

bool threads_taken(void) {
    const struct openmp *o = atomic_load(&openmp);
    return o && o->in_parallel();
}

const char *pyreg_openmp_library(void) {
    const struct openmp *o = atomic_load(&openmp);
    return !o ? "none" : o->file ? o->file : "unknown";
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
    const struct openmp *o = atomic_load(&openmp);
    int asked = number_of(thread_threads);
    if (!asked) asked = atomic_load(&process_threads);
    read_cpus(o, &t.cpus);
    int cpus = cpus_count(&t.cpus);
    if (!cpus) cpus = platform_cpus();
    cpus = (int)fmax(1, fmin(cpus, ceil(machine_quota())));
    t.count = asked ? asked : cpus;
    const int openmp_threads = o ? o->max_threads() : env_threads;
    const bool follow = o ? (!asked && o->asked) || openmp_threads != o->before : !asked && env_threads;
    if (follow && openmp_threads < t.count) t.count = openmp_threads;
    const int allowed = number_of(thread_limit), limit = o ? o->thread_limit() : env_limit ? env_limit : INT_MAX;
    if (allowed && allowed < t.count) t.count = allowed;
    if (t.count > limit) t.count = limit;
    t.crowded = t.count > cpus;
    t.useful = t.crowded ? t.count : cpus;
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
