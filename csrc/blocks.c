#include "blocks.h"

#include <string.h>

/* ---- View -------------------------------------------------------------------------------------------------------- */

/* Columns side by side of a line, and of a row of fewer elements than SHORT_ROW. */
enum { LINE_PHASES = 32, ROW_PHASES = 32, SHORT_ROW = 16 };

/* Inner dims of stride 0 repeat the same elements: they go outermost. */
static ptrdiff_t rank(const struct view_dim *d, enum bn_operand first) {
    return d->stride[first] ? d->stride[first] : PTRDIFF_MAX;
}

static bool one_dim(const struct view *v, const struct view_dim *out, const struct view_dim *in) {
    for (int k = 0; k < BN_OPERANDS; k++)
        if (v->size[k] && out->stride[k] != in->stride[k] * (ptrdiff_t)in->length) return false;
    return true;
}

/* Are the elements of each row neighbours? */
static bool is_rows(const struct view *v, enum bn_operand k, size_t channels, size_t inner) {
    const ptrdiff_t size = (ptrdiff_t)v->size[k];
    if (inner > 1 && v->inner_dim.stride[k] != size) return false;
    if (channels > 1 && v->channel_dim.stride[k] != (ptrdiff_t)inner * size) return false;
    if (v->line || v->phases == 1 || v->num_outer == 0) return true;
    return v->outer_dim[v->num_outer - 1].stride[k] == (ptrdiff_t)(channels * inner) * size;
}

void view_init(struct view *v, int ndim, const int64_t *shape, int axis, const struct operand *operands,
               enum bn_operand first, size_t long_line) {
    struct view_dim *dims = v->outer_dim; /* sorted first, merged in place after */
    int num = 0;
    for (int k = 0; k < BN_OPERANDS; k++) {
        v->size[k] = operands[k].data ? operands[k].size : 0;
        v->output[k] = operands[k].output;
        v->data[k] = (char *)(uintptr_t)operands[k].data;
    }
    v->channels = (size_t)shape[axis];
    for (int d = 0; d < ndim; d++) {
        struct view_dim dim = {.length = (size_t)shape[d]};
        for (int k = 0; k < BN_OPERANDS; k++) dim.stride[k] = v->size[k] ? (ptrdiff_t)operands[k].strides[d] : 0;
        if (d == axis) {
            v->channel_dim = dim;
            continue;
        }
        if (dim.length == 1) continue;
        if (dim.stride[first] < 0) /* the order of elements is ours to choose: upwards in the first operand */
            for (int k = 0; k < BN_OPERANDS; k++) {
                if (v->size[k]) v->data[k] += (ptrdiff_t)(dim.length - 1) * dim.stride[k];
                dim.stride[k] = -dim.stride[k];
            }
        int at = num++;
        for (; at > 0 && rank(&dims[at - 1], first) < rank(&dim, first); at--) dims[at] = dims[at - 1];
        dims[at] = dim;
    }

    ptrdiff_t channel_stride = v->channels == 1 ? PTRDIFF_MAX : v->channel_dim.stride[first];
    if (channel_stride < 0) channel_stride = -channel_stride;
    int inside = 0; /* first dim inside the channels */
    while (inside < num && rank(&dims[inside], first) >= channel_stride) inside++;
    v->num_outer = 0;
    v->outer = 1;
    for (int d = 0; d < num; d++) {
        struct view_dim *last = v->num_outer ? &v->outer_dim[v->num_outer - 1] : NULL;
        if (last && d != inside && one_dim(v, last, &dims[d])) {
            dims[d].length *= last->length;
            v->num_outer--;
        }
        v->outer_dim[v->num_outer++] = dims[d];
    }
    v->inner_dim = (struct view_dim){.length = 1};
    if (inside < num) v->inner_dim = v->outer_dim[--v->num_outer];
    v->inner = v->inner_dim.length;
    for (int d = 0; d < v->num_outer; d++) v->outer *= v->outer_dim[d].length;
    v->line = v->channels == 1 || v->inner >= long_line;
    v->phases = v->line ? LINE_PHASES : v->channels * v->inner < SHORT_ROW ? ROW_PHASES : 1;
    v->pack_bytes = 0;
    for (int k = 0; k < BN_OPERANDS; k++) {
        const enum bn_operand of = (enum bn_operand)k; /* all channels may be rows, where one of them is not */
        v->pack_at[k] = v->pack_bytes;
        if (v->size[k] && !(is_rows(v, of, v->channels, v->inner) && is_rows(v, of, 1, v->inner)))
            v->pack_bytes += PACK * v->size[k];
    }
}

char *view_at(const struct view *v, enum bn_operand k, size_t outer, size_t channel, size_t inner) {
    char *at = v->data[k] + (ptrdiff_t)channel * v->channel_dim.stride[k] + (ptrdiff_t)inner * v->inner_dim.stride[k];
    for (int d = v->num_outer - 1; d >= 0; d--) {
        at += (ptrdiff_t)(outer % v->outer_dim[d].length) * v->outer_dim[d].stride[k];
        outer /= v->outer_dim[d].length;
    }
    return at;
}

/* ---- Walk -------------------------------------------------------------------------------------------------------- */

