# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The border between Python and csrc/pyreg.h: types, the GIL, status -> exception.  _arguments.py checks arguments."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cpython.contextvars cimport get_value
from cpython.exc cimport PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_New

import os
import threading
from contextvars import ContextVar

from numpy._core._multiarray_umath import _ARRAY_API  # which NumPy 1.26 has there, too

numpy_use(_ARRAY_API)


F32, F64, F16, BF16 = PYREG_F32, PYREG_F64, PYREG_F16, PYREG_BF16
PHILOX, THREEFRY, THREEFRY_X64 = PYREG_PHILOX, PYREG_THREEFRY, PYREG_THREEFRY_X64
MAX_DIMS = PYREG_MAX_DIMS


cdef int check(pyreg_status status) except -1:
    if status == PYREG_OK:
        return 0
    if status == PYREG_INTERRUPTED and PyErr_Occurred():
        return -1  # raised by the signal handler
    message = pyreg_strerror(status).decode()
    raise MemoryError(message) if status == PYREG_NO_MEMORY else ValueError(message)


cdef unsigned long main_thread  # runs Python's signal handlers; any other may never get the GIL while Python ends


def this_is_the_main_thread():
    global main_thread
    main_thread = PyThread_get_thread_ident()


cdef c_bool signal_arrived() noexcept nogil:
    if PyThread_get_thread_ident() != main_thread:
        return False
    with gil:
        return PyErr_CheckSignals() != 0


cdef object asked = ContextVar("pyreg.num_threads", default=())  # lists of one number, the innermost first
cdef bint ever_asked = False


cdef int use_asked_threads() except -1:
    """Tells C what holds in this thread or task; at the start of each call."""
    cdef tuple numbers
    if ever_asked:
        numbers = get_value(asked)
        pyreg_use_threads(numbers[0][0] if numbers else 0)
    return 0


# ---- Arrays, fast: what _arguments.py asks about every argument of every call -----------------------------------------

cdef int bfloat16_num = -2  # NumPy numbers the types of other packages as they are loaded; -2: none yet


def set_bfloat16(dtype):
    """To the type of a package.  NumPy does not number those of the new kind: all of them have -1."""
    global bfloat16_num
    if dtype.num >= 0:
        bfloat16_num = dtype.num


def dtype_code(x):
    """F32, F64, F16 or BF16; -1 if x is not an array or of another dtype, in foreign byte order or not aligned."""
    if type(x) is not ndarray or not numpy_is(<ndarray>x, NUMPY_ALIGNED):
        return -1
    cdef int num = (<ndarray>x).dtype.num
    if num == NUMPY_FLOAT32:
        return PYREG_F32
    if num == NUMPY_FLOAT64:
        return PYREG_F64
    if num == NUMPY_FLOAT16:
        return PYREG_F16
    return PYREG_BF16 if num == bfloat16_num else -1


def empty_like(ndarray x not None):
    return numpy_new_like(x)


cdef inline pyreg_array array_of(ndarray a) noexcept:
    """a as an operand of C; None: there is none."""
    if a is None:
        return pyreg_array(data=NULL, strides=NULL)
    return pyreg_array(data=a.data, strides=a.strides)


def is_like(array, ndarray x not None):
    """Whether array can be read as it is, as one of the shape and dtype of x."""
    return (type(array) is ndarray and numpy_same_shape(<ndarray>array, x)
            and (<ndarray>array).dtype.num == x.dtype.num and numpy_is(<ndarray>array, NUMPY_ALIGNED))


cdef bint fits(ndarray out, ndarray x):
    """Whether out has the shape and dtype of x and can be written as it is."""
    return numpy_same_shape(out, x) and out.dtype.num == x.dtype.num and numpy_is(out, NUMPY_ALIGNED | NUMPY_WRITEABLE)


cdef (size_t, size_t) bounds(ndarray x) noexcept:
    """First byte of x, and the first after it; nothing if x has no elements."""
    cdef size_t low = <size_t>x.data, high = low + <size_t>numpy_itemsize(x)
    cdef int64_t reach
    cdef int d
    for d in range(x.ndim):
        if x.shape[d] == 0:
            return 0, 0
        reach = (x.shape[d] - 1) * x.strides[d]
        if reach < 0:
            low -= <size_t>-reach
        else:
            high += <size_t>reach
    return low, high


