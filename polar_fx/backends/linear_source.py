"""The functions of the kernel for `row_linear` (row_kernel.py), in C++: loops for a few rows, and
what many_rows_source.py has for more. The kernels for integers (quantized_kernel.py), for experts
(grouped_kernel.py) and for attention (block_attention.py) use them too.
"""

from . import many_rows_source, products_source

# Shape legend: M rows of x, K their size, N rows of the weight.
SOURCE = (
    products_source.SOURCE
    + r"""
#ifndef POLAR_FX_LINEAR
#define POLAR_FX_LINEAR
namespace polar_fx {

using Sums = Floats;

// Floats from memory, and to memory
inline Sums wide(const float* p) { return Sums::loadu(p); }
inline Sums wide(const at::BFloat16* p) {
    Sums x;
    at::vec::load_fp32_from_bf16(p, x);
    return x;
}
inline void keep(float* p, const Sums& x) { x.store(p); }
inline void keep(at::BFloat16* p, const Sums& x) {
    // the instruction makes numbers below 2^-126 zeros
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
    at::vec::convert_from_float<at::BFloat16>(x, x).store(p, Sums::size());
#endif
}

// How many rows of x and of the weight are multiplied at a time: their sums stay in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int X_ROWS = 4, W_ROWS = 4;
#else
constexpr int X_ROWS = 4, W_ROWS = 2;
#endif
// How many rows of a weight, with M rows of x: two where reading is all that counts
constexpr int64_t rows_at_a_time(int64_t M) { return M < X_ROWS ? 2 : W_ROWS; }

// What is read next is asked for in equal parts with all blocks of x, from so many rows of x on.
constexpr int64_t LEAST_EVENLY = 8;
// Bytes between what is read of a weight's rows of `row_bytes`, with M rows of x, and what is asked
// for. With few rows of x, Intel's processors do not see by themselves, among reads of x, that the
// weight is read in order; AMD's do, and become slower if they are asked.
inline int64_t bytes_ahead(int64_t M, int64_t row_bytes) {
    if (M >= LEAST_EVENLY) return std::max<int64_t>(row_bytes, 1024);
#if defined(__x86_64__)
    static const bool is_amd = __builtin_cpu_is("amd");
    if (is_amd) return 0;
#endif
    return 4096;
}

// What a step along K takes of a row: `X` is the type in which x is read. The library is faster
// for more than `most` rows of x, where tiles are not.
template <typename T> struct Step;

template <> struct Step<float> {
    using X = float;
    static constexpr int64_t size = Sums::size(), most = 64;
    template <typename P> static Sums load(const P* p) { return Sums::loadu(p); }
    template <typename P> static Sums load(const P* p, int64_t n) { return Sums::loadu(p, n); }
    static Sums add(const Sums& w, const Sums& x, const Sums& sums) {
        return at::vec::fmadd(w, x, sums);
    }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <> struct Step<at::BFloat16> {
    using X = at::BFloat16;
    static constexpr int64_t size = 32, most = 24;
    static __m512i load(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
    static __m512i load(const at::BFloat16* p, int64_t n) {
        return _mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p);
    }
    static Sums add(__m512i w, __m512i x, const Sums& sums) {
        return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
    }
};
#else
template <> struct Step<at::BFloat16> {
    using X = float;
    static constexpr int64_t size = Sums::size(), most = Step<float>::most;
    static Sums load(const float* p) { return Sums::loadu(p); }
    static Sums load(const float* p, int64_t n) { return Sums::loadu(p, n); }
    static Sums load(const at::BFloat16* p) {
        Sums wide;
        at::vec::load_fp32_from_bf16(p, wide);
        return wide;
    }
    static Sums load(const at::BFloat16* p, int64_t n) {
        float wide[size];
        for (int64_t i = 0; i < n; ++i) wide[i] = p[i];
        return Sums::loadu(wide, n);
    }
    static Sums add(const Sums& w, const Sums& x, const Sums& sums) {
        return at::vec::fmadd(w, x, sums);
    }
};
#endif

#if defined(CPU_CAPABILITY_AVX512)
// The sums of each four lanes beside each other, of one vector after the other
C10_ALWAYS_INLINE __m512 quarters(
    const Sums& a, const Sums& b, const Sums& c, const Sums& d
) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
#endif

// found[i] is the sum of the lanes of sums[i]. With AVX-512, four vectors or sixteen at a time: one
// by one, this takes longer than reading a short row. Always in the same order: x has the same
// results beside any others. `found` lies at a multiple of 64 bytes and has `room_for` so many
// floats, all of which may be written.
constexpr int room_for(int count) { return (count + 15) / 16 * 16; }
template <int COUNT> C10_ALWAYS_INLINE void totals(const Sums* sums, float* found) {
#if defined(CPU_CAPABILITY_AVX512)
    const Sums none(0);
    const auto at = [&](int i) { return i < COUNT ? sums[i] : none; };
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    #pragma GCC unroll 4
    for (int i = 0; i < COUNT; i += 16) {
        __m512 part[4];
        #pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int k = i + 4 * j;
            part[j] = k < COUNT ? quarters(at(k), at(k + 1), at(k + 2), at(k + 3)) : __m512(none);
        }
        const __m512 a = halves(part[0], part[1]);
        const __m512 b = COUNT - i > 8 ? halves(part[2], part[3]) : __m512(none);
        const __m512 sum = _mm512_add_ps(
            _mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)
        );
        _mm512_store_ps(found + i, sum);  // what is read next would wait for a masked store
    }
#else
    for (int i = 0; i < COUNT; ++i) {
        found[i] = at::vec::vec_reduce_all<float>([](Sums& a, Sums& b) { return a + b; }, sums[i]);
    }
#endif
}

// What is asked for while rows are multiplied: rows that begin at `start`, `apart` bytes from each
// other, `step` bytes in a step along K.
struct Ask {
    const char* start;
    int64_t apart, step;
};

// As much of rows from `start` on as is read, `bytes` a step, with M rows of x: what is asked for
// with each block of x, all of it or its part.
class Asks {
    static constexpr int64_t FINE = 256;  // a row's part of a step may be less than a byte
    const char* start;
    int64_t apart, step;
    bool evenly;

public:
    Asks(const void* start, int64_t apart, int64_t bytes, int64_t M)
        : start(static_cast<const char*>(start)), apart(apart), step(bytes),
          evenly(M >= LEAST_EVENLY) {
        if (evenly) step = step * FINE / M;
    }
    // of `count` rows of x from row m on, in so many steps
    Ask part(int64_t m, int64_t count, int64_t steps) const {
        if (!evenly) return {start, apart, step};
        return {start + step * m / FINE * steps, apart, step * count / FINE};
    }
    Asks from(int64_t bytes) const {
        Asks later = *this;
        later.start += bytes;
        return later;
    }
};

// y[m * N + r * apart], in T or wider, of M rows of x and R of the weight, `apart` from each other;
// asks for R rows meanwhile. Not inline: it is compiled once for all linears of a region.
template <int M, int R, typename T, typename Y>
C10_NOINLINE void multiply(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t N, int64_t K, Ask ask, int64_t apart = 1
) {
    using S = Step<T>;
    const int64_t w_step = apart * K;
    Sums sums[M][R];
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[m][r] = Sums(0);
    }
    int64_t k = 0;
    for (; k + S::size <= K; k += S::size, ask.start += ask.step) {
        decltype(S::load(w)) part[R];
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            part[r] = S::load(w + r * w_step + k);
            __builtin_prefetch(ask.start + r * ask.apart);
        }
        #pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            auto given = S::load(x + m * K + k);
            #pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[m][r] = S::add(part[r], given, sums[m][r]);
        }
    }
    if (k < K) {
        for (int m = 0; m < M; ++m) {
            auto given = S::load(x + m * K + k, K - k);
            for (int r = 0; r < R; ++r) {
                sums[m][r] = S::add(S::load(w + r * w_step + k, K - k), given, sums[m][r]);
            }
        }
    }
    alignas(64) float found[room_for(M * R)];
    totals<M * R>(&sums[0][0], found);
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float added = bias == nullptr ? 0.0f : float(bias[r * apart]);
            y[m * N + r * apart] = found[m * R + r] + added;
        }
    }
}

// M rows of x, `SIZE` at a time and then fewer: `multiply` gets how many, and the first of them
template <int SIZE, typename Multiply>
inline void each_block_of_rows(int64_t M, const Multiply& multiply) {
    int64_t m = 0;
    const auto multiply_next = [&](auto count) {
        multiply(count, m);
        m += count();
    };
    while (m + SIZE <= M) multiply_next(std::integral_constant<int, SIZE>());
    if constexpr (SIZE > 4) {
        if (m + 4 <= M) multiply_next(std::integral_constant<int, 4>());
    }
    if (m + 2 <= M) multiply_next(std::integral_constant<int, 2>());
    if (m < M) multiply_next(std::integral_constant<int, 1>());
}

// R rows of the weight, read from memory once, with all M rows of x; asks for rows meanwhile
template <int R, typename T, typename Y>
inline void rows(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t M, int64_t N, int64_t K, const Asks& asks, int64_t apart = 1
) {
    each_block_of_rows<X_ROWS>(M, [&](auto count, int64_t m) {
        const Ask ask = asks.part(m, count(), K / Step<T>::size);
        multiply<count(), R>(x + m * K, w, bias, y + m * N, N, K, ask, apart);
    });
}

// x in the type in which it is read; `place` holds it if it is another
template <typename T>
inline const T* as_read(const T* x, int64_t, std::unique_ptr<T[]>&) { return x; }
inline const float* as_read(
    const at::BFloat16* x, int64_t size, std::unique_ptr<float[]>& place
) {
    place.reset(new float[size]);
    for (int64_t i = 0; i < size; ++i) place[i] = x[i];
    return place.get();
}

// One of several weights over the same x: N rows, read in so many groups, whose results begin at
// `first` in a row of y
template <typename T> struct Plain {
    const T *data, *bias;
    int64_t N, groups, first;
};

// Group g of a weight's rows, `size` at most, which lie as far apart as there are groups: each is
// read where that of the group before ended. An AMD EPYC reads rows beside each other at half of
// the rate.
template <typename T>
inline void group(
    int64_t g, int64_t size, const typename Step<T>::X* x, const Plain<T>& weight, T* y,
    int64_t stride, int64_t M, int64_t K
) {
    const int64_t apart = weight.groups, bytes = K * sizeof(T);
    const int64_t ahead = bytes_ahead(M, bytes);
    const auto multiply_from = [&](auto count, int64_t n) {
        const T* bias = weight.bias == nullptr ? nullptr : weight.bias + n;
        const T* w = weight.data + n * K;
        const auto* start = reinterpret_cast<const char*>(w) + ahead;
        const Asks asks(start, apart * bytes, Step<T>::size * sizeof(T), M);
        rows<count()>(x, w, bias, y + weight.first + n, M, stride, K, asks, apart);
    };
    if (g + (size - 1) * apart < weight.N) {
        if (size == W_ROWS) {
            multiply_from(std::integral_constant<int, W_ROWS>(), g);
        } else {
            multiply_from(std::integral_constant<int, 2>(), g);
        }
        return;
    }
    for (int64_t n = g; n < weight.N; n += apart) {
        multiply_from(std::integral_constant<int, 1>(), n);
    }
}

// The weight that group number g of all is of; g becomes its number there
template <typename Each> inline const Each& weight_of(int64_t& g, const Each* weights) {
    for (; g >= weights->groups; ++weights) g -= weights->groups;
    return *weights;
}

}  // namespace polar_fx
#endif
"""
    + many_rows_source.SOURCE
)
