#include "machine.h"

#include "platform.h"
#include "pyreg.h"

/* The last-level caches of today have 2 to 12 MB for each CPU.  A virtual machine with a few CPUs is shown its host's
 * whole cache, which it shares with others. */
enum { CACHE_OF_CPU = 16 << 20 };

static size_t cache_bytes; /* 0: not read yet; every thread reads the same value */

size_t pyreg_cache_bytes(void) {
    size_t b = __atomic_load_n(&cache_bytes, __ATOMIC_RELAXED);
    if (!b) {
        const size_t read = platform_cache_bytes(), cpus = (size_t)platform_cpus();
        b = read == 0 ? (size_t)8 << 20 : read / CACHE_OF_CPU < cpus ? read : cpus * CACHE_OF_CPU;
        __atomic_store_n(&cache_bytes, b, __ATOMIC_RELAXED);
    }
    return b;
}

void pyreg_set_cache_bytes(size_t bytes) { __atomic_store_n(&cache_bytes, bytes, __ATOMIC_RELAXED); }

bool machine_stores_around(size_t bytes) { return bytes > pyreg_cache_bytes(); }

double machine_quota(void) {
    static double cpus;
    static uint64_t read_at; /* 0: never.  Threads that find it old at once all read the same */
    double q;
    const uint64_t now = clock_ns(), then = __atomic_load_n(&read_at, __ATOMIC_ACQUIRE);
    if (then && now - then < 1000000000) {
        __atomic_load(&cpus, &q, __ATOMIC_RELAXED);
    } else {
        q = platform_quota();
        __atomic_store(&cpus, &q, __ATOMIC_RELAXED);
        __atomic_store_n(&read_at, now, __ATOMIC_RELEASE);
    }
    return q;
}
