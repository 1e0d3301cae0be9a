#define _GNU_SOURCE
#include "platform.h"

#include <dlfcn.h>
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- The machine ------------------------------------------------------------------------------------------------- */

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
    double quota = 0, period = 0;
    snprintf(path, sizeof path, "%s%s/%s", dir, group, quota_file);
    FILE *f = fopen(path, "r");
    if (!f) return INFINITY;
    int got = fscanf(f, "%lf %lf", &quota, &period);
    fclose(f);
    if (period_file && got == 1) {
        snprintf(path, sizeof path, "%s%s/%s", dir, group, period_file);
        if (!(f = fopen(path, "r"))) return INFINITY;
        got += fscanf(f, "%lf", &period);
        fclose(f);
    }
    return got == 2 && quota > 0 && period > 0 ? quota / period : INFINITY;
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

int platform_cpus(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }

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

const char *platform_library(void *function) {
    Dl_info info;
    return dladdr(function, &info) ? info.dli_fname : NULL;
}

/* ---- Threads ----------------------------------------------------------------------------------------------------- */

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
    if (started && cpus_count(cpus)) pthread_setaffinity_np(thread, sizeof *cpus, (const cpu_set_t *)cpus);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&detached);
    return started;
}

void sleep_while(atomic_uint *word, unsigned value, uint64_t longest_ns) {
    const struct timespec longest = {(time_t)(longest_ns / 1000000000), (long)(longest_ns % 1000000000)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, longest_ns ? &longest : NULL, NULL, 0);
}

void wake(atomic_uint *word, int threads) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0); }

void at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    pthread_atfork(before, in_parent, in_child);
}
