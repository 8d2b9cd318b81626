"""The functions of the kernel for `block_attention` (block_attention.py) over several tokens a row,
in C++.
"""

# Shape legend: B rows, T tokens of each, H heads of keys and values, G heads of the query for each,
# E and F sizes of a head of keys and of values, C columns of a block, W blocks of a row, L = W * C.
SOURCE = r"""
#ifndef POLAR_FX_BLOCK_ATTENTION
#define POLAR_FX_BLOCK_ATTENTION
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <omp.h>
#include <type_traits>
#include <vector>

namespace polar_fx {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float UNDEFINED = std::numeric_limits<float>::quiet_NaN();

// A tile is so many rows of scores, one for each token and head of the query (more, where eight
// tokens have more), and so many columns. oneDNN makes code for each size it meets: those of tiles
// are multiples, the rest is zeros.
constexpr int64_t TILE_ROWS = 96, TILE_COLUMNS = 256, ROWS_STEP = 16, COLUMNS_STEP = 32;

struct Sizes {
    int64_t B, T, H, G, E, F, C, W;
    int64_t L() const { return W * C; }
    int64_t tiles() const { return ceil_div(L(), TILE_COLUMNS); }
    // of the columns of a tile, in memory
    int64_t width(int64_t tile) const {
        return std::min(TILE_COLUMNS, rounded(L() - tile * TILE_COLUMNS, COLUMNS_STEP));
    }
    // columns of all tiles, in memory
    int64_t columns() const { return rounded(L(), COLUMNS_STEP); }
};

// What is seen, or is added to scores: the steps between rows, heads and tokens in memory
template <typename S> struct Mask {
    const S* data;
    int64_t row, head, token;
};

template <typename S>
inline Mask<S> mask_of(const S* data, int64_t rows, int64_t heads, const Sizes& sizes) {
    const int64_t all = sizes.T * sizes.L();
    return {data, rows == 1 ? 0 : heads * all, heads == 1 ? 0 : all, sizes.L()};
}

inline bool is_seen(bool seen) { return seen; }
inline bool is_seen(float added) { return added != NEVER; }
inline bool is_seen(at::BFloat16 added) { return float(added) != NEVER; }
inline float added(bool) { return 0; }
inline float added(float value) { return value; }
inline float added(at::BFloat16 value) { return value; }

// What of a tile's columns its tokens see: those from `first` to `last`, in whole steps, and
// whether all tokens see them all, as they are
struct Seen {
    static constexpr int64_t STEPS = TILE_COLUMNS / COLUMNS_STEP;
    bool any[STEPS] = {}, changed[STEPS] = {};

    template <typename S> void look(const S* mask, int64_t n) {
        for (int64_t step = 0; step * COLUMNS_STEP < n; ++step) {
            const S* part = mask + step * COLUMNS_STEP;
            const int64_t count = std::min(COLUMNS_STEP, n - step * COLUMNS_STEP);
            bool some = false, all = true;
            look_at(part, count, some, all);
            any[step] |= some;
            changed[step] |= !all;
        }
    }
    // Whether some of so many are seen, and whether all are, as they are
    template <typename S> static void look_at(const S* part, int64_t count, bool& some, bool& all) {
        int one = 0, each = 1;
        #pragma omp simd reduction(|:one) reduction(&:each)
        for (int64_t j = 0; j < count; ++j) {
            one |= int(is_seen(part[j]));
            each &= int(is_seen(part[j]) & (added(part[j]) == 0));
        }
        some = one != 0;
        all = each != 0;
    }
    // any byte but 0 is true
    static void look_at(const bool* part, int64_t count, bool& some, bool& all) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(part);
        some = bytes[0] != 0 || std::memcmp(bytes, bytes + 1, count - 1) != 0;
        all = std::memchr(bytes, 0, count) == nullptr;
    }
    int64_t first() const { return std::find(any, any + STEPS, true) - any; }
    int64_t last() const {
        int64_t step = STEPS;
        while (step > 0 && !any[step - 1]) --step;
        return step;
    }
    bool is_changed() const {
        return std::find(changed + first(), changed + last(), true) != changed + last();
    }
};

// What is added to n scores; `place` holds it if it is made
inline const float* bias_of(const float* mask, int64_t, float*) { return mask; }
template <typename S> inline const float* bias_of(const S* mask, int64_t n, float* place) {
    #pragma omp simd
    for (int64_t j = 0; j < n; ++j) place[j] = is_seen(mask[j]) ? added(mask[j]) : NEVER;
    return place;
}

// One column of a store: of head h of the block that holds column j of a row
template <typename T> inline const T* column(
    const T* store, const int64_t* blocks, int64_t h, int64_t j, int64_t size, const Sizes& sizes
) {
    return store + ((blocks[j / sizes.C] * sizes.H + h) * sizes.C + j % sizes.C) * size;
}

// Columns first to first + n of keys, the rest zeros, as b of scores: [E, n], in bfloat16 pairs of
// E beside each other, which is the same with the pairs as floats.
template <typename T> void pack_keys(
    const T* key, const int64_t* blocks, int64_t h, int64_t first, int64_t n, T* to,
    const Sizes& sizes
) {
    const int64_t size = sizes.E * sizeof(T) / sizeof(float);
    auto* place = reinterpret_cast<float*>(to);
    for (int64_t j = 0; j < n; j += LANES) {
        const int64_t left = std::min(LANES, sizes.L() - first - j);
        const auto from = [&](int64_t i) {
            return reinterpret_cast<const float*>(
                column(key, blocks, h, first + j + i, sizes.E, sizes)
            );
        };
        if (left == LANES && sizes.C % LANES == 0 && first % sizes.C == 0) {
            turn(from(0), size, LANES, size, place + j, n);
            continue;
        }
        for (int64_t i = 0; i < LANES; ++i) {
            if (i < left) {
                turn(from(i), size, 1, size, place + j + i, n);
            } else {
                for (int64_t k = 0; k < size; ++k) place[k * n + j + i] = 0;
            }
        }
    }
}

// The same columns of values, as b of what they are summed to: [n, F]
inline void pack_values(
    const float* value, const int64_t* blocks, int64_t h, int64_t first, int64_t n, float* to,
    const Sizes& sizes
) {
    const int64_t count = std::min(n, sizes.L() - first);
    for (int64_t j = 0; j < count; ++j) {
        std::memcpy(
            to + j * sizes.F, column(value, blocks, h, first + j, sizes.F, sizes),
            sizes.F * sizeof(float)
        );
    }
    std::fill(to + count * sizes.F, to + n * sizes.F, 0.0f);
}

inline void pack_values(
    const at::BFloat16* value, const int64_t* blocks, int64_t h, int64_t first, int64_t n,
    at::BFloat16* to, const Sizes& sizes
) {
    const auto bits_of = [&](int64_t j) {
        return j >= sizes.L() ? nullptr : reinterpret_cast<const uint16_t*>(
            column(value, blocks, h, j, sizes.F, sizes)
        );
    };
    for (int64_t j = 0; j < n; j += 2) {
        const uint16_t *even = bits_of(first + j), *odd = bits_of(first + j + 1);
        auto* pairs = reinterpret_cast<uint32_t*>(to + j * sizes.F);
        if (odd != nullptr) {
            #pragma omp simd
            for (int64_t f = 0; f < sizes.F; ++f) pairs[f] = even[f] | uint32_t(odd[f]) << 16;
        } else {
            for (int64_t f = 0; f < sizes.F; ++f) pairs[f] = even == nullptr ? 0 : even[f];
        }
    }
}

// What a thread needs for a tile: the query, scores, what is added to them, their exponentials in
// T, and sums
template <typename T> struct Scratch {
    std::unique_ptr<T[]> query, weights;
    std::unique_ptr<float[]> scores, bias, sums, largest, total;
    std::unique_ptr<const float*[]> biases;

    Scratch(int64_t rows, const Sizes& sizes)
        : query(new T[rows * sizes.E]),
          weights(std::is_same_v<T, float> ? nullptr : new T[rows * TILE_COLUMNS]),
          scores(new float[rows * TILE_COLUMNS]), bias(new float[rows * TILE_COLUMNS]),
          sums(new float[rows * sizes.F]),
          largest(new float[rows]), total(new float[rows]), biases(new const float*[rows]) {}
};

// The larger one; undefined once one is, as infinity is as a score: infinity less itself
inline float larger(float a, float b) {
    if (a != a || b != b || a == -NEVER || b == -NEVER) return UNDEFINED;
    return std::max(a, b);
}

// The largest of scores * scale + bias, which the scores become if there is a bias
inline float largest_of(float* scores, float scale, const float* bias, int64_t n) {
    Floats most(NEVER), odd(0.0f);
    const Floats factor(scale), zero(0.0f);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        auto x = Floats::loadu(scores + j);
        if (bias == nullptr) {
            // not `maximum`, which looks for NaN each time; NaN and infinities times 0 are NaN
            x = x * factor;
            odd = at::vec::fmadd(x, zero, odd);
            most = at::vec::clamp_min(x, most);
        } else {
            x = at::vec::fmadd(x, factor, Floats::loadu(bias + j));
            x.store(scores + j);
            most = at::vec::maximum(most, x);
        }
    }
    float found = at::vec::vec_reduce_all<float>(
        [](Floats& a, Floats& b) { return at::vec::maximum(a, b); }, most + odd
    );
    if (bias == nullptr && found != found) {  // one by one: less than any is no fault
        found = NEVER;
        j = 0;
    }
    for (; j < n; ++j) {
        const float x = scores[j] * scale + (bias == nullptr ? 0 : bias[j]);
        if (bias != nullptr) scores[j] = x;
        found = larger(found, x);
    }
    return found;
}

// For weights in bfloat16 a coarser function is as good
C10_ALWAYS_INLINE Floats exp_for(const float*, const Floats& x) { return x.exp_u20(); }
C10_ALWAYS_INLINE Floats exp_for(const at::BFloat16*, const Floats& x) { return x.fexp_u20(); }

// weights = exp(scores * scale - most); their sum
template <typename T> inline float exponentials(
    const float* scores, float scale, float most, int64_t n, T* weights
) {
    Floats total(0.0f);
    const Floats factor(scale), less(-most);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        const auto x = at::vec::fmadd(Floats::loadu(scores + j), factor, less);
        const auto y = exp_for(weights, x);
        total = total + y;
        keep(weights + j, y);
    }
    float sum = at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return a + b; }, total);
    for (; j < n; ++j) {
        const float y = std::exp(scores[j] * scale - most);
        sum += y;
        weights[j] = y;
    }
    return sum;
}

// n scores of a row become weights, of `width` in memory; what was summed before is brought to the
// same scale
template <typename T> inline void weigh(
    float* scores, int64_t n, int64_t width, float scale, const float* bias, T* weights,
    float* sums, int64_t F, float& largest, float& total
) {
    const float most = larger(largest, largest_of(scores, scale, bias, n));
    if (most == NEVER) {
        std::fill(weights, weights + width, T(0.0f));
        return;
    }
    const float before = std::exp(largest - most);
    total = total * before
        + exponentials(scores, bias == nullptr ? scale : 1, most, n, weights);
    std::fill(weights + n, weights + width, T(0.0f));
    if (before != 1.0f) {
        #pragma omp simd
        for (int64_t f = 0; f < F; ++f) sums[f] *= before;
    }
    largest = most;
}

// What was summed, by the total of its weights; zeros if nothing was seen
template <typename T> inline void finish(const float* sums, float total, int64_t F, T* y) {
    const float share = total == 0 ? 0 : 1 / total;
    int64_t f = 0;
    for (; f + LANES <= F; f += LANES) keep(y + f, Floats::loadu(sums + f) * Floats(share));
    for (; f < F; ++f) y[f] = sums[f] * share;
}

// Tokens first to first + count of one row and head of keys
template <typename T, typename S> void attend_tile(
    const T* query, const T* keys, const T* values, const Mask<S>& mask, float scale, T* y,
    int64_t b, int64_t h, int64_t first, int64_t count, Scratch<T>& scratch, const Sizes& sizes
) {
    constexpr bool in_pairs = !std::is_same_v<T, float>;
    const int64_t E = sizes.E, F = sizes.F, rows = sizes.G * count;
    const int64_t all_rows = rounded(rows, ROWS_STEP), heads = sizes.H * sizes.G;
    const auto place = [&](int64_t r) {  // of head and token r, in the query and the result
        return (b * sizes.T + first + r % count) * heads + h * sizes.G + r / count;
    };
    const auto seen_by = [&](int64_t r) {
        return mask.data + b * mask.row + (h * sizes.G + r / count) * mask.head
            + (first + r % count) * mask.token;
    };
    T* given = scratch.query.get();
    for (int64_t r = 0; r < rows; ++r) std::copy_n(query + place(r) * E, E, given + r * E);
    std::fill(given + rows * E, given + all_rows * E, T(0.0f));
    float *scores = scratch.scores.get(), *sums = scratch.sums.get();
    std::fill(sums, sums + all_rows * F, 0.0f);
    std::fill(scratch.largest.get(), scratch.largest.get() + rows, NEVER);
    std::fill(scratch.total.get(), scratch.total.get() + rows, 0.0f);
    T* weights;
    if constexpr (in_pairs) weights = scratch.weights.get(); else weights = scores;
    const int64_t looked_at = mask.head == 0 ? count : rows;
    for (int64_t tile = 0; tile < sizes.tiles(); ++tile) {
        const int64_t width = sizes.width(tile);
        int64_t start = tile * TILE_COLUMNS, columns = width;  // of what is seen
        bool changed = false;
        if (mask.data != nullptr) {
            Seen seen;
            const int64_t n = std::min(width, sizes.L() - start);
            for (int64_t r = 0; r < looked_at; ++r) seen.look(seen_by(r) + start, n);
            if (seen.last() == 0) continue;
            start += seen.first() * COLUMNS_STEP;
            columns = (seen.last() - seen.first()) * COLUMNS_STEP;
            changed = seen.is_changed();
        }
        const int64_t n = std::min(columns, sizes.L() - start);
        const int64_t skipped = start - tile * TILE_COLUMNS;
        at::native::cpublas::brgemm(
            all_rows, columns, E, E, width, columns, false, given,
            keys + (start - skipped) * E + skipped * (in_pairs ? 2 : 1), scores, in_pairs
        );
        for (int64_t r = 0; changed && r < looked_at; ++r) {
            scratch.biases[r] = bias_of(
                seen_by(r) + start, n, scratch.bias.get() + r * TILE_COLUMNS
            );
        }
        for (int64_t r = 0; r < rows; ++r) {
            weigh(
                scores + r * columns, n, columns, scale,
                changed ? scratch.biases[r % looked_at] : nullptr, weights + r * columns,
                sums + r * F, F, scratch.largest[r], scratch.total[r]
            );
        }
        std::fill(weights + rows * columns, weights + all_rows * columns, T(0.0f));
        at::native::cpublas::brgemm(
            all_rows, F, columns, columns, F, F, true, weights, values + start * F, sums, in_pairs
        );
    }
    for (int64_t r = 0; r < rows; ++r) {
        finish(sums + r * F, scratch.total[r], F, y + place(r) * F);
    }
}

template <typename T, typename S> void attend_tiles(
    const T* query, const T* key, const T* value, const int64_t* blocks, const Mask<S>& mask,
    float scale, T* y, const Sizes& sizes, int threads
) {
    const int64_t pairs = sizes.B * sizes.H, columns = sizes.columns(), tiles = sizes.tiles();
    if (pairs == 0) return;
    std::unique_ptr<T[]> keys(new T[pairs * columns * sizes.E]);
    std::unique_ptr<T[]> values(new T[pairs * columns * sizes.F]);
    // tokens of a tile: all heads of the query that share keys are in it
    int64_t count = std::max<int64_t>(8, TILE_ROWS / sizes.G / 8 * 8);
    if (pairs * ceil_div(sizes.T, count) < 4 * threads) count = 8;
    const int64_t parts = ceil_div(sizes.T, count);
    // What may fail is done before there are threads: an exception of one would end the process.
    std::vector<Scratch<T>> scratch;
    for (int i = 0; i < threads; ++i) {
        scratch.emplace_back(rounded(sizes.G * count, ROWS_STEP), sizes);
    }
    try_products<T>();
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs * tiles; ++i) {
            const int64_t pair = i / tiles, tile = i % tiles, h = pair % sizes.H;
            const int64_t start = tile * TILE_COLUMNS, at = pair * columns + start;
            const int64_t* mine = blocks + pair / sizes.H * sizes.W;
            const int64_t width = sizes.width(tile);
            pack_keys(key, mine, h, start, width, keys.get() + at * sizes.E, sizes);
            pack_values(value, mine, h, start, width, values.get() + at * sizes.F, sizes);
        }
        #pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pairs * parts; ++i) {
            const int64_t pair = i / parts, first = i % parts * count;
            attend_tile(
                query, keys.get() + pair * columns * sizes.E,
                values.get() + pair * columns * sizes.F, mask, scale, y,
                pair / sizes.H, pair % sizes.H, first, std::min(count, sizes.T - first),
                scratch[omp_get_thread_num()], sizes
            );
        }
        if (!std::is_same_v<T, float>) at::native::cpublas::brgemm_release(true);
    }
}

}  // namespace polar_fx
#endif
"""
