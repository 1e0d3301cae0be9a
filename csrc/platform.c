#define _GNU_SOURCE
#include "platform.h"

#include <math.h>
#include <string.h>

#if defined(__linux__) && !defined(PYREG_AS_POSIX)
#define LINUX
#endif

#ifdef _WIN32
/* ---- Windows ----------------------------------------------------------------------------------------------------- */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

uint64_t clock_ns(void) {
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    const uint64_t t = (uint64_t)ticks.QuadPart, f = (uint64_t)per_second.QuadPart;
    return t / f * 1000000000 + t % f * 1000000000 / f;
}

size_t platform_cache_bytes(void) {
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION parts[512];
    DWORD bytes = sizeof parts;
    size_t last = 0;
    if (!GetLogicalProcessorInformation(parts, &bytes)) return 0;
    for (size_t i = 0; i < bytes / sizeof *parts; i++)
        if (parts[i].Relationship == RelationCache && parts[i].Cache.Size > last) last = parts[i].Cache.Size;
    return last;
}

int platform_cpus(void) {
    DWORD_PTR process, system;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &process, &system) || !process) /* of more than 64 CPUs */
        return (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    return __builtin_popcountll(process);
}

const char *platform_library(void *function) {
    (void)function;
    return NULL;
}

void *platform_function(const char *library, const char *name) {
    HMODULE module;
    return GetModuleHandleExA(0, library, &module) ? (void *)(intptr_t)GetProcAddress(module, name) : NULL;
}

_Static_assert(sizeof(lock_t) == sizeof(SRWLOCK), "lock_t is the system's own");
void lock_take(lock_t *lock) { AcquireSRWLockExclusive((SRWLOCK *)lock); }
void lock_give(lock_t *lock) { ReleaseSRWLockExclusive((SRWLOCK *)lock); }

void own_init(own_t *own) { *own = TlsAlloc(); }
void *own_get(own_t own) { return TlsGetValue(own); }
void own_set(own_t own, const void *value) { TlsSetValue(own, (void *)(intptr_t)value); }

thread_t thread_self(void) { return GetCurrentThreadId(); }

static DWORD WINAPI start(void *run) {
    ((void *(*)(void *))(intptr_t)run)(NULL);
    return 0;
}

bool thread_start(void *(*run)(void *), const struct cpus *cpus) {
    (void)cpus;
    HANDLE thread = CreateThread(NULL, 0, start, (void *)(intptr_t)run, 0, NULL);
    return thread && CloseHandle(thread);
}

typedef CONDITION_VARIABLE condition_t;
#define CONDITION_INITIALIZER CONDITION_VARIABLE_INIT

static void condition_wait(condition_t *condition, lock_t *lock, uint64_t longest_ns) {
    const DWORD ms = longest_ns ? (DWORD)((longest_ns + 999999) / 1000000) : INFINITE;
    SleepConditionVariableSRW(condition, (SRWLOCK *)lock, ms, 0);
}

static void condition_wake(condition_t *condition) { WakeAllConditionVariable(condition); }

void at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    (void)before, (void)in_parent, (void)in_child;
}

#else
/* ---- POSIX ------------------------------------------------------------------------------------------------------- */
#include <dlfcn.h>
#include <limits.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

static void set_cpus(pthread_t thread, const struct cpus *cpus);

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

int platform_cpus(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }

const char *platform_library(void *function) {
    Dl_info info;
    return dladdr(function, &info) ? info.dli_fname : NULL;
}

void *platform_function(const char *library, const char *name) {
    void *loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    return loaded ? dlsym(loaded, name) : NULL;
}

bool thread_start(void *(*run)(void *), const struct cpus *cpus) {
    sigset_t all, old;
    sigfillset(&all);
    for (const int *s = (const int[]){SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, 0}; *s; s++)
        sigdelset(&all, *s);
    pthread_attr_t detached;
    pthread_t thread;
    if (pthread_attr_init(&detached) != 0) return false;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const bool started = pthread_create(&thread, &detached, run, NULL) == 0;
    if (started && cpus_count(cpus)) set_cpus(thread, cpus);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&detached);
    return started;
}
#endif

