// Fused layers between the matrix products, for CPUs, without gradients: one pass over the tokens each. Formulas and
// notation as in lamamba/ops/layers/__init__.py.
//
// Inputs are float32 or bfloat16, channels innermost; all arithmetic is float32, rounded once at the end.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vec.h"

// Each struct is mirrored by a class in lamamba/ops/layers/cpu.py. Strides count elements; channels have stride 1.

struct ModulatedNorm {
    int64_t threads, is_bfloat16;
    int64_t b, l, c;
    float eps;
    const void *x, *weight, *bias;                              // (b, l, c); (c,) or both null
    const void *shift, *scale;                                  // (b, c)
    int64_t shift_b, scale_b;
    void* y;
};

struct GatedNorm {
    int64_t threads, is_bfloat16;
    int64_t rows, c;
    float eps;
    const void *x, *z;                                          // (rows, c)
    int64_t z_row;
    const void *weight, *bias;                                  // (c,)
    void* y;
};

struct Convolution {
    int64_t threads, is_bfloat16;
    int64_t b, h, w, c;
    const void* x;
    int64_t x_b, x_h, x_w;
    const float* weight;                                        // (9, c)
    void* y;                                                    // (b, h, w, c)
};

struct Windows {
    int64_t threads, is_bfloat16;
    int64_t b, h, w, heads, d;
    int64_t window_h, window_w, shift_h, shift_w;
    const void* qkv;                                            // (b, h, w, 3, heads, d)
    const float* bias;                                          // (heads, tokens, tokens)
    const uint8_t* mask;                                        // (windows, tokens, tokens) or null
    void* y;                                                    // (b, h, w, heads, d)
};

struct FewRows {
    int64_t threads, is_bfloat16;
    int64_t rows, inputs, outputs;
    const void* x;                                              // (rows, inputs)
    const void *weight, *bias;                                  // (outputs, inputs), (outputs,)
    void* y;                                                    // (rows, outputs)
};

struct QuantizedRows {
    int64_t threads, is_bfloat16;
    int64_t rows, c;
    const void* x;                                              // (rows, c)
    int8_t* q;                                                  // (rows, c)
    float* scale;                                               // (rows,)
};

struct ScaledProducts {
    int64_t threads, is_bfloat16;
    int64_t rows, c;
    const int32_t* products;                                    // (rows, c)
    const float *row_scale, *column_scale, *bias;               // (rows,), (c,), (c,)
    void* y;                                                    // (rows, c)
};

