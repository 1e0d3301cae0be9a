/* Every op with every one of its allocations failing: PYREG_NO_MEMORY, nothing written, nothing leaked, and the next call
 * is right.
 *
 * Exit status 0 and no report: passed; 2: this machine lacks the instruction set. */
#include "pyreg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OPS = 6, ROWS = 3000, CHANNELS = 40, N = ROWS * CHANNELS };

static const int64_t shape[2] = {ROWS, CHANNELS}, rows[2] = {4 * CHANNELS, 4}, columns[2] = {4, 4 * ROWS};
static const int64_t mask_rows[2] = {CHANNELS, 1}, shared[2] = {1, 0};
static float x[N], dy[N], given[CHANNELS];
static bool mask[N];

static struct results {
    float y[N], dx[N], mean[CHANNELS], var[CHANNELS], dscale[CHANNELS], dbias[CHANNELS];
    uint8_t bits[N];
} want, got, untouched;

static const struct pyreg_mask random_mask = {.generator = PYREG_THREEFRY, .key = {1, 2}, .rate = 0.3, .offset = 7};

static enum pyreg_status dropout(const int64_t *strides, float *y, const int64_t *mask_strides) {
    return pyreg_dropout(&(struct pyreg_dropout){
        .dtype = PYREG_F32,
        .ndim = 2,
        .shape = shape,
        .mask = random_mask,
        .scale = pyreg_dropout_scale(PYREG_F32, random_mask.rate),
        .x = {x, strides},
        .y = {y, strides},
        .mask_strides = mask_strides,
    });
}

static enum pyreg_status call(int op, struct results *r) {
    const struct pyreg_batchnorm common = {.dtype = PYREG_F32, .ndim = 2, .axis = 1, .shape = shape, .epsilon = 1e-5};
    switch (op) {
    case 0: return dropout(columns, r->y, NULL);
    case 1: return dropout(rows, r->y, shared);
    case 2: return pyreg_dropout_mask(&random_mask, N, true, r->bits);
    case 3:
        return pyreg_batchnorm_forward(&(struct pyreg_batchnorm_forward){
            .common = common,
            .x = {x, rows},
            .mask = {mask, mask_rows},
            .y = {r->y, rows},
            .mean = r->mean,
            .var = r->var,
        });
    case 4:
        return pyreg_batchnorm_inference(&(struct pyreg_batchnorm_inference){
            .common = common,
            .x = {x, columns},
            .residual = {dy, columns},
            .y = {r->y, columns},
            .mean = given,
            .var = given,
        });
    default:
        return pyreg_batchnorm_backward(&(struct pyreg_batchnorm_backward){
            .common = common,
            .dy = {dy, rows},
            .x = {x, rows},
            .dx = {r->dx, rows},
            .mean = given,
            .var = given,
            .dscale = r->dscale,
            .dbias = r->dbias,
        });
    }
}

int main(void) {
    if (pyreg_init() != PYREG_OK) return 2;
    int failures = 0, allocations = 0;
    for (int i = 0; i < N; i++) x[i] = (float)(i * 37 % 501 - 250) / 64, dy[i] = (float)(i % 7), mask[i] = i % 3 > 0;
    for (int c = 0; c < CHANNELS; c++) given[c] = 1 + (float)c;
    memset(&untouched, 0xa5, sizeof untouched);
    for (int op = 0; op < OPS; op++)
        for (int threads = 1; threads < 4; threads++) {
            pyreg_set_num_threads(threads);
            pyreg_set_parallel_from(0);
            memcpy(&want, &untouched, sizeof want);
            if (call(op, &want) != PYREG_OK) failures++;
            for (long n = 1;; n++) {
                memcpy(&got, &untouched, sizeof got);
                pyreg_fail_allocation(n);
                const enum pyreg_status status = call(op, &got);
                pyreg_fail_allocation(0);
                if (memcmp(&got, status ? &untouched : &want, sizeof got)) {
                    fprintf(stderr, "op %d, allocation %ld: status %d, and other results\n", op, n, (int)status);
                    failures++;
                }
                if (status == PYREG_OK) break;
                if (status != PYREG_NO_MEMORY) failures++;
                allocations++;
            }
        }
    if (!allocations) fprintf(stderr, "no allocation has failed\n");
    return failures || !allocations;
}
