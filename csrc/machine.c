#define _GNU_SOURCE
#include "machine.h"

#include "pyreg.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static size_t read_cache_bytes(void) {
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
    return last ? last : (size_t)8 << 20;
}

static size_t cache_bytes; /* 0: not read yet; every thread reads the same value */

size_t machine_cache_bytes(void) {
    size_t b = __atomic_load_n(&cache_bytes, __ATOMIC_RELAXED);
    if (!b) __atomic_store_n(&cache_bytes, b = read_cache_bytes(), __ATOMIC_RELAXED);
    return b;
}

void pyreg_set_cache_bytes(size_t bytes) { __atomic_store_n(&cache_bytes, bytes, __ATOMIC_RELAXED); }

size_t pyreg_cache_bytes(void) { return machine_cache_bytes(); }

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
static double cgroup_cpus(void) {
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

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

double machine_quota(void) {
    static double cpus;
    static uint64_t read_at; /* 0: never.  Threads that find it old at once all read the same */
    double q;
    const uint64_t now = clock_ns(), then = __atomic_load_n(&read_at, __ATOMIC_ACQUIRE);
    if (then && now - then < 1000000000) {
        __atomic_load(&cpus, &q, __ATOMIC_RELAXED);
    } else {
        q = cgroup_cpus();
        __atomic_store(&cpus, &q, __ATOMIC_RELAXED);
        __atomic_store_n(&read_at, now, __ATOMIC_RELEASE);
    }
    return q;
}