namespace {

// Calls function(T{}) with the type of the numbers: float, or uint16_t for bfloat16.
template <class Function>
void with_type(int64_t is_bfloat16, const Function& function) {
    if (is_bfloat16) function(uint16_t{});
    else function(float{});
}

// Calls function(first, last) on each thread, for a contiguous range of 0 .. count - 1.
template <class Function>
void in_runs(int64_t threads, int64_t count, int64_t elements, const Function& function) {
    const int64_t shares = elements < 16 * 1024 ? 1 : std::max<int64_t>(1, std::min(threads, count));
    in_parallel(shares, [&](int64_t share) { function(count * share / shares, count * (share + 1) / shares); });
}

int64_t round_up(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// A row as float32, padded with zeros, its mean, and 1 / its standard deviation.
struct Row {
    float mean, scale;

    template <class T>
    Row(const T* from, int64_t c, float eps, float* to) {
        Vec total = splat(0.0f), squares = splat(0.0f);
        for (int64_t i = 0; i < c; i += LANES) {
            const Vec value = read(from + i, c - i);
            store(to + i, value);
            total += value;
        }
        mean = sum(total) / float(c);
        for (int64_t i = 0; i + LANES <= c; i += LANES) {
            const Vec off = load(to + i) - mean;
            squares += off * off;
        }
        float variance = sum(squares);
        for (int64_t i = c / LANES * LANES; i < c; ++i) variance += (to[i] - mean) * (to[i] - mean);
        scale = 1.0f / std::sqrt(variance / float(c) + eps);
    }
};

template <class T>
void modulated_norm(const ModulatedNorm& s) {
    const T *x = static_cast<const T*>(s.x), *weight = static_cast<const T*>(s.weight);
    const T *bias = static_cast<const T*>(s.bias), *shift = static_cast<const T*>(s.shift);
    const T* scale = static_cast<const T*>(s.scale);
    T* y = static_cast<T*>(s.y);
    in_runs(s.threads, s.b * s.l, s.b * s.l * s.c, [&](int64_t first, int64_t last) {
        const int64_t width = round_up(s.c);
        float *row = scratch.take(3 * width), *times = row + width, *plus = times + width;
        int64_t image = -1;
        for (int64_t token = first; token < last; ++token) {
            if (token / s.l != image) {                         // (n w + b)(1 + scale) + shift = n times + plus
                image = token / s.l;
                for (int64_t i = 0; i < s.c; i += LANES) {
                    const int64_t count = s.c - i;
                    const Vec more = read(scale + image * s.scale_b + i, count) + 1.0f;
                    const Vec offset = read(shift + image * s.shift_b + i, count);
                    store(times + i, weight ? read(weight + i, count) * more : more);
                    store(plus + i, bias ? read(bias + i, count) * more + offset : offset);
                }
            }
            const Row norm(x + token * s.c, s.c, s.eps, row);
            for (int64_t i = 0; i < s.c; i += LANES) {
                const Vec normal = (load(row + i) - norm.mean) * norm.scale;
                write(y + token * s.c + i, normal * load(times + i) + load(plus + i), s.c - i);
            }
        }
    });
}

// AT_ONCE / R outputs of R rows of x, `width` floats apart: each weight is read once.
constexpr int AT_ONCE = 16;                                     // dot products accumulated together

template <int R, class T>
LAMAMBA_INLINE void few_products(const FewRows& s, const float* x, int64_t width, int64_t output, int64_t row) {
    constexpr int OUTPUTS = AT_ONCE / R;
    const T* weight[OUTPUTS];
    for (int j = 0; j < OUTPUTS; ++j)                           // past the end the last output is repeated
        weight[j] = static_cast<const T*>(s.weight) + std::min(output + j, s.outputs - 1) * s.inputs;
    Vec sums[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i) sums[i] = splat(0.0f);
    for (int64_t k = 0; k < s.inputs; k += LANES) {
        Vec part[R];
        for (int i = 0; i < R; ++i) part[i] = load(x + i * width + k);
        for (int j = 0; j < OUTPUTS; ++j) {
            const Vec w = read(weight[j] + k, s.inputs - k);
            for (int i = 0; i < R; ++i) sums[j * R + i] += w * part[i];
        }
    }
    alignas(64) float lanes[AT_ONCE * LANES], results[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i) store(lanes + i * LANES, sums[i]);
    for (int i = 0; i < AT_ONCE; i += LANES) write(results + i, sum_of_rows(lanes + i * LANES));
    for (int j = 0; j < OUTPUTS && output + j < s.outputs; ++j)
        for (int i = 0; i < R; ++i) {
            const float result = results[j * R + i];
            const int64_t at = output + j;
            if constexpr (sizeof(T) == 2) {
                const float bias = from_bfloat16(static_cast<const T*>(s.bias)[at]);
                static_cast<T*>(s.y)[(row + i) * s.outputs + at] = to_bfloat16(result + bias);
            } else {
                static_cast<T*>(s.y)[(row + i) * s.outputs + at] = result + static_cast<const T*>(s.bias)[at];
            }
        }
}

template <class T>
void few_rows(const FewRows& s) {
    const int64_t groups = (s.outputs + AT_ONCE - 1) / AT_ONCE;
    in_runs(s.threads, groups, s.outputs * s.inputs, [&](int64_t first, int64_t last) {
        const int64_t width = round_up(s.inputs);
        float* x = scratch.take(s.rows * width);
        for (int64_t row = 0; row < s.rows; ++row)
            for (int64_t k = 0; k < s.inputs; k += LANES)
                store(x + row * width + k, read(static_cast<const T*>(s.x) + row * s.inputs + k, s.inputs - k));
        const auto run = [&](auto R, int64_t output, int64_t row) {
            const int64_t end = std::min(output + AT_ONCE, s.outputs);
            for (; output < end; output += AT_ONCE / R.value)
                few_products<R.value, T>(s, x + row * width, width, output, row);
        };
        for (int64_t output = first * AT_ONCE; output < last * AT_ONCE; output += AT_ONCE) {
            int64_t row = 0;
            for (; row + 8 <= s.rows; row += 8) run(std::integral_constant<int, 8>{}, output, row);
            if (s.rows - row >= 4) run(std::integral_constant<int, 4>{}, output, row), row += 4;
            if (s.rows - row >= 2) run(std::integral_constant<int, 2>{}, output, row), row += 2;
            if (s.rows - row >= 1) run(std::integral_constant<int, 1>{}, output, row);
        }
    });
}

// x / (1 + exp(-x)).
template <int COUNT>
LAMAMBA_INLINE void silu(Vec* x) {
    Vec e[COUNT];
    for (int i = 0; i < COUNT; ++i) e[i] = floats(bits(x[i]) | int32_t(0x80000000));
    exp_of_negative<COUNT>(e);
    for (int i = 0; i < COUNT; ++i) x[i] = x[i] * sigmoid(x[i], e[i]);
}

template <class T>
void gated_norm(const GatedNorm& s) {
    const T *x = static_cast<const T*>(s.x), *z = static_cast<const T*>(s.z);
    const T *weight = static_cast<const T*>(s.weight), *bias = static_cast<const T*>(s.bias);
    T* y = static_cast<T*>(s.y);
    in_runs(s.threads, s.rows, s.rows * s.c, [&](int64_t first, int64_t last) {
        const int64_t width = round_up(s.c);
        float *row = scratch.take(3 * width), *times = row + width, *plus = times + width;
        for (int64_t i = 0; i < s.c; i += LANES) {
            store(times + i, read(weight + i, s.c - i));
            store(plus + i, read(bias + i, s.c - i));
        }
        for (int64_t token = first; token < last; ++token) {
            const Row norm(x + token * s.c, s.c, s.eps, row);
            const T* gate = z + token * s.z_row;
            T* to = y + token * s.c;
            int64_t i = 0;
            for (; i + 2 * LANES <= s.c; i += 2 * LANES) {
                Vec gates[2] = {read(gate + i), read(gate + i + LANES)};
                silu<2>(gates);
                for (int v = 0; v < 2; ++v) {
                    const int64_t at = i + v * LANES;
                    const Vec normal = (load(row + at) - norm.mean) * norm.scale;
                    write(to + at, (normal * load(times + at) + load(plus + at)) * gates[v]);
                }
            }
            for (; i < s.c; i += LANES) {
                Vec gates = read(gate + i, s.c - i);
                silu<1>(&gates);
                const Vec normal = (load(row + i) - norm.mean) * norm.scale;
                write(to + i, (normal * load(times + i) + load(plus + i)) * gates, s.c - i);
            }
        }
    });
}

// q = round(x / scale), scale = max |x| / 127 of each row. A row with NaN or infinity has scale NaN; a row of zeros, 0.
template <class T>
void quantized_rows(const QuantizedRows& s) {
    in_runs(s.threads, s.rows, s.rows * s.c, [&](int64_t first, int64_t last) {
        float* row = scratch.take(round_up(s.c));
        for (int64_t k = first; k < last; ++k) {
            const T* x = static_cast<const T*>(s.x) + k * s.c;
            Vec most = splat(0.0f), nothing = splat(0.0f);
            for (int64_t i = 0; i < s.c; i += LANES) {
                const Vec value = read(x + i, s.c - i);
                store(row + i, value);
                most = larger(most, absolute(value));
                nothing += value * 0.0f;
            }
            const float peak = largest(most) + sum(nothing);
            s.scale[k] = peak / 127.0f;
            const float times = peak > 1e-30f ? 127.0f / peak : 0.0f;  // no overflow
            int8_t* q = s.q + k * s.c;
            for (int64_t i = 0; i < s.c; i += LANES) {
                const Vec shifted = load(row + i) * times + ROUND;      // the nearest integer, in the low bits
                int32_t lanes[LANES];
                std::memcpy(lanes, &shifted, sizeof lanes);
                if (s.c - i >= LANES)
                    for (int j = 0; j < LANES; ++j) q[i + j] = int8_t(lanes[j]);
                else
                    for (int64_t j = 0; j < s.c - i; ++j) q[i + j] = int8_t(lanes[j]);
            }
        }
    });
}

// y = products row_scale column_scale + bias.
template <class T>
void scaled_products(const ScaledProducts& s) {
    in_runs(s.threads, s.rows, s.rows * s.c, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
            const int32_t* from = s.products + k * s.c;
            T* to = static_cast<T*>(s.y) + k * s.c;
            for (int64_t i = 0; i < s.c; i += LANES) {
                const int64_t count = std::min<int64_t>(LANES, s.c - i);
                float lanes[LANES] = {};
                if (count == LANES)
                    for (int j = 0; j < LANES; ++j) lanes[j] = float(from[i + j]);
                else
                    for (int64_t j = 0; j < count; ++j) lanes[j] = float(from[i + j]);
                const Vec scale = read(s.column_scale + i, count) * s.row_scale[k];
                write(to + i, read(lanes) * scale + read(s.bias + i, count), count);
            }
        }
    });
}

