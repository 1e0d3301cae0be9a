/* pyreg: regularisation kernels for CPUs.  This header is the manual of the C library.
 *
 * Contract of every function
 *   - Arguments are checked before anything is written; the result is a status, PYREG_OK (0) or an error.
 *   - Results are a function of the arguments alone: the same bits for every thread count, instruction set,
 *     alignment, memory layout (but see batch-norm), and for in-place and fresh outputs.
 *   - Thread-safe: any number of threads may call at once.  The library keeps no state but its threads, the settings
 *     below and what it has read of the machine; none of it changes a result.
 *   - 16 KB of stack are enough, in the calling thread and in others; scratch memory is allocated before anything is
 *     written.
 *   - The caller's floating-point mode (rounding, flush-to-zero) holds in every thread that helps, and is kept.
 *   - Arrays may be strided in any way (strides in bytes, also zero for inputs, also negative); elements are aligned
 *     to their size.  An input may be the output (same address and strides); other overlaps are the caller's to avoid.
 *   - After fork() parent and child go on as before, also where the interrupt check below forks, in a call's midst.
 * Not promised: progress or partial results after PYREG_INTERRUPTED: the output is then unspecified.
 */
#ifndef PYREG_H
#define PYREG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum pyreg_status {
    PYREG_OK = 0,
    PYREG_NO_MEMORY,   /* scratch memory could not be allocated; nothing was written */
    PYREG_INTERRUPTED, /* the interrupt check (below) asked to stop */
    PYREG_BAD_DTYPE,
    PYREG_BAD_GENERATOR,
    PYREG_BAD_RATE,  /* not in [0, 1] */
    PYREG_BAD_SHAPE, /* more than PYREG_MAX_DIMS dims, a negative length, or 2^63 elements (32 bits: 2^32) and more */
    PYREG_BAD_AXIS,  /* not one of the dims */
    PYREG_BAD_ISA,   /* PYREG_ISA names an instruction set that is unknown, or that this machine lacks */
};
const char *pyreg_strerror(enum pyreg_status status);

/* Element types.  Half types are stored as uint16_t and computed in float. */
enum pyreg_dtype { PYREG_F32, PYREG_F64, PYREG_F16, PYREG_BF16, PYREG_NUM_DTYPES };

enum { PYREG_MAX_DIMS = 64 };

/* An operand.  Inputs are not written.  data NULL: there is no such operand, and `strides` is not read. */
struct pyreg_array {
    void *data;             /* the first element */
    const int64_t *strides; /* from an element to the next along each dim, in bytes */
};

/* ---- Masks ------------------------------------------------------------------------------------------------------
 * Whether element i is dropped is a function of (generator, key, rate, i) and of nothing else; i is a 64-bit index.
 *
 * PYREG_PHILOX (frozen as "philox-v1").  Element i owns a number u in [0, 1) with 64 binary digits.  Digit p, most
 *   significant first, is bit i % 32 of word p % 4 of Philox4x32-10 [1] with key (key[0], key[1]) at the counter
 *   (low 32 bits of i / 32, high 32 bits of i / 32, p / 4, 0).  The element is dropped iff u < rate, where rate is
 *   rounded to a multiple of 2^-64.  So the probability is exact to 2^-64, a higher rate drops a superset, and only the
 *   digits that decide are ever computed: one for rate 0.5, eight and seldom more for any other.
 * PYREG_THREEFRY.  The mask of jax.random.bernoulli(key, 1 - rate) with x64 off: Threefry2x32-20 [1] at the counter
 *   (high 32 bits of i, low 32 bits of i) gives (a, b); dropped iff (a ^ b) >> 9 >= ceil(f32(1 - rate) * 2^23).
 * PYREG_THREEFRY_X64.  The same with x64 on: dropped iff (a << 32 | b) >> 12 >= ceil((1 - rate) * 2^52).
 *
 * PYREG_PACKED.  Bit i of `bits`, which pyreg_dropout_mask has packed: for a mask that is used more than once.
 *
 * [1] Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
 */
enum pyreg_generator { PYREG_PHILOX, PYREG_THREEFRY, PYREG_THREEFRY_X64, PYREG_PACKED, PYREG_NUM_GENERATORS };

struct pyreg_mask {
    enum pyreg_generator generator;
    uint32_t key[2];
    double rate;         /* probability of dropping, in [0, 1]; 0 and 1 draw nothing */
    uint64_t offset;     /* index of the first element */
    const uint8_t *bits; /* PYREG_PACKED only */
    size_t num_bytes;
};

/* ---- Dropout ----------------------------------------------------------------------------------------------------
 * y = kept ? x * scale : +0.  A dropped NaN or Inf becomes +0 too.  The backward pass is the same function on dy.
 * With rate 0 all is kept; with scale 1, which is that of rate 0, bits are then unchanged. */
