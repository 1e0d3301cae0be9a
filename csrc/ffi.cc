/* XLA's handlers: decode the call, call pyreg.h, translate the status.  XLA calls them from its own threads, several at
 * once, with subnormals flushed to zero; parallel.c takes that mode into its workers. */
#include "ffi.h"

#include "pyreg.h"

#include "xla/ffi/api/ffi.h"

#include <vector>

namespace ffi = xla::ffi;

namespace {

/* Signals are Python's, and these are not Python's threads. */
class NoInterrupts {
    bool before = pyreg_allow_interrupts(false);

  public:
    ~NoInterrupts() { pyreg_allow_interrupts(before); }
};

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

/* Strides of a dense array in C order, in steps of `size`. */
std::vector<int64_t> strides_of(Dims dims, size_t size) {
    std::vector<int64_t> strides(dims.size());
    int64_t step = static_cast<int64_t>(size);
    for (size_t d = dims.size(); d-- > 0; step *= dims[d]) strides[d] = step;
    return strides;
}

size_t bytes_of(ffi::AnyBuffer x) { return ffi::ByteWidth(x.element_type()); }

char *at(ffi::AnyBuffer x, int64_t offset) { return static_cast<char *>(x.untyped_data()) + offset; }

constexpr char GENERATOR[] = "generator", RATE[] = "rate", AXIS[] = "axis", EPSILON[] = "epsilon", RELU[] = "relu";

/* The handler that calls a function; its operands, results and attributes are those in the function's type. */
template <auto function> XLA_FFI_Error *handler(XLA_FFI_CallFrame *frame) {
    static const auto *bound = ffi::Ffi::BindTo(function).release(); /* never destroyed: XLA has threads at exit, too */
    return bound->Call(frame);
}

template <auto function> pyreg_ffi_handler named(const char *name) {
    return {name, reinterpret_cast<void *>(handler<function>)};
}

/* ---- Dropout ----------------------------------------------------------------------------------------------------- */

/* Operands: x, y: (batch..., inner...).  key: (batch..., 2), or bits: (batch..., bytes), a packed mask; both have 1 in
 * place of a batch dim that shares its mask.  window: (2, number of inner dims): where x begins in the array that the mask
 * is for, and the mask's shape there, 1 for a dim along which it is broadcast. */

using Window = ffi::Buffer<ffi::S32>;

size_t inner_dims(Window window) { return static_cast<size_t>(window.dimensions()[1]); }

/* set_mask(&mask, j): fills in what the j-th key, or row of bits, says. */
template <typename SetMask>
ffi::Error dropout_each(ffi::AnyBuffer x, Dims key_dims, Window window, ffi::AnyBuffer y, pyreg_mask mask,
                        SetMask set_mask) {
    const NoInterrupts guard;
    const Dims dims = x.dimensions();
    const size_t inner = inner_dims(window), batch = dims.size() - inner;
    const int32_t *start = window.typed_data(), *mask_shape = start + inner;
    if (x.element_count() == 0) return ffi::Error::Success();

    const auto strides = strides_of(dims, bytes_of(x)), key_strides = strides_of(key_dims.first(batch), 1);
    std::vector<int64_t> shape, x_strides, mask_strides, count, x_step, key_step; /* of one key; over the keys */
    for (size_t d = 0; d < batch; d++)
        if (key_dims[d] == dims[d] && dims[d] != 1) {
            count.push_back(dims[d]), x_step.push_back(strides[d]), key_step.push_back(key_strides[d]);
        } else {
            shape.push_back(dims[d]), x_strides.push_back(strides[d]), mask_strides.push_back(0);
        }
    const size_t first = shape.size();
    shape.resize(first + inner), x_strides.resize(first + inner), mask_strides.resize(first + inner);
    int64_t step = 1;
    for (size_t d = inner; d-- > 0; step *= mask_shape[d]) {
        shape[first + d] = dims[batch + d];
        x_strides[first + d] = strides[batch + d];
        mask_strides[first + d] = mask_shape[d] == 1 ? 0 : step;
        if (mask_shape[d] != 1) mask.offset += static_cast<uint64_t>(start[d]) * static_cast<uint64_t>(step);
    }

    std::vector<int64_t> index(count.size(), 0);
    for (int64_t x_at = 0, key_at = 0;;) {
        set_mask(&mask, key_at);
        const pyreg_status status =
            pyreg_dropout(dtype_of(x), &mask, true, static_cast<int>(shape.size()), shape.data(), at(x, x_at),
                          x_strides.data(), at(y, x_at), x_strides.data(), mask_strides.data());
        if (status != PYREG_OK) return error_of(status);
        size_t d = index.size();
        for (; d > 0; d--) { /* the next key */
            x_at += x_step[d - 1], key_at += key_step[d - 1];
            if (++index[d - 1] < count[d - 1]) break;
            x_at -= count[d - 1] * x_step[d - 1], key_at -= count[d - 1] * key_step[d - 1];
            index[d - 1] = 0;
        }
        if (d == 0) return ffi::Error::Success();
    }
}

using Keys = ffi::Buffer<ffi::U32>;
using Bits = ffi::Buffer<ffi::U8>;

pyreg_mask mask_of(int64_t generator, double rate) {
    return {static_cast<pyreg_generator>(generator), {0, 0}, rate, 0, nullptr, 0};
}

void set_key(pyreg_mask *mask, Keys keys, int64_t j) {
    mask->key[0] = keys.typed_data()[2 * j], mask->key[1] = keys.typed_data()[2 * j + 1];
}

ffi::Error dropout(ffi::AnyBuffer x, Keys keys, Window window, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Attr<int64_t, GENERATOR> generator, ffi::Attr<double, RATE> rate) {
    return dropout_each(x, keys.dimensions(), window, *y, mask_of(*generator, *rate),
                        [&](pyreg_mask *mask, int64_t j) { set_key(mask, keys, j); });
}

ffi::Error dropout_packed(ffi::AnyBuffer x, Bits bits, Window window, ffi::Result<ffi::AnyBuffer> y,
                          ffi::Attr<double, RATE> rate) {
    const Dims dims = bits.dimensions();
    pyreg_mask packed = mask_of(PYREG_PACKED, *rate);
    packed.num_bytes = static_cast<size_t>(dims[dims.size() - 1]);
    return dropout_each(x, dims, window, *y, packed, [&](pyreg_mask *mask, int64_t j) {
        mask->bits = bits.typed_data() + static_cast<size_t>(j) * mask->num_bytes;
    });
}

/* The packed masks of all keys, for dropout_packed. */
ffi::Error dropout_mask(Keys keys, Window window, ffi::Result<Bits> bits, ffi::Attr<int64_t, GENERATOR> generator,
                        ffi::Attr<double, RATE> rate) {
    const NoInterrupts guard;
    const size_t inner = inner_dims(window), bytes = static_cast<size_t>(bits->dimensions().back());
    size_t n = 1;
    for (size_t d = 0; d < inner; d++) n *= static_cast<size_t>(window.typed_data()[inner + d]);
    pyreg_mask mask = mask_of(*generator, *rate);
    for (size_t j = 0; j < keys.element_count() / 2; j++) {
        set_key(&mask, keys, static_cast<int64_t>(j));
        const pyreg_status status = pyreg_dropout_mask(&mask, n, true, bits->typed_data() + j * bytes);
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

/* ---- Batch-norm --------------------------------------------------------------------------------------------------
 * All operands have the same leading batch dims, of problems of their own.  Behind them x and what is like it have the
 * array's dims, statistics and parameters one.  An operand without elements is absent. */

using Bools = ffi::Buffer<ffi::PRED>;

/* A batch of problems, and the sizes of one. */
struct Problems {
    ffi::AnyBuffer x;
    Dims shape;
    std::vector<int64_t> strides, mask_strides;
    int64_t count = 1, elements = 1, channels;
    pyreg_batchnorm args;

    Problems(ffi::AnyBuffer x, size_t batch, int64_t axis, double epsilon, bool relu)
        : x(x), shape(x.dimensions().last(x.dimensions().size() - batch)), strides(strides_of(shape, bytes_of(x))),
          mask_strides(strides_of(shape, 1)), channels(shape[static_cast<size_t>(axis)]),
          args{dtype_of(x),
               static_cast<int>(shape.size()),
               static_cast<int>(axis),
               shape.begin(),
               epsilon,
               relu,
               nullptr,
               nullptr} {
        for (size_t d = 0; d < batch; d++) count *= x.dimensions()[d];
        for (int64_t n : shape) elements *= n;
    }

    /* Operands of problem i; NULL if absent. */
    char *array(ffi::AnyBuffer a, int64_t i) const { return of(a, i * elements); }
    char *channel_values(ffi::AnyBuffer a, int64_t i) const { return of(a, i * channels); }
    const bool *mask(Bools a, int64_t i) const { return a.element_count() ? a.typed_data() + i * elements : nullptr; }

  private:
    static char *of(ffi::AnyBuffer a, int64_t offset) {
        return a.element_count() ? at(a, offset * static_cast<int64_t>(bytes_of(a))) : nullptr;
    }
};

ffi::Error batch_norm_forward(ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias, Bools mask,
                              ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                              ffi::Result<ffi::AnyBuffer> var, ffi::Attr<int64_t, AXIS> axis,
                              ffi::Attr<double, EPSILON> epsilon, ffi::Attr<bool, RELU> relu) {
    const NoInterrupts guard;
    Problems p(x, mean->dimensions().size() - 1, *axis, *epsilon, *relu);
    for (int64_t i = 0; i < p.count; i++) {
        p.args.scale = p.channel_values(scale, i), p.args.bias = p.channel_values(bias, i);
        const pyreg_status status = pyreg_batchnorm_forward(
            &p.args, p.array(x, i), p.strides.data(), p.mask(mask, i), p.mask_strides.data(), p.array(residual, i),
            p.strides.data(), p.array(*y, i), p.strides.data(), p.channel_values(*mean, i), p.channel_values(*var, i));
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

ffi::Error batch_norm_backward(ffi::AnyBuffer dy, ffi::AnyBuffer dmean, ffi::AnyBuffer dvar, ffi::AnyBuffer x,
                               ffi::AnyBuffer mean, ffi::AnyBuffer var, ffi::AnyBuffer scale, Bools mask,
                               ffi::AnyBuffer y, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                               ffi::Result<ffi::AnyBuffer> dbias, ffi::Result<ffi::AnyBuffer> dresidual,
                               ffi::Attr<int64_t, AXIS> axis, ffi::Attr<double, EPSILON> epsilon) {
    const NoInterrupts guard;
    Problems p(x, mean.dimensions().size() - 1, *axis, *epsilon, y.element_count() > 0);
    for (int64_t i = 0; i < p.count; i++) {
        p.args.scale = p.channel_values(scale, i);
        const pyreg_status status = pyreg_batchnorm_backward(
            &p.args, p.array(dy, i), p.strides.data(), p.array(x, i), p.strides.data(), p.mask(mask, i),
            p.mask_strides.data(), p.array(y, i), p.strides.data(), p.channel_values(mean, i), p.channel_values(var, i),
            p.channel_values(dmean, i), p.channel_values(dvar, i), p.array(*dx, i), p.strides.data(),
            p.array(*dresidual, i), p.strides.data(), p.channel_values(*dscale, i), p.channel_values(*dbias, i));
        if (status != PYREG_OK) return error_of(status);
    }
    return ffi::Error::Success();
}

} // namespace

extern "C" const pyreg_ffi_handler pyreg_ffi_handlers[] = {
    named<dropout>("pyreg_dropout_v1"),
    named<dropout_mask>("pyreg_dropout_mask_v1"),
    named<dropout_packed>("pyreg_dropout_packed_v1"),
    named<batch_norm_forward>("pyreg_batch_norm_forward_v1"),
    named<batch_norm_backward>("pyreg_batch_norm_backward_v1"),
    {nullptr, nullptr},
};
