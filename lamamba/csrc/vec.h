// One vector of LANES floats and the functions the kernels need, for every instruction set.
//
// GCC and Clang lower their generic vectors to whatever the build is for (AVX-512, AVX2, SSE2, NEON); other compilers
// get plain arrays. No flag that relaxes floating point is needed, so NaN and infinity keep their meaning.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef LAMAMBA_LANES
#define LAMAMBA_LANES 4
#endif

#if (defined(__GNUC__) || defined(__clang__)) && !defined(LAMAMBA_PLAIN_ARRAYS)
#define LAMAMBA_VECTOR_TYPES
#endif

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define LAMAMBA_INLINE static __forceinline
#else
#define LAMAMBA_INLINE static inline __attribute__((always_inline))
#endif

namespace {

constexpr int LANES = LAMAMBA_LANES;

#ifdef LAMAMBA_VECTOR_TYPES

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), may_alias));

LAMAMBA_INLINE Vec splat(float value) { return Vec{} + value; }
LAMAMBA_INLINE Bits bits(Vec a) { return (Bits)a; }
LAMAMBA_INLINE Vec floats(Bits a) { return (Vec)a; }

// The larger and the smaller of a bound and each lane; a lane that is NaN stays NaN.
LAMAMBA_INLINE Vec at_least(float bound, Vec a) {
#if defined(__AVX512F__)
    return _mm512_max_ps(_mm512_set1_ps(bound), a);
#elif defined(__AVX2__)
    return _mm256_max_ps(_mm256_set1_ps(bound), a);
#elif defined(__SSE2__)
    return _mm_max_ps(_mm_set1_ps(bound), a);
#else
    Vec bounds = splat(bound);
    return bounds > a ? bounds : a;
#endif
}

LAMAMBA_INLINE Vec at_most(float bound, Vec a) {
#if defined(__AVX512F__)
    return _mm512_min_ps(_mm512_set1_ps(bound), a);
#elif defined(__AVX2__)
    return _mm256_min_ps(_mm256_set1_ps(bound), a);
#elif defined(__SSE2__)
    return _mm_min_ps(_mm_set1_ps(bound), a);
#else
    Vec bounds = splat(bound);
    return bounds < a ? bounds : a;
#endif
}

// One step of adding up lanes: lane I of the result is a[I] + a[I + D] where bit D of I is clear, else b[I - D] + b[I].
template <int D, size_t... I>
LAMAMBA_INLINE Vec fold(Vec a, Vec b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((I & D) ? LANES + I : I)...) +
           __builtin_shufflevector(a, b, ((I & D) ? LANES + I - D : I + D)...);
#else
    return __builtin_shuffle(a, b, Bits{((I & D) ? int(LANES + I) : int(I))...}) +
           __builtin_shuffle(a, b, Bits{((I & D) ? int(LANES + I - D) : int(I + D))...});
#endif
}

#else

struct Vec { float lane[LANES]; };
struct Bits { int32_t lane[LANES]; };

#define LAMAMBA_LANEWISE(type, op)                              \
    LAMAMBA_INLINE type operator op(type a, type b) {           \
        for (int i = 0; i < LANES; ++i) a.lane[i] = a.lane[i] op b.lane[i]; \
        return a;                                               \
    }
LAMAMBA_LANEWISE(Vec, +)
LAMAMBA_LANEWISE(Vec, -)
LAMAMBA_LANEWISE(Vec, *)
LAMAMBA_LANEWISE(Vec, /)
LAMAMBA_LANEWISE(Bits, +)
#undef LAMAMBA_LANEWISE

LAMAMBA_INLINE Bits operator<<(Bits a, int count) {
    for (int i = 0; i < LANES; ++i) a.lane[i] = int32_t(uint32_t(a.lane[i]) << count);
    return a;
}
LAMAMBA_INLINE Bits operator|(Bits a, int32_t b) {
    for (int i = 0; i < LANES; ++i) a.lane[i] |= b;
    return a;
}
LAMAMBA_INLINE Vec splat(float value) {
    Vec a;
    for (int i = 0; i < LANES; ++i) a.lane[i] = value;
    return a;
}
LAMAMBA_INLINE Vec operator+(Vec a, float b) { return a + splat(b); }
LAMAMBA_INLINE Vec operator-(Vec a, float b) { return a - splat(b); }
LAMAMBA_INLINE Vec operator*(Vec a, float b) { return a * splat(b); }
LAMAMBA_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
LAMAMBA_INLINE Bits bits(Vec a) { Bits b; std::memcpy(&b, &a, sizeof a); return b; }
LAMAMBA_INLINE Vec floats(Bits a) { Vec b; std::memcpy(&b, &a, sizeof a); return b; }
LAMAMBA_INLINE Vec at_least(float bound, Vec a) {
    for (int i = 0; i < LANES; ++i) a.lane[i] = bound > a.lane[i] ? bound : a.lane[i];
    return a;
}
LAMAMBA_INLINE Vec at_most(float bound, Vec a) {
    for (int i = 0; i < LANES; ++i) a.lane[i] = bound < a.lane[i] ? bound : a.lane[i];
    return a;
}
template <int D, size_t... I>
LAMAMBA_INLINE Vec fold(Vec a, Vec b, std::index_sequence<I...>) {
    Vec sum;
    for (int i = 0; i < LANES; ++i) sum.lane[i] = (i & D) ? b.lane[i - D] + b.lane[i] : a.lane[i] + a.lane[i + D];
    return sum;
}