cdef bint between(ndarray x, size_t low, size_t high) noexcept:
    """Whether x may have bytes from low to before high; false is certain."""
    cdef size_t x_low, x_high
    x_low, x_high = bounds(x)
    return x_low < high and low < x_high


cdef bint in_place(ndarray x, ndarray y) noexcept:
    """Whether x and y, of the same shape and dtype, are the same memory, element by element."""
    cdef int d
    if x.data != y.data:
        return False
    for d in range(x.ndim):
        if x.strides[d] != y.strides[d]:
            return False
    return True


cdef bint elements_apart(ndarray x) noexcept:
    """Whether each step of x is longer than what the dims of shorter steps take: then no two elements share memory."""
    if numpy_is(x, NUMPY_C_CONTIGUOUS) or numpy_is(x, NUMPY_F_CONTIGUOUS):  # as is any array without elements
        return True
    cdef int64_t[PYREG_MAX_DIMS] steps, reaches
    cdef int64_t step, reach, taken
    cdef int d, k, n = 0
    for d in range(x.ndim):  # by ascending step
        if x.shape[d] == 1:
            continue
        step = x.strides[d]
        step = -step if step < 0 else step
        reach = (x.shape[d] - 1) * step
        k = n
        while k > 0 and steps[k - 1] > step:
            steps[k], reaches[k] = steps[k - 1], reaches[k - 1]
            k -= 1
        steps[k], reaches[k] = step, reach
        n += 1
    taken = numpy_itemsize(x)  # bytes from the first of the dims so far to their end
    for k in range(n):
        if steps[k] < taken:
            return False
        taken += reaches[k]
    return True


def apart(ndarray x not None):
    """Whether no two elements of x share memory; may be false where dims interleave."""
    return elements_apart(x)


def can_write(out, ndarray x not None, tuple inputs not None, tuple values not None):
    """Whether out is an array like x that can be written as it is, without spoiling what is still to be read.

    inputs: arrays like x, one of which out may be; values: others; None among them does not count.
    """
    if type(out) is not ndarray or not fits(out, x) or not elements_apart(out):
        return False
    cdef size_t low, high
    low, high = bounds(out)
    for a in inputs:
        if a is not None and a is not out and not in_place(a, out) and between(a, low, high):
            return False
    for a in values:
        if a is not None and between(a, low, high):
            return False
    return True


def deliver(y, out):
    """out if it was given, with y in it; else y."""
    if out is None or y is out:
        return y
    out[...] = y
    return out


# ---- Dropout ---------------------------------------------------------------------------------------------------------

cdef pyreg_mask make_mask(int generator, uint64_t key, double rate, uint64_t offset) noexcept:
    return pyreg_mask(generator=<pyreg_generator>generator, key=[<uint32_t>(key >> 32), <uint32_t>key], rate=rate,
                      offset=offset)


cdef void allow_threads(int max_threads, bint team) noexcept:
    """For the next call, to another library's limit; 0: no limit.  To be taken back before Python code runs again."""
    pyreg_limit_threads(max_threads)
    pyreg_use_team(team)


cdef int num_dims(object shape) except -1:
    if len(shape) > PYREG_MAX_DIMS:
        raise ValueError(f"an array has {len(shape)} dims; wanted at most {PYREG_MAX_DIMS}")
    return <int>len(shape)


cdef int set_ints(object ints, int n, int64_t unit, int64_t *out) except -1:
    """A tuple of n ints, in units, for C; torch.Size is one, too."""
    cdef int d
    if not isinstance(ints, tuple) or len(<tuple>ints) != n:
        raise ValueError(f"{ints!r} is not a tuple of {n} ints")
    for d in range(n):
        out[d] = unit * <int64_t>(<tuple>ints)[d]
    return 0


cdef int64_t size_of(int dtype) noexcept:
    return 4 if dtype == PYREG_F32 else 8 if dtype == PYREG_F64 else 2


