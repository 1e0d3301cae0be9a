/* What the machine gives this process, read from the operating system once. */
#ifndef PYREG_MACHINE_H
#define PYREG_MACHINE_H

#include <stddef.h>

size_t machine_cache_bytes(void); /* last-level cache; a guess of 8 MiB where the system does not say */
int machine_cpus(void);           /* CPUs of the affinity mask, no more than the cgroup's CPU quota; at least 1 */

#endif