// Three rows of the grid around an output row; outside the grid, one token of zeros stands for the whole row.
template <class T>
struct Rows {
    const T* first[3];
    int64_t step[3];

    Rows(const Convolution& s, int64_t image, int64_t row, const T* zeros) {
        for (int64_t k = 0; k < 3; ++k) {
            const int64_t from = row + k - 1;
            const bool inside = from >= 0 && from < s.h;
            first[k] = inside ? static_cast<const T*>(s.x) + image * s.x_b + from * s.x_h : zeros;
            step[k] = inside ? s.x_w : 0;
        }
    }
};

// V vectors of neighbouring channels of one output row. A column of three tokens is read once and adds to the sums of
// the columns on its left, its own and on its right.
template <int V, class T>
LAMAMBA_INLINE void convolve_row(const Convolution& s, const Rows<T>& rows, int64_t c0, T* to) {
    const int64_t count = s.c - c0;
    Vec weight[9][V], left[V], here[V];
    for (int k = 0; k < 9; ++k)
        for (int v = 0; v < V; ++v) weight[k][v] = read(s.weight + k * s.c + c0 + v * LANES, count - v * LANES);
    for (int v = 0; v < V; ++v) left[v] = here[v] = splat(0.0f);
    const auto finish = [&](Vec* sums, int64_t column) {
        silu<V>(sums);
        for (int v = 0; v < V; ++v) write(to + column * s.c + c0 + v * LANES, sums[v], count - v * LANES);
    };
    for (int64_t column = 0; column < s.w; ++column) {
        Vec right[V];
        for (int v = 0; v < V; ++v) right[v] = splat(0.0f);
        for (int k = 0; k < 3; ++k)
            for (int v = 0; v < V; ++v) {
                const Vec x = read(rows.first[k] + column * rows.step[k] + c0 + v * LANES, count - v * LANES);
                left[v] += x * weight[3 * k + 2][v];
                here[v] += x * weight[3 * k + 1][v];
                right[v] += x * weight[3 * k][v];
            }
        if (column > 0) finish(left, column - 1);
        for (int v = 0; v < V; ++v) left[v] = here[v], here[v] = right[v];
    }
    finish(left, s.w - 1);
}

