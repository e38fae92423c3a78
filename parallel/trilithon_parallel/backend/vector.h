/* Vectors of floats by the compiler's own extension: as wide as the machine's registers, the same code on each. */
#ifndef TRILITHON_VECTOR_H
#define TRILITHON_VECTOR_H
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

static inline vec load_bf16(const uint16_t *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
}

static inline float widen(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN stays one */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vec broadcast(float x) { return x - (vec){}; }

static inline vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* exp of x <= 0 to within 2 units in the last place; exactly 1 at 0, exactly 0 below -87. */
static inline vec exp_negative(vec x) {
    ivec is_zero = x < -87.0f;
    ivec is_nan = x != x;
    vec n = x * 1.44269504f + 12582912.0f;
    n = n - 12582912.0f;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = (__builtin_convertvector(choose(is_zero | is_nan, broadcast(0.0f), n), ivec) + 127) << 23;
    return choose(is_nan, x, choose(is_zero, broadcast(0.0f), p * (vec)power));
}

static inline void store_bf16(uint16_t *p, vec v) {
    const uvec bits = (uvec)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const uvec nan = (uvec)(v != v);
    const hvec half = __builtin_convertvector(((rounded & ~nan) >> 16) | (nan & 0x7fc0), hvec);
    memcpy(p, &half, sizeof half);
}

#endif
