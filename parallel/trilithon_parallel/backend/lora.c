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
#define MAX_LANES 4
#define MAX_PARTS 3
/* Loads ahead of use, in steps of the inner loops: with one row a step there is little to hide memory's latency behind. */
#define AHEAD 32
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

/* A term of a panel of A: one accumulator a row. Several run at once, for each waits on its own last addition. */
struct lane {
    const float *w;
    int64_t from, words; /* of the inputs */
    double *sums;        /* [rows, WIDTH] of the panel */
};

INLINE void run_some(const struct lane *lanes, const float *const *x, const int num_lanes, const int rows,
                     const int is_bf16) {
    vec total[MAX_LANES][MAX_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < num_lanes; i++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) total[i][r] = (vec){};
    for (int64_t k = 0; k < lanes->words; k++)
#pragma GCC unroll 4
        for (int i = 0; i < num_lanes; i++) {
            const vec column = load(lanes[i].w + k * WIDTH);
            __builtin_prefetch(lanes[i].w + (k + AHEAD) * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                total[i][r] = multiply_add(total[i][r], x[r][lanes[i].from + k], column, is_bf16);
        }
#pragma GCC unroll 4
    for (int i = 0; i < num_lanes; i++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float term[WIDTH];
            memcpy(term, &total[i][r], sizeof term);
            for (int o = 0; o < WIDTH; o++) lanes[i].sums[r * WIDTH + o] += term[o];
        }
}

INLINE void run_lanes(const struct lane *lanes, const float *const *x, int num_lanes, const int rows, const int is_bf16) {
    if (num_lanes == 1) run_some(lanes, x, 1, rows, is_bf16);
    else if (num_lanes == 2) run_some(lanes, x, 2, rows, is_bf16);
    else if (num_lanes == 3) run_some(lanes, x, 3, rows, is_bf16);
    else if (num_lanes == 4) run_some(lanes, x, 4, rows, is_bf16);
}

/* Rows times A of every product of the site: sums in fp32 inside a term, in fp64 from term to term. */
INLINE void shrink(const struct site *s, const struct factors *f, const float *const *x, double *sums, const int rows,
                   const int is_bf16) {
    const int most = rows > 4 ? 2 : MAX_LANES; /* what registers hold */
    struct lane lanes[MAX_LANES];
    int held = 0;
    for (int part = 0; part < s->num_parts; part++)
        for (int64_t panel = 0; panel < f[part].rank; panel += WIDTH, sums += MAX_ROWS * WIDTH) {
            memset(sums, 0, (size_t)rows * WIDTH * sizeof *sums);
            for (int64_t t = 0, from = 0; t < s->num_terms; from += s->terms[t++]) {
                if (held == most || (held && lanes->words != s->terms[t])) {
                    run_lanes(lanes, x, held, rows, is_bf16);
                    held = 0;
                }
                lanes[held++] = (struct lane){f[part].a + panel * s->words + from * WIDTH, from, s->terms[t], sums};
            }
        }
    run_lanes(lanes, x, held, rows, is_bf16);
}

/* Rows of u times one panel of B: at most `MAX_RANK` words, one term. */
INLINE void expand(const float *u, const float *w, int64_t words, vec total[][2], const int rows, const int is_bf16) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = (vec){};
    for (int64_t k = 0; k < words; k++) {
        const vec left = load(w + k * PANEL), right = load(w + k * PANEL + WIDTH);
        __builtin_prefetch(w + (k + AHEAD) * PANEL);
        __builtin_prefetch(w + (k + AHEAD) * PANEL + WIDTH);
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

/* One adapter's share of some rows: u = scale * A x in buffers of this thread, then y += B u. */
INLINE void adapt(const struct site *s, const struct factors *f, const float *const *x, char *const *y, const int rows,
                  const int is_bf16) {
    double sums[MAX_PARTS * MAX_RANK * MAX_ROWS];
    shrink(s, f, x, sums, rows, is_bf16);
    const double *panel = sums;
    for (int part = 0; part < s->num_parts; part++, f++) {
        float u[MAX_ROWS * MAX_RANK] __attribute__((aligned(64)));
        for (int64_t from = 0; from < f->rank; from += WIDTH, panel += MAX_ROWS * WIDTH) {
            const int here = (int)(f->rank - from < WIDTH ? f->rank - from : WIDTH);
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < here; o++) {
                    const float value = (float)panel[r * WIDTH + o];
                    if (is_bf16) ((uint16_t *)(u + r * MAX_RANK))[from + o] = narrow(widen(narrow(value)) * f->scale);
                    else u[r * MAX_RANK + from + o] = value * f->scale;
                }
        }
        if (!f->rank) continue;
        const int64_t words = is_bf16 ? f->rank / 2 : f->rank, stop = s->starts[part + 1];
        const float *w = f->b;
        for (int64_t output = s->starts[part]; output < stop; output += PANEL, w += words * PANEL) {
            vec total[MAX_ROWS][2];
            expand(u, w, words, total, rows, is_bf16);
            const int count = (int)(stop - output < PANEL ? stop - output : PANEL);
            for (int r = 0; r < rows; r++) add_to(s, y[r], output, total[r], count);
        }
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
        const struct factors *f = s->slots + g->slot * s->num_parts;
        for (int done = 0, left = (int)g->count; left > 0;) {
            const int now = left >= MAX_ROWS ? MAX_ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            switch (now * 2 + s->is_bf16) {
#define CASE(N)                                                               \
    case 2 * N: adapt(s, f, from + done, to + done, N, 0); break;             \
    case 2 * N + 1: adapt(s, f, from + done, to + done, N, 1); break;
                CASE(1) CASE(2) CASE(4)
#if WIDTH == 16
                CASE(8)
#endif
            }
            done += now, left -= now;
        }
    }
}
