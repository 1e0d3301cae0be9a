/* XLA's handlers of the ops, for jax.ffi.register_ffi_target.  Only in builds that found XLA's headers (PYREG_FFI). */
#ifndef PYREG_FFI_H
#define PYREG_FFI_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct pyreg_ffi_handler {
    const char *name; /* NULL ends the list.  Exported programs keep it: what an operand or attribute means is frozen */
    void *handler;
};

#ifdef PYREG_FFI
void pyreg_ffi_use_xla_pool(bool use); /* do XLA's threads help in calls from it (the default), or the library's? */
extern const struct pyreg_ffi_handler pyreg_ffi_handlers[];
extern const int pyreg_ffi_api[2]; /* major and minor version of XLA's interface that they are built for */
#else
static const struct pyreg_ffi_handler pyreg_ffi_handlers[] = {{0}};
static const int pyreg_ffi_api[2];
static inline void pyreg_ffi_use_xla_pool(bool use) { (void)use; }
#endif

#ifdef __cplusplus
}
#endif

#endif
