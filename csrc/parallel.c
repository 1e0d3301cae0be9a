/* Threads of our own, because OpenMP ends the process when one cannot be created, waits for ever in a forked child, and
 * makes a team for each thread that calls: XLA has many.  One pool serves all calls but those whose caller has a team or
 * a pool itself.  Each call's own thread works, and would finish it alone; a helper that comes late, or never, is not
 * waited for. */
#include "parallel.h"

#include "arith.h"
#include "memory.h"
#include "platform.h"
#include "threads.h"

#include <limits.h>
#include <string.h>

/* ---- Floating-point mode: helpers take the caller's (XLA flushes subnormals, NumPy does not) ------------------- */
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

/* ---- Calls ------------------------------------------------------------------------------------------------------- */
enum { MAX_PARTS = 16 }; /* of a phase: one for each thread, or shared by a few */

struct call {
    const struct phase *phases;
    size_t chunks; /* of all phases, counted on from one phase to the next */
    void *work;
    fp_mode mode;
    thread_t caller;
    struct call *outer; /* of the same thread, whose interrupt check called us */
    const struct threads *threads;
    const struct pyreg_pool *pool; /* whose threads help; NULL: ours */

    atomic_size_t next, done;                   /* chunks claimed, and finished */
    atomic_size_t taken[MAX_PHASES][MAX_PARTS]; /* chunks of each part, or more than there are */
    atomic_bool stop;                           /* the interrupt check said so */
    uint64_t ask_at;                            /* when to ask it again */

    atomic_uint turn;    /* futex: changes when a phase ends and when the helpers have left */
    atomic_bool held;    /* helpers shall leave: the caller forks */
    int helpers;         /* at work; under the lock, as are */
    void *scratch;       /* that no helper has: the first bytes of each say where the next one is */
    struct call *listed; /* the next of the calls in the list */
};

static own_t current; /* the call that this thread works on */

/* ---- Interrupts -------------------------------------------------------------------------------------------------- */
static bool (*_Atomic interrupt_check)(void);
static own_t no_interrupts;

void pyreg_set_interrupt_check(bool (*check)(void)) { atomic_store(&interrupt_check, check); }

bool pyreg_allow_interrupts(bool allow) {
    bool before = !own_get(no_interrupts);
    own_set(no_interrupts, allow ? NULL : &no_interrupts);
    return before;
}

static const uint64_t ask_every_ns = 50000000, never = UINT64_MAX;

static bool stopped(struct call *call) {
    if (atomic_load_explicit(&call->stop, memory_order_relaxed)) return true;
    if (!thread_is_self(call->caller) || call->ask_at == never || clock_ns() < call->ask_at) return false;
    bool (*check)(void) = atomic_load_explicit(&interrupt_check, memory_order_relaxed);
    call->ask_at = never; /* the check may call us */
    bool stop = check && !own_get(no_interrupts) && check();
    if (stop) atomic_store(&call->stop, true);
    call->ask_at = clock_ns() + ask_every_ns;
    return stop;
}

bool parallel_stop(void) {
    struct call *call = own_get(current);
    return call && stopped(call);
}

/* ---- Work -------------------------------------------------------------------------------------------------------- */

/* Most waits are short, and to sleep and be woken takes as long, on a virtual machine up to 0.1 ms: so each begins with
 * a look-out, if that does not keep a thread that has work from its CPU. */
static const uint64_t look_out_ns = 50000;

