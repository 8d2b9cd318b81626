"""The CPU's kernel for `row_linear` (passes/linear_to_row_kernel.py): C++ that Inductor compiles
into a region like its own. Loops for a few rows, oneDNN's small products for more, and the
library's for many.

An adapter around torch's semi-public C++ templates (cpp_template.py).
"""

from typing import Any

import torch

from ..passes.linear_to_row_kernel import row_linear
from . import products_source
from .cpp_template import output_of

ROW_LINEAR: Any = torch.ops.polar_fx.row_linear.default
assert row_linear._opoverload is ROW_LINEAR

# Shape legend: M rows of x, K their size, N rows of the weight.
SOURCE = (
    products_source.SOURCE
    + r"""
#ifndef POLAR_FX_ROW_LINEAR
#define POLAR_FX_ROW_LINEAR
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
// Bytes between what is read of a weight and what is asked for: processors do not see by
// themselves, among so many reads of x, that the weight is read in order.
constexpr int64_t AHEAD = 4096;

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

inline float total(const Sums& sums) {
    return at::vec::vec_reduce_all<float>([](Sums& a, Sums& b) { return a + b; }, sums);
}

// y[m * N + r], in T or wider, of M rows of x and R of the weight; asks for what lies `ahead`
// elements further on. Not inline: it is compiled once for all linears of a region.
template <int M, int R, typename T, typename Y>
C10_NOINLINE void multiply(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t N, int64_t K, int64_t ahead
) {
    using S = Step<T>;
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
            part[r] = S::load(w + r * K + k);
            __builtin_prefetch(w + r * K + k + ahead);
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
                sums[m][r] = S::add(S::load(w + r * K + k, K - k), given, sums[m][r]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            y[m * N + r] = total(sums[m][r]) + (bias == nullptr ? 0.0f : float(bias[r]));
        }
    }
}

// R rows of the weight, read from memory once, with all M rows of x
template <int R, typename T, typename Y>
inline void rows(
    const typename Step<T>::X* x, const T* w, const T* bias, Y* y,
    int64_t M, int64_t N, int64_t K, int64_t ahead
) {
    int64_t m = 0;
    for (; m + X_ROWS <= M; m += X_ROWS) {
        multiply<X_ROWS, R>(x + m * K, w, bias, y + m * N, N, K, m == 0 ? ahead : 0);
    }
    if (X_ROWS > 4 && m + 4 <= M) {
        multiply<4, R>(x + m * K, w, bias, y + m * N, N, K, m == 0 ? ahead : 0);
        m += 4;
    }
    if (m + 2 <= M) {
        multiply<2, R>(x + m * K, w, bias, y + m * N, N, K, m == 0 ? ahead : 0);
        m += 2;
    }
    if (m < M) multiply<1, R>(x + m * K, w, bias, y + m * N, N, K, m == 0 ? ahead : 0);
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

// Weight rows from w0 on, W_ROWS at a time
template <typename T>
inline void group(
    int64_t w0, const typename Step<T>::X* x, const T* w, const T* bias, T* y,
    int64_t M, int64_t N, int64_t K
) {
    const int64_t bytes = W_ROWS * K * sizeof(T);
    const int64_t ahead = (AHEAD + bytes - 1) / bytes * W_ROWS * K;
    if (w0 + W_ROWS <= N) {
        rows<W_ROWS>(x, w + w0 * K, bias == nullptr ? bias : bias + w0, y + w0, M, N, K, ahead);
        return;
    }
    for (int64_t n = w0; n < N; ++n) {
        rows<1>(x, w + n * K, bias == nullptr ? bias : bias + n, y + n, M, N, K, 0);
    }
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

// Whether tiles or the library have multiplied M rows of x; loops are the way if not
template <typename T> bool multiply_many(
    const T* x, const T* w, const T* bias, T* y, int64_t M, int64_t N, int64_t K, int threads
) {
    if (tiles_fit<T>(M, K, FASTEST<T>)) {
        multiply_tiles(x, RowsOf<T>{w, K}, bias, y, M, N, K, N, threads);
        return true;
    }
    if (M <= Step<T>::most) return false;
    by_library(x, w, bias, y, M, N, K, N, false);
    return true;
}

}  // namespace polar_fx
#endif
"""
)

KERNEL = r"""
extern "C" {{kernel.def_kernel(inputs={"x": x, "w": w, "bias": bias}, outputs={"y": y})}}
{
    using T = {{kernel.dtype(w)}};
    using X = polar_fx::Step<T>::X;
    const int64_t M = ({{kernel.size(x, 0)}}) * ({{kernel.size(x, 1)}});
    const int64_t N = {{kernel.size(w, 0)}}, K = {{kernel.size(w, 1)}};
    const T* weight = &{{kernel.index(w, [0, 0])}};
    const T* added = {% if bias is none %}nullptr{% else %}&{{kernel.index(bias, [0])}}{% endif %};
    const T* read = &{{kernel.index(x, [0, 0, 0])}};
    if (polar_fx::multiply_many(read, weight, added, y, M, N, K, {{threads}})) return;
    std::unique_ptr<X[]> place;
    const X* given = polar_fx::as_read(read, M * K, place);
    {%- if threads > 1 %}
    #pragma omp parallel for num_threads({{threads}}) schedule(static)
    {%- endif %}
    for (int64_t n = 0; n < N; n += polar_fx::W_ROWS) {
        polar_fx::group<T>(n, given, weight, added, y, M, N, K);
    }
}
"""


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate

    class RowLinear(CppTemplate):
        """`row_linear` of x [B, T, K], w [N, K] and perhaps bias [N], as C++."""

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            x, w, *bias = self.input_nodes
            return (
                self.header().getvalue()
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    x=x,
                    w=w,
                    bias=bias[0] if bias else None,
                    y=template_buffer_node or self.output_node,
                    threads=self.num_threads,
                )
            )

    @register_lowering(ROW_LINEAR, type_promotion_kind=None)
    def _(x: Any, weight: Any, bias: Any = None) -> Any:
        operands = [operand for operand in (x, weight, bias) if operand]
        size = [*x.get_size()[:-1], weight.get_size()[0]]
        return output_of(RowLinear, operands, name="row_linear", size=size)