#ifdef LINUX
/* ---- Linux ------------------------------------------------------------------------------------------------------- */
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <sys/syscall.h>

size_t platform_cache_bytes(void) {
    size_t last = 0;
    for (int i = 0; i < 8; i++) {
        char path[80], unit = 0;
        size_t size;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        FILE *f = fopen(path, "r");
        if (!f) break;
        if (fscanf(f, "%zu%c", &size, &unit) >= 1) {
            size <<= unit == 'K' ? 10 : unit == 'M' ? 20 : 0;
            if (size > last) last = size;
        }
        fclose(f);
    }
    return last;
}

/* Two numbers of a cgroup file, "max" read as no limit; their ratio is a number of CPUs. */
static double read_quota(const char *dir, const char *group, const char *quota_file, const char *period_file) {
    char path[640];
    long quota = 0, period = 0; /* musl's fscanf takes 8 KB of stack for a double */
    snprintf(path, sizeof path, "%s%s/%s", dir, group, quota_file);
    FILE *f = fopen(path, "r");
    if (!f) return INFINITY;
    int got = fscanf(f, "%ld %ld", &quota, &period);
    fclose(f);
    if (period_file && got == 1) {
        snprintf(path, sizeof path, "%s%s/%s", dir, group, period_file);
        if (!(f = fopen(path, "r"))) return INFINITY;
        got += fscanf(f, "%ld", &period);
        fclose(f);
    }
    return got == 2 && quota > 0 && period > 0 ? (double)quota / (double)period : INFINITY;
}

/* The tightest quota on the way from this process's cgroup to the root, v2 and v1. */
double platform_quota(void) {
    double cpus = INFINITY;
    char line[512];
    FILE *f = fopen("/proc/self/cgroup", "r");
    if (!f) return cpus;
    while (fgets(line, sizeof line, f)) { /* "0::/group" or "4:cpu,cpuacct:/group" */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        bool v2 = *++controllers == 0, cpu = false;
        for (char *rest, *name = strtok_r(controllers, ",", &rest); name; name = strtok_r(NULL, ",", &rest))
            cpu |= strcmp(name, "cpu") == 0;
        if (!v2 && !cpu) continue;
        for (;;) {
            char *slash = strrchr(group, '/');
            if (slash && slash[1] == 0) *slash = 0; /* the root: "/" as "" */
            double q = v2 ? read_quota("/sys/fs/cgroup", group, "cpu.max", NULL)
                          : read_quota("/sys/fs/cgroup/cpu", group, "cpu.cfs_quota_us", "cpu.cfs_period_us");
            cpus = fmin(cpus, q);
            if (!(slash = strrchr(group, '/'))) break;
            *slash = 0;
        }
    }
    fclose(f);
    return cpus;
}

_Static_assert(sizeof(struct cpus) == sizeof(cpu_set_t), "struct cpus is the system's own");

static void read_cpus(pid_t thread, struct cpus *cpus) {
    memset(cpus, 0, sizeof *cpus);
    if (sched_getaffinity(thread, sizeof *cpus, (cpu_set_t *)cpus) != 0) memset(cpus, 0, sizeof *cpus);
}

void cpus_of_thread(struct cpus *cpus) { read_cpus(0, cpus); }

void cpus_of_process(struct cpus *cpus) { read_cpus(getpid(), cpus); }

void cpus_set_thread(const struct cpus *cpus) { sched_setaffinity(0, sizeof *cpus, (const cpu_set_t *)cpus); }

void cpus_add(struct cpus *cpus, int cpu) {
    if (cpu >= 0 && cpu < MAX_CPUS) CPU_SET((size_t)cpu, (cpu_set_t *)cpus);
}

int cpus_count(const struct cpus *cpus) { return CPU_COUNT((const cpu_set_t *)cpus); }

bool cpus_equal(const struct cpus *a, const struct cpus *b) { return memcmp(a, b, sizeof *a) == 0; }

static void set_cpus(pthread_t thread, const struct cpus *cpus) {
    pthread_setaffinity_np(thread, sizeof *cpus, (const cpu_set_t *)cpus);
}

