#include "memory.h"

#include "pyreg.h"

#include <stdatomic.h>
#include <stdlib.h>

static atomic_long fail_at; /* the allocation that fails counts down to 1; 0: none does */

void pyreg_fail_allocation(long n) { atomic_store(&fail_at, n); }

void *memory_alloc(size_t count, size_t bytes) {
    size_t total;
    if (__builtin_mul_overflow(count, bytes, &total)) return NULL;
    long n = atomic_load(&fail_at);
    if (n > 0 && atomic_fetch_sub(&fail_at, 1) == 1) return NULL;
    return malloc(total ? total : 1);
}

void memory_free(void *p) { free(p); }
