/*
 * silu(gate) * up, in fp32 with one rounding. Every element goes through the same vector code wherever it stands (a tail
 * is padded to a whole vector), so its bits don't depend on shapes or threads.
 */
#include "vector.h"

static inline vec silu(vec x) {
    const vec e = exp_negative(choose(x > 0.0f, -x, x)); /* never overflows */
    return x * choose(x > 0.0f, broadcast(1.0f), e) / (e + 1.0f);
}

static inline __attribute__((always_inline)) void gate_row(const void *gate, const void *up, void *out, int64_t width,
                                                           const int is_bf16) {
    const int64_t size = is_bf16 ? 2 : 4, whole = width - width % WIDTH, rest = (width - whole) * size;
    float tail[3][WIDTH] = {{0}};
    memcpy(tail[0], (const char *)gate + whole * size, (size_t)rest);
    memcpy(tail[1], (const char *)up + whole * size, (size_t)rest);
    for (int64_t i = 0; i <= whole; i += WIDTH) {
        const void *g = i < whole ? (const char *)gate + i * size : (const char *)tail[0];
        const void *u = i < whole ? (const char *)up + i * size : (const char *)tail[1];
        void *y = i < whole ? (char *)out + i * size : (char *)tail[2];
        if (is_bf16) store_bf16(y, silu(load_bf16(g)) * load_bf16(u));
        else store(y, silu(load(g)) * load(u));
    }
    memcpy((char *)out + whole * size, tail[2], (size_t)rest);
}

/* gate, up [rows, width], `stride` elements from row to row -> out [rows, width]. */
void gated_silu(const void *gate, const void *up, int64_t stride, void *out, int64_t rows, int64_t width,
                int32_t is_bf16, int32_t num_threads) {
    const int64_t size = is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const char *g = (const char *)gate + row * stride * size, *u = (const char *)up + row * stride * size;
        char *y = (char *)out + row * width * size;
        if (is_bf16) gate_row(g, u, y, width, 1);
        else gate_row(g, u, y, width, 0);
    }
}
