/* The operating system: the only file that knows which one it is.  Linux, macOS, Windows; others that have POSIX get
 * what macOS gets. */
#ifndef PYREG_PLATFORM_H
#define PYREG_PLATFORM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifndef _WIN32
#include <pthread.h>
#endif

uint64_t clock_ns(void); /* a monotonic clock */

/* ---- The machine ------------------------------------------------------------------------------------------------- */
size_t platform_cache_bytes(void); /* of the last level; 0 if the system does not say */
double platform_quota(void);       /* CPUs that the cgroup's quota is worth; INFINITY if there is none */
int platform_cpus(void);           /* that are online; of Windows' those that the process may run on */

/* A set of CPUs; empty where the system does not say. */
enum { MAX_CPUS = 1024 };
struct cpus {
    uint64_t bits[MAX_CPUS / 64];
};
void cpus_of_thread(struct cpus *cpus);  /* on which this thread may run */
void cpus_of_process(struct cpus *cpus); /* and the main thread */
void cpus_set_thread(const struct cpus *cpus);
void cpus_add(struct cpus *cpus, int cpu);
int cpus_count(const struct cpus *cpus);
bool cpus_equal(const struct cpus *a, const struct cpus *b);

/* File of the library that has a function; NULL if unknown.  A function of a library that the process has loaded, which
 * then stays loaded; NULL if there is none. */
const char *platform_library(void *function);
void *platform_function(const char *library, const char *name);

/* ---- Threads ----------------------------------------------------------------------------------------------------- */
/* A lock; a pointer of each thread's own, NULL at first; a thread.  Not _Thread_local: that may allocate at its first
 * use, and ends the process where it cannot. */
#ifdef _WIN32 /* windows.h stays out of here: it makes macros of common words */
typedef struct {
    void *srwlock;
} lock_t;
#define LOCK_INITIALIZER {0}
typedef unsigned long own_t, thread_t;
void lock_take(lock_t *lock);
void lock_give(lock_t *lock);
void own_init(own_t *own);
void *own_get(own_t own);
void own_set(own_t own, const void *value);
thread_t thread_self(void);
static inline bool thread_is_self(thread_t thread) { return thread == thread_self(); }
#else
typedef pthread_mutex_t lock_t;
#define LOCK_INITIALIZER PTHREAD_MUTEX_INITIALIZER
static inline void lock_take(lock_t *lock) { pthread_mutex_lock(lock); }
static inline void lock_give(lock_t *lock) { pthread_mutex_unlock(lock); }
typedef pthread_key_t own_t;
static inline void own_init(own_t *own) { pthread_key_create(own, NULL); }
static inline void *own_get(own_t own) { return pthread_getspecific(own); }
static inline void own_set(own_t own, const void *value) { pthread_setspecific(own, value); }
typedef pthread_t thread_t;
static inline thread_t thread_self(void) { return pthread_self(); }
static inline bool thread_is_self(thread_t thread) { return pthread_equal(thread, pthread_self()); }
#endif

/* Starts a detached thread on these CPUs (if not empty), which takes no signals but those that a fault raises. */
bool thread_start(void *(*run)(void *), const struct cpus *cpus);

/* Sleeps while the word has the value, until it is woken; or longest_ns (0: without end), or for no reason. */
void sleep_while(atomic_uint *word, unsigned value, uint64_t longest_ns);
void wake(atomic_uint *word, int threads);

/* Has a function run before each fork, and after it in the parent and in the child; Windows has no forks. */
void at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void));

/* Runs a function when the library is loaded. */
#define AT_LOAD __attribute__((constructor))

#endif
