/* One op, so many times, for tests/instructions.py to count the instructions of:  test_count CASE REPEATS
 * Without arguments: each case once.  Exit status 2: this machine lacks the instruction set. */
#include "pyreg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 64, CHANNELS = 64, SIZE = ROWS * CHANNELS, IMAGES = 8, PIXELS = SIZE / IMAGES / IMAGES };

static double x[SIZE], y[SIZE], mean[CHANNELS], var[CHANNELS], scale[CHANNELS], sums[2][CHANNELS];

static void drop(enum pyreg_generator generator, double rate, enum pyreg_dtype dtype, int64_t size) {
    const int64_t shape = SIZE;
    const struct pyreg_dropout args = {.dtype = dtype,
                                       .ndim = 1,
                                       .shape = &shape,
                                       .mask = {.generator = generator, .key = {1, 2}, .rate = rate},
                                       .scale = pyreg_dropout_scale(dtype, rate),
                                       .x = {x, &size},
                                       .y = {y, &size}};
    if (pyreg_dropout(&args) != PYREG_OK) abort();
}

static void philox(void) { drop(PYREG_PHILOX, 0.1, PYREG_F32, 4); }
static void philox_half(void) { drop(PYREG_PHILOX, 0.5, PYREG_F32, 4); }
static void philox_bf16(void) { drop(PYREG_PHILOX, 0.1, PYREG_BF16, 2); }
static void threefry(void) { drop(PYREG_THREEFRY, 0.1, PYREG_F32, 4); }
static void threefry_x64(void) { drop(PYREG_THREEFRY_X64, 0.1, PYREG_F32, 4); }

/* What is asked of batch-norm: channels last; or first, 8 images of 8 channels. */
enum pass { FORWARD, INFERENCE, BACKWARD };

static void norm(enum pass pass, bool channels_first, enum pyreg_dtype dtype, int64_t size) {
    const int64_t last[3] = {1, ROWS, CHANNELS}, first[3] = {IMAGES, SIZE / IMAGES / PIXELS, PIXELS};
    const int64_t *shape = channels_first ? first : last;
    const int64_t strides[3] = {shape[1] * shape[2] * size, shape[2] * size, size};
    const struct pyreg_batchnorm common = {
        .dtype = dtype, .ndim = 3, .axis = channels_first ? 1 : 2, .shape = shape, .epsilon = 1e-5, .scale = scale};
    const struct pyreg_array in = {x, strides}, out = {y, strides};
    enum pyreg_status status;
    if (pass == FORWARD)
        status = pyreg_batchnorm_forward(
            &(struct pyreg_batchnorm_forward){.common = common, .x = in, .y = out, .mean = mean, .var = var});
    else if (pass == INFERENCE)
        status = pyreg_batchnorm_inference(
            &(struct pyreg_batchnorm_inference){.common = common, .x = in, .y = out, .mean = mean, .var = var});
    else
        status = pyreg_batchnorm_backward(&(struct pyreg_batchnorm_backward){.common = common,
                                                                             .x = in,
                                                                             .dy = in,
                                                                             .dx = out,
                                                                             .mean = mean,
                                                                             .var = var,
                                                                             .dscale = sums[0],
                                                                             .dbias = sums[1]});
    if (status != PYREG_OK) abort();
}

static void forward_nhwc(void) { norm(FORWARD, false, PYREG_F32, 4); }
static void forward_nchw(void) { norm(FORWARD, true, PYREG_F32, 4); }
static void inference_nhwc(void) { norm(INFERENCE, false, PYREG_F32, 4); }
static void inference_nchw(void) { norm(INFERENCE, true, PYREG_F32, 4); }
static void backward_nhwc(void) { norm(BACKWARD, false, PYREG_F32, 4); }
static void backward_nchw(void) { norm(BACKWARD, true, PYREG_F32, 4); }
static void forward_bf16(void) { norm(FORWARD, true, PYREG_BF16, 2); }
static void inference_bf16(void) { norm(INFERENCE, true, PYREG_BF16, 2); }
static void inference_f16(void) { norm(INFERENCE, true, PYREG_F16, 2); }
static void backward_f16(void) { norm(BACKWARD, false, PYREG_F16, 2); }

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"philox", philox},
    {"philox rate 0.5", philox_half},
    {"philox bfloat16", philox_bf16},
    {"threefry", threefry},
    {"threefry_x64", threefry_x64},
    {"forward NHWC", forward_nhwc},
    {"forward NCHW", forward_nchw},
    {"inference NHWC", inference_nhwc},
    {"inference NCHW", inference_nchw},
    {"backward NHWC", backward_nhwc},
    {"backward NCHW", backward_nchw},
    {"forward NCHW bfloat16", forward_bf16},
    {"inference NCHW bfloat16", inference_bf16},
    {"inference NCHW float16", inference_f16},
    {"backward NHWC float16", backward_f16},
};
enum { CASES = sizeof cases / sizeof *cases };

int main(int arguments, char **argument) {
    if (pyreg_init() != PYREG_OK) return 2;
    pyreg_set_num_threads(1);
    if (arguments == 2 && strcmp(argument[1], "list") == 0) { /* and what the counts depend on */
        printf("%s\n%d\n", pyreg_compiler(), SIZE);
        for (int c = 0; c < CASES; c++) puts(cases[c].name);
        return 0;
    }
    const int repeats = arguments == 3 ? atoi(argument[2]) : 1;
    for (int c = 0; c < CASES; c++)
        for (int r = 0; r < repeats && (arguments < 3 || strcmp(argument[1], cases[c].name) == 0); r++) cases[c].run();
    return 0;
}
