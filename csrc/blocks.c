#include "blocks.h"

#include "arith.h"

/* ---- View -------------------------------------------------------------------------------------------------------- */

/* Columns side by side of a line, and of a row of fewer elements than FEW_ELEMENTS. */
enum { LINE_SPREAD = 32, ROW_SPREAD = 32, FEW_ELEMENTS = 16 };

/* Dims of stride 0 repeat the same elements: they go outermost. */
static int64_t reach(const struct dim *d) { return d->stride[BN_X] ? d->stride[BN_X] : INT64_MAX; }

/* Are the elements of each row neighbours? */
static bool is_rows(const struct view *v, enum bn_operand k, size_t channels, size_t inner) {
    const int64_t size = (int64_t)v->size[k];
    if (inner > 1 && v->inner_dim.stride[k] != size) return false;
    if (channels > 1 && v->channel_dim.stride[k] != (int64_t)inner * size) return false;
    if (v->line || v->spread == 1 || v->num_outer == 0) return true;
    return v->outer_dim[v->num_outer - 1].stride[k] == (int64_t)(channels * inner) * size;
}

/* Turns a dim around, so that x's elements come upwards: their order is ours to choose. */
static void reverse(struct view *v, struct dim *dim) {
    for (int k = 0; k < BN_OPERANDS; k++) {
        if (v->size[k]) v->data[k] += (int64_t)(dim->length - 1) * dim->stride[k];
        dim->stride[k] = -dim->stride[k];
    }
}

void view_init(struct view *v, int ndim, const int64_t *shape, int axis, const struct operand *operands,
               size_t long_line) {
    struct dim *dims = v->outer_dim; /* sorted first, merged in place after */
    int num = 0;
    for (int k = 0; k < BN_OPERANDS; k++) {
        v->data[k] = operands[k].array.data;
        v->size[k] = v->data[k] ? operands[k].size : 0;
        v->output[k] = operands[k].output;
    }
    v->channels = (size_t)shape[axis];
    for (int d = 0; d < ndim; d++) {
        struct dim dim = {.length = (size_t)shape[d]};
        for (int k = 0; k < BN_OPERANDS; k++) dim.stride[k] = v->size[k] ? operands[k].array.strides[d] : 0;
        if (d == axis) {
            v->channel_dim = dim;
        } else if (dim.length > 1) {
            if (dim.stride[BN_X] < 0) reverse(v, &dim);
            num = insert_dim(dims, num, &dim, reach);
        }
    }

    int64_t channel_stride = v->channels == 1 ? INT64_MAX : v->channel_dim.stride[BN_X];
    if (channel_stride < 0) channel_stride = -channel_stride;
    int outside = 0; /* dims outside the channels; these, and those inside, are merged among themselves */
    while (outside < num && reach(&dims[outside]) >= channel_stride) outside++;
    int merged = 0;
    for (int d = 0; d < outside; d++) {
        merged = append_dim(dims, merged, &dims[d]);
    }
    int inner = 0;
    for (int d = outside; d < num; d++) {
        inner = append_dim(dims + merged, inner, &dims[d]);
    }
    v->num_outer = merged + inner;
    v->inner_dim = (struct dim){.length = 1};
    if (inner) v->inner_dim = dims[--v->num_outer];
    v->inner = v->inner_dim.length;
    v->outer = 1;
    for (int d = 0; d < v->num_outer; d++) v->outer *= dims[d].length;
    v->line = v->channels == 1 || v->inner >= long_line;
    v->spread = v->line ? LINE_SPREAD : v->channels * v->inner < FEW_ELEMENTS ? ROW_SPREAD : 1;
    v->pack_bytes = 0;
    for (int k = 0; k < BN_OPERANDS; k++) {
        const enum bn_operand of = (enum bn_operand)k; /* all channels may be rows, where one of them is not */
        v->pack_at[k] = v->pack_bytes;
        if (v->size[k] && !(is_rows(v, of, v->channels, v->inner) && is_rows(v, of, 1, v->inner)))
            v->pack_bytes += PACK * v->size[k];
    }
}

char *view_at(const struct view *v, enum bn_operand k, size_t outer, size_t channel, size_t inner) {
    const int64_t at = offset_of(v->outer_dim, v->num_outer, outer, (int)k);
    return v->data[k] + at + (int64_t)channel * v->channel_dim.stride[k] + (int64_t)inner * v->inner_dim.stride[k];
}

/* ---- Walk -------------------------------------------------------------------------------------------------------- */

/* Copies what a block has of an operand: into its packed form, or out of it. */
static void copy_now(struct walk *w, enum bn_operand k, bool pack) {
    const struct view *v = w->view;
    const struct region *now = &w->now;
    const size_t lengths[] = {now->inner_end - now->inner, now->channel_end - now->channel,
                              now->outer_end - now->outer};
    const int64_t strides[] = {v->inner_dim.stride[k], v->channel_dim.stride[k],
                               v->num_outer ? v->outer_dim[v->num_outer - 1].stride[k] : 0};
    struct box box = {.size = v->size[k]};
    int64_t packed = (int64_t)v->size[k];
    for (int d = 0; d < 3; d++) {
        if (lengths[d] == 1) continue; /* the innermost loop is to be long */
        box.length[box.ndim] = lengths[d];
        box.to_stride[box.ndim] = pack ? packed : strides[d];
        box.from_stride[box.ndim++] = pack ? strides[d] : packed;
        packed *= (int64_t)lengths[d];
    }
    if (box.ndim == 0) box.length[box.ndim++] = 1;
    char *block = w->pack + v->pack_at[k], *array = view_at(v, k, now->outer, now->channel, now->inner);
    copy_box(&box, pack ? block : array, pack ? array : block);
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

size_t view_columns(const struct view *v, size_t channels) { return channels * v->spread * (v->line ? 1 : v->inner); }

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
        if (rows > v->spread && !v->line) rows -= rows % v->spread;
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
            const int64_t stride = v->num_outer ? v->outer_dim[v->num_outer - 1].stride[k] / (int64_t)v->size[k] : 0;
            w->block.of[k] = (struct bn_rows){
                view_at(v, (enum bn_operand)k, w->now.outer, w->now.channel, w->now.inner), (ptrdiff_t)stride};
        }
        follow &= rows == 1 || w->block.of[k].stride == width;
    }
    w->block.rows = follow ? 1 : rows;
    w->block.lines = v->line ? channels : 1;
    w->block.length = v->line ? length : (follow ? rows : 1) * (size_t)width;
    w->block.period = v->line ? v->spread : v->spread * (size_t)width;
    w->block.channel_lines = v->line;

    w->left.inner = w->now.inner_end;
    if (w->left.inner == w->left.inner_end) {
        w->left.inner = w->inner_begin;
        w->left.outer = w->now.outer_end;
    }
    return true;
}
