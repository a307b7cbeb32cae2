// The selective scan over a grid and its gradients, for CPUs. Formulas and notation as in
// lamamba/ops/selective_scan/__init__.py.
//
// Channels are innermost and independent in the scan: a vector holds neighbouring channels, and a block of channels of
// one image is a task. It reads x once, scans all directions, gathering and scattering through the paths, and
// accumulates their sum. Nothing of size (b, g, l, c) is ever in memory.
//
// A path is processed TILE tokens at a time: W_dt dt for all channels of the block, softplus, then one state after
// another. The backward pass scans each path twice: forward, to save delta and the state before each tile; then in
// reverse, tile by tile, recomputing the tile's h. Sums over channels (gradients of dt, B, C) and over images (of the
// parameters) are accumulated per share of the tasks and reduced in a fixed order: no atomics, reproducible bits.

#include <algorithm>

#include "parallel.h"
#include "vec.h"

// Mirrored by _Scan in lamamba/ops/selective_scan/cpu.py. Strides count elements; the last dimension has stride 1.
struct Scan {
    int64_t b, l, c, g, r, n;
    int64_t threads;
    int64_t is_bfloat16;                                        // x, y, gy and gx; everything else is float32
    const void* x;
    int64_t x_b, x_l;
    const float* dt;
    int64_t dt_b, dt_l, dt_g;
    const float* B;
    int64_t B_b, B_l, B_g;
    const float* C;
    int64_t C_b, C_l, C_g;
    const float *W_dt, *b_dt, *A, *D;                           // contiguous
    const int64_t* paths;                                       // contiguous
    float* workspace;                                           // of lamamba_selective_scan_workspace floats
    void* y;                                                    // (b, l, c) contiguous, as are all results
    const void* gy;
    int64_t gy_b, gy_l;
    void* gx;
    float *gdt, *gB, *gC, *gW_dt, *gb_dt, *gA, *gD;
};

namespace {

constexpr int TILE = 32;                                        // tokens; a multiple of LANES
constexpr int MAX_VECTORS = 4;                                  // per block
constexpr int TOKENS_AT_ONCE = LANES == 16 ? 6 : 2;             // in the products with W_dt, limited by the registers
static_assert(TILE % LANES == 0, "lanes are summed LANES tokens at a time");

int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Partition of a call into blocks of channels and shares of tasks, and the layout of its workspace.
struct Plan {
    int64_t width, blocks, c_pad, tasks, shares;                // width and c_pad count channels
    int64_t rows;                                               // of a block's parameters: r of W_dt, b_dt, n of A, D
    int64_t r_pad, sums;                                        // floats of gdt, gB, gC for one token and direction
    int64_t packed, packed_W, grads, partials, total;           // offsets, in floats

