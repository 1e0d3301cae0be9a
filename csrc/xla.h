/* What pyreg uses of XLA's FFI: an interface in C between XLA and libraries, whose layout, numbers and rules OpenXLA's
 * xla/ffi/api/c_api.h documents.  Declared here as of version 0.1, so that a build needs no jaxlib: later minor versions
 * only add to the ends of structs, and say how long theirs are.  tests/test_jax_ffi.py compares it with the header of
 * the jaxlib that is installed. */
#ifndef PYREG_XLA_H
#define PYREG_XLA_H

#include <stddef.h>
#include <stdint.h>

enum { XLA_API_MAJOR = 0, XLA_API_MINOR = 1 };

enum xla_dtype {
    XLA_PRED = 1,
    XLA_S32 = 4,
    XLA_S64 = 5,
    XLA_U8 = 6,
    XLA_U32 = 8,
    XLA_F16 = 10,
    XLA_F32 = 11,
    XLA_F64 = 12,
    XLA_BF16 = 16,
};

enum xla_error_code { XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8 };
enum xla_stage { XLA_EXECUTE = 3 };
enum xla_attribute_type { XLA_SCALAR = 3 };
enum xla_extension_type { XLA_METADATA = 1 };

struct xla_error; /* these two are XLA's own */
struct xla_context;

/* The head of most structs: how many bytes the caller's has, and what else comes with it, a list. */
struct xla_extension {
    size_t struct_size;
    enum xla_extension_type type;
    struct xla_extension *next;
};

struct xla_version {
    size_t struct_size;
    struct xla_extension *extensions;
    int major, minor;
};

/* ---- What XLA asks of a handler before its first call: fill in the metadata ---- */
struct xla_metadata {
    size_t struct_size;
    struct xla_version version;
    uint32_t traits;
};
struct xla_metadata_extension {
    struct xla_extension head;
    struct xla_metadata *metadata;
};

/* ---- What a handler may ask of XLA; an error belongs to who gets it ---- */
struct xla_error_create_args {
    size_t struct_size;
    struct xla_extension *extensions;
    const char *message; /* is copied */
    enum xla_error_code code;
};
struct xla_error_destroy_args {
    size_t struct_size;
    struct xla_extension *extensions;
    struct xla_error *error;
};
struct xla_schedule_args {
    size_t struct_size;
    struct xla_extension *extensions;
    struct xla_context *context;
    void (*task)(void *argument);
    void *argument;
};
struct xla_api {
    size_t struct_size;
    struct xla_extension *extensions;
    struct xla_version version;
    void *internal;
    struct xla_error *(*error_create)(struct xla_error_create_args *args);
    void (*error_get_message)(void);
    void (*error_destroy)(struct xla_error_destroy_args *args);
    void (*others[8])(void);
    struct xla_error *(*schedule)(struct xla_schedule_args *args); /* a task on one of XLA's threads */
};

/* ---- A call ---- */
struct xla_buffer { /* an array in C order */
    size_t struct_size;
    struct xla_extension *extensions;
    enum xla_dtype dtype;
    void *data;
    int64_t rank;
    const int64_t *dims;
};
struct xla_buffers { /* operands or results, all of them buffers in version 0.1 */
    size_t struct_size;
    struct xla_extension *extensions;
    int64_t count;
    const int *types;
    struct xla_buffer **buffers;
};
struct xla_span {
    const char *text; /* without a 0 at the end */
    size_t length;
};
struct xla_scalar {
    enum xla_dtype dtype;
    const void *value;
};
struct xla_attributes {
    size_t struct_size;
    struct xla_extension *extensions;
    int64_t count;
    const enum xla_attribute_type *types;
    const struct xla_span **names;
    void **values; /* xla_scalar, where that is the type */
};
struct xla_call_frame {
    size_t struct_size;
    struct xla_extension *extensions;
    const struct xla_api *api;
    struct xla_context *context;
    enum xla_stage stage;
    struct xla_buffers operands, results;
    struct xla_attributes attributes;
};

#endif