template <class T>
void convolution(const Convolution& s) {
    in_runs(s.threads, s.b * s.h, s.b * s.h * s.w * s.c, [&](int64_t first, int64_t last) {
        float* nothing = scratch.take(s.c);
        std::fill(nothing, nothing + s.c, 0.0f);
        for (int64_t i = first; i < last; ++i) {
            const Rows<T> rows(s, i / s.h, i % s.h, reinterpret_cast<const T*>(nothing));
            T* to = static_cast<T*>(s.y) + i * s.w * s.c;
            int64_t c0 = 0;
            for (; c0 + 2 * LANES <= s.c; c0 += 2 * LANES) convolve_row<2>(s, rows, c0, to);
            for (; c0 < s.c; c0 += LANES) convolve_row<1>(s, rows, c0, to);
        }
    });
}

// rows (Q, V vectors) = a (Q, depth) times b (depth, V vectors): Q rows and V columns of vectors stay in registers.
template <int Q, int V>
LAMAMBA_INLINE void product(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, Vec (&sums)[Q][V]) {
    for (int i = 0; i < Q; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] = splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        Vec columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(b + k * b_row + v * LANES);
        for (int i = 0; i < Q; ++i)
            for (int v = 0; v < V; ++v) sums[i][v] += columns[v] * a[i * a_row + k];
    }
}