    Plan(const Scan& s, bool backward) {
        int64_t vectors = MAX_VECTORS;
        while (vectors > 1 && s.l * vectors * LANES > 2048 * 1024) vectors /= 2;
        while (vectors > 1 && s.b * ((s.c + vectors * LANES - 1) / (vectors * LANES)) < s.threads) vectors /= 2;
        width = vectors * LANES;
        blocks = (s.c + width - 1) / width;
        c_pad = round_up(s.c, LANES);
        tasks = s.b * blocks;
        bool small = s.b * s.l * s.g * c_pad * (s.n + 2) < 16 * 1024;
        shares = small ? 1 : std::max<int64_t>(1, std::min(s.threads, tasks));
        rows = s.r + 1 + s.n + 1;
        r_pad = round_up(s.r, LANES);
        sums = r_pad + 2 * s.n;
        packed = 0;
        packed_W = packed + s.g * c_pad * rows;
        grads = packed_W + (backward ? s.g * c_pad * r_pad : 0);
        partials = grads + (backward ? shares * s.g * c_pad * rows : 0);
        total = partials + (backward ? (s.b + shares - 1) * s.l * s.g * sums : 0);
    }
    int64_t first_task(int64_t share) const { return tasks * share / shares; }
    // Shares are contiguous ranges of tasks, image by image; so image + share is unique for each pair that overlaps.
    int64_t slot(int64_t image, int64_t share) const { return image + share; }
    int64_t parameters(int64_t k, int64_t c0) const { return (k * c_pad + c0) * rows; }
};

template <class Function>
void with_flag(bool flag, const Function& function) {
    if (flag) function(std::true_type{});
    else function(std::false_type{});
}

template <class Function>
void with_vectors(int64_t channels, const Function& function) {
    switch ((channels + LANES - 1) / LANES) {
        case 1: return function(std::integral_constant<int, 1>{});
        case 2: return function(std::integral_constant<int, 2>{});
        case 3: return function(std::integral_constant<int, 3>{});
        default: return function(std::integral_constant<int, 4>{});
    }
}

bool paths_are_valid(const Scan& s) {
    bool valid = true;
    for (int64_t i = 0; i < s.g * s.l; ++i) valid &= uint64_t(s.paths[i]) < uint64_t(s.l);
    return valid;
}

// A block's parameters with channels innermost, padded with zeros; for the backward pass also W_dt in its own layout.
void pack_parameters(const Scan& s, const Plan& plan, bool backward, int64_t k, int64_t c0) {
    const int64_t count = std::min(plan.width, s.c - c0), width = round_up(count, LANES);
    float* to = s.workspace + plan.packed + plan.parameters(k, c0);
    auto transpose = [&](const float* from, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row, to += width)
            for (int64_t c = 0; c < width; ++c) to[c] = c < count ? from[c * rows + row] : 0.0f;
    };
    const int64_t channel = k * s.c + c0;
    transpose(s.W_dt + channel * s.r, s.r);
    transpose(s.b_dt + channel, 1);
    transpose(s.A + channel * s.n, s.n);
    transpose(s.D + channel, 1);
    if (!backward) return;
    float* row = s.workspace + plan.packed_W + (k * plan.c_pad + c0) * plan.r_pad;
    for (int64_t c = 0; c < width; ++c, row += plan.r_pad)
        for (int64_t j = 0; j < plan.r_pad; ++j) row[j] = c < count && j < s.r ? s.W_dt[(channel + c) * s.r + j] : 0.0f;
}

void pack_all_parameters(const Scan& s, const Plan& plan, bool backward) {
    const int64_t pieces = s.g * plan.blocks;
    in_parallel(std::min(plan.shares, pieces), [&](int64_t share) {
        const int64_t shares = std::min(plan.shares, pieces);
        for (int64_t i = pieces * share / shares; i < pieces * (share + 1) / shares; ++i)
            pack_parameters(s, plan, backward, i / plan.blocks, i % plan.blocks * plan.width);
    });
}

// count channels of an image's l tokens, as rows of `width` floats, padded with zeros.
void read_rows(
    const Scan& s, const void* from, int64_t offset, int64_t stride, int64_t count, int64_t width, float* to) {
    for (int64_t t = 0; t < s.l; ++t, offset += stride, to += width) {
        if (s.is_bfloat16) {
            const uint16_t* row = static_cast<const uint16_t*>(from) + offset;
            for (int64_t c = 0; c < count; ++c) to[c] = from_bfloat16(row[c]);
        } else {
            std::memcpy(to, static_cast<const float*>(from) + offset, size_t(count) * sizeof(float));
        }
        for (int64_t c = count; c < width; ++c) to[c] = 0.0f;
    }
}

void write_rows(const Scan& s, void* to, int64_t offset, int64_t count, int64_t width, const float* from) {
    for (int64_t t = 0; t < s.l; ++t, offset += s.c, from += width) {
        if (s.is_bfloat16) {
            uint16_t* row = static_cast<uint16_t*>(to) + offset;
            for (int64_t c = 0; c < count; ++c) row[c] = to_bfloat16(from[c]);
        } else {
            std::memcpy(static_cast<float*>(to) + offset, from, size_t(count) * sizeof(float));
        }
    }
}

// The tokens of one tile: their grid positions, and their rows of dt, B and C.
struct Tile {
    int64_t count;
    int64_t token[TILE];
    const float *dt[TILE], *B[TILE], *C[TILE];

    Tile(const Scan& s, int64_t image, int64_t k, int64_t start) : count(std::min<int64_t>(TILE, s.l - start)) {
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = token[t] = s.paths[k * s.l + start + t];
            dt[t] = s.dt + image * s.dt_b + at * s.dt_l + k * s.dt_g;
            B[t] = s.B + image * s.B_b + at * s.B_l + k * s.B_g;
            C[t] = s.C + image * s.C_b + at * s.C_l + k * s.C_g;
        }
    }
};

