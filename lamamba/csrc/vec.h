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

#if defined(_WIN32)
#define LAMAMBA_EXPORT extern "C" __declspec(dllexport)
#else
#define LAMAMBA_EXPORT extern "C" __attribute__((visibility("default")))
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

LAMAMBA_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
LAMAMBA_INLINE Vec absolute(Vec a) { return (Vec)((Bits)a & 0x7fffffff); }

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
LAMAMBA_INLINE Vec larger(Vec a, Vec b) {
    for (int i = 0; i < LANES; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
LAMAMBA_INLINE Vec absolute(Vec a) {
    for (int i = 0; i < LANES; ++i) a.lane[i] = a.lane[i] < 0 ? -a.lane[i] : a.lane[i];
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

LAMAMBA_INLINE float largest(Vec a) {
    float lanes[LANES], result;
    std::memcpy(lanes, &a, sizeof lanes);
    result = lanes[0];
    for (int i = 1; i < LANES; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
}

// The functions below work in place on COUNT vectors, interleaved to hide the latency of the multiplications.

// p = (..(c_0 x + c_1) x + ..) x + c_last.
template <int COUNT, int DEGREE>
LAMAMBA_INLINE void polynomial(const float (&coefficients)[DEGREE + 1], const Vec* x, Vec* p) {
    for (int i = 0; i < COUNT; ++i) p[i] = x[i] * coefficients[0] + coefficients[1];
    for (int k = 2; k <= DEGREE; ++k)
        for (int i = 0; i < COUNT; ++i) p[i] = p[i] * x[i] + coefficients[k];
}

// Both exponentials split their argument into an integer, added to the exponent, and a rest in [-1/2, 1/2] (times
// log 2) for a polynomial that is exact at 0. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the
// low bits.
constexpr float ROUND = 12582912.0f;
constexpr float LOG2_E = 1.44269504f;

// e^x for x <= 0 to about 1 unit in the last place: x = i log 2 + f, where log 2 comes in two parts of which the first
// times i is exact. Below 2^-126 the result is some number between 0 and 2^-126.
template <int COUNT>
LAMAMBA_INLINE void exp_of_negative(Vec* x) {
    constexpr float COEFFICIENTS[] = {1.3814613e-3f, 8.36871e-3f, 4.166839e-2f, 1.6666521e-1f, 4.9999994e-1f, 1.0f,
                                      1.0f};
    Vec shifted[COUNT], p[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        x[i] = at_least(-87.3f, x[i]);
        shifted[i] = x[i] * LOG2_E + ROUND;
    }
    for (int i = 0; i < COUNT; ++i) {
        const Vec whole = shifted[i] - ROUND;
        x[i] = x[i] - whole * 0.693145752f;
        x[i] = x[i] - whole * 1.42860682e-6f;
    }
    polynomial<COUNT, 6>(COEFFICIENTS, x, p);
    for (int i = 0; i < COUNT; ++i) x[i] = floats(bits(p[i]) + (bits(shifted[i]) << 23));
}

// 2^z, as accurate as z itself. A tame z has |z| <= 126; any other z ends at some number between 0 and 2^-126 below and at
// infinity or NaN above.
template <int COUNT, bool tame>
LAMAMBA_INLINE void exp2(Vec* z) {
    constexpr float COEFFICIENTS[] = {1.5353362e-4f, 1.3398874e-3f, 9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f,
                                      6.9314718e-1f, 1.0f};
    Vec shifted[COUNT], p[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        if (!tame) z[i] = at_most(128.0f, at_least(-126.0f, z[i]));
        shifted[i] = z[i] + ROUND;
    }
    for (int i = 0; i < COUNT; ++i) z[i] = z[i] - (shifted[i] - ROUND);
    polynomial<COUNT, 6>(COEFFICIENTS, z, p);
    for (int i = 0; i < COUNT; ++i) z[i] = floats(bits(p[i]) + (bits(shifted[i]) << 23));
}

// log(1 + e) for e in [0, 1], to about 1 unit in the last place of small and large results alike.
template <int COUNT>
LAMAMBA_INLINE void log1p_of_unit(const Vec* e, Vec* result) {
    constexpr float COEFFICIENTS[] = {5.3648227e-3f, -3.0065786e-2f, 7.9204520e-2f, -1.3753802e-1f,
                                      1.9153655e-1f, -2.4857163e-1f, 3.3321324e-1f, -4.9999648e-1f};
    polynomial<COUNT, 7>(COEFFICIENTS, e, result);
    for (int i = 0; i < COUNT; ++i) result[i] = e[i] + e[i] * (e[i] * result[i]);
}

// softplus(s) = max(s, 0) + log(1 + e) with e = exp(-|s|), which is returned for `sigmoid`: neither overflows.
template <int COUNT>
LAMAMBA_INLINE void softplus(const Vec* s, Vec* e, Vec* result) {
    for (int i = 0; i < COUNT; ++i) e[i] = floats(bits(s[i]) | int32_t(0x80000000));
    exp_of_negative<COUNT>(e);
    log1p_of_unit<COUNT>(e, result);
    for (int i = 0; i < COUNT; ++i) result[i] = at_least(0.0f, s[i]) + result[i];
}

// The derivative of softplus, 1 / (1 + exp(-s)): 1 / (1 + e) for s >= 0, e / (1 + e) below.
LAMAMBA_INLINE Vec sigmoid(Vec s, Vec e) {
#ifdef LAMAMBA_VECTOR_TYPES
    const Vec numerator = s < 0.0f ? e : splat(1.0f);
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

// Unaligned loads and stores of one vector, as float32 or (uint16_t) bfloat16. Lanes from `count` on are not accessed
// in memory and load as 0. Partial vectors go through an array, so that vectors stay in registers.
template <class To, class From>
LAMAMBA_INLINE To copy(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
#if defined(__AVX512F__) && defined(LAMAMBA_VECTOR_TYPES)
template <class To>
LAMAMBA_INLINE To copy_some(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
template <class To>
LAMAMBA_INLINE To copy_some(const uint16_t* from, int64_t count) {
    return To(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from));
}
LAMAMBA_INLINE void copy_some_to(float* to, Vec a, int64_t count) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), a);
}
template <class From>
LAMAMBA_INLINE void copy_some_to(uint16_t* to, From a, int64_t count) {
    _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), __m256i(a));
}
#else
template <class To, class From>
LAMAMBA_INLINE To copy_some(const From* from, int64_t count) {
    From lanes[LANES] = {};
    std::memcpy(lanes, from, size_t(count) * sizeof(From));
    return copy<To>(lanes);
}
template <class From, class To>
LAMAMBA_INLINE void copy_some_to(To* to, From a, int64_t count) {
    To lanes[LANES];
    std::memcpy(lanes, &a, sizeof lanes);
    std::memcpy(to, lanes, size_t(count) * sizeof(To));
}
#endif
LAMAMBA_INLINE Vec read(const float* from, int64_t count = LANES) {
    return count >= LANES ? copy<Vec>(from) : copy_some<Vec>(from, count);
}
LAMAMBA_INLINE void write(float* to, Vec a, int64_t count = LANES) {
    if (count >= LANES) std::memcpy(to, &a, sizeof a);
    else copy_some_to(to, a, count);
}

#ifdef LAMAMBA_VECTOR_TYPES
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), may_alias));
LAMAMBA_INLINE Vec widen(Halves a) { return floats(__builtin_convertvector(a, Bits) << 16); }
LAMAMBA_INLINE Halves narrow(Vec a) {
    const Bits wide = bits(a), rounded = ((wide + 0x7fff + ((wide >> 16) & 1)) >> 16) & 0xffff;
    return __builtin_convertvector((wide & 0x7fffffff) > 0x7f800000 ? Bits{} + 0x7fc0 : rounded, Halves);
}
#else
struct Halves { uint16_t lane[LANES]; };
LAMAMBA_INLINE Vec widen(Halves a) {
    Vec b;
    for (int i = 0; i < LANES; ++i) b.lane[i] = from_bfloat16(a.lane[i]);
    return b;
}
LAMAMBA_INLINE Halves narrow(Vec a) {
    Halves b;
    for (int i = 0; i < LANES; ++i) b.lane[i] = to_bfloat16(a.lane[i]);
    return b;
}
#endif

LAMAMBA_INLINE Vec read(const uint16_t* from, int64_t count = LANES) {
    return widen(count >= LANES ? copy<Halves>(from) : copy_some<Halves>(from, count));
}
LAMAMBA_INLINE void write(uint16_t* to, Vec a, int64_t count = LANES) {
    const Halves b = narrow(a);
    if (count >= LANES) std::memcpy(to, &b, sizeof b);
    else copy_some_to(to, b, count);
}

LAMAMBA_INLINE float sum(Vec a) {
    float lanes[LANES], result = 0.0f;
    std::memcpy(lanes, &a, sizeof lanes);
    for (int i = 0; i < LANES; ++i) result += lanes[i];
    return result;
}

}  // namespace
