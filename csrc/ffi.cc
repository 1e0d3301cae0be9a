/* XLA's handlers: check the call, decode it, call pyreg.h, translate the status.  XLA calls them from its own threads,
 * several at once, with subnormals flushed to zero; parallel.c takes that mode into its workers.
 *
 * A program says what it likes (jax.ffi.ffi_call, a damaged file): all that memory depends on is checked here. */
#include "ffi.h"

#include "strided.h"

#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

namespace ffi = xla::ffi;

namespace {

std::atomic<bool> use_xla_pool{true};

/* What holds on a thread of XLA's while it calls: XLA's other threads help, and nothing interrupts (signals are
 * Python's, and this is not a thread of Python's). */
class OnXlaThread {
    XLA_FFI_CallFrame *frame;
    pyreg_pool pool{schedule, this};
    const bool interrupts = pyreg_allow_interrupts(false);
    const pyreg_pool *const before = pyreg_use_pool(use_xla_pool.load() ? &pool : nullptr);

    static void schedule(void *self, void (*task)(void *), void *argument) {
        const XLA_FFI_CallFrame *frame = static_cast<OnXlaThread *>(self)->frame;
        XLA_FFI_ThreadPool_Schedule_Args args = {};
        args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
        args.ctx = frame->ctx, args.task = task, args.data = argument;
        XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
        if (!error) return; /* else it has no pool, and the call does without help */
        XLA_FFI_Error_Destroy_Args destroy = {};
        destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, destroy.error = error;
        frame->api->XLA_FFI_Error_Destroy(&destroy);
    }

