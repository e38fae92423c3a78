/*
 * The backward pass of attention over packed sequences: scores are made again, a tile of queries at a time, so that no
 * matrix of queries by keys is kept (FlashAttention's backward, arXiv 2205.14135, appendix B). One thread owns a sequence's
 * key/value group: its gradients of keys and values are its own sums, in a fixed order.
 */
#include <math.h>
#include <stdlib.h>

#include "gemm.h"

#define QUERIES BAND_ROWS

struct attention {
    int32_t num_sequences, heads, groups, channels, is_causal, is_bf16, num_threads;
    float scale;
    const int64_t *bounds;              /* [B + 1] */
    const void *q, *k, *v, *d_out;      /* [T, A | G | G | A, C], a token's heads contiguous */
    int64_t q_row, k_row, v_row, d_row; /* elements from token to token */
    float *d_q, *d_k, *d_v;             /* fp32, contiguous, [T, A | G | G, C]; keys' and values' are zero */
};

static struct matrix part(const struct attention *s, const void *data, int64_t row, int64_t token, int head) {
    const int64_t at = token * row + (int64_t)head * s->channels;
    return (struct matrix){(const char *)data + at * (s->is_bf16 ? 2 : 4), row, 1, s->is_bf16};
}

static struct matrix transposed(struct matrix m) { return (struct matrix){m.data, m.column, m.row, m.is_bf16}; }

/* Scores -> softmax weights; in the same pass over `d`, the weights' gradients -> those of the scaled scores. */
static void softmax_backward(float *p, float *d, int64_t seen, int64_t keys, float scale) {
    float most = -INFINITY;
    for (int64_t i = 0; i < seen; i++) most = p[i] > most ? p[i] : most;
    double total = 0, inner = 0;
    int64_t i = 0;
    vec sum = {}, dot = {};
    for (; i + WIDTH <= seen; i += WIDTH) {
        const vec e = exp_negative((load(p + i) - most) * scale);
        store(p + i, e);
        sum += e;
        dot += e * load(d + i);
    }
    for (int o = 0; o < WIDTH; o++) total += sum[o], inner += dot[o];
    for (; i < seen; i++) {
        p[i] = expf((p[i] - most) * scale);
        total += p[i];
        inner += p[i] * d[i];
    }
    const float shrink = (float)(1 / total), mean = (float)(inner / total);
    for (i = 0; i < seen; i++) {
        p[i] *= shrink;
        d[i] = p[i] * (d[i] - mean) * scale;
    }
    for (; i < keys; i++) p[i] = d[i] = 0.0f;
}

static int attend_backward(const struct attention *s, int sequence, int group, struct workspace *w) {
    const int64_t start = s->bounds[sequence], size = s->bounds[sequence + 1] - start;
    const int C = s->channels, per_group = s->heads / s->groups;
    const int64_t padded = (size + WIDTH - 1) / WIDTH * WIDTH;
    float *p = aligned_alloc(64, (size_t)(QUERIES * padded) * sizeof *p), *d = aligned_alloc(64, (size_t)(QUERIES * padded) * sizeof *d);
    const int failed = !p || !d;
    float *d_k = s->d_k + (start * s->groups + group) * C, *d_v = s->d_v + (start * s->groups + group) * C;
    const struct matrix k = part(s, s->k, s->k_row, start, group), v = part(s, s->v, s->v_row, start, group);
    const struct matrix k_t = transposed(k), v_t = transposed(v);
    const int64_t kv_row = (int64_t)s->groups * C, q_row = (int64_t)s->heads * C;
    const struct matrix weights = {p, 1, padded, 0}, scores = {d, 1, padded, 0}, rows = {d, padded, 1, 0};
    for (int head = group * per_group; head < (group + 1) * per_group && !failed; head++)
        for (int64_t first = 0; first < size; first += QUERIES) {
            const int64_t here = size - first < QUERIES ? size - first : QUERIES;
            const int64_t keys = s->is_causal ? first + here : size;
            const struct matrix q = part(s, s->q, s->q_row, start + first, head);
            const struct matrix d_out = part(s, s->d_out, s->d_row, start + first, head);
            multiply(&q, &k_t, here, keys, C, p, padded, 0, w);
            multiply(&d_out, &v_t, here, keys, C, d, padded, 0, w);
            for (int64_t r = 0; r < here; r++)
                softmax_backward(p + r * padded, d + r * padded, s->is_causal ? first + r + 1 : keys, keys, s->scale);
            multiply(&weights, &d_out, keys, C, here, d_v, kv_row, 1, w);
            multiply(&scores, &q, keys, C, here, d_k, kv_row, 1, w);
            multiply(&rows, &k, here, C, keys, s->d_q + ((start + first) * s->heads + head) * C, q_row, 0, w);
        }
    free(p);
    free(d);
    return failed;
}

/* Gradients of queries, keys and values. 0, or 1 where memory is short. */
int32_t attention_backward(const struct attention *s) {
    const int64_t items = (int64_t)s->num_sequences * s->groups;
    int failed = 0;
#pragma omp parallel num_threads(s->num_threads) reduction(| : failed)
    {
        struct workspace *w = aligned_alloc(64, sizeof *w);
        failed |= !w;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++)
            if (w) failed |= attend_backward(s, (int)(item / s->groups), (int)(item % s->groups), w);
        free(w);
    }
    return failed;
}