constexpr int QUERIES = 4;
constexpr int COLUMNS = LANES == 16 ? 4 : 2;                    // vectors

// function(integral_constant V, first vector) for all vectors of a row of `width` floats, COLUMNS at a time.
template <class Function>
LAMAMBA_INLINE void for_columns(int64_t width, const Function& function) {
    int64_t at = 0;
    for (; at + COLUMNS * LANES <= width; at += COLUMNS * LANES)
        function(std::integral_constant<int, COLUMNS>{}, at);
    switch ((width - at) / LANES) {
        case 3: if constexpr (COLUMNS > 3) return function(std::integral_constant<int, 3>{}, at);
        case 2: if constexpr (COLUMNS > 2) return function(std::integral_constant<int, 2>{}, at);
        case 1: return function(std::integral_constant<int, 1>{}, at);
    }
}

// One head of one window. Queries and keys arrive as (tokens, d) and (d, tokens), values as (tokens, d), all in rows of
// whole vectors; queries are scaled.
struct Head {
    int64_t tokens, keys, channels;                             // tokens; tokens and d, padded to whole vectors
    float *q, *k, *v, *scores;
};

template <int Q>
LAMAMBA_INLINE void attend(const Head& head, int64_t d, int64_t first, const float* bias, const float* mask, float* y) {
    float* scores = head.scores;
    Vec top[Q], total[Q];
    for (int i = 0; i < Q; ++i) top[i] = splat(-INFINITY), total[i] = splat(0.0f);
    for_columns(head.keys, [&](auto V, int64_t at) {
        Vec sums[Q][V.value];
        product<Q, V.value>(head.q + first * head.channels, head.channels, head.k + at, head.keys, d, sums);
        for (int i = 0; i < Q; ++i)
            for (int v = 0; v < V.value; ++v) {
                const int64_t key = at + v * LANES, row = (first + i) * head.tokens + key;
                Vec score = sums[i][v] + read(bias + row, head.tokens - key);
                if (mask) score += load(mask + (first + i) * head.keys + key);
                store(scores + i * head.keys + key, score);
                top[i] = larger(top[i], score);
            }
    });
    for (int i = 0; i < Q; ++i) {
        float* row = scores + i * head.keys;
        const float highest = largest(top[i]);
        for_columns(head.keys, [&](auto V, int64_t at) {
            Vec weights[V.value];
            for (int v = 0; v < V.value; ++v) weights[v] = load(row + at + v * LANES) - highest;
            exp_of_negative<V.value>(weights);
            for (int v = 0; v < V.value; ++v) {
                store(row + at + v * LANES, weights[v]);
                total[i] += weights[v];
            }
        });
    }
    for_columns(head.channels, [&](auto V, int64_t at) {
        Vec sums[Q][V.value];
        product<Q, V.value>(scores, head.keys, head.v + at, head.channels, head.tokens, sums);
        for (int i = 0; i < Q; ++i) {
            const float share = 1.0f / sum(total[i]);
            for (int v = 0; v < V.value; ++v)
                store(y + (first + i) * head.channels + at + v * LANES, sums[i][v] * share);
        }
    });
}

