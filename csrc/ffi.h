/* XLA's handlers of the ops, for jax.ffi.register_ffi_target. */
#ifndef PYREG_FFI_H
#define PYREG_FFI_H

#include <stdbool.h>

struct pyreg_ffi_handler {
    const char *name; /* NULL ends the list.  Exported programs keep it: what an operand or attribute means is frozen */
    void *handler;
};

extern const struct pyreg_ffi_handler pyreg_ffi_handlers[];
extern const int pyreg_ffi_api[2];     /* major and minor version of XLA's interface that they are built for */
void pyreg_ffi_use_xla_pool(bool use); /* do XLA's threads help in calls from it (the default), or the library's? */

#endif
