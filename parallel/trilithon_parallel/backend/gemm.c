/* Products of the backward pass over several threads; a thread owns a part of C. See gemm.h. */
#include <stdlib.h>

#include "gemm.h"

/* Rounded up to whole tiles, the share of `size` that part `i` of `parts` begins at. */
static int64_t border(int64_t size, int64_t tile, int64_t parts, int64_t i) {
    const int64_t at = (size + tile - 1) / tile * i / parts * tile;
    return at < size ? at : size;
}

/* c [rows, columns] (+)= A B, fp32, rows `stride` apart; strides of A and B in elements. 0, or 1 where memory is short. */
int32_t gemm(const struct matrix *a, const struct matrix *b, int64_t rows, int64_t columns, int64_t depth, float *c,
             int64_t stride, int32_t is_added, int32_t num_threads) {
    const int by_rows = rows >= columns;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(num_threads) reduction(| : failed)
    for (int32_t i = 0; i < num_threads; i++) {
        const int64_t size = by_rows ? rows : columns, tile = by_rows ? TILE_ROWS : TILE_COLUMNS;
        const int64_t first = border(size, tile, num_threads, i), count = border(size, tile, num_threads, i + 1) - first;
        if (count == 0) continue;
        struct workspace *w = aligned_alloc(64, sizeof *w);
        if (!w) {
            failed = 1;
            continue;
        }
        struct matrix mine = by_rows ? *a : *b;
        mine.data = (const char *)mine.data + first * (by_rows ? mine.row : mine.column) * (mine.is_bf16 ? 2 : 4);
        if (by_rows) multiply(&mine, b, count, columns, depth, c + first * stride, stride, is_added, w);
        else multiply(a, &mine, rows, count, depth, c + first, stride, is_added, w);
        free(w);
    }
    return failed;
}