  public:
    explicit OnXlaThread(XLA_FFI_CallFrame *frame) : frame(frame) {}
    ~OnXlaThread() {
        pyreg_use_pool(before);
        pyreg_allow_interrupts(interrupts);
    }
};

ffi::Error refuse(const char *what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

ffi::Error error_of(pyreg_status status) {
    if (status == PYREG_OK) return ffi::Error::Success();
    auto code = status == PYREG_NO_MEMORY ? ffi::ErrorCode::kResourceExhausted : ffi::ErrorCode::kInvalidArgument;
    return ffi::Error(code, pyreg_strerror(status));
}

pyreg_dtype dtype_of(ffi::AnyBuffer x) {
    switch (x.element_type()) {
    case ffi::DataType::F32: return PYREG_F32;
    case ffi::DataType::F64: return PYREG_F64;
    case ffi::DataType::F16: return PYREG_F16;
    case ffi::DataType::BF16: return PYREG_BF16;
    default: return PYREG_NUM_DTYPES; /* refused by pyreg_* */
    }
}

using Dims = ffi::Span<const int64_t>;

bool same(Dims a, Dims b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

bool is_like(ffi::AnyBuffer a, ffi::AnyBuffer x) {
    return a.element_type() == x.element_type() && same(a.dimensions(), x.dimensions());
}

template <typename Buffer> bool is_absent(const Buffer &a) { return a.element_count() == 0; }

int64_t elements_of(Dims dims) {
    int64_t n = 1;
    for (int64_t d : dims) n *= d;
    return n;
}

void set_strides(Dims dims, size_t size, int64_t *strides) { c_strides(dims.size(), dims.begin(), size, strides); }

size_t bytes_of(ffi::AnyBuffer x) { return ffi::ByteWidth(x.element_type()); }

char *at(ffi::AnyBuffer x, int64_t offset) { return static_cast<char *>(x.untyped_data()) + offset; }

/* A number as an operand: the words of a double, low one first. */
double number_at(const uint32_t *words) {
    const uint64_t bits = static_cast<uint64_t>(words[1]) << 32 | words[0];
    double number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

constexpr char GENERATOR[] = "generator", RATE[] = "rate", AXIS[] = "axis", EPSILON[] = "epsilon", RELU[] = "relu";

/* The handler that calls a function; its operands, results and attributes are those in the function's type.  XLA's
 * interface is C: what is thrown ends here, and that is std::bad_alloc, because an error's text takes memory. */
template <auto function> XLA_FFI_Error *handler(XLA_FFI_CallFrame *frame) {
    try {
        /* Never destroyed: XLA has threads at exit, too. */
        static const auto *bound = ffi::Ffi::BindTo(function).release();
        const OnXlaThread here(frame);
        return bound->Call(frame);
    } catch (...) {
        XLA_FFI_Error_Create_Args error = {};
        error.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
        error.message = pyreg_strerror(PYREG_NO_MEMORY);
        error.errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
        return frame->api->XLA_FFI_Error_Create(&error);
    }
}

template <auto function> pyreg_ffi_handler named(const char *name) {
    return {name, reinterpret_cast<void *>(handler<function>)};
}

/* ---- Dropout ----------------------------------------------------------------------------------------------------- */

/* Operands: x, y: (batch..., inner...).  keys: (batch..., 2), or bits: (batch..., bytes), a packed mask; numbers:
 * (batch..., NUMBERS).  These have 1 in place of a batch dim that shares what they say.  window: (3, inner dims): how
 * many parts as long as x's lie in front of it in each dim of the array that the mask is for; and the mask's shape
 * there, low and high words, 1 for a dim along which it is broadcast.
 *
 * Version 1 has the rate as an attribute instead of numbers, and the window (2, inner dims) of int32: where x begins,
 * and the mask's shape. */

using Words = ffi::Buffer<ffi::U32>;
using Bytes = ffi::Buffer<ffi::U8>;
using WindowV1 = ffi::Buffer<ffi::S32>;

/* The rate's words, and the scale's; what is behind them is for JAX operations. */
enum { RATE_AT = 0, SCALE_AT = 2, NUMBERS = 7 };

/* Where the inner dims of x lie in the array that the mask is for. */
struct Window {
    size_t inner = 0;
    uint64_t first = 0; /* index of x's first element in the mask */
    int64_t strides[PYREG_MAX_DIMS];
    size_t elements = 1; /* of the mask */
};

/* Returns what is wrong with the window, or NULL.  x: its dims, for version 2; NULL: x is all of the array. */
template <typename Buffer> const char *set_window(Window *w, Buffer window, const Dims *x = nullptr) {
    constexpr bool is_v1 = std::is_same_v<Buffer, WindowV1>;
    const Dims dims = window.dimensions();
    if (dims.size() != 2 || dims[0] != (is_v1 ? 2 : 3) || dims[1] > PYREG_MAX_DIMS)
        return "the window has another shape";
    const size_t n = w->inner = static_cast<size_t>(dims[1]);
    if (x && x->size() < n) return "x has fewer dims than the window";
    const auto *words = window.typed_data();
    int64_t lengths[PYREG_MAX_DIMS];
    for (size_t d = 0; d < n; d++)
        if constexpr (is_v1)
            lengths[d] = words[n + d];
        else
            lengths[d] = static_cast<int64_t>(uint64_t{words[2 * n + d]} << 32 | words[n + d]);
    if (count_elements(static_cast<int>(n), lengths, &w->elements) != PYREG_OK)
        return "the mask's shape in the window is negative, or has 2^63 elements or more";
    set_strides(Dims(lengths, n), 1, w->strides);
    for (size_t d = 0; d < n; d++) {
        if (lengths[d] == 1) w->strides[d] = 0;
        const uint64_t parts = is_v1 ? 1 : x ? static_cast<uint64_t>(x->last(n)[d]) : 0;
        w->first += static_cast<uint64_t>(words[d]) * parts * static_cast<uint64_t>(w->strides[d]);
    }
    return nullptr;
}

/* An operand with a row for each part of x, but one for all along a dim of 1.  No operand: always row 0. */
struct Rows {
    bool present = false;
    Dims dims{nullptr, 0};

    Rows() = default;
    explicit Rows(Dims dims) : present(true), dims(dims) {}

    bool fits(Dims batch) const {
        if (!present) return true;
        if (dims.size() != batch.size() + 1) return false;
        for (size_t d = 0; d < batch.size(); d++)
            if (dims[d] != 1 && dims[d] != batch[d]) return false;
        return true;
    }
    bool has_own(size_t d) const { return present && dims[d] != 1; }
    /* From row to row along each dim of a batch that they fit. */
    void set_steps(size_t batch, int64_t *steps) const {
        if (present) set_strides(dims.first(batch), 1, steps);
        for (size_t d = 0; d < batch; d++)
            if (!has_own(d)) steps[d] = 0;
    }
};

/* The parts of a batch with a mask of their own, in C order: the byte where each begins in an array, and its rows. */
class Parts {
    dim dims[PYREG_MAX_DIMS];
    int num_dims = 0;

  public:
    struct Place {
        int64_t at[3] = {0, 0, 0}; /* in the array; row of a; row of b */
    };
    size_t count = 1;

    void add_dim(int64_t length, int64_t stride, int64_t a_step, int64_t b_step) {
        count *= static_cast<size_t>(length);
        dims[num_dims++] = {static_cast<size_t>(length), {stride, a_step, b_step}};
    }
    Place operator[](size_t part) const {
        Place place;
        add_offsets(dims, num_dims, part, 3, place.at);
        return place;
    }
};

/* One call of pyreg_dropout for each part of x with a mask of its own.  prepare(&mask, i, j): fills in what row i of
 * `a`, the key or the bits, and row j of `b`, the numbers, say; returns the scale. */
template <typename Prepare>
ffi::Error dropout_each(ffi::AnyBuffer x, ffi::AnyBuffer y, Rows a, Rows b, const Window &window,
                        const pyreg_mask &mask, Prepare prepare) {
    const Dims dims = x.dimensions();
    if (dtype_of(x) == PYREG_NUM_DTYPES) return error_of(PYREG_BAD_DTYPE);
    if (dims.size() > PYREG_MAX_DIMS || dims.size() < window.inner) return refuse("x has another number of dims");
    const size_t batch = dims.size() - window.inner;
    if (!is_like(y, x)) return refuse("y is not like x");
    if (!a.fits(dims.first(batch)) || !b.fits(dims.first(batch)))
        return refuse("the key, the mask's bits or the numbers have batch dims that are not those of x");
    if (x.element_count() == 0) return ffi::Error::Success();
    if (window.elements == 0) return refuse("the mask has no element, x has");

    int64_t strides[PYREG_MAX_DIMS], a_steps[PYREG_MAX_DIMS], b_steps[PYREG_MAX_DIMS];
    set_strides(dims, bytes_of(x), strides);
    a.set_steps(batch, a_steps), b.set_steps(batch, b_steps);
    int64_t shape[PYREG_MAX_DIMS], x_strides[PYREG_MAX_DIMS], mask_strides[PYREG_MAX_DIMS]; /* of a part */
    Parts parts;
    size_t ndim = 0;
    for (size_t d = 0; d < dims.size(); d++)
        if (d < batch && (a.has_own(d) || b.has_own(d))) {
            parts.add_dim(dims[d], strides[d], a_steps[d], b_steps[d]);
        } else {
            shape[ndim] = dims[d], x_strides[ndim] = strides[d];
            mask_strides[ndim++] = d < batch ? 0 : window.strides[d - batch];
        }
    struct pyreg_dropout args = {};
    args.dtype = dtype_of(x), args.ndim = static_cast<int>(ndim), args.shape = shape;
    args.mask = mask, args.mask.offset = window.first, args.mask_strides = mask_strides;

    for (size_t part = 0; part < parts.count; part++) {
        const auto [x_at, i, j] = parts[part].at;
        args.scale = prepare(&args.mask, i, j);
        args.x = {at(x, x_at), x_strides}, args.y = {at(y, x_at), x_strides};
        const pyreg_status status = pyreg_dropout(&args);
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

/* The packed masks of all keys and rates, a row of bits for each. */
template <typename Prepare>
ffi::Error mask_each(Dims keys, Rows numbers, const Window &window, ffi::Result<Bytes> bits, pyreg_mask mask,
                     Prepare prepare) {
    const Dims dims = bits->dimensions();
    if (dims.size() == 0 || dims.size() > PYREG_MAX_DIMS ||
        static_cast<size_t>(dims.back()) != window.elements / 8 + (window.elements % 8 != 0))
        return refuse("the bits have another shape than the mask");
    const size_t batch = dims.size() - 1;
    const Rows key_rows(keys);
    if (!key_rows.fits(dims.first(batch)) || !numbers.fits(dims.first(batch)))
        return refuse("the key or the numbers have batch dims that are not those of the bits");
    int64_t key_steps[PYREG_MAX_DIMS], number_steps[PYREG_MAX_DIMS];
    key_rows.set_steps(batch, key_steps), numbers.set_steps(batch, number_steps);
    int64_t strides[PYREG_MAX_DIMS];
    set_strides(dims, 1, strides);
    Parts parts;
    for (size_t d = 0; d < batch; d++) parts.add_dim(dims[d], strides[d], key_steps[d], number_steps[d]);
    for (size_t part = 0; part < parts.count; part++) {
        const auto [bits_at, i, j] = parts[part].at;
        prepare(&mask, i, j);
        const pyreg_status status = pyreg_dropout_mask(&mask, window.elements, true, bits->typed_data() + bits_at);
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

bool are_keys(Words keys) { return keys.dimensions().size() > 0 && keys.dimensions().back() == 2; }

bool are_numbers(Words numbers) { return numbers.dimensions().size() > 0 && numbers.dimensions().back() == NUMBERS; }

constexpr char NO_KEYS[] = "the keys have another shape, or the generator is unknown";
constexpr char NO_NUMBERS[] = "the numbers have another shape";
constexpr char NO_BITS[] = "the mask's bits have another shape";

bool draws(int64_t generator) { return generator >= 0 && generator < PYREG_PACKED; }

void set_key(pyreg_mask *mask, Words keys, int64_t i) {
    mask->key[0] = keys.typed_data()[2 * i], mask->key[1] = keys.typed_data()[2 * i + 1];
}

void set_bits(pyreg_mask *mask, Bytes bits, int64_t i) {
    mask->num_bytes = static_cast<size_t>(bits.dimensions().back());
    mask->bits = bits.typed_data() + static_cast<size_t>(i) * mask->num_bytes;
}

/* A traced rate may be anything: as in Flax less than 0 keeps all, more than 1 nothing, and so does NaN. */
double set_numbers(pyreg_mask *mask, Words numbers, int64_t j) {
    const uint32_t *words = numbers.typed_data() + j * NUMBERS;
    const double rate = number_at(words + RATE_AT);
    mask->rate = rate < 0 ? 0 : rate <= 1 ? rate : 1;
    return number_at(words + SCALE_AT);
}

pyreg_mask mask_of(int64_t generator, double rate = 0) {
    pyreg_mask mask = {};
    mask.generator = static_cast<pyreg_generator>(generator), mask.rate = rate;
    return mask;
}

ffi::Error dropout(ffi::AnyBuffer x, Words keys, Words numbers, Words window, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Attr<int64_t, GENERATOR> generator) {
    if (!are_keys(keys) || !draws(*generator)) return refuse(NO_KEYS);
    if (!are_numbers(numbers)) return refuse(NO_NUMBERS);
    Window w;
    const Dims x_dims = x.dimensions();
    if (const char *wrong = set_window(&w, window, &x_dims)) return refuse(wrong);
    return dropout_each(x, *y, Rows(keys.dimensions()), Rows(numbers.dimensions()), w, mask_of(*generator),
                        [&](pyreg_mask *mask, int64_t i, int64_t j) {
                            set_key(mask, keys, i);
                            return set_numbers(mask, numbers, j);
                        });
}

ffi::Error dropout_mask(Words keys, Words numbers, Words window, ffi::Result<Bytes> bits,
                        ffi::Attr<int64_t, GENERATOR> generator) {
    if (!are_keys(keys) || !draws(*generator)) return refuse(NO_KEYS);
    if (!are_numbers(numbers)) return refuse(NO_NUMBERS);
    Window w;
    if (const char *wrong = set_window(&w, window)) return refuse(wrong);
    return mask_each(keys.dimensions(), Rows(numbers.dimensions()), w, bits, mask_of(*generator),
                     [&](pyreg_mask *mask, int64_t i, int64_t j) {
                         set_key(mask, keys, i);
                         set_numbers(mask, numbers, j);
                     });
}

ffi::Error dropout_packed(ffi::AnyBuffer x, Bytes bits, Words numbers, Words window, ffi::Result<ffi::AnyBuffer> y) {
    if (bits.dimensions().size() == 0) return refuse(NO_BITS);
    if (!are_numbers(numbers)) return refuse(NO_NUMBERS);
    Window w;
    if (const char *wrong = set_window(&w, window)) return refuse(wrong);
    return dropout_each(x, *y, Rows(bits.dimensions()), Rows(numbers.dimensions()), w, mask_of(PYREG_PACKED),
                        [&](pyreg_mask *mask, int64_t i, int64_t j) {
                            set_bits(mask, bits, i);
                            return set_numbers(mask, numbers, j);
                        });
}

ffi::Error dropout_v1(ffi::AnyBuffer x, Words keys, WindowV1 window, ffi::Result<ffi::AnyBuffer> y,
                      ffi::Attr<int64_t, GENERATOR> generator, ffi::Attr<double, RATE> rate) {
    if (!are_keys(keys) || !draws(*generator)) return refuse(NO_KEYS);
    Window w;
    if (const char *wrong = set_window(&w, window)) return refuse(wrong);
    const double scale = pyreg_dropout_scale(dtype_of(x), *rate);
    return dropout_each(x, *y, Rows(keys.dimensions()), Rows(), w, mask_of(*generator, *rate),
                        [&](pyreg_mask *mask, int64_t i, int64_t) {
                            set_key(mask, keys, i);
                            return scale;
                        });
}

ffi::Error dropout_mask_v1(Words keys, WindowV1 window, ffi::Result<Bytes> bits,
                           ffi::Attr<int64_t, GENERATOR> generator, ffi::Attr<double, RATE> rate) {
    if (!are_keys(keys) || !draws(*generator)) return refuse(NO_KEYS);
    Window w;
    if (const char *wrong = set_window(&w, window)) return refuse(wrong);
    return mask_each(keys.dimensions(), Rows(), w, bits, mask_of(*generator, *rate),
                     [&](pyreg_mask *mask, int64_t i, int64_t) { set_key(mask, keys, i); });
}

ffi::Error dropout_packed_v1(ffi::AnyBuffer x, Bytes bits, WindowV1 window, ffi::Result<ffi::AnyBuffer> y,
                             ffi::Attr<double, RATE> rate) {
    if (bits.dimensions().size() == 0) return refuse(NO_BITS);
    Window w;
    if (const char *wrong = set_window(&w, window)) return refuse(wrong);
    const double scale = pyreg_dropout_scale(dtype_of(x), *rate);
    return dropout_each(x, *y, Rows(bits.dimensions()), Rows(), w, mask_of(PYREG_PACKED, *rate),
                        [&](pyreg_mask *mask, int64_t i, int64_t) {
                            set_bits(mask, bits, i);
                            return scale;
                        });
}

/* ---- Batch-norm --------------------------------------------------------------------------------------------------
 * All operands have the same leading batch dims, of problems of their own.  Behind them x and what is like it have the
 * array's dims, statistics and parameters one, epsilon the words of a number.  An operand without elements is absent.
 *
 * Version 1 has epsilon as an attribute, and no low part of the mean. */

using Bools = ffi::Buffer<ffi::PRED>;

enum { EPSILON_WORDS = 3 }; /* a double's, and one for JAX operations */

/* A batch of problems, and the sizes of one. */
struct Problems {
    ffi::AnyBuffer x;
    size_t batch;
    Dims shape{nullptr, 0};
    int64_t strides[PYREG_MAX_DIMS], mask_strides[PYREG_MAX_DIMS];
    int64_t count = 1, elements = 1, channels = 1;
    pyreg_batchnorm common = {}; /* epsilon: that of version 1 */
    const char *wrong = nullptr; /* what does not fit; then nothing else is to be used */

    /* statistic: an operand with a value per channel. */
    Problems(ffi::AnyBuffer x, ffi::AnyBuffer statistic, int64_t axis, bool relu, double epsilon = 0) : x(x) {
        const Dims dims = x.dimensions();
        batch = statistic.dimensions().size() - 1;
        if (dtype_of(x) == PYREG_NUM_DTYPES) {
            wrong = pyreg_strerror(PYREG_BAD_DTYPE);
        } else if (statistic.dimensions().size() == 0 || dims.size() <= batch || dims.size() - batch > PYREG_MAX_DIMS) {
            wrong = "x has another number of dims";
        } else if (axis < 0 || axis >= static_cast<int64_t>(dims.size() - batch)) {
            wrong = pyreg_strerror(PYREG_BAD_AXIS);
        } else {
            shape = dims.last(dims.size() - batch);
            set_strides(shape, bytes_of(x), strides);
            set_strides(shape, 1, mask_strides);
            channels = shape[static_cast<size_t>(axis)];
            count = elements_of(dims.first(batch)), elements = elements_of(shape);
            common.dtype = dtype_of(x), common.shape = shape.begin();
            common.ndim = static_cast<int>(shape.size()), common.axis = static_cast<int>(axis);
            common.epsilon = epsilon, common.relu = relu;
            check_values(statistic, false);
        }
    }

    /* Arrays like x; or a mask of its shape; or values per channel; or batch dims and a row of words. */
    void check_array(ffi::AnyBuffer a, bool optional) { check(optional && is_absent(a), is_like(a, x)); }
    void check_mask(Bools a) { check(is_absent(a), same(a.dimensions(), x.dimensions())); }
    void check_values(ffi::AnyBuffer a, bool optional) {
        const ffi::DataType f64 = ffi::DataType::F64, f32 = ffi::DataType::F32;
        check(optional && is_absent(a),
              a.element_type() == (x.element_type() == f64 ? f64 : f32) && has_row(a, channels));
    }
    void check_epsilon(Words a) { check(false, has_row(a, EPSILON_WORDS)); }

    /* Operands of problem i; NULL if absent. */
    pyreg_array array(ffi::AnyBuffer a, int64_t i) const { return {of(a, i * elements), strides}; }
    pyreg_array mask(Bools a, int64_t i) const {
        return {is_absent(a) ? nullptr : a.typed_data() + i * elements, mask_strides};
    }
    char *channel_values(ffi::AnyBuffer a, int64_t i) const { return of(a, i * channels); }
    static double epsilon(Words a, int64_t i) { return number_at(a.typed_data() + i * EPSILON_WORDS); }

  private:
    void check(bool absent, bool fits) {
        if (!wrong && !absent && !fits)
            wrong = "an operand or a result does not have the shape or dtype that goes with x";
    }
    template <typename Buffer> bool has_row(const Buffer &a, int64_t length) const {
        const Dims dims = a.dimensions();
        return dims.size() == batch + 1 && same(dims.first(batch), x.dimensions().first(batch)) &&
               dims.back() == length;
    }
    static char *of(ffi::AnyBuffer a, int64_t offset) {
        return is_absent(a) ? nullptr : at(a, offset * static_cast<int64_t>(bytes_of(a)));
    }
};

using Array = ffi::AnyBuffer;
using NewArray = ffi::Result<ffi::AnyBuffer>;

/* epsilon, mean_low: NULL in version 1. */
ffi::Error forward_each(Problems &&p, Array scale, Array bias, const Words *epsilon, Bools mask, Array residual,
                        Array y, Array mean, const Array *mean_low, Array var) {
    if (!p.wrong) {
        p.check_values(scale, true), p.check_values(bias, true), p.check_mask(mask), p.check_array(residual, true);
        p.check_array(y, true), p.check_values(var, false);
        if (epsilon) p.check_epsilon(*epsilon);
        if (mean_low) p.check_values(*mean_low, false);
    }
    if (p.wrong) return refuse(p.wrong);
    struct pyreg_batchnorm_forward args = {};
    args.common = p.common;
    for (int64_t i = 0; i < p.count; i++) {
        args.common.scale = p.channel_values(scale, i), args.common.bias = p.channel_values(bias, i);
        if (epsilon) args.common.epsilon = p.epsilon(*epsilon, i);
        args.x = p.array(p.x, i), args.mask = p.mask(mask, i), args.residual = p.array(residual, i);
        args.y = p.array(y, i), args.mean = p.channel_values(mean, i), args.var = p.channel_values(var, i);
        if (mean_low) args.mean_low = p.channel_values(*mean_low, i);
        const pyreg_status status = pyreg_batchnorm_forward(&args);
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

ffi::Error backward_each(Problems &&p, Array dy, Array dmean, Array dvar, Array mean, Array var, Array scale,
                         const Words *epsilon, Bools mask, Array y, Array dx, Array dscale, Array dbias,
                         Array dresidual) {
    if (!p.wrong) {
        p.check_array(dy, false), p.check_array(y, true), p.check_array(dx, false), p.check_array(dresidual, true);
        p.check_values(dmean, true), p.check_values(dvar, true), p.check_values(var, false);
        p.check_values(scale, true), p.check_values(dscale, false), p.check_values(dbias, false), p.check_mask(mask);
        if (epsilon) p.check_epsilon(*epsilon);
    }
    if (p.wrong) return refuse(p.wrong);
    struct pyreg_batchnorm_backward args = {};
    args.common = p.common;
    for (int64_t i = 0; i < p.count; i++) {
        args.common.scale = p.channel_values(scale, i);
        if (epsilon) args.common.epsilon = p.epsilon(*epsilon, i);
        args.dy = p.array(dy, i), args.x = p.array(p.x, i), args.mask = p.mask(mask, i), args.y = p.array(y, i);
        args.dx = p.array(dx, i), args.dresidual = p.array(dresidual, i);
        args.mean = p.channel_values(mean, i), args.var = p.channel_values(var, i);
        args.dmean = p.channel_values(dmean, i), args.dvar = p.channel_values(dvar, i);
        args.dscale = p.channel_values(dscale, i), args.dbias = p.channel_values(dbias, i);
        const pyreg_status status = pyreg_batchnorm_backward(&args);
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

ffi::Error batch_norm_forward(Array x, Array scale, Array bias, Words epsilon, Bools mask, Array residual, NewArray y,
                              NewArray mean, NewArray mean_low, NewArray var, ffi::Attr<int64_t, AXIS> axis,
                              ffi::Attr<bool, RELU> relu) {
    const Array low = *mean_low;
    return forward_each(Problems(x, *mean, *axis, *relu), scale, bias, &epsilon, mask, residual, *y, *mean, &low, *var);
}

ffi::Error batch_norm_backward(Array dy, Array dmean, Array dvar, Array x, Array mean, Array var, Array scale,
                               Words epsilon, Bools mask, Array y, NewArray dx, NewArray dscale, NewArray dbias,
                               NewArray dresidual, ffi::Attr<int64_t, AXIS> axis) {
    return backward_each(Problems(x, mean, *axis, !is_absent(y)), dy, dmean, dvar, mean, var, scale, &epsilon, mask, y,
                         *dx, *dscale, *dbias, *dresidual);
}

ffi::Error batch_norm_forward_v1(Array x, Array scale, Array bias, Bools mask, Array residual, NewArray y,
                                 NewArray mean, NewArray var, ffi::Attr<int64_t, AXIS> axis,
                                 ffi::Attr<double, EPSILON> epsilon, ffi::Attr<bool, RELU> relu) {
    return forward_each(Problems(x, *mean, *axis, *relu, *epsilon), scale, bias, nullptr, mask, residual, *y, *mean,
                        nullptr, *var);
}

ffi::Error batch_norm_backward_v1(Array dy, Array dmean, Array dvar, Array x, Array mean, Array var, Array scale,
                                  Bools mask, Array y, NewArray dx, NewArray dscale, NewArray dbias, NewArray dresidual,
                                  ffi::Attr<int64_t, AXIS> axis, ffi::Attr<double, EPSILON> epsilon) {
    return backward_each(Problems(x, mean, *axis, !is_absent(y), *epsilon), dy, dmean, dvar, mean, var, scale, nullptr,
                         mask, y, *dx, *dscale, *dbias, *dresidual);
}

} // namespace

extern "C" const pyreg_ffi_handler pyreg_ffi_handlers[] = {
    named<dropout>("pyreg_dropout_v2"),
    named<dropout_mask>("pyreg_dropout_mask_v2"),
    named<dropout_packed>("pyreg_dropout_packed_v2"),
    named<batch_norm_forward>("pyreg_batch_norm_forward_v2"),
    named<batch_norm_backward>("pyreg_batch_norm_backward_v2"),
    named<dropout_v1>("pyreg_dropout_v1"),
    named<dropout_mask_v1>("pyreg_dropout_mask_v1"),
    named<dropout_packed_v1>("pyreg_dropout_packed_v1"),
    named<batch_norm_forward_v1>("pyreg_batch_norm_forward_v1"),
    named<batch_norm_backward_v1>("pyreg_batch_norm_backward_v1"),
    {nullptr, nullptr},
};

extern "C" void pyreg_ffi_use_xla_pool(bool use) { use_xla_pool = use; }

extern "C" const int pyreg_ffi_api[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