template <int V>
LAMAMBA_INLINE void load_row(Vec* to, const float* from) {
    for (int v = 0; v < V; ++v) to[v] = load(from + v * LANES);
}

// One token's decays, exp(delta A) = 2^(delta rate).
template <int V>
LAMAMBA_INLINE void load_rates(Vec* to, const float* A) {
    for (int v = 0; v < V; ++v) to[v] = load(A + v * LANES) * LOG2_E;
}

template <int V, bool tame>
LAMAMBA_INLINE void decays(const float* delta, const Vec* rate, Vec* to) {
    for (int v = 0; v < V; ++v) to[v] = load(delta + v * LANES) * rate[v];
    exp2<V, tame>(to);
}

// Whether all exponents delta rate are tame, decided by the largest delta and |A|; false for NaN.
bool is_tame(float delta, float A) { return delta * A * LOG2_E <= 126.0f; }

float largest_of(const float* values, int64_t count) {
    Vec most{};
    for (int64_t i = 0; i < count; i += LANES) most = larger(absolute(load(values + i)), most);
    return largest(most);
}

// s = W_dt dt + b_dt for T tokens. W holds r rows, then b_dt.
template <int V, int T>
LAMAMBA_INLINE void lift_tokens(const float* const* dt, int64_t r, const float* W, float* out) {
    Vec sum[T][V] = {}, b[V];
    for (int64_t j = 0; j < r; ++j) {
        Vec w[V];
        load_row<V>(w, W + j * V * LANES);
        for (int t = 0; t < T; ++t) {
            const Vec value = splat(dt[t][j]);
            for (int v = 0; v < V; ++v) sum[t][v] += value * w[v];
        }
    }
    load_row<V>(b, W + r * V * LANES);                         // last, because it is the largest term
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) store(out + (t * V + v) * LANES, sum[t][v] + b[v]);
}

template <int V>
LAMAMBA_INLINE void lift(const Tile& tile, int64_t r, const float* W, float* out) {
    int64_t t = 0;
    for (; t + TOKENS_AT_ONCE <= tile.count; t += TOKENS_AT_ONCE)
        lift_tokens<V, TOKENS_AT_ONCE>(tile.dt + t, r, W, out + t * V * LANES);
    for (; t < tile.count; ++t) lift_tokens<V, 1>(tile.dt + t, r, W, out + t * V * LANES);
}

// delta = softplus(W_dt dt + b_dt) and delta x of one tile, rows of V vectors; for the backward pass also the slopes of
// softplus. The largest delta, or NaN where one is.
template <int V, bool has_slopes = false>
LAMAMBA_INLINE float time_steps(
    const Tile& tile, int64_t r, const float* W, const float* x, float* delta, float* du, float* slopes = nullptr) {
    constexpr int width = V * LANES;
    lift<V>(tile, r, W, delta);
    Vec longest{};
    for (int64_t t = 0; t < tile.count; ++t) {
        Vec before[V], e[V], step[V];
        load_row<V>(before, delta + t * width);
        softplus<V>(before, e, step);
        for (int v = 0; v < V; ++v) {
            const int64_t at = t * width + v * LANES;
            longest = larger(step[v], longest);
            store(delta + at, step[v]);
            if constexpr (has_slopes) store(slopes + at, sigmoid(before[v], e[v]));
            store(du + at, step[v] * load(x + tile.token[t] * width + v * LANES));
        }
    }
    return largest(longest);
}

