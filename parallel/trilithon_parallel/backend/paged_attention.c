/*
 * Attention over a paged cache, read in place: decodes and prefill chunks of a ragged batch in one call.
 *
 * A row of the result (one token, one query head) is a sum in a fixed order: keys in tiles of KEY_TILE from position 0,
 * channels from 0, one accumulator per key or channel. So its bits depend on the row's own tokens alone, not on the
 * batch, on how a prompt was cut into chunks, or on threads. Compile without -ffast-math, which would break that.
 *
 * Layout of one layer: keys [G, N, C, 16] (channels outer, so that a block's 16 keys are one vector), then values
 * [G, N, 16, C]. Elements are float or bfloat16; sums are float.
 */
#include <math.h>

#include "vector.h"

#define BLOCK 16
#define KEY_TILE 64
#define MAX_ROWS 48
#define MAX_CHANNELS 256

#define VECTORS (BLOCK / WIDTH)

/* What one step's layers share. Positions are counted in tokens, strides in elements. */
struct step {
    int32_t num_sequences, num_tokens, heads, groups, channels, table_width, is_bf16, num_threads;
    int64_t num_blocks;
    float scale;
    int32_t num_items;
    const int64_t *slots;        /* [T] */
    const int32_t *bounds;       /* [B + 1] */
    const int32_t *context_lens; /* [B] */
    const int32_t *tables;       /* [B, table_width] */
    const int32_t *items;        /* [num_items, 3]: sequence, first token of the tile, tokens of the tile */
};