def dropout(int dtype, ndarray x not None, ndarray y not None, int generator, uint64_t key, double rate,
            uint64_t offset, bint scaled, mask_strides, scale=None):
    """y = dropout(x).  scale: of kept elements; None for that of the rate if scaled, else 1.
    mask_strides: a tuple of x.ndim ints, or None for C order."""
    cdef int64_t[PYREG_MAX_DIMS] strides
    cdef pyreg_status status
    cdef dropout_arguments args = dropout_arguments(
        dtype=<pyreg_dtype>dtype, ndim=x.ndim, shape=x.shape,
        mask=make_mask(generator, key, rate, offset), scale=1, x=array_of(x), y=array_of(y), mask_strides=NULL)
    if scale is not None:
        args.scale = scale
    elif scaled:
        args.scale = pyreg_dropout_scale(args.dtype, rate)
    if mask_strides is not None:
        set_ints(mask_strides, args.ndim, 1, strides)
        args.mask_strides = &strides[0]
    use_asked_threads()
    with nogil:
        status = pyreg_dropout(&args)
    check(status)


def dropout_at(int dtype, size_t x, size_t y, shape, x_strides, y_strides, uint64_t key, double rate, double scale,
               mask_strides, int max_threads, bint team):
    """y = dropout(x) by philox, for arrays of another library: addresses, and strides in elements, one for each dim.
    mask_strides: as there, or None for C order.  max_threads: that it allows; team: are OpenMP's to help?"""
    cdef int64_t[PYREG_MAX_DIMS] lengths, of_x, of_y, of_mask
    cdef int64_t size = size_of(dtype)
    cdef int ndim = num_dims(shape)
    cdef pyreg_status status
    set_ints(shape, ndim, 1, lengths)
    set_ints(x_strides, ndim, size, of_x)
    set_ints(y_strides, ndim, size, of_y)
    cdef dropout_arguments args = dropout_arguments(
        dtype=<pyreg_dtype>dtype, ndim=ndim, shape=&lengths[0], mask=make_mask(PYREG_PHILOX, key, rate, 0), scale=scale,
        x=pyreg_array(data=<void *>x, strides=&of_x[0]), y=pyreg_array(data=<void *>y, strides=&of_y[0]),
        mask_strides=NULL)
    if mask_strides is not None:
        set_ints(mask_strides, ndim, 1, of_mask)
        args.mask_strides = &of_mask[0]
    use_asked_threads()
    allow_threads(max_threads, team)
    with nogil:
        status = pyreg_dropout(&args)
    allow_threads(0, False)
    check(status)


def array_at(int dtype, size_t address, shape, strides, owner):
    """An array on memory of another library, which the owner keeps; strides in elements.  bfloat16 is there as int16."""
    cdef int64_t[PYREG_MAX_DIMS] lengths, bytes_
    cdef int ndim = num_dims(shape)
    cdef int num = (NUMPY_FLOAT32 if dtype == PYREG_F32 else NUMPY_FLOAT64 if dtype == PYREG_F64
                    else NUMPY_FLOAT16 if dtype == PYREG_F16 else NUMPY_INT16)
    set_ints(shape, ndim, 1, lengths)
    set_ints(strides, ndim, size_of(dtype), bytes_)
    array = numpy_new(ndarray, ndim, &lengths[0], num, &bytes_[0], <void *>address)
    numpy_set_base(array, owner)
    return array


def dropout_scale(int dtype, double rate):
    """1 / (1 - rate), rounded as XLA rounds it for the dtype."""
    return pyreg_dropout_scale(<pyreg_dtype>dtype, rate)


def dropout_mask(size_t n, ndarray out not None, bint packed, int generator, uint64_t key, double rate,
                 uint64_t offset):
    """Fills out, a contiguous array of n bytes or (n + 7) // 8 if packed."""
    cdef pyreg_mask mask = make_mask(generator, key, rate, offset)
    cdef pyreg_status status
    use_asked_threads()
    with nogil:
        status = pyreg_dropout_mask(&mask, n, packed, <uint8_t *>out.data)
    check(status)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------

