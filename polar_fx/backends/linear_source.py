"""The functions of the kernel for `row_linear` (row_kernel.py), in C++: loops for a few rows,
oneDNN's small products for more, and the library's for many. The kernels for integers
(quantized_kernel.py), for experts (grouped_kernel.py) and for attention (block_attention.py) use
them too.
"""

from . import products_source

# Shape legend: M rows of x, K their size, N rows of the weight.
SOURCE = (
    products_source.SOURCE
    + r"""
#ifndef POLAR_FX_LINEAR
#define POLAR_FX_LINEAR
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
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
constexpr int X_ROWS = 8, W_ROWS = 2;
#else
constexpr int X_ROWS = 4, W_ROWS = 2;
#endif
// Bytes between what is read of a weight, with M rows of x, and what is asked for. Intel's
// processors do not see by themselves, among reads of x, that the weight is read in order; AMD's do
// while the rows are few, and become slower if they are asked.
inline int64_t bytes_ahead(int64_t M) {
#if defined(__x86_64__)
    static const bool is_amd = __builtin_cpu_is("amd");
    if (is_amd) return M < 8 ? 0 : 1024;
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
// results beside any others.
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
        const int left = COUNT - i < 16 ? COUNT - i : 16;
        _mm512_mask_storeu_ps(found + i, __mmask16((1u << left) - 1), sum);
    }
#else
    for (int i = 0; i < COUNT; ++i) {
        found[i] = at::vec::vec_reduce_all<float>([](Sums& a, Sums& b) { return a + b; }, sums[i]);
    }
#endif
}

// y[m * N + r * apart], in T or wider, of M rows of x and R of the weight, `apart` from each other;
// asks for what lies `ahead` elements further on. Not inline: it is compiled once for all linears
// of a region.
template <int M, int R, typename T, typename Y>
C10_NOINLINE void multiply(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t N, int64_t K, int64_t ahead, int64_t apart = 1
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
    for (; k + S::size <= K; k += S::size) {
        decltype(S::load(w)) part[R];
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            part[r] = S::load(w + r * w_step + k);
            __builtin_prefetch(w + r * w_step + k + ahead);
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
    float found[M * R];
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

// M rows of x, X_ROWS at a time and then fewer: `multiply` gets how many, and the first of them
template <typename Multiply> inline void each_block_of_rows(int64_t M, const Multiply& multiply) {
    int64_t m = 0;
    const auto multiply_next = [&](auto count) {
        multiply(count, m);
        m += count();
    };
    while (m + X_ROWS <= M) multiply_next(std::integral_constant<int, X_ROWS>());
    if (X_ROWS > 4 && m + 4 <= M) multiply_next(std::integral_constant<int, 4>());
    if (m + 2 <= M) multiply_next(std::integral_constant<int, 2>());
    if (m < M) multiply_next(std::integral_constant<int, 1>());
}

// R rows of the weight, read from memory once, with all M rows of x
template <int R, typename T, typename Y>
inline void rows(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t M, int64_t N, int64_t K, int64_t ahead, int64_t apart = 1
) {
    each_block_of_rows(M, [&](auto count, int64_t m) {
        multiply<count(), R>(x + m * K, w, bias, y + m * N, N, K, m == 0 ? ahead : 0, apart);
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

// One of several weights over the same x: N rows, whose results begin at `first` in a row of y
template <typename T> struct Plain {
    const T *data, *bias;
    int64_t N, first;
};

inline int64_t row_groups(int64_t N, int64_t size) { return (N + size - 1) / size; }

// Group g of a weight's rows, W_ROWS at most, which lie as far apart as there are groups: each is
// read where that of the group before ended. An AMD EPYC reads rows beside each other at half of
// the rate.
template <typename T>
inline void group(
    int64_t g, const typename Step<T>::X* x, const Plain<T>& weight, T* y, int64_t stride,
    int64_t M, int64_t K
) {
    const int64_t apart = row_groups(weight.N, W_ROWS), ahead = bytes_ahead(M) / sizeof(T);
    const auto multiply_from = [&](auto count, int64_t n) {
        const T* bias = weight.bias == nullptr ? nullptr : weight.bias + n;
        T* to = y + weight.first + n;
        rows<count()>(x, weight.data + n * K, bias, to, M, stride, K, ahead, apart);
    };
    if (g + (W_ROWS - 1) * apart < weight.N) {
        multiply_from(std::integral_constant<int, W_ROWS>(), g);
        return;
    }
    for (int64_t n = g; n < weight.N; n += apart) {
        multiply_from(std::integral_constant<int, 1>(), n);
    }
}

// The weight that group number g of all is of; g becomes its number there
template <typename Each> inline const Each& weight_of(
    int64_t& g, const Each* weights, int64_t size
) {
    for (; g >= row_groups(weights->N, size); ++weights) g -= row_groups(weights->N, size);
    return *weights;
}

inline int32_t dtype_of(const float*) { return aoti_torch_dtype_float32(); }
inline int32_t dtype_of(const at::BFloat16*) { return aoti_torch_dtype_bfloat16(); }

inline void check(AOTITorchError error) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a product of the library failed");
}

// Memory as a tensor [rows, columns] of torch's, for as long as this lives
struct View {
    AtenTensorHandle handle = nullptr;
    template <typename T> View(
        const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride
    ) {
        const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
        check(aoti_torch_create_tensor_from_blob(
            const_cast<T*>(data), 2, sizes, strides, 0, dtype_of(data),
            aoti_torch_device_type_cpu(), 0, &handle
        ));
    }
    View(const View&) = delete;
    ~View() { aoti_torch_delete_tensor_object(handle); }
};

// The library's product, for so many rows that its arithmetic counts, not reading the weight;
// `stride` lies between the rows of y. The weight is [N, K], or [K, N] if `transposed`.
template <typename T>
void by_library(
    const T* x, const T* w, const T* bias, T* y, int64_t M, int64_t N, int64_t K, int64_t stride,
    bool transposed
) {
    View given(x, M, K, K, 1), result(y, M, N, stride, 1);
    View weight(w, K, N, transposed ? N : 1, transposed ? 1 : K);
    if (bias == nullptr) {
        check(aoti_torch_cpu_mm_out(result.handle, given.handle, weight.handle));
        return;
    }
    View added(bias, M, N, 0, 1);
    check(aoti_torch_cpu_addmm_out(
        result.handle, added.handle, given.handle, weight.handle, 1, 1
    ));
}

// Up to how many rows of x loops are the fastest way, and then tiles
struct Ways {
    int64_t loops, tiles;
};
template <typename T> constexpr Ways FASTEST{Step<T>::most, 0};
#if defined(CPU_CAPABILITY_AVX512)
template <> constexpr Ways FASTEST<float>{16, 96};
#if defined(__AMX_BF16__)
template <> constexpr Ways FASTEST<at::BFloat16>{4, 128};
#elif defined(__AVX512BF16__)
template <> constexpr Ways FASTEST<at::BFloat16>{24, 96};
#endif
#endif

// Whether tiles are the way for M rows of x, and can be: pairs of bfloat16 need an even size, and
// oneDNN has to be there. Where it multiplies bfloat16, it multiplies floats; the other way round
// others would.
template <typename T> inline bool tiles_fit(int64_t M, int64_t K, const Ways& fastest) {
    if (M <= fastest.loops || M > fastest.tiles) return false;
    if (K * sizeof(T) % sizeof(float) != 0) return false;
    try {
        try_products<at::BFloat16>();
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

// Rows of the weight, and rows of x, of a tile
constexpr int64_t TILE_W = 32, TILE_X = 64;

// Rows of a weight [N, K] as they lie in memory
template <typename T> struct RowsOf {
    static constexpr bool are_made = false;
    const T* data;
    int64_t K;
    const T* operator()(int64_t first, int64_t, T*) const { return data + first * K; }
};

// The product of the weight, whose `rows` are a row's numbers beside each other, with the rows of x
// as columns: the weight is neither copied nor read twice, as the library does to put it in an
// order of its own. Where rows are made, it is a tile of them at a time.
template <typename T, typename Rows> void multiply_tiles(
    const T* x, const Rows& rows, const T* bias, T* y, int64_t M, int64_t N, int64_t K,
    int64_t stride, int threads
) {
    constexpr bool in_pairs = !std::is_same_v<T, float>;
    const int64_t size = K * sizeof(T) / sizeof(float), all = rounded(M, LANES);
    const int64_t parts = (all + TILE_X - 1) / TILE_X, chunks = (N + TILE_W - 1) / TILE_W;
    std::unique_ptr<float[]> columns(new float[all * size]);
    std::unique_ptr<T[]> places(Rows::are_made ? new T[threads * TILE_W * K] : nullptr);
    #pragma omp parallel num_threads(threads)
    {
        T* place = Rows::are_made ? places.get() + omp_get_thread_num() * TILE_W * K : nullptr;
        #pragma omp for schedule(static)
        for (int64_t m = 0; m < all; m += LANES) {
            const int64_t first = m / TILE_X * TILE_X, width = std::min(TILE_X, all - first);
            const int64_t count = std::min(LANES, M - m);
            float* to = columns.get() + first * size + m - first;
            turn(reinterpret_cast<const float*>(x + m * K), size, count, size, to, width);
            for (int64_t k = 0; count < LANES && k < size; ++k) {
                std::fill(to + k * width + count, to + k * width + LANES, 0.0f);
            }
        }
        int64_t held = -1;  // the first of the rows that were asked for
        const T* weight = nullptr;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < chunks * parts; ++i) {
            const int64_t first = i % parts * TILE_X, width = std::min(TILE_X, all - first);
            const int64_t start = i / parts * TILE_W, count = std::min(TILE_W, N - start);
            if (start != held) weight = rows(start, count, place);
            held = start;
            float sums[TILE_W * TILE_X], turned[LANES * LANES];
            at::native::cpublas::brgemm(
                count, width, K, K, width, width, false, weight,
                reinterpret_cast<const T*>(columns.get() + first * size), sums, in_pairs
            );
            for (int64_t m = first; m < std::min(first + width, M); m += LANES) {
                for (int64_t n = 0; n < count; n += LANES) {
                    const int64_t lanes = std::min(LANES, count - n);
                    const T* added = bias == nullptr ? bias : bias + start + n;
                    turn(sums + n * width + m - first, width, lanes, LANES, turned, LANES);
                    for (int64_t r = 0; r < std::min(LANES, M - m); ++r) {
                        const float* sum = turned + r * LANES;
                        T* to = y + (m + r) * stride + start + n;
                        if (lanes == LANES) {
                            const auto found = Floats::loadu(sum);
                            keep(to, added == nullptr ? found : found + wide(added));
                            continue;
                        }
                        for (int64_t l = 0; l < lanes; ++l) {
                            to[l] = sum[l] + (added == nullptr ? 0.0f : float(added[l]));
                        }
                    }
                }
            }
        }
        if (in_pairs) at::native::cpublas::brgemm_release(true);
    }
}

// Whether tiles or the library have multiplied M rows of x with each weight; loops are the way if
// not
template <typename T, size_t COUNT> bool multiply_many(
    const T* x, const Plain<T> (&weights)[COUNT], T* y, int64_t stride, int64_t M, int64_t K,
    int threads
) {
    const bool by_tiles = tiles_fit<T>(M, K, FASTEST<T>);
    if (!by_tiles && M <= Step<T>::most) return false;
    for (const auto& [data, bias, N, first] : weights) {
        if (by_tiles) {
            multiply_tiles(x, RowsOf<T>{data, K}, bias, y + first, M, N, K, stride, threads);
        } else {
            by_library(x, data, bias, y + first, M, N, K, stride, false);
        }
    }
    return true;
}

}  // namespace polar_fx
#endif
"""
)
