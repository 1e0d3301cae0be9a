/* Sizes: of a cache line; the lesser, the greater, the quotient rounded up. */
#ifndef PYREG_ARITH_H
#define PYREG_ARITH_H

#include <stddef.h>

enum { LINE_BYTES = 64 };

static inline size_t at_most(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t at_least(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

#endif
