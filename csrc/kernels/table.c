/* Loops over elements.  Compiled once per instruction set (PYREG_ISA) and element type (PYREG_DTYPE): a table each. */
#include "batchnorm.h"
#include "dropout.h"

#define NAME3(isa, dtype) pyreg_kernels_##isa##_##dtype
#define NAME2(isa, dtype) NAME3(isa, dtype)
const struct kernels NAME2(PYREG_ISA, PYREG_DTYPE) = {
    dropout,
    stream_end,
    bn_sums,
    bn_shifted_sums,
    bn_masked_sums,
    bn_gradient_sums,
    bn_finite_gradient_sums,
    bn_normalise,
    bn_differentiate,
    bn_sweep_wide,
};
