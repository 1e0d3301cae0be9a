/* Running chunks of work on threads. */
#ifndef PYREG_PARALLEL_H
#define PYREG_PARALLEL_H

#include "pyreg.h"

/* A phase is `chunks` calls run(work, 0 .. chunks - 1, scratch), in any order, on any thread, claimed one by one.
 * Phases run one after the other: all chunks of one are done before the next starts.  Each thread first claims chunks
 * that are next to each other, the same part of each phase and, if the threads are ours, as a rule of the next call:
 * that may still be in its cache. */
struct phase {
    size_t chunks;
    void (*run)(void *work, size_t chunk, void *scratch);
};
enum { MAX_PHASES = 3 }; /* of a call */

/* Runs the phases, on this thread and those helpers that are free; on this one alone if serial_ns, an estimate of the
 * whole work in nanoseconds on one thread, is below what threads pay for.  Each thread has `scratch_bytes` of its own,
 * from the beginning of a cache line on.  PYREG_OK, PYREG_INTERRUPTED, or PYREG_NO_MEMORY before anything has run. */
enum pyreg_status parallel_run(const struct phase *phases, size_t num_phases, void *work, size_t scratch_bytes,
                               double serial_ns);

/* Should the call stop?  For a run() that takes long to ask now and then, on any thread; false outside of one.  Where
 * it is true run() returns as soon as it can, and parallel_run returns PYREG_INTERRUPTED. */
bool parallel_stop(void);

/* Is the work shared among threads, if there are any? */
bool parallel_pays(double serial_ns);

#endif
