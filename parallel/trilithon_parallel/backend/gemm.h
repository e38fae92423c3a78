/*
 * C (+)= A B in fp32 on one thread: both factors are packed, a block at a time, so that they may lie in memory in any way.
 *
 * After "Anatomy of High-Performance Matrix Multiplication" (Goto and van de Geijn 2008): a panel of B stays in the first
 * cache, a block of A in the second. Sums run over DEPTH inputs in registers, then from block to block in C.
 */
#ifndef TRILITHON_GEMM_H
#define TRILITHON_GEMM_H
#include "vector.h"

#define TILE_ROWS (WIDTH == 16 ? 12 : 6)
#define TILE_COLUMNS (2 * WIDTH)
#define DEPTH 256
#define BAND_ROWS (8 * TILE_ROWS)
#define BAND_COLUMNS (16 * TILE_COLUMNS)

/* A matrix in memory: element (i, j) is `data[i * row + j * column]`, a float or a bfloat16. */
struct matrix {
    const void *data;
    int64_t row, column;
    int32_t is_bf16;
};

/* What one thread packs into; 64-byte aligned. */
struct workspace {
    float a[BAND_ROWS * DEPTH];
    float b[BAND_COLUMNS * DEPTH];
};

static inline float element(const struct matrix *m, int64_t i, int64_t j) {
    const int64_t at = i * m->row + j * m->column;
    return m->is_bf16 ? widen(((const uint16_t *)m->data)[at]) : ((const float *)m->data)[at];
}

/*
 * Lines [first, first + count) of `m` by inputs [from, from + depth) -> panels [count / width][depth][width], the last one
 * padded with zeros. Lines are rows of A or columns of B: `line` and `along` are the strides that make it so.
 */
static inline void pack_lines(const struct matrix *m, int64_t line, int64_t along, int64_t first, int64_t count,
                              int64_t from, int64_t depth, int width, float *out) {
    const struct matrix view = {m->data, line, along, m->is_bf16};
    for (int64_t panel = 0; panel < count; panel += width, out += depth * width) {
        const int here = (int)(count - panel < width ? count - panel : width);
        if (here < width) memset(out, 0, (size_t)(depth * width) * sizeof *out);
        if (!m->is_bf16 && line == 1) { /* lines lie side by side: whole vectors move */
            const float *source = (const float *)m->data + first + panel + from * along;
            for (int64_t k = 0; k < depth; k++) memcpy(out + k * width, source + k * along, (size_t)here * sizeof *out);
        } else if (!m->is_bf16) {
            for (int i = 0; i < here; i++) {
                const float *source = (const float *)m->data + (first + panel + i) * line + from * along;
                for (int64_t k = 0; k < depth; k++) out[k * width + i] = source[k * along];
            }
        } else {
            for (int64_t k = 0; k < depth; k++)
                for (int i = 0; i < here; i++) out[k * width + i] = element(&view, first + panel + i, from + k);
        }
    }
}

/* A tile of at most TILE_ROWS x TILE_COLUMNS: packed panels in, added to or written over `c`. */
static inline void multiply_tile(const float *a, const float *b, int64_t depth, float *c, int64_t stride, int rows,
                                 int columns, int is_added) {
    vec total[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) total[r][0] = total[r][1] = (vec){};
    for (int64_t k = 0; k < depth; k++, a += TILE_ROWS, b += TILE_COLUMNS) {
        const vec left = load(b), right = load(b + WIDTH);
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++) {
            total[r][0] = total[r][0] + a[r] * left;
            total[r][1] = total[r][1] + a[r] * right;
        }
    }
    if (rows == TILE_ROWS && columns == TILE_COLUMNS) {
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++, c += stride) {
            store(c, is_added ? load(c) + total[r][0] : total[r][0]);
            store(c + WIDTH, is_added ? load(c + WIDTH) + total[r][1] : total[r][1]);
        }
        return;
    }
    float edge[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) {
        store(edge[r], total[r][0]);
        store(edge[r] + WIDTH, total[r][1]);
    }
    for (int r = 0; r < rows; r++, c += stride)
        for (int o = 0; o < columns; o++) c[o] = (is_added ? c[o] : 0.0f) + edge[r][o];
}

/* c [rows, columns], its rows `stride` apart, from A [rows, depth] and B [depth, columns]. */
static inline void multiply(const struct matrix *a, const struct matrix *b, int64_t rows, int64_t columns, int64_t depth,
                            float *c, int64_t stride, int is_added, struct workspace *w) {
    for (int64_t from = 0; from < depth; from += DEPTH) {
        const int64_t inner = depth - from < DEPTH ? depth - from : DEPTH;
        const int adds = is_added || from > 0;
        for (int64_t left = 0; left < columns; left += BAND_COLUMNS) {
            const int64_t wide = columns - left < BAND_COLUMNS ? columns - left : BAND_COLUMNS;
            pack_lines(b, b->column, b->row, left, wide, from, inner, TILE_COLUMNS, w->b);
            for (int64_t top = 0; top < rows; top += BAND_ROWS) {
                const int64_t high = rows - top < BAND_ROWS ? rows - top : BAND_ROWS;
                pack_lines(a, a->row, a->column, top, high, from, inner, TILE_ROWS, w->a);
                for (int64_t o = 0; o < wide; o += TILE_COLUMNS)
                    for (int64_t r = 0; r < high; r += TILE_ROWS)
                        multiply_tile(w->a + r * inner, w->b + o * inner, inner, c + (top + r) * stride + left + o, stride,
                                      (int)(high - r < TILE_ROWS ? high - r : TILE_ROWS),
                                      (int)(wide - o < TILE_COLUMNS ? wide - o : TILE_COLUMNS), adds);
            }
        }
    }
}

#endif
