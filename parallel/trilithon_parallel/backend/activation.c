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

/* One row of gradients: through silu(gate) * up. Elements beyond the last whole vector are padded to one. */
static inline __attribute__((always_inline)) void gate_row_backward(const void *gate, const void *up, const void *d_out,
                                                                    void *d_gate, void *d_up, int64_t width,
                                                                    const int is_bf16) {
    const int64_t size = is_bf16 ? 2 : 4, whole = width - width % WIDTH, rest = (width - whole) * size;
    float tail[5][WIDTH] = {{0}};
    memcpy(tail[0], (const char *)gate + whole * size, (size_t)rest);
    memcpy(tail[1], (const char *)up + whole * size, (size_t)rest);
    memcpy(tail[2], (const char *)d_out + whole * size, (size_t)rest);
    for (int64_t i = 0; i <= whole; i += WIDTH) {
        const int is_tail = i == whole;
        const void *g = is_tail ? (const char *)tail[0] : (const char *)gate + i * size;
        const void *u = is_tail ? (const char *)tail[1] : (const char *)up + i * size;
        const void *d = is_tail ? (const char *)tail[2] : (const char *)d_out + i * size;
        void *to_gate = is_tail ? (char *)tail[3] : (char *)d_gate + i * size;
        void *to_up = is_tail ? (char *)tail[4] : (char *)d_up + i * size;
        const vec x = is_bf16 ? load_bf16(g) : load(g), y = is_bf16 ? load_bf16(u) : load(u);
        const vec dy = is_bf16 ? load_bf16(d) : load(d);
        const vec e = exp_negative(choose(x > 0.0f, -x, x));
        const vec sigmoid = choose(x > 0.0f, broadcast(1.0f), e) / (e + 1.0f);
        const vec by_gate = dy * y * sigmoid * (1.0f + x * (1.0f - sigmoid)), by_up = dy * x * sigmoid;
        if (is_bf16) {
            store_bf16(to_gate, by_gate);
            store_bf16(to_up, by_up);
        } else {
            store(to_gate, by_gate);
            store(to_up, by_up);
        }
    }
    memcpy((char *)d_gate + whole * size, tail[3], (size_t)rest);
    memcpy((char *)d_up + whole * size, tail[4], (size_t)rest);
}

/* The backward pass of `gated_silu`: gradients of gate and up, [rows, width] like `d_out`. */
void gated_silu_backward(const void *gate, const void *up, int64_t stride, const void *d_out, void *d_gate, void *d_up,
                         int64_t rows, int64_t width, int32_t is_bf16, int32_t num_threads) {
    const int64_t size = is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const char *g = (const char *)gate + row * stride * size, *u = (const char *)up + row * stride * size;
        const int64_t at = row * width * size;
        const void *d = (const char *)d_out + at;
        if (is_bf16) gate_row_backward(g, u, d, (char *)d_gate + at, (char *)d_up + at, width, 1);
        else gate_row_backward(g, u, d, (char *)d_gate + at, (char *)d_up + at, width, 0);
    }
}
