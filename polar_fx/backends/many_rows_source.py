"""Linear layers over so many rows of x that arithmetic counts, not reading the weight, in C++:
oneDNN's small products, and the library's. A part of linear_source.py, whose loops are for fewer.
"""

# Shape legend: M rows of x, K their size, N rows of the weight.
SOURCE = r"""
#ifndef POLAR_FX_MANY_ROWS
#define POLAR_FX_MANY_ROWS
#include <limits>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
namespace polar_fx {

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

inline bool is_intel() {
#if defined(__x86_64__)
    static const bool found = __builtin_cpu_is("intel");
    return found;
#else
    return false;
#endif
}

// Up to how many rows of x loops are the fastest way, and then tiles. torch's library for floats,
// MKL, does not use the vectors of other processors than Intel's.
struct Ways {
    int64_t loops, tiles;
};
constexpr int64_t ANY_NUMBER = std::numeric_limits<int64_t>::max();
template <typename T> inline Ways fastest() { return {Step<T>::most, 0}; }
#if defined(CPU_CAPABILITY_AVX512)
template <> inline Ways fastest<float>() { return {16, is_intel() ? 96 : ANY_NUMBER}; }
#if defined(__AMX_BF16__)
template <> inline Ways fastest<at::BFloat16>() { return {4, 128}; }
#elif defined(__AVX512BF16__)
template <> inline Ways fastest<at::BFloat16>() { return {24, is_intel() ? 96 : 256}; }
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

// Rows of x of a tile, and of the weight: more where there are more tiles, which threads share
constexpr int64_t TILE_X = 64, MOST_TILE_W = 64;
inline int64_t tile_w_of(int64_t M) { return M > 2 * TILE_X ? MOST_TILE_W : MOST_TILE_W / 2; }

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
    const int64_t tile_w = tile_w_of(M);
    const int64_t parts = ceil_div(all, TILE_X), chunks = ceil_div(N, tile_w);
    std::unique_ptr<float[]> columns(new float[all * size]);
    std::unique_ptr<T[]> places(Rows::are_made ? new T[threads * tile_w * K] : nullptr);
    #pragma omp parallel num_threads(threads)
    {
        T* place = Rows::are_made ? places.get() + omp_get_thread_num() * tile_w * K : nullptr;
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
            const int64_t start = i / parts * tile_w, count = std::min(tile_w, N - start);
            if (start != held) weight = rows(start, count, place);
            held = start;
            float sums[MOST_TILE_W * TILE_X], turned[LANES * LANES];
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
    const bool by_tiles = tiles_fit<T>(M, K, fastest<T>());
    if (!by_tiles && M <= Step<T>::most) return false;
    for (const auto& [data, bias, N, groups, first] : weights) {
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