template <class T>
void window_attention(const Windows& s) {
    const T* qkv = static_cast<const T*>(s.qkv);
    T* y = static_cast<T*>(s.y);
    const int64_t rows = (s.h + s.window_h - 1) / s.window_h, columns = (s.w + s.window_w - 1) / s.window_w;
    const int64_t tokens = s.window_h * s.window_w, keys = round_up(tokens), channels = round_up(s.d), c = s.heads * s.d;
    const float scale = 1.0f / std::sqrt(float(s.d));
    in_runs(s.threads, s.b * rows * columns, s.b * s.h * s.w * 3 * c, [&](int64_t first, int64_t last) {
        float* memory = scratch.take(3 * tokens * channels + channels * keys + (tokens + QUERIES) * keys + 2 * tokens);
        const auto next = [&](int64_t size) { return memory += size, memory - size; };
        Head head{tokens, keys, channels, next(tokens * channels), next(channels * keys), next(tokens * channels),
                  next(QUERIES * keys)};
        float *result = next(tokens * channels), *mask = next(tokens * keys);
        int64_t* place = reinterpret_cast<int64_t*>(next(2 * tokens));      // of each token on the grid, or -1: padding
        std::fill(head.q, mask, 0.0f);
        for (int64_t task = first; task < last; ++task) {
            const int64_t image = task / (rows * columns), window = task % (rows * columns);
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t down = (window / columns * s.window_h + t / s.window_w + s.shift_h) % (rows * s.window_h);
                const int64_t right = (window % columns * s.window_w + t % s.window_w + s.shift_w) % (columns * s.window_w);
                place[t] = down < s.h && right < s.w ? (image * s.h + down) * s.w + right : -1;
            }
            const uint8_t* seen = s.mask ? s.mask + window * tokens * tokens : nullptr;
            bool is_masked = keys != tokens;                                // padding of a vector is masked, too
            for (int64_t i = 0; seen && i < tokens * tokens; ++i) is_masked |= !seen[i];
            for (int64_t i = 0; is_masked && i < tokens; ++i)
                for (int64_t j = 0; j < keys; ++j)
                    mask[i * keys + j] = j < tokens && (!seen || seen[i * tokens + j]) ? 0.0f : -INFINITY;
            for (int64_t h = 0; h < s.heads; ++h) {
                for (int64_t t = 0; t < tokens; ++t) {
                    const T* from = qkv + std::max<int64_t>(place[t], 0) * 3 * c + h * s.d;
                    float row[LANES];
                    for (int64_t i = 0; i < s.d; i += LANES) {
                        const int64_t count = place[t] < 0 ? 0 : s.d - i;
                        write(head.q + t * channels + i, read(from + i, count) * scale);
                        write(row, read(from + c + i, count));
                        for (int64_t j = 0; j < std::min<int64_t>(LANES, s.d - i); ++j)
                            head.k[(i + j) * keys + t] = row[j];
                        write(head.v + t * channels + i, read(from + 2 * c + i, count));
                    }
                }
                const float *bias = s.bias + h * tokens * tokens, *masked = is_masked ? mask : nullptr;
                int64_t query = 0;
                for (; query + QUERIES <= tokens; query += QUERIES)
                    attend<QUERIES>(head, s.d, query, bias, masked, result);
                for (; query < tokens; ++query) attend<1>(head, s.d, query, bias, masked, result);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t i = 0; place[t] >= 0 && i < s.d; i += LANES)
                        write(y + place[t] * c + h * s.d + i, load(result + t * channels + i), s.d - i);
            }
        }
    });
}

}  // namespace

LAMAMBA_EXPORT void lamamba_modulated_norm(const ModulatedNorm* s) {
    with_type(s->is_bfloat16, [&](auto type) { modulated_norm<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_gated_norm(const GatedNorm* s) {
    with_type(s->is_bfloat16, [&](auto type) { gated_norm<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_convolution(const Convolution* s) {
    with_type(s->is_bfloat16, [&](auto type) { convolution<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_window_attention(const Windows* s) {
    with_type(s->is_bfloat16, [&](auto type) { window_attention<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_few_rows(const FewRows* s) {
    with_type(s->is_bfloat16, [&](auto type) { few_rows<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_quantized_rows(const QuantizedRows* s) {
    with_type(s->is_bfloat16, [&](auto type) { quantized_rows<decltype(type)>(*s); });
}
LAMAMBA_EXPORT void lamamba_scaled_products(const ScaledProducts* s) {
    with_type(s->is_bfloat16, [&](auto type) { scaled_products<decltype(type)>(*s); });
}
