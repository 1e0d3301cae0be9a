#define _GNU_SOURCE
#include "parallel.h"

#include "machine.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

/* ---- Floating-point mode: workers take the caller's for the region (XLA flushes subnormals, NumPy does not) ------ */
#if defined(__x86_64__)
#include <xmmintrin.h>
typedef unsigned fp_mode;
static fp_mode fp_get(void) { return _mm_getcsr(); }
static void fp_set(fp_mode m) { _mm_setcsr(m); }
#elif defined(__aarch64__)
typedef struct {
    uint64_t control, status;
} fp_mode;
static fp_mode fp_get(void) {
    fp_mode m;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(m.control), "=r"(m.status));
    return m;
}
static void fp_set(fp_mode m) { __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" ::"r"(m.control), "r"(m.status)); }
#else
#include <fenv.h>
typedef fenv_t fp_mode;
static fp_mode fp_get(void) {
    fp_mode m;
    fegetenv(&m);
    return m;
}
static void fp_set(fp_mode m) { fesetenv(&m); }
#endif

/* ---- How many threads -------------------------------------------------------------------------------------------- */
static int openmp_default;               /* what OpenMP allowed when the library was loaded */
static atomic_int process_threads;       /* pyreg_set_num_threads */
static _Thread_local int thread_threads; /* pyreg_use_threads */
static atomic_bool forked;               /* a child has none of OpenMP's threads and would wait for them for ever */

static void in_child(void) { atomic_store(&forked, true); }

__attribute__((constructor)) static void at_load(void) {
    openmp_default = omp_get_max_threads();
    pthread_atfork(NULL, NULL, in_child);
}

static int at_most(int a, int b) { return a < b ? a : b; }

int pyreg_get_num_threads(void) {
    int openmp = omp_get_max_threads(), asked = thread_threads ? thread_threads : atomic_load(&process_threads);
    if (!asked) return at_most(openmp, machine_cpus());
    return openmp < openmp_default ? at_most(asked, openmp) : asked;
}

void pyreg_set_num_threads(int n) { atomic_store(&process_threads, n > 0 ? n : 0); }

int pyreg_use_threads(int n) {
    int old = thread_threads;
    thread_threads = n > 0 ? n : 0;
    return old;
}

int pyreg_openmp_version(void) { return _OPENMP; }

const char *pyreg_openmp_library(void) {
    Dl_info info;
    return dladdr((void *)(intptr_t)omp_get_max_threads, &info) ? info.dli_fname : "unknown";
}

/* ---- Interrupts -------------------------------------------------------------------------------------------------- */
static bool (*_Atomic interrupt_check)(void);
static _Thread_local bool no_interrupts;

void pyreg_set_interrupt_check(bool (*check)(void)) { atomic_store(&interrupt_check, check); }

bool pyreg_allow_interrupts(bool allow) {
    bool before = !no_interrupts;
    no_interrupts = !allow;
    return before;
}

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static const uint64_t interrupt_every_ns = 50000000, never = UINT64_MAX;

struct call {
    atomic_bool stop;
    uint64_t next; /* when to ask again; read and written by the thread that called us */
};
static _Thread_local struct call *current; /* what this thread works on */
static _Thread_local bool caller;          /* is it this thread's own call? */

bool parallel_stop(void) {
    struct call *call = current;
    if (!call) return false;
    if (atomic_load_explicit(&call->stop, memory_order_relaxed)) return true;
    bool (*check)(void) = atomic_load_explicit(&interrupt_check, memory_order_relaxed);
    if (!caller || !check || no_interrupts || call->next == never || clock_ns() < call->next) return false;
    bool stop = check(); /* may call us */
    if (stop) atomic_store(&call->stop, true);
    call->next = clock_ns() + interrupt_every_ns;
    return stop;
}

/* ---- Regions ----------------------------------------------------------------------------------------------------- */

/* From here on, in one thread's time, no op loses by a second thread, whatever its CPU does.  If that is idle, two win
 * from 75 us (philox) to 190 us (threefry) on; beside a busy process two take 1.1 to 2 times as long as one at 50 to 130
 * us, 1.0 to 1.2 times at 100 to 500 us, and then no longer.  Measured with `./run bench scaling --neighbour` on 2 CPUs
 * of a virtual machine: docs/performance.md. */
static const double built_parallel_from = 200e3;
static double set_parallel_from = -1; /* negative: as built */

double pyreg_parallel_from(void) {
    double ns;
    __atomic_load(&set_parallel_from, &ns, __ATOMIC_RELAXED);
    return ns < 0 ? built_parallel_from : ns;
}

void pyreg_set_parallel_from(double ns) { __atomic_store(&set_parallel_from, &ns, __ATOMIC_RELAXED); }

bool parallel_pays(double serial_ns) { return serial_ns >= pyreg_parallel_from(); }

static void run_serial(const struct phase *phases, size_t num_phases, void *work) {
    for (size_t p = 0; p < num_phases; p++)
        for (size_t c = 0; c < phases[p].chunks; c++) {
            phases[p].run(work, c);
            if (parallel_stop()) return;
        }
}

enum pyreg_status parallel_run(const struct phase *phases, size_t num_phases, void *work, double serial_ns) {
    fp_mode mode = fp_get();
    size_t most = 0;
    for (size_t p = 0; p < num_phases; p++) most = phases[p].chunks > most ? phases[p].chunks : most;

    int threads = 1;
    if (parallel_pays(serial_ns) && !omp_in_parallel() && !atomic_load(&forked)) {
        threads = pyreg_get_num_threads();
        if ((size_t)threads > most) threads = (int)most;
    }
    /* A short call is not worth a clock. */
    struct call call = {.next = serial_ns > 10e6 || threads > 1 ? clock_ns() + interrupt_every_ns : never};
    struct call *outer = current; /* of which the interrupt check called us */
    bool outer_caller = caller;
    if (threads <= 1) {
        current = &call;
        caller = true;
        run_serial(phases, num_phases, work);
    } else {
#pragma omp parallel num_threads(threads)
        {
            fp_mode own = fp_get();
            fp_set(mode);
            current = &call;
            caller = omp_get_thread_num() == 0;
            for (size_t p = 0; p < num_phases; p++) {
                size_t chunks = phases[p].chunks;
                if (p > 0) {
#pragma omp barrier
                }
#pragma omp for schedule(dynamic, 1) nowait
                for (size_t c = 0; c < chunks; c++) {
                    if (parallel_stop()) continue;
                    phases[p].run(work, c);
                }
            }
            current = NULL;
            fp_set(own);
        }
    }
    current = outer;
    caller = outer_caller;
    fp_set(mode); /* no exception flags left behind */
    return atomic_load(&call.stop) ? PYREG_INTERRUPTED : PYREG_OK;
}