cdef pyreg_batchnorm make_batchnorm(int dtype, ndarray x, int axis, double epsilon, bint relu, ndarray scale,
                                    ndarray bias) noexcept:
    return pyreg_batchnorm(
        dtype=<pyreg_dtype>dtype, ndim=x.ndim, axis=axis, shape=x.shape, epsilon=epsilon, relu=relu,
        scale=array_of(scale).data, bias=array_of(bias).data)


cdef int statistic_num(int dtype) noexcept:
    """NumPy's number of the type of statistics and parameters of data of this dtype."""
    return NUMPY_FLOAT64 if dtype == PYREG_F64 else NUMPY_FLOAT32


cdef ndarray statistics_like(int dtype, int64_t channels):
    """A new array for a statistic or a parameter's gradient of data of this dtype."""
    return numpy_new(ndarray, 1, &channels, statistic_num(dtype), NULL, NULL)


def is_statistic(array, int dtype, int64_t channels):
    """Whether array can be read as a value per channel for data of this dtype."""
    if type(array) is not ndarray:
        return False
    cdef ndarray a = array
    return (a.ndim == 1 and a.shape[0] == channels and numpy_is(a, NUMPY_C_CONTIGUOUS | NUMPY_ALIGNED)
            and a.dtype.num == statistic_num(dtype))


def batch_norm(int dtype, ndarray x not None, int axis, double epsilon, bint relu, ndarray scale,
               ndarray bias, ndarray mask, ndarray residual, ndarray y not None,
               ndarray mean_low=None, int max_threads=0, bint team=False):
    """y = batch_norm(x), mean_low = what its mean lacks; returns mean and var.  None: no such operand."""
    cdef ndarray mean = statistics_like(dtype, x.shape[axis])
    cdef ndarray var = statistics_like(dtype, x.shape[axis])
    cdef forward_arguments args = forward_arguments(
        common=make_batchnorm(dtype, x, axis, epsilon, relu, scale, bias), x=array_of(x), mask=array_of(mask),
        residual=array_of(residual), y=array_of(y), mean=array_of(mean).data, mean_low=array_of(mean_low).data,
        var=array_of(var).data)
    cdef pyreg_status status
    use_asked_threads()
    allow_threads(max_threads, team)
    with nogil:
        status = pyreg_batchnorm_forward(&args)
    allow_threads(0, False)
    check(status)
    return mean, var


def batch_norm_inference(int dtype, ndarray x not None, int axis, double epsilon, bint relu,
                         ndarray scale, ndarray bias, ndarray residual, ndarray mean not None,
                         ndarray var not None, ndarray y not None):
    """y = batch_norm_inference(x)."""
    cdef inference_arguments args = inference_arguments(
        common=make_batchnorm(dtype, x, axis, epsilon, relu, scale, bias), x=array_of(x), residual=array_of(residual),
        y=array_of(y), mean=array_of(mean).data, var=array_of(var).data)
    cdef pyreg_status status
    use_asked_threads()
    with nogil:
        status = pyreg_batchnorm_inference(&args)
    check(status)


def batch_norm_backward(int dtype, ndarray dy not None, ndarray x not None, int axis, double epsilon, bint relu,
                        ndarray scale, ndarray mask, ndarray y, ndarray mean not None,
                        ndarray var not None, ndarray dx not None, ndarray dresidual,
                        ndarray dmean=None, ndarray dvar=None, int max_threads=0, bint team=False):
    """dx and dresidual (or None) = batch_norm_backward(dy, x); returns dscale and dbias.  y: None without relu."""
    cdef ndarray dscale = statistics_like(dtype, x.shape[axis])
    cdef ndarray dbias = statistics_like(dtype, x.shape[axis])
    cdef backward_arguments args = backward_arguments(
        common=make_batchnorm(dtype, x, axis, epsilon, relu, scale, None), dy=array_of(dy), x=array_of(x),
        mask=array_of(mask), y=array_of(y), dx=array_of(dx), dresidual=array_of(dresidual), mean=array_of(mean).data,
        var=array_of(var).data, dmean=array_of(dmean).data, dvar=array_of(dvar).data, dscale=array_of(dscale).data,
        dbias=array_of(dbias).data)
    cdef pyreg_status status
    use_asked_threads()
    allow_threads(max_threads, team)
    with nogil:
        status = pyreg_batchnorm_backward(&args)
    allow_threads(0, False)
    check(status)
    return dscale, dbias