struct pyreg_dropout {
    enum pyreg_dtype dtype;
    int ndim;
    const int64_t *shape;
    struct pyreg_mask mask;
    double scale; /* that of pyreg_dropout_scale: values equal Flax's bit for bit; 1: the form of the 2014 paper */
    struct pyreg_array x, y;
    const int64_t *mask_strides; /* in elements: that at (j0, j1, ...) has index offset + sum j_d * mask_strides[d]; 0
                                  * where the mask is broadcast; those of a larger array's shape where x is a part of
                                  * it.  NULL: C order */
};
enum pyreg_status pyreg_dropout(const struct pyreg_dropout *args);

/* 1 / (1 - rate), rounded as XLA rounds it for the dtype. */
double pyreg_dropout_scale(enum pyreg_dtype dtype, double rate);

/* The mask itself for indices offset .. offset + n - 1, 1 = kept: a byte per element (0 or 1), or packed, LSB first,
 * in (n + 7) / 8 bytes with the spare bits 0. */
enum pyreg_status pyreg_dropout_mask(const struct pyreg_mask *mask, size_t n, bool packed, uint8_t *out);

/* One block of the generators, as the instruction set in use computes it. */
void pyreg_philox4x32_10(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]);
void pyreg_threefry2x32_20(const uint32_t key[2], const uint32_t counter[2], uint32_t out[2]);

/* ---- Batch-norm --------------------------------------------------------------------------------------------------
 * x has `shape`; dim `axis` counts the channels; the n elements of a channel share a mean and a (biased) variance.
 *
 *   forward    y = (x - mean) * (scale / sqrt(var + epsilon)) + bias, mean and var those of x, or of x where mask is
 *              true
 *   inference  the same with the mean and var given
 *   backward   dbias = sum dy, dscale = sum dy * xhat, xhat = (x - mean) / sqrt(var + epsilon),
 *              dx = scale / sqrt(var + epsilon) * (dy - dbias / n - xhat * dscale / n)
 *              and, where dmean and dvar (gradients of the outputs mean and var) are given, + dmean / n
 *              + 2 dvar (x - mean) / n.  Where mask is false dx is scale / sqrt(var + epsilon) * dy; dbias and dscale
 *              are sums over all elements, but one that is masked and not finite adds nothing to dscale.
 *   epilogue   forward and inference: y += residual if not NULL, then y = max(y, 0) if relu.  backward with relu: y is
 *              the forward's output, dy counts where y > 0 and is 0 elsewhere; that is written to dresidual if not
 *              NULL.
 *
 * Types.    mean, var, scale, bias and their gradients: contiguous, a value per channel; float, or double with
 *           PYREG_F64. mask: a byte per element, 0 or 1.  The arithmetic is that of the statistics' type, sums are in
 *           double, half types are rounded once, at the end.
 * Optional. scale (1), bias (0), mask, residual, dmean, dvar, dresidual, y of the backward without relu: NULL.
 *           y of the forward: NULL for mean and var alone.  mean_low: what the mean is more than `mean`; or NULL.
 * In place. y may be x or residual; dx and dresidual may be dy, x or y (one each).
 * Accuracy. var is within 4e-7 of itself for |mean| / std up to 1e7; a channel of equal elements gives exactly bias.
 * Range.    A float var is inf where it is above 3.4e38 (std 1.8e19), and loses digits below 1.2e-38.  y of the forward
 *           is right all the same, and so are the gradients: backward takes such a var from x again, if epsilon does
 *           not hide it.  Inference knows only the var given: with inf y is bias.  Double: sums of squares that
 *           overflow (from a std of about 1e150 on) give an infinite or NaN var, and nothing else either.
 * Bits.     The order of additions is a function of shape and of x's strides (backward: also dy's and y's); NaN and
 *           Inf stay in their channel (which NaN, of the many, is not promised).
 * Edges.    A channel without elements, or whose mask is all false: mean and var are NaN.
 * Pass the mean of the forward to backward: it is refined from x, because a float may be a good part of a std off. */
struct pyreg_batchnorm {
    enum pyreg_dtype dtype;
    int ndim, axis; /* 0 <= axis < ndim */
    const int64_t *shape;
    double epsilon;
    bool relu;
    const void *scale, *bias; /* backward does not read bias */
};

struct pyreg_batchnorm_forward {
    struct pyreg_batchnorm common;
    struct pyreg_array x, mask, residual, y;
    void *mean, *mean_low, *var; /* written */
};
enum pyreg_status pyreg_batchnorm_forward(const struct pyreg_batchnorm_forward *args);