static void wait_while(atomic_uint *word, unsigned value, uint64_t longest_ns, bool crowded) {
    const uint64_t until = crowded ? 0 : clock_ns() + look_out_ns;
    do
        for (int k = 0; k < 16; k++) {
            if (atomic_load_explicit(word, memory_order_relaxed) != value) return;
#if defined(__x86_64__)
            _mm_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
    while (clock_ns() < until);
    sleep_while(word, value, longest_ns);
}

static void nap(struct call *call, unsigned turn) {
    wait_while(&call->turn, turn, ask_every_ns, call->threads->crowded);
    stopped(call); /* the caller asks while it waits, too */
}

/* A chunk for a thread that has claimed one, no matter which: of its own part, or else of the next that has some. */
static size_t take_chunk(struct call *call, size_t phase, int own_part) {
    const size_t chunks = call->phases[phase].chunks, parts = at_most((size_t)call->threads->count, MAX_PARTS);
    for (size_t part = (size_t)own_part % parts;; part = (part + 1) % parts) {
        const size_t first = chunks * part / parts, end = chunks * (part + 1) / parts;
        atomic_size_t *taken = &call->taken[phase][part];
        if (atomic_load(taken) >= end - first) continue;
        const size_t chunk = first + atomic_fetch_add(taken, 1);
        if (chunk < end) return chunk;
    }
}

static void work_on(struct call *call, int own_part, void *scratch) {
    for (size_t chunk = atomic_load(&call->next); chunk < call->chunks && !atomic_load(&call->held);) {
        size_t start = 0, p = 0;
        while (chunk - start >= call->phases[p].chunks) start += call->phases[p++].chunks;
        const struct phase *phase = &call->phases[p];
        unsigned turn = atomic_load(&call->turn);
        if (atomic_load(&call->done) < start) {
            if (!atomic_load(&call->held)) nap(call, turn);
            chunk = atomic_load(&call->next);
            continue;
        }
        if (!atomic_compare_exchange_weak(&call->next, &chunk, chunk + 1)) continue;
        if (!stopped(call)) phase->run(call->work, take_chunk(call, p, own_part), scratch);
        if (atomic_fetch_add(&call->done, 1) + 1 == start + phase->chunks) {
            atomic_fetch_add(&call->turn, 1);
            wake(&call->turn, INT_MAX);
        }
        chunk = atomic_load(&call->next);
    }
}

/* ---- Helpers ----------------------------------------------------------------------------------------------------- */
static lock_t lock = LOCK_INITIALIZER; /* of all that follows, and held for moments only */
static struct call *calls;             /* that helpers may work on */
static int helpers, idle, numbered;
static atomic_uint news; /* futex: changes when there is work for the idle */

static int at_work(void) {
    int threads = 0;
    for (struct call *c = calls; c; c = c->listed) threads += 1 + c->helpers;
    return threads;
}

static int helpers_wanted(const struct call *call, int working) {
    if (atomic_load(&call->held) || atomic_load(&call->next) >= call->chunks) return 0;
    int own = call->threads->count - 1 - call->helpers, all = call->threads->useful - working;
    return own < all ? own : all;
}

static void *take_scratch(struct call *call) {
    void *scratch = call->scratch;
    if (scratch) memcpy(&call->scratch, scratch, sizeof call->scratch);
    return scratch;
}

static void give_scratch(struct call *call, void *scratch) {
    if (scratch) memcpy(scratch, &call->scratch, sizeof call->scratch);
    if (scratch) call->scratch = scratch;
}

/* The caller has part 0.  The lock is held before and after. */
static void help_with(struct call *call, int number) {
    call->helpers++;
    void *scratch = take_scratch(call);
    lock_give(&lock);
    fp_set(call->mode);
    own_set(current, call);
    work_on(call, 1 + number % (call->threads->count - 1), scratch);
    own_set(current, NULL);
    lock_take(&lock);
    give_scratch(call, scratch);
    if (--call->helpers == 0) {
        atomic_uint *turn = &call->turn;
        atomic_fetch_add(turn, 1);
        lock_give(&lock); /* now the call may be gone; to wake on its address does no harm */
        wake(turn, 1);
        lock_take(&lock);
    }
}

static struct call *call_that_wants_help(void) {
    struct call *call = calls;
    for (int working = at_work(); call && helpers_wanted(call, working) <= 0;) call = call->listed;
    return call;
}

static void *help(void *unused) {
    struct cpus cpus = {{0}}; /* where this thread may run */
    lock_take(&lock);
    const int number = numbered++;
    bool crowded = false; /* in the last call */
    for (;;) {
        struct call *call = call_that_wants_help();
        if (!call) {
            unsigned seen = atomic_load(&news);
            idle++;
            lock_give(&lock);
            wait_while(&news, seen, 0, crowded);
            lock_take(&lock);
            idle--;
            continue;
        }
        if (cpus_count(&call->threads->cpus) && !cpus_equal(&cpus, &call->threads->cpus)) {
            cpus = call->threads->cpus;
            cpus_set_thread(&cpus);
        }
        crowded = call->threads->crowded;
        help_with(call, number);
    }
    return unused;
}

/* Of a pool; it may come late, when the call is gone. */
static void help_once(void *unused) {
    (void)unused;
    if (own_get(current)) return; /* the pool has run it at once, on the thread of the call */
    const fp_mode mode = fp_get();
    lock_take(&lock);
    struct call *call = call_that_wants_help();
    if (call) help_with(call, call->helpers);
    lock_give(&lock);
    fp_set(mode);
}

static void call_helpers(struct call *call) {
    lock_take(&lock);
    call->listed = calls;
    calls = call;
    int wanted = helpers_wanted(call, at_work());
    if (call->pool) {
        lock_give(&lock);
        for (; wanted > 0; wanted--) call->pool->schedule(call->pool->context, help_once, NULL);
        return;
    }
    for (int missing = wanted - idle; missing > 0 && helpers < call->threads->useful - 1; missing--) {
        if (!thread_start(help, &call->threads->cpus)) break; /* so be it */
        helpers++;
    }
    atomic_fetch_add(&news, 1);
    lock_give(&lock);
    if (wanted > 0) wake(&news, wanted);
}

/* Waits until no helper knows the call. */
static void await_helpers(struct call *call) {
    lock_take(&lock);
    while (call->helpers > 0) {
        unsigned turn = atomic_load(&call->turn);
        lock_give(&lock);
        nap(call, turn);
        lock_take(&lock);
    }
    lock_give(&lock);
}

static void dismiss_helpers(struct call *call) {
    await_helpers(call);
    lock_take(&lock);
    struct call **c = &calls;
    while (*c && *c != call) c = &(*c)->listed;
    if (*c) *c = call->listed;
    bool others = calls && idle; /* may find this thread's place */
    if (others) atomic_fetch_add(&news, 1);
    lock_give(&lock);
    if (others) wake(&news, 1);
}

/* ---- OpenMP's team: instead of helpers, for a call from a library whose OpenMP threads spin between its own calls.
 * Ours would wait for the CPUs that they hold.  The team is waited for, as the library waits for it. --------------- */
static own_t on_team;
static atomic_bool forked; /* then OpenMP's threads are not there, and it waits for them */

bool pyreg_use_team(bool use) {
    bool before = own_get(on_team);
    own_set(on_team, use ? &on_team : NULL);
    return before;
}

/* ---- Another library's pool: what helps is a task that looks, once, for a call that wants help --------------------- */
static own_t pool;

const struct pyreg_pool *pyreg_use_pool(const struct pyreg_pool *use) {
    const struct pyreg_pool *before = own_get(pool);
    own_set(pool, (void *)(intptr_t)use);
    return before;
}

struct member {
    struct call *call;
    void *scratch; /* of the caller */
};

static void work_in_team(void *argument) {
    struct member *member = argument;
    if (thread_is_self(member->call->caller)) {
        work_on(member->call, 0, member->scratch);
        return;
    }
    const fp_mode mode = fp_get();
    lock_take(&lock);
    help_with(member->call, member->call->helpers);
    lock_give(&lock);
    fp_set(mode);
}

/* ---- Forks: the child has the calling thread alone, and may be made by the interrupt check, in the middle of a call:
 * then no chunk may be half done by a helper that the child lacks. ------------------------------------------------------ */
static void before_fork(void) {
    for (struct call *c = own_get(current); c; c = c->outer) {
        atomic_store(&c->held, true);
        atomic_fetch_add(&c->turn, 1);
        wake(&c->turn, INT_MAX);
        await_helpers(c);
    }
}

static void resume(void) {
    for (struct call *c = own_get(current); c; c = c->outer) atomic_store(&c->held, false);
}

static void in_parent(void) {
    resume();
    if (!own_get(current)) return;
    lock_take(&lock);
    atomic_fetch_add(&news, 1);
    lock_give(&lock);
    wake(&news, INT_MAX);
}

static void in_child(void) {
    lock = (lock_t)LOCK_INITIALIZER;
    calls = NULL;
    helpers = idle = numbered = 0;
    atomic_store(&forked, true);
    resume();
}

AT_LOAD static void at_load(void) {
    own_init(&current);
    own_init(&no_interrupts);
    own_init(&on_team);
    own_init(&pool);
    at_fork(before_fork, in_parent, in_child);
}

/* ---- Regions ----------------------------------------------------------------------------------------------------- */

/* From here on, in one thread's time, no op loses by a second thread, whatever its CPU does.  If that is idle, two win
 * from 75 us (philox) to 190 us (threefry) on; beside a busy process two take 1.1 to 2 times as long as one at 50 to
 * 130 us, 1.0 to 1.2 times at 100 to 500 us, and then no longer.  Measured with `./run bench scaling --neighbour` on 2
 * CPUs of a virtual machine: docs/performance.md. */
static const double built_parallel_from = 200e3;
static double set_parallel_from = -1; /* negative: as built */

double pyreg_parallel_from(void) {
    double ns;
    __atomic_load(&set_parallel_from, &ns, __ATOMIC_RELAXED);
    return ns < 0 ? built_parallel_from : ns;
}

void pyreg_set_parallel_from(double ns) { __atomic_store(&set_parallel_from, &ns, __ATOMIC_RELAXED); }

bool parallel_pays(double serial_ns) { return serial_ns >= pyreg_parallel_from(); }

/* A call that parallel_stop and fork() know. */
static enum pyreg_status run_known(const struct phase *phases, size_t num_phases, void *work, char *scratch,
                                   size_t scratch_bytes, fp_mode mode, const struct threads *threads) {
    const bool team = threads->count > 1 && threads_have_team() && own_get(on_team) && !atomic_load(&forked);
    struct call call = {.phases = phases,
                        .work = work,
                        .mode = mode,
                        .threads = threads,
                        .pool = own_get(pool),
                        .caller = thread_self(),
                        .outer = own_get(current),
                        /* A handler might fork, and in the child OpenMP would wait for the rest of the team. */
                        .ask_at = team ? never : clock_ns() + ask_every_ns};
    for (size_t p = 0; p < num_phases; p++) call.chunks += phases[p].chunks;
    for (int t = 1; scratch && t < threads->count; t++) give_scratch(&call, scratch + (size_t)t * scratch_bytes);
    own_set(current, &call);
    if (team) {
        struct member member = {&call, scratch};
        threads_team(threads->count, work_in_team, &member);
    } else {
        if (threads->count > 1) call_helpers(&call);
        work_on(&call, 0, scratch);
        if (threads->count > 1) dismiss_helpers(&call);
    }
    own_set(current, call.outer);
    return atomic_load(&call.stop) ? PYREG_INTERRUPTED : PYREG_OK;
}

static size_t most_chunks(const struct phase *phases, size_t num_phases) {
    size_t most = 0;
    for (size_t p = 0; p < num_phases; p++) most = phases[p].chunks > most ? phases[p].chunks : most;
    return most;
}

enum pyreg_status parallel_run(const struct phase *phases, size_t num_phases, void *work, size_t scratch_bytes,
                               double serial_ns) {
    fp_mode mode = fp_get();
    struct threads threads;
    threads.count = 1;
    if (parallel_pays(serial_ns) && !threads_taken()) {
        threads = threads_for_call();
        size_t most = most_chunks(phases, num_phases);
        if ((size_t)threads.count > most) threads.count = (int)most;
    }
    char *memory = NULL, *scratch = NULL;
    if (scratch_bytes) { /* from a cache line on: vectors that cross lines take up to a fifth longer */
        scratch_bytes += -scratch_bytes % LINE_BYTES;
        memory = memory_alloc(1, (size_t)threads.count * scratch_bytes + LINE_BYTES);
        if (!memory) return PYREG_NO_MEMORY;
        scratch = memory + -(uintptr_t)memory % LINE_BYTES;
    }
    enum pyreg_status status = PYREG_OK;
    if (threads.count > 1 || serial_ns > 10e6)
        status = run_known(phases, num_phases, work, scratch, scratch_bytes, mode, &threads);
    else /* too short for interrupts and forks in its midst */
        for (size_t p = 0; p < num_phases; p++)
            for (size_t c = 0; c < phases[p].chunks; c++) phases[p].run(work, c, scratch);
    memory_free(memory);
    fp_set(mode); /* no exception flags left behind */
    return status;
}