/* Copies (rows, channels, inner) elements of `size` bytes between a packed block and a strided array. */
static void copy_block(char *packed, char *strided, size_t size, const size_t length[3], const ptrdiff_t stride[3],
                       bool pack) {
    for (size_t r = 0; r < length[0]; r++)
        for (size_t c = 0; c < length[1]; c++) {
            char *at = strided + (ptrdiff_t)r * stride[0] + (ptrdiff_t)c * stride[1];
            for (size_t i = 0; i < length[2]; i++, packed += size, at += stride[2]) {
                char *to = pack ? packed : at, *from = pack ? at : packed;
                switch (size) { /* a constant size is one move */
                case 1: memcpy(to, from, 1); break;
                case 2: memcpy(to, from, 2); break;
                case 4: memcpy(to, from, 4); break;
                default: memcpy(to, from, 8); break;
                }
            }
        }
}

static void copy_now(struct walk *w, enum bn_operand k, bool pack) {
    const struct view *v = w->view;
    const struct region *now = &w->now;
    const size_t length[3] = {now->outer_end - now->outer, now->channel_end - now->channel,
                              now->inner_end - now->inner};
    const ptrdiff_t stride[3] = {v->num_outer ? v->outer_dim[v->num_outer - 1].stride[k] : 0, v->channel_dim.stride[k],
                                 v->inner_dim.stride[k]};
    copy_block(w->pack + v->pack_at[k], view_at(v, k, now->outer, now->channel, now->inner), v->size[k], length, stride,
               pack);
}

void walk_begin(struct walk *w, const struct view *v, struct region region, void *pack) {
    w->view = v;
    w->pack = pack;
    w->left = region;
    w->inner_begin = region.inner;
    for (int k = 0; k < BN_OPERANDS; k++) {
        w->packed[k] = false;
        w->block.of[k].at = NULL;
    }
    w->now = (struct region){0};
    w->block.relu = w->block.stream = false;
}

size_t view_columns(const struct view *v, size_t channels) { return channels * v->phases * (v->line ? 1 : v->inner); }

size_t view_together(const struct view *v, size_t channels) {
    bool neighbours = true;
    for (int k = 0; k < BN_OPERANDS; k++) neighbours &= !v->size[k] || is_rows(v, (enum bn_operand)k, 2, v->inner);
    return v->line && !neighbours ? 1 : at_most(channels, BN_COLUMNS / view_columns(v, 1));
}

bool walk_next(struct walk *w) {
    const struct view *v = w->view;
    for (int k = 0; k < BN_OPERANDS; k++)
        if (w->packed[k] && v->output[k]) copy_now(w, (enum bn_operand)k, false);
    if (w->left.outer == w->left.outer_end) return false;

    const size_t channels = w->left.channel_end - w->left.channel, inner = w->left.inner_end - w->left.inner;
    const size_t run = v->num_outer ? v->outer_dim[v->num_outer - 1].length : 1;
    size_t rows = at_most(run - w->left.outer % run, w->left.outer_end - w->left.outer), length = inner;
    bool any = false;
    for (int k = 0; k < BN_OPERANDS; k++) {
        w->packed[k] = v->size[k] && !is_rows(v, (enum bn_operand)k, channels, w->left.inner_end - w->inner_begin);
        any |= w->packed[k];
    }
    if (any) { /* as much as fits: rows, or a part of a row, which is a part of a line if there is one channel only */
        length = at_most(inner, PACK / channels);
        rows = length < inner || w->left.inner > w->inner_begin ? 1 : at_most(rows, PACK / (channels * length));
        if (rows > v->phases && !v->line) rows -= rows % v->phases;
    }
    w->now = w->left;
    w->now.outer_end = w->left.outer + rows;
    w->now.inner_end = w->left.inner + length;

    const ptrdiff_t width = (ptrdiff_t)(channels * length);
    bool follow = !v->line; /* rows that follow each other make one longer line */
    for (int k = 0; k < BN_OPERANDS; k++) {
        if (!v->size[k]) continue;
        if (w->packed[k]) {
            if (!v->output[k]) copy_now(w, (enum bn_operand)k, true);
            w->block.of[k] = (struct bn_rows){w->pack + v->pack_at[k], width};
        } else {
            ptrdiff_t stride = v->num_outer ? v->outer_dim[v->num_outer - 1].stride[k] / (ptrdiff_t)v->size[k] : 0;
            w->block.of[k] =
                (struct bn_rows){view_at(v, (enum bn_operand)k, w->now.outer, w->now.channel, w->now.inner), stride};
        }
        follow &= rows == 1 || w->block.of[k].stride == width;
    }
    w->block.rows = follow ? 1 : rows;
    w->block.lines = v->line ? channels : 1;
    w->block.length = v->line ? length : (follow ? rows : 1) * (size_t)width;
    w->block.period = v->line ? v->phases : v->phases * (size_t)width;
    w->block.channel_lines = v->line;

    w->left.inner = w->now.inner_end;
    if (w->left.inner == w->left.inner_end) {
        w->left.inner = w->inner_begin;
        w->left.outer = w->now.outer_end;
    }
    return true;
}