struct pyreg_batchnorm_inference {
    struct pyreg_batchnorm common;
    struct pyreg_array x, residual, y;
    const void *mean, *var;
};
enum pyreg_status pyreg_batchnorm_inference(const struct pyreg_batchnorm_inference *args);

struct pyreg_batchnorm_backward {
    struct pyreg_batchnorm common;
    struct pyreg_array dy, x, mask, y, dx, dresidual;
    const void *mean, *var, *dmean, *dvar;
    void *dscale, *dbias; /* written */
};
enum pyreg_status pyreg_batchnorm_backward(const struct pyreg_batchnorm_backward *args);

/* ---- Threads ----------------------------------------------------------------------------------------------------
 * Number of threads of the next call from this thread: pyreg_use_threads(n) of this thread if n > 0, else
 * pyreg_set_num_threads(n) if n > 0, else what OpenMP, the CPU affinity and the cgroup CPU quota allow.  A number that
 * OpenMP is given after loading, as threadpoolctl does, is a limit in every case, but not noticed if it equals the one
 * at loading.  Small calls run serially.  The threads that help are the library's own; all calls share them, and 50 us
 * after a call they sleep.  Where the system refuses another one, those that there are do the work.
 *
 * A build without OpenMP heeds its OMP_NUM_THREADS, as it is when the library is loaded.
 *
 * pyreg_limit_threads(n) is what another library allows the calling thread: never more than n, if n > 0. */
int pyreg_get_num_threads(void);
void pyreg_set_num_threads(int n); /* whole process; 0: automatic */
int pyreg_use_threads(int n);      /* calling thread only; 0: as the process.  Returns the previous value */
int pyreg_limit_threads(int n);    /* calling thread only; 0: no limit.  Returns the previous value */

/* Follow an OpenMP library that the process has loaded: its number of threads and its limits hold for calls, too.  At
 * first it is the one that this library is linked with, or else one that was loaded before, under its usual name.  Returns
 * false where there is no such library, or it lacks gcc's entry points (LLVM's and Intel's have them).  Where none is
 * followed, OMP_NUM_THREADS and OMP_THREAD_LIMIT are heeded. */
bool pyreg_follow_openmp(const char *file);

/* Whether its threads help in calls from this thread, instead of our own: for a program whose other code keeps them
 * spinning on the CPUs.  Not in forked children; and nothing asks whether such a call is to be interrupted.  Nothing
 * changes where no OpenMP library is followed.  Returns what held before. */
bool pyreg_use_team(bool use);

/* Another library's pool, whose threads help in calls from this thread, instead of the library's own: schedule() has
 * task(argument) run on one of them, now, later or never.  NULL: none.  Returns what held before. */
struct pyreg_pool {
    void (*schedule)(void *context, void (*task)(void *argument), void *argument);
    void *context;
};
const struct pyreg_pool *pyreg_use_pool(const struct pyreg_pool *pool);

/* OpenMP may pin the thread that loads it to a CPU (OMP_PROC_BIND).  Says that the loader has undone that, so that a
 * main thread with that affinity has it from elsewhere. */
void pyreg_unpinned(void);

/* Long calls ask this, from the calling thread, about every 50 ms; they stop when it returns true. */
void pyreg_set_interrupt_check(bool (*check)(void));
bool pyreg_allow_interrupts(bool allow); /* do calls from this thread ask?  Returns the previous value, true at first */

/* ---- Tests and benchmarks ---------------------------------------------------------------------------------------
 * The n-th allocation of scratch memory from now fails, once; 0: none does. */
void pyreg_fail_allocation(long n);
/* The two sizes at which calls change gear, so that both sides can be measured anywhere; no bit depends on them. */
double pyreg_parallel_from(void);         /* work that is shared among threads: estimated ns on one thread */
void pyreg_set_parallel_from(double ns);  /* negative: as built */
void pyreg_set_cache_bytes(size_t bytes); /* what pyreg_cache_bytes() says; 0: as the operating system says */

/* ---- Build and machine ------------------------------------------------------------------------------------------ */
enum pyreg_status pyreg_init(void); /* chooses the instruction set: PYREG_ISA, else the best.  Call it first */
enum pyreg_status pyreg_use_isa(const char *name); /* changes it, NULL: the best; not while other calls run */
const char *pyreg_isa_name(void);                  /* the one in use */
const char *pyreg_isa_available(int i);            /* i-th that this machine can run, best first; NULL past the end */
const char *pyreg_compiler(void);
const char *pyreg_openmp_library(void); /* file of the OpenMP runtime in use */
size_t pyreg_cache_bytes(void);         /* last-level cache, at most 16 MiB for each CPU, or 8 MiB if unknown: larger
                                 * working sets are written around it */

#ifdef __cplusplus
}
#endif
#endif
