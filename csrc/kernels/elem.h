/* One element type, chosen by the build with -DPYREG_F32 and so on:
 *   elem_t  as stored;  acc_t  as computed;  load() and store() convert, store() rounds to nearest even. */
#ifndef PYREG_ELEM_H
#define PYREG_ELEM_H

#include "half.h"

#if defined(PYREG_F32)
typedef float elem_t;
typedef float acc_t;
static inline acc_t load(elem_t e) { return e; }
static inline elem_t store(acc_t a) { return a; }

#elif defined(PYREG_F64)
typedef double elem_t;
typedef double acc_t;
static inline acc_t load(elem_t e) { return e; }
static inline elem_t store(acc_t a) { return a; }

#elif defined(PYREG_F16)
typedef uint16_t elem_t;
typedef float acc_t;
static inline acc_t load(elem_t e) { return f16_to_float(e); }
static inline elem_t store(acc_t a) { return float_to_f16(a); }

#elif defined(PYREG_BF16)
typedef uint16_t elem_t;
typedef float acc_t;
static inline acc_t load(elem_t e) { return bf16_to_float(e); }
static inline elem_t store(acc_t a) { return float_to_bf16(a); }

#else
#error "the build chooses the element type: -DPYREG_F32, _F64, _F16 or _BF16"
#endif

#endif
