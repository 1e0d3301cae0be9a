/* How many threads a call may have, by the caller, the operating system and OpenMP's settings.  The only file that
 * knows OpenMP; but for a team or a pool that was asked for, threads are our own, in parallel.c. */
#ifndef PYREG_THREADS_H
#define PYREG_THREADS_H

#include "platform.h"

struct threads {
    int count;        /* for one call */
    int useful;       /* for all calls of the process together */
    bool crowded;     /* more than there are CPUs for */
    struct cpus cpus; /* where they may run; empty if the system does not say */
};
struct threads threads_for_call(void); /* from this thread */

bool threads_have_team(void); /* an OpenMP library is followed */

/* work(argument) on this thread and on the team's, `count` in all. */
void threads_team(int count, void (*work)(void *), void *argument);

/* Is this thread part of an OpenMP region, whose others are at work? */
bool threads_taken(void);

#endif
