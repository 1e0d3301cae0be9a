/* Loops over elements.  Compiled once per instruction set (PYREG_ISA) and element type (PYREG_DTYPE): a table each. */
#include "dropout.h"
#include "sums.h"
#include "sweeps.h"

#define NAME3(isa, dtype) pyreg_kernels_##isa##_##dtype
#define NAME2(isa, dtype) NAME3(isa, dtype)
const struct kernels NAME2(PYREG_ISA, PYREG_DTYPE) = {
    .dropout = dropout,
    .stream_end = stream_end,
    .bn_sums = bn_sums,
    .bn_shifted_sums = bn_shifted_sums,
    .bn_masked_sums = bn_masked_sums,
    .bn_gradient_sums = bn_gradient_sums,
    .bn_finite_gradient_sums = bn_finite_gradient_sums,
    .bn_normalise = bn_normalise,
    .bn_differentiate = bn_differentiate,
    .bn_sweep_wide = bn_sweep_wide,
};
