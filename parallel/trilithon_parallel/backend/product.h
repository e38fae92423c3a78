/* What every product's inner loop does: one word of a row times a vector of weights, added to float lanes. */
#ifndef TRILITHON_PRODUCT_H
#define TRILITHON_PRODUCT_H
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vector.h"

/* A word is a float, or two bfloat16. `is_bf16` is a constant where this is inlined. */
static inline __attribute__((always_inline)) vec multiply_add(vec total, float word, vec column, const int is_bf16) {
#ifdef __AVX512BF16__
    if (is_bf16) {
        int32_t bits;
        memcpy(&bits, &word, 4);
        return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)column);
    }
#endif
    return total + word * column;
}

#endif