#endif

LAMAMBA_INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
LAMAMBA_INLINE void store(float* to, Vec a) { *reinterpret_cast<Vec*>(to) = a; }
LAMAMBA_INLINE void add_unaligned(float* to, Vec a) {
    Vec sum;
    std::memcpy(&sum, to, sizeof sum);
    sum = sum + a;
    std::memcpy(to, &sum, sizeof sum);
}

// LANES vectors in, one out: lane i is the sum of the lanes of the i-th. Rows lie LANES floats apart.
template <int D>
LAMAMBA_INLINE void fold_rows(Vec* rows) {
    for (int i = 0; i < D; ++i) rows[i] = fold<D>(rows[i], rows[i + D], std::make_index_sequence<LANES>{});
    if constexpr (D > 1) fold_rows<D / 2>(rows);
}
LAMAMBA_INLINE Vec sum_of_rows(const float* from) {
    Vec rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = load(from + i * LANES);
    fold_rows<LANES / 2>(rows);
    return rows[0];
}

// e^x to about 1 unit in the last place: x = i log 2 + f with |f| <= log(2) / 2, a polynomial for e^f, and i added to the
// exponent. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits; log 2 comes in two parts, of
// which the first times i is exact. Below 2^-126 the result is some number between 0 and 2^-126.
LAMAMBA_INLINE Vec exp(Vec x) {
    const float ROUND = 12582912.0f;
    x = at_most(88.8f, at_least(-87.3f, x));
    Vec shifted = x * 1.44269504f + ROUND;
    Vec i = shifted - ROUND;
    Vec f = x - i * 0.693145752f;
    f = f - i * 1.42860682e-6f;
    Vec p = f * 1.3814613e-3f + 8.36871e-3f;
    p = p * f + 4.166839e-2f;
    p = p * f + 1.6666521e-1f;
    p = p * f + 4.9999994e-1f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return floats(bits(p) + (bits(shifted) << 23));
}

// log(1 + e) for e in [0, 1], to about 1 unit in the last place of small and large results alike.
LAMAMBA_INLINE Vec log1p_of_unit(Vec e) {
    Vec q = e * 5.3648227e-3f + -3.0065786e-2f;
    q = q * e + 7.9204520e-2f;
    q = q * e + -1.3753802e-1f;
    q = q * e + 1.9153655e-1f;
    q = q * e + -2.4857163e-1f;
    q = q * e + 3.3321324e-1f;
    q = q * e + -4.9999648e-1f;
    return e + e * (e * q);
}

// exp(-|s|), from which softplus and its derivative follow without overflow or cancellation.
LAMAMBA_INLINE Vec exp_of_minus_abs(Vec s) { return exp(floats(bits(s) | int32_t(0x80000000))); }
LAMAMBA_INLINE Vec softplus(Vec s, Vec e) { return at_least(0.0f, s) + log1p_of_unit(e); }

// 1 / (1 + exp(-s)): 1 / (1 + e) for s >= 0, e / (1 + e) below.
LAMAMBA_INLINE Vec sigmoid(Vec s, Vec e) {
#ifdef LAMAMBA_VECTOR_TYPES
    Vec numerator = s < 0.0f ? e : splat(1.0f);
#else
    Vec numerator;
    for (int i = 0; i < LANES; ++i) numerator.lane[i] = s.lane[i] < 0.0f ? e.lane[i] : 1.0f;
#endif
    return numerator / (e + 1.0f);
}

LAMAMBA_INLINE float from_bfloat16(uint16_t value) {
    uint32_t wide = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

// To the nearest, ties to even; a NaN stays one.
LAMAMBA_INLINE uint16_t to_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    return uint16_t((wide & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace
