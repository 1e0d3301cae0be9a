/* Non-temporal stores: they write around the cache, so that a large output is not read before it is written. */
#ifndef PYREG_STREAM_H
#define PYREG_STREAM_H

#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* to: aligned to 64 bytes; bytes: a multiple of 64.  From half a vector to half a vector: `from` has just been written,
 * and a load that spans two stores has to wait for both to reach the cache. */
static inline void stream_lines(void *to, const void *from, size_t bytes) {
#if defined(__AVX512F__)
    for (size_t b = 0; b < bytes; b += 32)
        _mm256_stream_si256((__m256i *)((char *)to + b), _mm256_loadu_si256((const __m256i *)((const char *)from + b)));
#elif defined(__x86_64__)
    for (size_t b = 0; b < bytes; b += 16)
        _mm_stream_si128((__m128i *)((char *)to + b), _mm_loadu_si128((const __m128i *)((const char *)from + b)));
#else
    memcpy(to, from, bytes);
#endif
}

static void stream_end(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#endif
