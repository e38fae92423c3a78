/*
 * Y = X W^T with the inputs cut into terms: fp32 inside a term, fp64 from term to term, one rounding at the end.
 *
 * An element of a term is one accumulator that takes its inputs in order. So its bits depend on neither the number of
 * rows nor threads nor what else the rank holds, and the fp64 sum of a dozen terms is exact enough for their order not
 * to matter. Compile without -ffast-math, which would break that.
 *
 * Elements are float, or bfloat16 in pairs: either way a row of inputs and a panel of weights are 32-bit words, and one
 * instruction multiplies words and adds them to float lanes. The weight lies in panels of PANEL outputs, zero-padded:
 * [ceil(O / PANEL), words, PANEL].
 */
#include "product.h"

#define MAX_ROWS (WIDTH == 16 ? 12 : 6)
#define VECTORS 2
#define PANEL (WIDTH * VECTORS)
/* Rows whose fp64 sums one thread holds at once: 24 KiB of stack. */
#define BAND 96

struct product {
    int64_t words, outputs; /* words of a row: inputs, or half of them in bfloat16 */
    int32_t num_terms, is_bf16;
    const int64_t *terms; /* words of each */
    const float *panels;
    const float *bias; /* [O] or NULL */
};

/* What the caller must know to lay weights out: outputs of a panel, and whether bfloat16 is taken. */
int32_t product_panel(void) { return PANEL; }

int32_t product_takes_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* One term of some rows times one panel, added to their fp64 sums. The last two arguments are constants where inlined. */
static inline __attribute__((always_inline)) void add_term(const float *x, int64_t stride, const float *w, int64_t words,
                                                           double *sums, const int rows, const int is_bf16) {
    vec total[MAX_ROWS][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) total[r][v] = (vec){};
    for (int64_t k = 0; k < words; k++) {
        vec column[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) column[v] = load(w + k * PANEL + v * WIDTH);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                total[r][v] = multiply_add(total[r][v], x[r * stride + k], column[v], is_bf16);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            float term[WIDTH];
            const vec last = total[r][v];
            memcpy(term, &last, sizeof term);
            for (int o = 0; o < WIDTH; o++) sums[r * PANEL + v * WIDTH + o] += term[o];
        }
}

static void add_rows(int rows, const float *x, int64_t stride, const float *w, int64_t words, double *sums, int is_bf16) {
    switch (rows * 2 + is_bf16) {
#define CASE(N)                                                             \
    case 2 * N: add_term(x, stride, w, words, sums, N, 0); break;           \
    case 2 * N + 1: add_term(x, stride, w, words, sums, N, 1); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if WIDTH == 16
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/*
 * x [rows, words], `stride` words apart -> out [rows, O] = residual + (X W^T + bias), the residual optional, in the
 * elements' type; or, where `sums` is given, X W^T + bias in fp64 there.
 */
void product(const struct product *p, int64_t rows, const float *x, int64_t stride, const void *residual, void *out,
             double *sums, int32_t num_threads) {
    const int64_t num_panels = (p->outputs + PANEL - 1) / PANEL, num_bands = (rows + BAND - 1) / BAND;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t item = 0; item < num_panels * num_bands; item++) {
        const int64_t panel = item / num_bands, first = item % num_bands * BAND;
        const int here = (int)(rows - first < BAND ? rows - first : BAND);
        const int pieces = (here + MAX_ROWS - 1) / MAX_ROWS;
        double band[BAND * PANEL] __attribute__((aligned(64)));
        memset(band, 0, (size_t)here * PANEL * sizeof *band);
        const float *w = p->panels + panel * p->words * PANEL, *from = x + first * stride;
        for (int t = 0; t < p->num_terms; t++) { /* a term of a panel stays in the first cache while rows pass */
            for (int i = 0; i < pieces; i++) {
                const int start = here * i / pieces, stop = here * (i + 1) / pieces;
                add_rows(stop - start, from + start * stride, stride, w, p->terms[t], band + start * PANEL, p->is_bf16);
            }
            w += p->terms[t] * PANEL;
            from += p->terms[t];
        }
        const int64_t output = panel * PANEL;
        const int wide = (int)(p->outputs - output < PANEL ? p->outputs - output : PANEL);
        for (int r = 0; r < here; r++) {
            const int64_t at = (first + r) * p->outputs + output;
            double *sum = band + r * PANEL;
            if (p->bias)
                for (int o = 0; o < wide; o++) sum[o] += p->bias[output + o];
            if (sums) {
                memcpy(sums + at, sum, (size_t)wide * sizeof *sum);
            } else if (p->is_bf16) {
                uint16_t *to = (uint16_t *)out + at;
                if (residual)
                    for (int o = 0; o < wide; o++) sum[o] += widen(((const uint16_t *)residual)[at + o]);
                for (int o = 0; o < wide; o++) to[o] = narrow((float)sum[o]);
            } else {
                float *to = (float *)out + at;
                if (residual)
                    for (int o = 0; o < wide; o++) sum[o] += ((const float *)residual)[at + o];
                for (int o = 0; o < wide; o++) to[o] = (float)sum[o];
            }
        }
    }
}
