/* What the machine gives this process, read from the operating system and remembered. */
#ifndef PYREG_MACHINE_H
#define PYREG_MACHINE_H

#include <stdbool.h>
#include <stddef.h>

/* Should a call that reads and writes so many bytes store around the cache?  Where the last-level cache cannot hold
 * them that takes 0.6 to 0.9 times as long on an AMD Zen 3, and 0.6 to 1.2 times on Intel's CPUs, as the memory will
 * have it; where it can, up to 1.7 times, or what reads them next takes longer: `./run bench scaling --stores`. */
bool machine_stores_around(size_t bytes);

double machine_quota(void); /* CPUs that the cgroup's quota is worth, INFINITY if there is none; a second old at most */

#endif
