"""The functions of the kernel for `block_attention` (block_attention.py) over one token a row, in
C++. They use those for several tokens (tiles_source.py), and of the kernel for linears
(linear_source.py).
"""

# Shape legend: B rows, H heads of keys and values, G heads of the query for each, E and F sizes of
# a head of keys and of values, C columns of a block, W blocks of a row, L = W * C.
SOURCE = r"""
#ifndef POLAR_FX_ROW_ATTENTION
#define POLAR_FX_ROW_ATTENTION
namespace polar_fx {

// So many columns have scores at a time; a task of a thread has at least so many columns.
constexpr int64_t STRIP = 64, LEAST = 128;

// sums[m * F + f] of M heads and P vectors of f += weights[m * STRIP + c] * values[c * F + f] of n
// columns; asks for what lies `ahead` elements further on
template <int M, int P, typename T> C10_ALWAYS_INLINE void mix_part(
    const float* weights, const T* values, int64_t n, int64_t F, float* sums, int64_t ahead
) {
    Floats part[M][P];
    #pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 4
        for (int p = 0; p < P; ++p) part[m][p] = Floats::loadu(sums + m * F + p * LANES);
    }
    for (int64_t c = 0; c < n; ++c) {
        Floats x[P];
        #pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            x[p] = wide(values + c * F + p * LANES);
            __builtin_prefetch(values + c * F + p * LANES + ahead);
        }
        #pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Floats weight(weights[m * STRIP + c]);
            #pragma GCC unroll 4
            for (int p = 0; p < P; ++p) part[m][p] = at::vec::fmadd(weight, x[p], part[m][p]);
        }
    }
    #pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 4
        for (int p = 0; p < P; ++p) part[m][p].store(sums + m * F + p * LANES);
    }
}

template <int M, typename T> C10_NOINLINE void mix(
    const float* weights, const T* values, int64_t n, int64_t F, float* sums, int64_t ahead
) {
    int64_t f = 0;
    for (; f + 4 * LANES <= F; f += 4 * LANES) {
        mix_part<M, 4>(weights, values + f, n, F, sums + f, ahead);
    }
    for (; f + LANES <= F; f += LANES) {
        mix_part<M, 1>(weights, values + f, n, F, sums + f, ahead);
    }
    for (; f < F; ++f) {
        for (int m = 0; m < M; ++m) {
            for (int64_t c = 0; c < n; ++c) {
                sums[m * F + f] += weights[m * STRIP + c] * float(values[c * F + f]);
            }
        }
    }
}

// What the heads of one row that share keys have of some columns
struct Partial {
    float *sums, *largest, *total;
};

// The columns of a row, a block at a time: `body` gets the first, how many, and how far from
// it the same columns of the next block lie, in a store of heads of `size`
template <typename T, typename Body> C10_ALWAYS_INLINE void each_block(
    const T* store, const int64_t* blocks, int64_t h, int64_t first, int64_t n, int64_t size,
    const Sizes& sizes, const Body& body
) {
    for (int64_t j = 0; j < n;) {
        const int64_t at = first + j, count = std::min(sizes.C - at % sizes.C, n - j);
        const T* here = column(store, blocks, h, at, size, sizes);
        const int64_t next = at + sizes.C < sizes.L() ? at + sizes.C : at;
        body(here, j, count, column(store, blocks, h, next, size, sizes) - here);
        j += count;
    }
}

// Columns first to last of row b and head h of keys; `scores` has room for G * STRIP
template <typename T, typename S> void attend_columns(
    const typename Step<T>::X* query, const T* key, const T* value, const int64_t* blocks,
    const Mask<S>& mask, float scale, int64_t b, int64_t h, int64_t first, int64_t last,
    float* scores, float* bias, const Partial& partial, const Sizes& sizes
) {
    const int64_t E = sizes.E, F = sizes.F, G = sizes.G, biases = mask.head == 0 ? 1 : G;
    std::fill(partial.sums, partial.sums + G * F, 0.0f);
    std::fill(partial.largest, partial.largest + G, NEVER);
    std::fill(partial.total, partial.total + G, 0.0f);
    for (int64_t start = first; start < last; start += STRIP) {
        const int64_t n = std::min(STRIP, last - start);
        const auto by = [&](int64_t g) {
            return mask.data + b * mask.row + (h * G + g) * mask.head + start;
        };
        Seen seen;
        for (int64_t g = 0; mask.data != nullptr && g < biases; ++g) seen.look(by(g), n);
        if (mask.data != nullptr && seen.last() == 0) continue;
        const bool changed = mask.data != nullptr && seen.is_changed();
        each_block(key, blocks, h, start, n, E, sizes, [&](
            const T* keys, int64_t j, int64_t count, int64_t ahead
        ) {
            const int64_t bytes = E * sizeof(T);
            const Asks asks(keys + ahead, bytes, Step<T>::size * sizeof(T), G);
            const auto score = [&](auto some, int64_t r) {
                const T *row = keys + r * E, *none = nullptr;
                const Asks own = asks.from(r * bytes);
                rows<some()>(query, row, none, scores + j + r, G, STRIP, E, own);
            };
            int64_t r = 0;
            for (; r + W_ROWS <= count; r += W_ROWS) {
                score(std::integral_constant<int, W_ROWS>(), r);
            }
            // blocks have an even number of columns
            for (; r < count; r += 2) score(std::integral_constant<int, 2>(), r);
        });
        const float* added = nullptr;
        for (int64_t g = 0; g < G; ++g) {
            if (changed && g < biases) added = bias_of(by(g), n, bias);
            weigh(
                scores + g * STRIP, n, n, scale, added, scores + g * STRIP, partial.sums + g * F,
                F, partial.largest[g], partial.total[g]
            );
        }
        each_block(value, blocks, h, start, n, F, sizes, [&](
            const T* values, int64_t j, int64_t count, int64_t ahead
        ) {
            int64_t g = 0;
            for (; g + 4 <= G; g += 4) {
                mix<4>(scores + g * STRIP + j, values, count, F, partial.sums + g * F, ahead);
            }
            if (g + 2 <= G) {
                mix<2>(scores + g * STRIP + j, values, count, F, partial.sums + g * F, ahead);
                g += 2;
            }
            if (g < G) {
                mix<1>(scores + g * STRIP + j, values, count, F, partial.sums + g * F, ahead);
            }
        });
    }
}

// What the parts of one head have, brought to the same scale: a result of F
template <typename T> inline void join(
    const Partial* parts, int64_t count, int64_t g, int64_t F, T* y
) {
    float most = NEVER, total = 0;
    for (int64_t i = 0; i < count; ++i) most = larger(most, parts[i].largest[g]);
    if (most == NEVER) {
        std::fill(y, y + F, T(0.0f));
        return;
    }
    float* sums = parts[0].sums + g * F;
    for (int64_t i = 0; i < count; ++i) {
        const float factor = std::exp(parts[i].largest[g] - most);
        total += parts[i].total[g] * factor;
        const float* more = parts[i].sums + g * F;
        #pragma omp simd
        for (int64_t f = 0; f < F; ++f) sums[f] = (i == 0 ? 0 : sums[f]) + more[f] * factor;
    }
    finish(sums, total, F, y);
}

template <typename T, typename S> void attend_rows(
    const T* query, const T* key, const T* value, const int64_t* blocks, const Mask<S>& mask,
    float scale, T* y, const Sizes& sizes, int threads
) {
    const int64_t pairs = sizes.B * sizes.H, G = sizes.G, E = sizes.E, F = sizes.F;
    if (pairs == 0) return;
    const int64_t wanted = std::max<int64_t>(1, 4 * threads / pairs);
    const int64_t columns = std::max(LEAST, rounded(ceil_div(sizes.L(), wanted), STRIP));
    const int64_t parts = std::max<int64_t>(1, ceil_div(sizes.L(), columns));
    std::unique_ptr<typename Step<T>::X[]> place;
    const auto* given = as_read(query, pairs * G * E, place);
    std::unique_ptr<float[]> numbers(new float[pairs * parts * G * (F + 2)]);
    std::unique_ptr<Partial[]> partials(new Partial[pairs * parts]);
    for (int64_t i = 0; i < pairs * parts; ++i) {
        float* mine = numbers.get() + i * G * (F + 2);
        partials[i] = {mine, mine + G * F, mine + G * (F + 1)};
    }
    const int64_t room = (G + 1) * STRIP;  // of a thread, for scores and what is added to them
    std::unique_ptr<float[]> scores(new float[threads * room]);
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < pairs * parts; ++i) {
        const int64_t pair = i / parts, first = i % parts * columns;
        float* mine = scores.get() + omp_get_thread_num() * room;
        attend_columns(
            given + pair * G * E, key, value, blocks + pair / sizes.H * sizes.W, mask, scale,
            pair / sizes.H, pair % sizes.H, first, std::min(first + columns, sizes.L()), mine,
            mine + G * STRIP, partials[i], sizes
        );
        for (int64_t g = 0; parts == 1 && g < G; ++g) {
            join(&partials[i], 1, g, F, y + (pair * G + g) * F);
        }
    }
    for (int64_t i = 0; parts > 1 && i < pairs * G; ++i) {
        join(&partials[i / G * parts], parts, i % G, F, y + i * F);
    }
}

}  // namespace polar_fx
#endif
"""
