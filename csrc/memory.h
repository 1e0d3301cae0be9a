/* Scratch memory.  The library allocates nowhere else, so that a test can make any allocation fail. */
#ifndef PYREG_MEMORY_H
#define PYREG_MEMORY_H

#include <stddef.h>

void *memory_alloc(size_t count, size_t bytes); /* count * bytes; NULL on failure, overflow included */
void memory_free(void *p);

#endif
