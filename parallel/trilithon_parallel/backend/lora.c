/*
 * y += B (scale * A x) for the rows of several adapters at once: what low-rank adapters add to a product's result.
 *
 * The numbers are those of two products as `product.c` makes them, each rounded to the elements' type, so a row's bits
 * depend on neither its neighbours nor threads, and equal those of the forward pass that trained the adapter. One call
 * does all rows of one place of the model: a step has hundreds of such places, and each adapter is read from memory once.
 *
 * A lies in panels of WIDTH outputs, B in panels of PANEL, both zero-padded: [ceil(outputs / width), words, width].
 */
#include "product.h"

#define MAX_ROWS (WIDTH == 16 ? 8 : 4)
#define PANEL (2 * WIDTH)
#define MAX_RANK 256
#define INLINE static inline __attribute__((always_inline))

/* One adapter's factors for one product; rank 0 where it has none. */
struct factors {
    const float *a, *b;
    int64_t rank; /* even where elements are bfloat16 */
    float scale;
    int32_t unused;
};

/* Products that share their input and lie side by side in the result. */
struct site {
    int64_t words, width; /* of a row of inputs; elements of a row of the result */
    int32_t num_terms, num_parts, is_bf16, is_wide; /* wide: the result is fp64 */
    const int64_t *terms;         /* words of each term of the inputs */
    const int64_t *starts;        /* [num_parts + 1] */
    const struct factors *slots;  /* [slots][num_parts] */
};

/* Rows of one slot that go together: `rows[first .. first + count)`, count <= MAX_ROWS. */
struct group {
    int64_t slot, first, count;
};

int32_t lora_rows(void) { return MAX_ROWS; }
int32_t lora_rank(void) { return MAX_RANK; }
int32_t lora_width(void) { return WIDTH; }

/* Rows times one panel of A, all terms: sums in fp64 from term to term. */
INLINE void shrink(const struct site *s, const float *const *x, const float *w, double *sums, const int rows,
                   const int is_bf16) {
    int64_t at = 0;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < WIDTH; o++) sums[r * WIDTH + o] = 0.0;
    for (int t = 0; t < s->num_terms; t++) {
        const int64_t stop = at + s->terms[t];
        vec total[MAX_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) total[r] = (vec){};
        for (; at < stop; at++) {
            const vec column = load(w + at * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) total[r] = multiply_add(total[r], x[r][at], column, is_bf16);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float term[WIDTH];
            memcpy(term, &total[r], sizeof term);
            for (int o = 0; o < WIDTH; o++) sums[r * WIDTH + o] += term[o];
        }
    }
}

/* Rows of u times one panel of B: at most `MAX_RANK` words, one term. */
INLINE void expand(const float *u, const float *w, int64_t words, vec total[][2], const int rows, const int is_bf16) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = (vec){};
    for (int64_t k = 0; k < words; k++) {
        const vec left = load(w + k * PANEL), right = load(w + k * PANEL + WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            total[r][0] = multiply_add(total[r][0], u[r * MAX_RANK + k], left, is_bf16);
            total[r][1] = multiply_add(total[r][1], u[r * MAX_RANK + k], right, is_bf16);
        }
    }
}

/* Add up to PANEL products to a row of the result from element `at` on. */
INLINE void add_to(const struct site *s, void *y, int64_t at, const vec v[2], int count) {
    if (!s->is_wide && count == PANEL) {
        for (int half = 0; half < 2; half++) {
            const int64_t from = at + half * WIDTH;
            if (s->is_bf16) {
                uint16_t rounded[WIDTH];
                store_bf16(rounded, v[half]);
                store_bf16((uint16_t *)y + from, load_bf16((uint16_t *)y + from) + load_bf16(rounded));
            } else {
                store((float *)y + from, load((float *)y + from) + v[half]);
            }
        }
        return;
    }
    float values[PANEL];
    memcpy(values, v, sizeof values);
    for (int o = 0; o < count; o++) {
        const float value = s->is_bf16 ? widen(narrow(values[o])) : values[o];
        if (s->is_wide) ((double *)y)[at + o] += value;
        else if (s->is_bf16) ((uint16_t *)y)[at + o] = narrow(widen(((uint16_t *)y)[at + o]) + value);
        else ((float *)y)[at + o] += value;
    }
}

/* One adapter's part of some rows: u = scale * A x in a buffer of this thread, then y += B u. */
INLINE void add_part(const struct site *s, const struct factors *f, int part, const float *const *x, char *const *y,
                     const int rows, const int is_bf16) {
    float u[MAX_ROWS * MAX_RANK] __attribute__((aligned(64)));
    for (int64_t from = 0; from < f->rank; from += WIDTH) {
        double sums[MAX_ROWS * WIDTH];
        shrink(s, x, f->a + from * s->words, sums, rows, is_bf16);
        const int here = (int)(f->rank - from < WIDTH ? f->rank - from : WIDTH);
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < here; o++) {
                const float value = (float)sums[r * WIDTH + o];
                if (is_bf16) ((uint16_t *)(u + r * MAX_RANK))[from + o] = narrow(widen(narrow(value)) * f->scale);
                else u[r * MAX_RANK + from + o] = value * f->scale;
            }
    }
    const int64_t words = is_bf16 ? f->rank / 2 : f->rank, outputs = s->starts[part + 1] - s->starts[part];
    const float *w = f->b;
    for (int64_t output = 0; output < outputs; output += PANEL, w += words * PANEL) {
        vec total[MAX_ROWS][2];
        expand(u, w, words, total, rows, is_bf16);
        const int count = (int)(outputs - output < PANEL ? outputs - output : PANEL);
        for (int r = 0; r < rows; r++) add_to(s, y[r], s->starts[part] + output, total[r], count);
    }
}

static void add_rows(const struct site *s, const struct factors *f, int part, const float *const *x, char *const *y,
                     int rows) {
    while (rows > 0) {
        const int now = rows >= MAX_ROWS ? MAX_ROWS : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        switch (now * 2 + s->is_bf16) {
#define CASE(N)                                                 \
    case 2 * N: add_part(s, f, part, x, y, N, 0); break;        \
    case 2 * N + 1: add_part(s, f, part, x, y, N, 1); break;
            CASE(1) CASE(2) CASE(4)
#if WIDTH == 16
            CASE(8)
#endif
        }
        rows -= now, x += now, y += now;
    }
}

/* x [rows, words], `stride` words apart; y [rows, width] contiguous, in the elements' type or fp64, is added to. */
void lora(const struct site *s, const struct group *groups, int64_t num_groups, const int64_t *rows, const float *x,
          int64_t stride, void *y, int32_t num_threads) {
    const int64_t size = s->is_wide ? 8 : s->is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t item = 0; item < num_groups; item++) {
        const struct group *g = groups + item;
        const float *from[MAX_ROWS];
        char *to[MAX_ROWS];
        for (int i = 0; i < g->count; i++) {
            from[i] = x + rows[g->first + i] * stride;
            to[i] = (char *)y + rows[g->first + i] * s->width * size;
        }
        for (int part = 0; part < s->num_parts; part++) {
            const struct factors *f = s->slots + g->slot * s->num_parts + part;
            if (f->rank) add_rows(s, f, part, from, to, (int)g->count);
        }
    }
}