static inline __attribute__((always_inline)) void attend_tile(
    const struct step *s, int C, int is_bf16, const void *layer, const void *q, int64_t q_stride, void *out,
    int sequence, int first, int num_tokens, int group) {
    float rows_RC[MAX_ROWS][MAX_CHANNELS] __attribute__((aligned(64)));
    float sums_RC[MAX_ROWS][MAX_CHANNELS] __attribute__((aligned(64)));
    float scores_RS[MAX_ROWS][KEY_TILE] __attribute__((aligned(64)));
    float wide[KEY_TILE * MAX_CHANNELS] __attribute__((aligned(64)));
    float most_R[MAX_ROWS], total_R[MAX_ROWS], shrink_R[MAX_ROWS];
    const int per_group = s->heads / s->groups, rows = num_tokens * per_group, padded = (rows + 3) & ~3;
    const int size = is_bf16 ? 2 : 4;
    const int64_t token_0 = s->bounds[sequence] + first;
    const int context = s->context_lens[sequence] + first; /* positions before the tile's first token */
    const int num_keys = context + num_tokens;
    const int32_t *table = s->tables + (int64_t)sequence * s->table_width;
    const char *keys = (const char *)layer + (int64_t)group * s->num_blocks * BLOCK * C * size;
    const char *values = keys + (int64_t)s->groups * s->num_blocks * BLOCK * C * size;

    for (int r = 0; r < padded; r++) {
        most_R[r] = -INFINITY;
        total_R[r] = 0.0f;
        int64_t at = (token_0 + r / per_group) * q_stride + (int64_t)(group * per_group + r % per_group) * C;
        for (int c = 0; c < C; c++) {
            float x = 0.0f;
            if (r < rows) x = is_bf16 ? widen(((const uint16_t *)q)[at + c]) : ((const float *)q)[at + c];
            rows_RC[r][c] = x * s->scale;
            sums_RC[r][c] = 0.0f;
        }
    }
    for (int base = 0; base < num_keys; base += KEY_TILE) {
        const int num_here = num_keys - base < KEY_TILE ? num_keys - base : KEY_TILE;
        const int blocks_here = (num_here + BLOCK - 1) / BLOCK;
        for (int b = 0; b < blocks_here; b++) {
            const char *at = keys + (int64_t)table[base / BLOCK + b] * BLOCK * C * size;
            const float *k_CS = (const float *)at;
            if (is_bf16) {
                for (int i = 0; i < BLOCK * C; i += WIDTH) store(wide + i, load_bf16((const uint16_t *)at + i));
                k_CS = wide;
            }
            for (int r = 0; r < padded; r += 4) {
                vec s0[VECTORS] = {}, s1[VECTORS] = {}, s2[VECTORS] = {}, s3[VECTORS] = {};
                for (int c = 0; c < C; c++) {
                    for (int v = 0; v < VECTORS; v++) {
                        vec k = load(k_CS + c * BLOCK + v * WIDTH);
                        s0[v] += rows_RC[r][c] * k;
                        s1[v] += rows_RC[r + 1][c] * k;
                        s2[v] += rows_RC[r + 2][c] * k;
                        s3[v] += rows_RC[r + 3][c] * k;
                    }
                }
                for (int v = 0; v < VECTORS; v++) {
                    store(&scores_RS[r][b * BLOCK + v * WIDTH], s0[v]);
                    store(&scores_RS[r + 1][b * BLOCK + v * WIDTH], s1[v]);
                    store(&scores_RS[r + 2][b * BLOCK + v * WIDTH], s2[v]);
                    store(&scores_RS[r + 3][b * BLOCK + v * WIDTH], s3[v]);
                }
            }
        }
        if (is_bf16) {
            for (int b = 0; b < blocks_here; b++) {
                const uint16_t *at = (const uint16_t *)(values + (int64_t)table[base / BLOCK + b] * BLOCK * C * size);
                for (int i = 0; i < BLOCK * C; i += WIDTH) store(wide + b * BLOCK * C + i, load_bf16(at + i));
            }
        }
        for (int r = 0; r < padded; r++) {
            const int visible = r < rows ? context + r / per_group + 1 - base : 0; /* keys that the row may see */
            float *score = scores_RS[r];
            if (visible <= 0) {
                memset(score, 0, sizeof scores_RS[r]);
                shrink_R[r] = 1.0f;
                continue;
            }
            for (int j = visible < num_here ? visible : num_here; j < KEY_TILE; j++) score[j] = -INFINITY;
            vec most = load(score);
            for (int j = WIDTH; j < KEY_TILE; j += WIDTH) {
                vec next = load(score + j);
                most = choose(next > most, next, most);
            }
            float top = most_R[r];
            for (int j = 0; j < WIDTH; j++) top = most[j] > top ? most[j] : top;
            shrink_R[r] = exp_negative(broadcast(most_R[r] - top))[0];
            vec total = {};
            for (int j = 0; j < KEY_TILE; j += WIDTH) {
                vec weight = exp_negative(load(score + j) - top);
                store(score + j, weight);
                total += weight;
            }
            for (int half = WIDTH / 2; half > 0; half /= 2)
                for (int j = 0; j < half; j++) total[j] += total[j + half];
            most_R[r] = top;
            total_R[r] = total_R[r] * shrink_R[r] + total[0];
        }
        /* Two rows at once share the loads of values; a key that a row may not see has weight zero there. */
        for (int r = 0; r < padded; r += 2) {
            const float *weights_0 = scores_RS[r], *weights_1 = scores_RS[r + 1];
            for (int c = 0; c < C; c += 4 * WIDTH) {
                vec sum_0[4], sum_1[4];
                const int vectors = C - c < 4 * WIDTH ? (C - c) / WIDTH : 4;
                for (int v = 0; v < vectors; v++) {
                    sum_0[v] = load(&sums_RC[r][c + v * WIDTH]) * shrink_R[r];
                    sum_1[v] = load(&sums_RC[r + 1][c + v * WIDTH]) * shrink_R[r + 1];
                }
                for (int b = 0; b < blocks_here; b++) {
                    const float *v_SC = is_bf16 ? wide + b * BLOCK * C
                        : (const float *)(values + (int64_t)table[base / BLOCK + b] * BLOCK * C * size);
                    const int last = num_here - b * BLOCK < BLOCK ? num_here - b * BLOCK : BLOCK;
                    for (int j = 0; j < last; j++) {
                        const float w_0 = weights_0[b * BLOCK + j], w_1 = weights_1[b * BLOCK + j];
                        for (int v = 0; v < vectors; v++) {
                            vec value = load(v_SC + j * C + c + v * WIDTH);
                            sum_0[v] += w_0 * value;
                            sum_1[v] += w_1 * value;
                        }
                    }
                }
                for (int v = 0; v < vectors; v++) {
                    store(&sums_RC[r][c + v * WIDTH], sum_0[v]);
                    store(&sums_RC[r + 1][c + v * WIDTH], sum_1[v]);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        int64_t at = ((token_0 + r / per_group) * s->heads + group * per_group + r % per_group) * C;
        for (int c = 0; c < C; c++) {
            float y = sums_RC[r][c] / total_R[r];
            if (is_bf16) ((uint16_t *)out)[at + c] = narrow(y);
            else ((float *)out)[at + c] = y;
        }
    }
}

static void write_token(const struct step *s, void *layer, const void *k, int64_t k_stride, const void *v,
                        int64_t v_stride, int64_t token) {
    const int C = s->channels, size = s->is_bf16 ? 2 : 4;
    const int64_t block = s->slots[token] / BLOCK, offset = s->slots[token] % BLOCK;
    for (int g = 0; g < s->groups; g++) {
        char *key = (char *)layer + ((int64_t)g * s->num_blocks + block) * BLOCK * C * size;
        char *value = (char *)layer + ((int64_t)(s->groups + g) * s->num_blocks + block) * BLOCK * C * size;
        const char *from = (const char *)k + (token * k_stride + (int64_t)g * C) * size;
        for (int c = 0; c < C; c++) memcpy(key + ((int64_t)c * BLOCK + offset) * size, from + (int64_t)c * size, size);
        memcpy(value + offset * C * size, (const char *)v + (token * v_stride + (int64_t)g * C) * size, (size_t)C * size);
    }
}

/* Writes the step's new keys and values into one layer's cache, then attends: out [T, heads, C]. */
void paged_attention(const struct step *s, void *layer, const void *q, int64_t q_stride, const void *k,
                     int64_t k_stride, const void *v, int64_t v_stride, void *out) {
#pragma omp parallel num_threads(s->num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < s->num_tokens; t++) write_token(s, layer, k, k_stride, v, v_stride, t);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)s->num_items * s->groups; i++) {
            const int32_t *item = s->items + i / s->groups * 3;
            const int group = (int)(i % s->groups);
#define ATTEND(C, IS_BF16) attend_tile(s, C, IS_BF16, layer, q, q_stride, out, item[0], item[1], item[2], group)
            if (s->channels == 64 && s->is_bf16) ATTEND(64, 1);
            else if (s->channels == 64) ATTEND(64, 0);
            else if (s->channels == 128 && s->is_bf16) ATTEND(128, 1);
            else if (s->channels == 128) ATTEND(128, 0);
            else if (s->is_bf16) ATTEND(s->channels, 1);
            else ATTEND(s->channels, 0);
        }
    }
}
