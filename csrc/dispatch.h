/* Which instruction sets there are, which one is in use, and what it has. */
#ifndef PYREG_DISPATCH_H
#define PYREG_DISPATCH_H

#include "kernels/kernels.h"
#include "pyreg.h"

const struct mask_kernels *dispatch_masks(void);
const struct kernels *dispatch_kernels(enum pyreg_dtype dtype);
size_t dispatch_bytes(enum pyreg_dtype dtype); /* of an element */

#endif