// M states of one tile, starting with the n-th, from their current h. C . h over the states is summed in
// y_tile and, with the last ones, added to y on the grid.
template <int V, int M, bool tame>
LAMAMBA_INLINE void scan_states(
    const Tile& tile, int64_t n, bool last, const float* delta, const float* du, const float* A, float* states,
    float* y_tile, float* y) {
    constexpr int width = V * LANES;
    Vec rate[M][V], h[M][V];
    for (int m = 0; m < M; ++m) {
        load_rates<V>(rate[m], A + (n + m) * width);
        load_row<V>(h[m], states + (n + m) * width);
    }
    for (int64_t t = 0; t < tile.count; ++t) {
        float *row = y_tile + t * width, *to = last ? y + tile.token[t] * width : row;
        Vec sum[V] = {};
        for (int m = 0; m < M; ++m) {
            Vec decay[V];
            decays<V, tame>(delta + t * width, rate[m], decay);
            const Vec B = splat(tile.B[t][n + m]), C = splat(tile.C[t][n + m]);
            for (int v = 0; v < V; ++v) {
                h[m][v] = decay[v] * h[m][v] + load(du + t * width + v * LANES) * B;
                sum[v] += h[m][v] * C;
            }
        }
        if (n > 0)
            for (int v = 0; v < V; ++v) sum[v] += load(row + v * LANES);
        if (last)
            for (int v = 0; v < V; ++v) sum[v] += load(to + v * LANES);
        for (int v = 0; v < V; ++v) store(to + v * LANES, sum[v]);
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store(states + (n + m) * width + v * LANES, h[m][v]);
}

// Allocates consecutive pieces of a thread's working memory.
struct Pieces {
    float* next;
    float* take(int64_t size) {
        float* piece = next;
        next += round_up(size, 16);
        return piece;
    }
};

// The skip, D x summed over the directions, is added last: the other summands are often smaller.
template <int V>
void add_skip(const Scan& s, const Plan& plan, int64_t c0, const float* from, float* to) {
    constexpr int width = V * LANES;
    Vec D[V] = {};
    for (int64_t k = 0; k < s.g; ++k)
        for (int v = 0; v < V; ++v)
            D[v] += load(s.workspace + plan.packed + plan.parameters(k, c0) + (plan.rows - 1) * width + v * LANES);
    for (int64_t t = 0; t < s.l; ++t)
        for (int v = 0; v < V; ++v) {
            const int64_t at = t * width + v * LANES;
            store(to + at, load(to + at) + D[v] * load(from + at));
        }
}

template <int V>
void forward_block(const Scan& s, const Plan& plan, int64_t image, int64_t c0) {
    constexpr int width = V * LANES;
    const int64_t count = std::min<int64_t>(width, s.c - c0);
    Pieces pieces{scratch.take(2 * s.l * width + 3 * TILE * width + s.n * width + 6 * 16)};
    float *x = pieces.take(s.l * width), *y = pieces.take(s.l * width), *h = pieces.take(s.n * width);
    float *delta = pieces.take(TILE * width), *du = pieces.take(TILE * width), *y_tile = pieces.take(TILE * width);

    read_rows(s, s.x, image * s.x_b + c0, s.x_l, count, width, x);
    std::fill(y, y + s.l * width, 0.0f);
    for (int64_t k = 0; k < s.g; ++k) {
        const float* W = s.workspace + plan.packed + plan.parameters(k, c0);
        const float* A = W + (s.r + 1) * width;
        const float fastest = largest_of(A, s.n * width);
        std::fill(h, h + s.n * width, 0.0f);
        for (int64_t start = 0; start < s.l; start += TILE) {
            const Tile tile(s, image, k, start);
            const float longest = time_steps<V>(tile, s.r, W, x, delta, du);
            with_flag(is_tame(longest, fastest), [&](auto tame) {
                int64_t n = 0;
                for (; n + 2 <= s.n; n += 2)
                    scan_states<V, 2, tame.value>(tile, n, n + 2 == s.n, delta, du, A, h, y_tile, y);
                for (; n < s.n; ++n)
                    scan_states<V, 1, tame.value>(tile, n, n + 1 == s.n, delta, du, A, h, y_tile, y);
            });
        }
    }
    add_skip<V>(s, plan, c0, x, y);
    write_rows(s, s.y, image * s.l * s.c + c0, count, width, y);
}

// The n-th state after one tile.
template <int V, bool tame>
LAMAMBA_INLINE void advance_state(
    const Tile& tile, int64_t n, const float* delta, const float* du, const float* A, const float* before,
    float* after) {
    constexpr int width = V * LANES;
    Vec rate[V], h[V];
    load_rates<V>(rate, A + n * width);
    load_row<V>(h, before + n * width);
    for (int64_t t = 0; t < tile.count; ++t) {
        Vec decay[V];
        decays<V, tame>(delta + t * width, rate, decay);
        const Vec B = splat(tile.B[t][n]);
        for (int v = 0; v < V; ++v) h[v] = decay[v] * h[v] + load(du + t * width + v * LANES) * B;
    }
    for (int v = 0; v < V; ++v) store(after + n * width + v * LANES, h[v]);
}

// Buffers of one tile in the backward pass: rows of `width` floats for each token.
struct TileBuffers {
    float *du, *decay, *h, *through_input, *through_decay;      // h has one row more: the state before the tile
    float *sum_B, *sum_C;                                       // LANES partial sums over channels for each token
};

// Backward pass of one state of one tile. gh is the gradient of the state after the tile.
template <int V, bool tame>
LAMAMBA_INLINE void unscan_state(
    const Tile& tile, int64_t n, const float* delta, const float* gy, const float* A, const float* h_before,
    float* gh_rows, float* gA, const TileBuffers& to) {
    constexpr int width = V * LANES;
    Vec rate[V], h[V], gh[V], sum_A[V] = {};
    load_row<V>(h, h_before);
    load_rates<V>(rate, A);
    for (int v = 0; v < V; ++v) store(to.h + v * LANES, h[v]);
    for (int64_t t = 0; t < tile.count; ++t) {
        Vec decay[V];
        decays<V, tame>(delta + t * width, rate, decay);
        const Vec B = splat(tile.B[t][n]);
        for (int v = 0; v < V; ++v) {
            const int64_t at = t * width + v * LANES;
            h[v] = decay[v] * h[v] + load(to.du + at) * B;
            store(to.decay + at, decay[v]);
            store(to.h + width + at, h[v]);
        }
    }
    load_row<V>(gh, gh_rows);
    load_row<V>(rate, A);
    for (int64_t t = tile.count; t-- > 0;) {
        const float* gy_row = gy + tile.token[t] * width;
        Vec sum_B{}, sum_C{};
        for (int v = 0; v < V; ++v) {
            const int64_t at = t * width + v * LANES;
            const Vec out = load(gy_row + v * LANES);
            sum_C += out * h[v];
            gh[v] += out * tile.C[t][n];
            sum_B += gh[v] * load(to.du + at);
            store(to.through_input + at, load(to.through_input + at) + gh[v] * tile.B[t][n]);
            gh[v] = gh[v] * load(to.decay + at);
            h[v] = load(to.h + at);
            const Vec through_decay = gh[v] * h[v];
            store(to.through_decay + at, load(to.through_decay + at) + through_decay * rate[v]);
            sum_A[v] += through_decay * load(delta + at);
        }
        store(to.sum_B + t * LANES, sum_B);
        store(to.sum_C + t * LANES, sum_C);
    }
    for (int v = 0; v < V; ++v) {
        store(gh_rows + v * LANES, gh[v]);
        store(gA + v * LANES, load(gA + v * LANES) + sum_A[v]);
    }
}

// gW_dt += sum over the tile's tokens of gs dt for J ranks.
template <int V, int J>
LAMAMBA_INLINE void add_rank_grads(const Tile& tile, int64_t j, const float* gs, float* gW) {
    constexpr int width = V * LANES;
    Vec sum[J][V] = {};
    for (int64_t t = 0; t < tile.count; ++t) {
        Vec row[V];
        load_row<V>(row, gs + t * width);
        for (int i = 0; i < J; ++i) {
            const Vec value = splat(tile.dt[t][j + i]);
            for (int v = 0; v < V; ++v) sum[i][v] += value * row[v];
        }
    }
    for (int i = 0; i < J; ++i)
        for (int v = 0; v < V; ++v) {
            float* to = gW + (j + i) * width + v * LANES;
            store(to, load(to) + sum[i][v]);
        }
}

// gdt = W_dt^T gs for T tokens and R vectors of ranks; W holds a row of r_pad ranks for each channel.
template <int T, int R>
LAMAMBA_INLINE void lower_tokens(int64_t width, int64_t r_pad, const float* gs, const float* W, float* const* to) {
    Vec sum[T][R] = {};
    for (int64_t c = 0; c < width; ++c) {
        Vec row[R];
        load_row<R>(row, W + c * r_pad);
        for (int t = 0; t < T; ++t) {
            const Vec value = splat(gs[t * width + c]);
            for (int i = 0; i < R; ++i) sum[t][i] += value * row[i];
        }
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < R; ++i) add_unaligned(to[t] + i * LANES, sum[t][i]);
}

template <int T>
LAMAMBA_INLINE void lower_ranks(int64_t width, int64_t r_pad, const float* gs, const float* W, float* const* to) {
    float* rows[T];
    int64_t j = 0;
    for (; j + 2 * LANES <= r_pad; j += 2 * LANES) {
        for (int t = 0; t < T; ++t) rows[t] = to[t] + j;
        lower_tokens<T, 2>(width, r_pad, gs, W + j, rows);
    }
    for (; j < r_pad; j += LANES) {
        for (int t = 0; t < T; ++t) rows[t] = to[t] + j;
        lower_tokens<T, 1>(width, r_pad, gs, W + j, rows);
    }
}

template <int V>
void backward_block(const Scan& s, const Plan& plan, int64_t image, int64_t c0, float* grads, float* partial) {
    constexpr int width = V * LANES;
    const int64_t count = std::min<int64_t>(width, s.c - c0);
    const int64_t tiles = (s.l + TILE - 1) / TILE, path = tiles * TILE * width, state = s.n * width;
    Pieces pieces{scratch.take(
        5 * path + (tiles + 1) * state + (6 * TILE + 1) * width + 2 * TILE * LANES + tiles + 16 * 16)};
    float *x = pieces.take(path), *gy = pieces.take(path), *gx = pieces.take(path);
    float *deltas = pieces.take(path), *slopes = pieces.take(path);     // along the path; slope = d delta / d s
    float *starts = pieces.take(tiles * state), *gh = pieces.take(state);
    float* gs = pieces.take(TILE * width);
    float* tame_tiles = pieces.take(tiles);                     // 1 or 0
    TileBuffers buffers;
    buffers.du = pieces.take(TILE * width);
    buffers.decay = pieces.take(TILE * width);
    buffers.h = pieces.take((TILE + 1) * width);
    buffers.through_input = pieces.take(TILE * width);
    buffers.through_decay = pieces.take(TILE * width);
    buffers.sum_B = pieces.take(TILE * LANES);
    buffers.sum_C = pieces.take(TILE * LANES);

    read_rows(s, s.x, image * s.x_b + c0, s.x_l, count, width, x);
    read_rows(s, s.gy, image * s.gy_b + c0, s.gy_l, count, width, gy);
    std::fill(gx, gx + s.l * width, 0.0f);
    Vec sum_D[V] = {};
    for (int64_t start = 0; start < s.l; start += TILE) {
        Vec sum[V] = {};
        for (int64_t t = start; t < std::min(start + TILE, s.l); ++t)
            for (int v = 0; v < V; ++v) sum[v] += load(x + t * width + v * LANES) * load(gy + t * width + v * LANES);
        for (int v = 0; v < V; ++v) sum_D[v] += sum[v];
    }

    for (int64_t k = 0; k < s.g; ++k) {
        const float* W = s.workspace + plan.packed + plan.parameters(k, c0);
        const float* A = W + (s.r + 1) * width;
        const float fastest = largest_of(A, s.n * width);
        const float* W_rows = s.workspace + plan.packed_W + (k * plan.c_pad + c0) * plan.r_pad;
        float *gW = grads + plan.parameters(k, c0), *gb = gW + s.r * width, *gA = gb + width, *gD = gA + s.n * width;
        for (int v = 0; v < V; ++v) store(gD + v * LANES, load(gD + v * LANES) + sum_D[v]);

        std::fill(starts, starts + state, 0.0f);
        for (int64_t i = 0; i < tiles; ++i) {
            const Tile tile(s, image, k, i * TILE);
            float *delta = deltas + i * TILE * width, *slope = slopes + i * TILE * width;
            tame_tiles[i] = is_tame(time_steps<V, true>(tile, s.r, W, x, delta, buffers.du, slope), fastest);
            if (i + 1 == tiles) break;
            const float *before = starts + i * state, *du = buffers.du;
            with_flag(tame_tiles[i], [&](auto tame) {
                for (int64_t n = 0; n < s.n; ++n)
                    advance_state<V, tame.value>(tile, n, delta, du, A, before, starts + (i + 1) * state);
            });
        }

        std::fill(gh, gh + state, 0.0f);
        for (int64_t i = tiles; i-- > 0;) {
            const Tile tile(s, image, k, i * TILE);
            const float *delta = deltas + i * TILE * width, *slope = slopes + i * TILE * width;
            float* sums[TILE];
            for (int64_t t = 0; t < tile.count; ++t) {
                sums[t] = partial + (tile.token[t] * s.g + k) * plan.sums;
                for (int v = 0; v < V; ++v) {
                    const int64_t at = t * width + v * LANES;
                    store(buffers.du + at, load(delta + at) * load(x + tile.token[t] * width + v * LANES));
                    store(buffers.through_input + at, Vec{});
                    store(buffers.through_decay + at, Vec{});
                }
            }
            for (int64_t n = 0; n < s.n; ++n) {
                with_flag(tame_tiles[i], [&](auto tame) {
                    unscan_state<V, tame.value>(tile, n, delta, gy, A + n * width, starts + i * state + n * width,
                                                gh + n * width, gA + n * width, buffers);
                });
                for (int64_t t0 = 0; t0 < tile.count; t0 += LANES) {
                    alignas(64) float of_B[LANES], of_C[LANES];
                    store(of_B, sum_of_rows(buffers.sum_B + t0 * LANES));
                    store(of_C, sum_of_rows(buffers.sum_C + t0 * LANES));
                    for (int64_t t = t0; t < std::min<int64_t>(t0 + LANES, tile.count); ++t) {
                        sums[t][plan.r_pad + n] += of_B[t - t0];
                        sums[t][plan.r_pad + s.n + n] += of_C[t - t0];
                    }
                }
            }

            Vec sum_b[V] = {};
            for (int64_t t = 0; t < tile.count; ++t)
                for (int v = 0; v < V; ++v) {
                    const int64_t at = t * width + v * LANES, on_grid = tile.token[t] * width + v * LANES;
                    const Vec through_input = load(buffers.through_input + at);
                    const Vec gdelta = through_input * load(x + on_grid) + load(buffers.through_decay + at);
                    const Vec before = gdelta * load(slope + at);
                    store(gs + at, before);
                    store(gx + on_grid, load(gx + on_grid) + through_input * load(delta + at));
                    sum_b[v] += before;
                }
            for (int v = 0; v < V; ++v) store(gb + v * LANES, load(gb + v * LANES) + sum_b[v]);
            int64_t j = 0;
            for (; j + 4 <= s.r; j += 4) add_rank_grads<V, 4>(tile, j, gs, gW);
            for (; j < s.r; ++j) add_rank_grads<V, 1>(tile, j, gs, gW);
            int64_t t = 0;
            for (; t + 4 <= tile.count; t += 4) lower_ranks<4>(width, plan.r_pad, gs + t * width, W_rows, sums + t);
            for (; t < tile.count; ++t) lower_ranks<1>(width, plan.r_pad, gs + t * width, W_rows, sums + t);
        }
    }
    add_skip<V>(s, plan, c0, gy, gx);
    write_rows(s, s.gx, image * s.l * s.c + c0, count, width, gx);
}

// Reduces the shares' sums over channels: gdt, gB and gC of one token.
void sum_token(const Scan& s, const Plan& plan, int64_t first_share, int64_t last_share, int64_t image, int64_t token) {
    const int64_t row = s.g * plan.sums;
    float* sum = s.workspace + plan.partials + (plan.slot(image, first_share) * s.l + token) * row;
    for (int64_t share = first_share + 1; share <= last_share; ++share) {
        const float* more = s.workspace + plan.partials + (plan.slot(image, share) * s.l + token) * row;
        for (int64_t i = 0; i < row; ++i) sum[i] += more[i];
    }
    for (int64_t k = 0; k < s.g; ++k, sum += plan.sums) {
        const int64_t at = (image * s.l + token) * s.g + k;
        std::memcpy(s.gdt + at * s.r, sum, size_t(s.r) * sizeof(float));
        std::memcpy(s.gB + at * s.n, sum + plan.r_pad, size_t(s.n) * sizeof(float));
        std::memcpy(s.gC + at * s.n, sum + plan.r_pad + s.n, size_t(s.n) * sizeof(float));
    }
}

// Reduces the shares' sums over images: the gradients of one block's parameters.
void sum_parameters(const Scan& s, const Plan& plan, int64_t k, int64_t c0) {
    const int64_t count = std::min(plan.width, s.c - c0), width = round_up(count, LANES), channel = k * s.c + c0;
    float* from = s.workspace + plan.grads + plan.parameters(k, c0);
    for (int64_t share = 1; share < plan.shares; ++share) {
        const float* more = from + share * s.g * plan.c_pad * plan.rows;
        for (int64_t i = 0; i < plan.rows * width; ++i) from[i] += more[i];
    }
    auto transpose = [&](float* to, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row, from += width)
            for (int64_t c = 0; c < count; ++c) to[c * rows + row] = from[c];
    };
    transpose(s.gW_dt + channel * s.r, s.r);
    transpose(s.gb_dt + channel, 1);
    transpose(s.gA + channel * s.n, s.n);
    transpose(s.gD + channel, 1);
}

}  // namespace

