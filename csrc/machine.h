/* What the machine gives this process, as the operating system tells. */
#ifndef PYREG_MACHINE_H
#define PYREG_MACHINE_H

#include <stddef.h>
#include <stdint.h>

size_t machine_cache_bytes(void); /* last-level cache; a guess of 8 MiB where the system does not say.  Read once */
double machine_quota(void); /* CPUs that the cgroup's quota is worth, INFINITY if there is none; a second old at most */
uint64_t clock_ns(void);    /* a monotonic clock */

#endif
