"""The functions of the kernel for `quantized_linear` (quantized_kernel.py), in C++. They use those
of the kernel for weights in floats (linear_source.py).
"""

from . import integers_source

# Shape legend: M rows of x, K their size, N rows of the weight.
SOURCE = (
    integers_source.SOURCE
    + r"""
#ifndef POLAR_FX_QUANTIZED_LINEAR
#define POLAR_FX_QUANTIZED_LINEAR
namespace polar_fx {

// How many rows of x and of the weight are multiplied at a time. Making numbers of a weight costs
// more than reading x, so the rows of x are more than for floats. With fewer than four of them,
// there are more of the weight: what is done once for several short rows, such as adding up the
// lanes of their sums, is done less often.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int X_ROWS_OF_INTEGERS = 8, W_ROWS_OF_INTEGERS = 2, W_ROWS_WITH_FEW = 4;
#else  // there are fewer registers
constexpr int X_ROWS_OF_INTEGERS = 4, W_ROWS_OF_INTEGERS = 1, W_ROWS_WITH_FEW = 1;
#endif
constexpr int64_t integers_at_a_time(int64_t M) {
    return M < 4 ? W_ROWS_WITH_FEW : W_ROWS_OF_INTEGERS;
}
// For more rows of x than tiles are for, the weight is made into floats, so many numbers at a time,
// and the library multiplies.
constexpr int64_t NUMBERS_AT_A_TIME = 1 << 20;

// Up to how many rows of x loops are the fastest way, and then tiles, for which a weight's numbers
// are made once
template <typename T> inline Ways fastest_of_integers() { return {Step<T>::most, 0}; }
#if defined(CPU_CAPABILITY_AVX512)
template <> inline Ways fastest_of_integers<float>() { return {24, 256}; }
#if defined(__AMX_BF16__)
template <> inline Ways fastest_of_integers<at::BFloat16>() { return {10, 384}; }
#elif defined(__AVX512BF16__)
template <> inline Ways fastest_of_integers<at::BFloat16>() { return {24, 256}; }
#endif
#endif

// A scale, and a zero, for each of `groups` groups of a row; int8 has one scale a row, no zeros
template <typename S> struct Scales {
    const S *scale, *zero;
    int64_t groups;
};

// One of several weights over the same x: N rows, read in so many groups, whose results begin at
// `first` in a row of y
template <typename D, typename S, typename T> struct Weight {
    const D* data;
    Scales<S> of;
    const T* bias;
    int64_t N, groups, first;
};

inline Sums floats(const float* p, int64_t n) { return Sums::loadu(p, n); }
inline Sums floats(const at::BFloat16* p, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return Sums(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
#else
    float wide[Sums::size()] = {};
    for (int64_t i = 0; i < n; ++i) wide[i] = p[i];
    return Sums::loadu(wide);
#endif
}

// Rows of x in the order of blocks, zeros after them; and the sums of their groups
template <typename F> struct Given {
    using X = typename F::X;
    int64_t size, groups;
    std::unique_ptr<X[]> memory;
    std::unique_ptr<float[]> of_groups;
    X* data;
    Given(int64_t M, int64_t K, int64_t groups)
        : size(rounded(K, F::BLOCK)), groups(groups), memory(new X[M * size + 64 / sizeof(X)]),
          of_groups(new float[M * groups]) {
        // vectors must not lie in two lines of the cache: each is read once for each row of x
        const auto address = reinterpret_cast<uintptr_t>(memory.get());
        data = reinterpret_cast<X*>((address + 63) / 64 * 64);
    }
    X* row(int64_t m) const { return data + m * size; }
    float* sums(int64_t m) const { return of_groups.get() + m * groups; }
};

template <typename W, typename T, typename S>
inline Given<Form<W, T>> given_of(const T* x, const Scales<S>& of, int64_t M, int64_t K) {
    using F = Form<W, T>;
    const int64_t groups = of.zero == nullptr ? 0 : rounded(of.groups, Sums::size());
    Given<F> made(M, K, groups);
    for (int64_t m = 0; m < M; ++m) {
        auto* row = made.row(m);
        float* sums = made.sums(m);
        const T* from = x + m * K;
        int64_t k = 0;
        for (; k + F::BLOCK <= K; k += F::BLOCK) F::arrange(from + k, row + k);
        if (k < K) {
            T last[F::BLOCK] = {};
            std::copy(from + k, from + K, last);
            F::arrange(last, row + k);
        }
        for (int64_t g = 0; g < groups; g += Sums::size()) {
            Sums parts[Sums::size()];
            for (int64_t i = 0; i < Sums::size(); ++i) {
                parts[i] = Sums(0);
                if (g + i >= of.groups) continue;
                const T* own = from + (g + i) * GROUP;
                for (int64_t j = 0; j < GROUP; j += Sums::size()) {
                    parts[i] = parts[i] + wide(own + j);
                }
            }
            alignas(64) float found[room_for(Sums::size())];
            totals<Sums::size()>(parts, found);
            std::copy(found, found + Sums::size(), sums + g);
        }
    }
    return made;
}

// A block of R rows of the weight, with M rows of x, added to their sums
template <bool WHOLE, int M, int R, typename W, typename F, typename S>
C10_ALWAYS_INLINE void add_block(
    Sums (&sums)[M][R], const typename F::X* x, int64_t x_step, const typename W::Data* w,
    int64_t w_step, const S* scale, int64_t s_step, int64_t left
) {
    constexpr bool LATE = F::is_scaled_late(M);
    typename F::V part[R][F::PARTS];
    Sums scales[R];
    #pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        F::template load<WHOLE>(w + r * w_step, left, part[r]);
        if constexpr (W::grouped) {
            const S* own = scale + r * s_step;
            scales[r] = F::template scales<WHOLE>(own, left, 0);
            if constexpr (!LATE) {
                #pragma GCC unroll 8
                for (int i = 0; i < F::PARTS; ++i) {
                    part[r][i] = part[r][i] *
                        (F::alike ? scales[r] : F::template scales<WHOLE>(own, left, i));
                }
            }
        }
    }
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        Sums of_block[R];
        #pragma GCC unroll 4
        for (int r = 0; r < R; ++r) of_block[r] = LATE ? Sums(0) : sums[m][r];
        #pragma GCC unroll 8
        for (int i = 0; i < F::PARTS; ++i) {
            const auto of_x = F::read(x + m * x_step, i);
            #pragma GCC unroll 4
            for (int r = 0; r < R; ++r) of_block[r] = F::add(part[r][i], of_x, of_block[r]);
        }
        #pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            sums[m][r] =
                LATE ? at::vec::fmadd(of_block[r], scales[r], sums[m][r]) : of_block[r];
        }
    }
}

// M rows of x from m0 on, times R of the weight from n0 on, `apart` from each other. Asks for rows
// meanwhile, and for the scales of the rows that come `far` rows later. Not inline: it is compiled
// once for all linears of a region.
template <int M, int R, typename W, typename S, typename T>
C10_NOINLINE void multiply_integers(
    const Given<Form<W, T>>& x, int64_t m0, const Weight<typename W::Data, S, T>& weight, T* y,
    int64_t stride, int64_t n0, int64_t K, Ask ask, int64_t far, int64_t apart
) {
    using F = Form<W, T>;
    const auto& of = weight.of;
    Sums sums[M][R];
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[m][r] = Sums(0);
    }
    const int64_t row_bytes = W::row_bytes(K), w_step = apart * row_bytes;
    const int64_t s_step = apart * of.groups;
    const typename W::Data* w = weight.data + n0 * row_bytes;
    const S* scale = of.scale + n0 * of.groups;
    const auto* given = x.row(m0);
    for (int r = 0; W::grouped && far > 0 && r < R; ++r) {
        const int64_t later = (n0 + r * apart + far) * of.groups;
        for (int64_t g = 0; g < of.groups; g += 64 / sizeof(S)) {
            __builtin_prefetch(of.scale + later + g);
            __builtin_prefetch(of.zero + later + g);
        }
    }
    int64_t k = 0;
    for (; k + F::BLOCK <= K; k += F::BLOCK, ask.start += ask.step) {
        #pragma GCC unroll 4
        for (int r = 0; r < R; ++r) __builtin_prefetch(ask.start + r * ask.apart);
        add_block<true, M, R, W, F>(sums, given + k, x.size, w, w_step, scale, s_step, F::bytes);
        w += F::bytes;
        scale += F::BLOCK / GROUP;
    }
    if (k < K) {
        const int64_t left = W::row_bytes(K - k);
        add_block<false, M, R, W, F>(sums, given + k, x.size, w, w_step, scale, s_step, left);
    }
    for (int64_t g = 0; g < x.groups; g += Sums::size()) {
        for (int r = 0; r < R; ++r) {
            const int64_t n = std::min<int64_t>(of.groups - g, Sums::size());
            const Sums zeros = floats(of.zero + (n0 + r * apart) * of.groups + g, n);
            for (int m = 0; m < M; ++m) {
                const Sums of_x = Sums::loadu(x.sums(m0 + m) + g);
                sums[m][r] = at::vec::fmadd(zeros, of_x, sums[m][r]);
            }
        }
    }
    alignas(64) float found[room_for(M * R)];
    totals<M * R>(&sums[0][0], found);
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int64_t n = n0 + r * apart;
            float result = found[m * R + r];
            if constexpr (!W::grouped) result *= float(of.scale[n]);
            if (weight.bias != nullptr) result += float(weight.bias[n]);
            y[(m0 + m) * stride + weight.first + n] = result;
        }
    }
}

// R rows of the weight from n0 on, `apart` from each other, read from memory once, with all M rows
// of x; asks for rows, and the scales of the rows that come `far` rows later, meanwhile
template <int R, typename W, typename S, typename T>
inline void rows_of_integers(
    const Given<Form<W, T>>& x, const Weight<typename W::Data, S, T>& weight, T* y, int64_t stride,
    int64_t n0, int64_t M, int64_t K, const Asks& asks, int64_t far, int64_t apart
) {
    // so many rows of the weight come with fewer than four of x
    constexpr int SIZE = R > W_ROWS_OF_INTEGERS ? 2 : X_ROWS_OF_INTEGERS;
    each_block_of_rows<SIZE>(M, [&](auto count, int64_t m) {
        const Ask ask = asks.part(m, count(), K / Form<W, T>::BLOCK);
        const int64_t later = m == 0 ? far : 0;
        multiply_integers<count(), R, W>(x, m, weight, y, stride, n0, K, ask, later, apart);
    });
}

// Group g of a weight's rows, `size` at most, as far apart as there are groups
template <typename W, typename S, typename T>
inline void group_of_integers(
    int64_t g, int64_t size, const Given<Form<W, T>>& x,
    const Weight<typename W::Data, S, T>& weight, T* y, int64_t stride, int64_t M, int64_t K
) {
    const int64_t apart = weight.groups, bytes = W::row_bytes(K);
    const int64_t ahead = bytes_ahead(M, bytes), far = W::grouped ? ahead / bytes : 0;
    const auto multiply_from = [&](auto count, int64_t n) {
        const auto* start = weight.data + n * bytes + ahead;
        const Asks asks(start, apart * bytes, Form<W, T>::bytes, M);
        rows_of_integers<count(), W>(x, weight, y, stride, n, M, K, asks, far, apart);
    };
    if (g + (size - 1) * apart < weight.N) {
        if (size == W_ROWS_OF_INTEGERS) {
            multiply_from(std::integral_constant<int, W_ROWS_OF_INTEGERS>(), g);
        } else {
            multiply_from(std::integral_constant<int, W_ROWS_WITH_FEW>(), g);
        }
        return;
    }
    for (int64_t n = g; n < weight.N; n += apart) {
        multiply_from(std::integral_constant<int, 1>(), n);
    }
}

// The numbers of a group, a byte each
inline void in_order(const uint8_t* pairs, int8_t* bytes) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m128i both = _mm_loadu_si128((const __m128i*)pairs), four_bits = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(both, four_bits);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), four_bits);
    _mm_store_si128((__m128i*)bytes, _mm_unpacklo_epi8(low, high));
    _mm_store_si128((__m128i*)bytes + 1, _mm_unpackhi_epi8(low, high));
#else
    for (int64_t i = 0; i < GROUP / 2; ++i) {
        bytes[2 * i] = pairs[i] & 15;
        bytes[2 * i + 1] = pairs[i] >> 4;
    }
#endif
}

// Row n of the weight as numbers of type T [K]
template <typename W, typename T, typename S>
inline void as_floats(
    T* made, const typename W::Data* w, const Scales<S>& of, int64_t n, int64_t K
) {
    const typename W::Data* row = w + n * W::row_bytes(K);
    alignas(16) int8_t bytes[GROUP];
    const int64_t step = W::grouped ? int64_t(GROUP) : K;
    for (int64_t g = 0; g < of.groups; ++g) {
        const float scale = of.scale[n * of.groups + g];
        const float zero = W::grouped ? float(of.zero[n * of.groups + g]) : 0.0f;
        const auto* numbers = reinterpret_cast<const int8_t*>(row);
        if constexpr (W::grouped) {
            in_order(row + g * (GROUP / 2), bytes);
            numbers = bytes;
        }
        T* to = made + g * step;
        int64_t k = 0;
        for (; k + Sums::size() <= step; k += Sums::size()) {
            keep(to + k, at::vec::fmadd(widened(numbers + k), Sums(scale), Sums(zero)));
        }
        for (; k < step; ++k) to[k] = float(numbers[k]) * scale + zero;
    }
}

// Rows of a weight as numbers of type T, for tiles (many_rows_source.py)
template <typename W, typename S, typename T> struct MadeRowsOf {
    static constexpr bool are_made = true;
    const Weight<typename W::Data, S, T>& weight;
    int64_t K;
    const T* operator()(int64_t first, int64_t count, T* place) const {
        for (int64_t n = 0; n < count; ++n) {
            as_floats<W>(place + n * K, weight.data, weight.of, first + n, K);
        }
        return place;
    }
};

}  // namespace polar_fx
#endif
"""
)