// The OpenMP entry points GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch uses.
LAMAMBA_EXPORT void lamamba_use_openmp(void* parallel, void* thread, void* threads) {
    openmp.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
    openmp.thread = reinterpret_cast<int (*)()>(thread);
    openmp.threads = reinterpret_cast<int (*)()>(threads);
}

LAMAMBA_EXPORT int64_t lamamba_selective_scan_workspace(const Scan* scan, int32_t backward) {
    return Plan(*scan, backward != 0).total;
}

// Both return 0, or 1 without any effect when paths hold an index outside 0 .. l - 1.
LAMAMBA_EXPORT int32_t lamamba_selective_scan_forward(const Scan* scan) {
    const Scan& s = *scan;
    if (!paths_are_valid(s)) return 1;
    const Plan plan(s, false);
    pack_all_parameters(s, plan, false);
    in_parallel(plan.shares, [&](int64_t share) {
        for (int64_t task = plan.first_task(share); task < plan.first_task(share + 1); ++task) {
            const int64_t image = task / plan.blocks, c0 = task % plan.blocks * plan.width;
            with_vectors(std::min(plan.width, s.c - c0), [&](auto V) { forward_block<V.value>(s, plan, image, c0); });
        }
    });
    return 0;
}

LAMAMBA_EXPORT int32_t lamamba_selective_scan_backward(const Scan* scan) {
    const Scan& s = *scan;
    if (!paths_are_valid(s)) return 1;
    const Plan plan(s, true);
    pack_all_parameters(s, plan, true);
    in_parallel(plan.shares, [&](int64_t share) {
        const int64_t params = s.g * plan.c_pad * plan.rows, tokens = s.l * s.g * plan.sums;
        float *grads = s.workspace + plan.grads + share * params, *partial = nullptr;
        std::fill(grads, grads + params, 0.0f);
        int64_t last = -1;
        for (int64_t task = plan.first_task(share); task < plan.first_task(share + 1); ++task) {
            const int64_t image = task / plan.blocks, c0 = task % plan.blocks * plan.width;
            if (image != last) {
                partial = s.workspace + plan.partials + plan.slot(image, share) * tokens;
                std::fill(partial, partial + tokens, 0.0f);
                last = image;
            }
            with_vectors(std::min(plan.width, s.c - c0),
                         [&](auto V) { backward_block<V.value>(s, plan, image, c0, grads, partial); });
        }
    });
    in_parallel(plan.shares, [&](int64_t share) {
        const int64_t tokens = s.b * s.l, pieces = s.g * plan.blocks;
        int64_t first = 0, end = 0, counted = -1;                   // the shares that worked on an image
        for (int64_t i = tokens * share / plan.shares; i < tokens * (share + 1) / plan.shares; ++i) {
            const int64_t image = i / s.l;
            if (image != counted) {
                counted = image;
                while (plan.first_task(first + 1) <= image * plan.blocks) ++first;
                end = first;
                while (end + 1 < plan.shares && plan.first_task(end + 1) < (image + 1) * plan.blocks) ++end;
            }
            sum_token(s, plan, first, end, image, i % s.l);
        }
        for (int64_t i = pieces * share / plan.shares; i < pieces * (share + 1) / plan.shares; ++i)
            sum_parameters(s, plan, i / plan.blocks, i % plan.blocks * plan.width);
    });
    return 0;
}