void sleep_while(atomic_uint *word, unsigned value, uint64_t longest_ns) {
    /* A timespec as the kernel has it: on 32 bits time_t may be longer. */
    const long longest[2] = {(long)(longest_ns / 1000000000), (long)(longest_ns % 1000000000)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, longest_ns ? longest : NULL, NULL, 0);
}

void wake(atomic_uint *word, int threads) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0); }

void at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    pthread_atfork(before, in_parent, in_child);
}

#elif !defined(_WIN32)
/* ---- macOS and other POSIX; tests compile it on Linux, too: PYREG_AS_POSIX --------------------------------------- */
#ifdef __APPLE__
#include <sys/sysctl.h>

static size_t number_of(const char *name) {
    uint64_t value = 0; /* some are of 32 bits; both machines are little-endian */
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, NULL, 0) == 0 ? (size_t)value : 0;
}

size_t platform_cache_bytes(void) {
    static const char *const names[] = {"hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"};
    size_t bytes = 0;
    for (int i = 0; !bytes && i < 3; i++) bytes = number_of(names[i]);
    return bytes;
}
#else
size_t platform_cache_bytes(void) { return 0; }
#endif

static void set_cpus(pthread_t thread, const struct cpus *cpus) { (void)thread, (void)cpus; }

typedef pthread_cond_t condition_t;
#define CONDITION_INITIALIZER PTHREAD_COND_INITIALIZER

static void condition_wait(condition_t *condition, lock_t *lock, uint64_t longest_ns) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* the only clock of conditions that macOS has */
    const uint64_t ns = (uint64_t)until.tv_nsec + longest_ns;
    until.tv_sec += (time_t)(ns / 1000000000), until.tv_nsec = (long)(ns % 1000000000);
    if (longest_ns)
        pthread_cond_timedwait(condition, lock, &until);
    else
        pthread_cond_wait(condition, lock);
}

static void condition_wake(condition_t *condition) { pthread_cond_broadcast(condition); }
#endif

#ifndef LINUX
/* ---- Not Linux --------------------------------------------------------------------------------------------------- */

double platform_quota(void) { return INFINITY; }

/* Threads are not bound to CPUs. */
void cpus_of_thread(struct cpus *cpus) { memset(cpus, 0, sizeof *cpus); }
void cpus_of_process(struct cpus *cpus) { memset(cpus, 0, sizeof *cpus); }
void cpus_set_thread(const struct cpus *cpus) { (void)cpus; }
void cpus_add(struct cpus *cpus, int cpu) { (void)cpus, (void)cpu; }
int cpus_count(const struct cpus *cpus) {
    (void)cpus;
    return 0;
}
bool cpus_equal(const struct cpus *a, const struct cpus *b) {
    (void)a, (void)b;
    return true;
}

/* Sleepers share a few beds, by the address of their word: who wakes one wakes all in its bed. */
enum { BEDS = 16 };
#define FREE_BED {LOCK_INITIALIZER, CONDITION_INITIALIZER}
static struct bed {
    lock_t lock;
    condition_t woken;
} beds[BEDS] = {[0 ... BEDS - 1] = FREE_BED};

static struct bed *bed_of(const atomic_uint *word) { return &beds[(uintptr_t)word / 64 % BEDS]; }

void sleep_while(atomic_uint *word, unsigned value, uint64_t longest_ns) {
    struct bed *bed = bed_of(word);
    lock_take(&bed->lock);
    if (atomic_load(word) == value) condition_wait(&bed->woken, &bed->lock, longest_ns);
    lock_give(&bed->lock);
}

void wake(atomic_uint *word, int threads) {
    (void)threads;
    struct bed *bed = bed_of(word);
    lock_take(&bed->lock);
    condition_wake(&bed->woken);
    lock_give(&bed->lock);
}

#ifndef _WIN32
static void make_beds(void) {
    for (int b = 0; b < BEDS; b++) beds[b] = (struct bed)FREE_BED;
}

void at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    pthread_atfork(NULL, NULL, make_beds); /* in the child nobody sleeps, or holds a lock */
    pthread_atfork(before, in_parent, in_child);
}
#endif
#endif