# ---- Generators ------------------------------------------------------------------------------------------------------

def random_block(int generator, key, counter):
    """One block of Philox4x32-10 or Threefry2x32-20: tuples of 32-bit words in and out."""
    cdef uint32_t[2] k
    cdef uint32_t[4] c, out
    k[0], k[1] = key
    if generator == PYREG_PHILOX:
        c[0], c[1], c[2], c[3] = counter
        pyreg_philox4x32_10(k, c, out)
        return out[0], out[1], out[2], out[3]
    c[0], c[1] = counter
    pyreg_threefry2x32_20(k, c, out)
    return out[0], out[1]


# ---- Tests and benchmarks --------------------------------------------------------------------------------------------

def fail_allocation(long n):
    """The n-th allocation of scratch memory from now fails, once: for tests.  0: none does."""
    pyreg_fail_allocation(n)


def set_gears(double parallel_from=-1, size_t cache_bytes=0):
    """Where calls change gear: nanoseconds of work that is shared, bytes that stores go around.  For benchmarks."""
    pyreg_set_parallel_from(parallel_from)
    pyreg_set_cache_bytes(cache_bytes)


# ---- Threads and build -----------------------------------------------------------------------------------------------

def get_num_threads():
    use_asked_threads()
    return pyreg_get_num_threads()


def set_num_threads(int n):
    pyreg_set_num_threads(n)


def ask_threads(int n):
    """Calls of this thread or task use n threads, until end_threads is called with what is returned."""
    global ever_asked
    ever_asked = True
    number = [n]
    asked.set((number, *asked.get()))
    return number


def end_threads(number):
    asked.set(tuple([a for a in asked.get() if a is not number]))
    use_asked_threads()  # for calls that do not come through here


def unpinned():
    pyreg_unpinned()


def isa_available():
    names, i = [], 0
    while pyreg_isa_available(i) != NULL:
        names.append(pyreg_isa_available(i).decode())
        i += 1
    return names


def use_isa(str name):
    """Change the instruction set of the process: for tests and benchmarks, not while other threads compute."""
    check(pyreg_use_isa(name.encode()))


def ffi_handlers():
    """XLA's handlers by name, as capsules."""
    handlers, i = {}, 0
    while pyreg_ffi_handlers[i].name != NULL:
        handlers[pyreg_ffi_handlers[i].name.decode()] = PyCapsule_New(pyreg_ffi_handlers[i].handler, NULL, NULL)
        i += 1
    return handlers


def ffi_api():
    """Version of XLA's interface, major and minor, that the handlers are built for."""
    return pyreg_ffi_api[0], pyreg_ffi_api[1]


def follow_openmp(str file):
    """Whether the file is of an OpenMP library that is loaded; its settings then hold, and its threads may help."""
    return pyreg_follow_openmp(os.fsencode(file))


def ffi_use_xla_pool(bint use):
    """Whether XLA's threads help in calls from it, or pyreg's."""
    pyreg_ffi_use_xla_pool(use)


def config():
    use_asked_threads()
    return {
        "compiler": pyreg_compiler().decode(),
        "isa": pyreg_isa_name().decode(),
        "isa_available": isa_available(),
        "openmp_library": pyreg_openmp_library().decode(),
        "threads": pyreg_get_num_threads(),
        "cache_bytes": pyreg_cache_bytes(),
        "parallel_from_ns": pyreg_parallel_from(),
    }


cdef init():
    if pyreg_init() != PYREG_OK:
        if not isa_available():
            raise ImportError("pyreg was compiled for a machine with other instructions (PYREG_ISAS=native); compile it "
                              "for this one")
        raise ImportError(f"PYREG_ISA={os.environ.get('PYREG_ISA')!r} is not an instruction set that this machine can "
                          f"run and pyreg was compiled for; choose from {', '.join(isa_available())}")
    global main_thread
    main_thread = threading.main_thread().ident
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=this_is_the_main_thread)
    pyreg_set_interrupt_check(signal_arrived)


init()
