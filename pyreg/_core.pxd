# cython: language_level=3
"""What _core.pyx calls of C.  A struct of arguments has the name of its function in C, and another one here."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "Python.h" nogil:
    int PyErr_CheckSignals()
    unsigned long PyThread_get_thread_ident()


cdef extern from "numpy_abi.h":
    ctypedef struct numpy_dtype:
        int num

    ctypedef class numpy.ndarray [object numpy_array, check_size ignore]:
        cdef:
            char *data
            int ndim
            int64_t *shape
            int64_t *strides
            numpy_dtype *dtype

    enum:
        NUMPY_INT16
        NUMPY_FLOAT16
        NUMPY_FLOAT32
        NUMPY_FLOAT64
        NUMPY_C_CONTIGUOUS
        NUMPY_F_CONTIGUOUS
        NUMPY_ALIGNED
        NUMPY_WRITEABLE

    int numpy_use(object table) except -1
    int64_t numpy_itemsize(ndarray a) noexcept
    bint numpy_is(ndarray a, int flags) noexcept
    bint numpy_same_shape(ndarray a, ndarray b) noexcept
    object numpy_new_like(ndarray a)
    object numpy_new(type array, int ndim, const int64_t *shape, int num, const int64_t *strides, void *data)
    int numpy_set_base(ndarray a, object base) except -1


cdef extern from "pyreg.h" nogil:
    ctypedef bint c_bool "bool"

    enum pyreg_status:
        PYREG_OK
        PYREG_NO_MEMORY
        PYREG_INTERRUPTED
    const char *pyreg_strerror(pyreg_status status)

    enum pyreg_dtype:
        PYREG_F32
        PYREG_F64
        PYREG_F16
        PYREG_BF16

    enum:
        PYREG_MAX_DIMS

    struct pyreg_array:
        void *data
        const int64_t *strides

    enum pyreg_generator:
        PYREG_PHILOX
        PYREG_THREEFRY
        PYREG_THREEFRY_X64

    struct pyreg_mask:
        pyreg_generator generator
        uint32_t key[2]
        double rate
        uint64_t offset

    ctypedef struct dropout_arguments "struct pyreg_dropout":
        pyreg_dtype dtype
        int ndim
        const int64_t *shape
        pyreg_mask mask
        double scale
        pyreg_array x, y
        const int64_t *mask_strides
    pyreg_status pyreg_dropout(const dropout_arguments *args)
    double pyreg_dropout_scale(pyreg_dtype dtype, double rate)
    pyreg_status pyreg_dropout_mask(const pyreg_mask *mask, size_t n, c_bool packed, uint8_t *out)

    void pyreg_philox4x32_10(const uint32_t *key, const uint32_t *counter, uint32_t *out)
    void pyreg_threefry2x32_20(const uint32_t *key, const uint32_t *counter, uint32_t *out)

    struct pyreg_batchnorm:
        pyreg_dtype dtype
        int ndim, axis
        const int64_t *shape
        double epsilon
        c_bool relu
        const void *scale
        const void *bias

    ctypedef struct forward_arguments "struct pyreg_batchnorm_forward":
        pyreg_batchnorm common
        pyreg_array x, mask, residual, y
        void *mean
        void *mean_low
        void *var
    pyreg_status pyreg_batchnorm_forward(const forward_arguments *args)

    ctypedef struct inference_arguments "struct pyreg_batchnorm_inference":
        pyreg_batchnorm common
        pyreg_array x, residual, y
        const void *mean
        const void *var
    pyreg_status pyreg_batchnorm_inference(const inference_arguments *args)

    ctypedef struct backward_arguments "struct pyreg_batchnorm_backward":
        pyreg_batchnorm common
        pyreg_array dy, x, mask, y, dx, dresidual
        const void *mean
        const void *var
        const void *dmean
        const void *dvar
        void *dscale
        void *dbias
    pyreg_status pyreg_batchnorm_backward(const backward_arguments *args)

    int pyreg_get_num_threads()
    void pyreg_set_num_threads(int n)
    int pyreg_use_threads(int n)
    int pyreg_limit_threads(int n)
    c_bool pyreg_use_team(c_bool use)
    c_bool pyreg_follow_openmp(const char *file)
    void pyreg_unpinned()
    void pyreg_set_interrupt_check(c_bool (*check)() noexcept nogil)

    void pyreg_fail_allocation(long n)
    double pyreg_parallel_from()
    void pyreg_set_parallel_from(double ns)
    void pyreg_set_cache_bytes(size_t bytes)

    pyreg_status pyreg_init()
    pyreg_status pyreg_use_isa(const char *name)
    const char *pyreg_isa_name()
    const char *pyreg_isa_available(int i)
    const char *pyreg_compiler()
    const char *pyreg_openmp_library()
    size_t pyreg_cache_bytes()


cdef extern from "ffi.h" nogil:
    struct pyreg_ffi_handler:
        const char *name
        void *handler
    const pyreg_ffi_handler *pyreg_ffi_handlers
    const int *pyreg_ffi_api
    void pyreg_ffi_use_xla_pool(c_bool use)
