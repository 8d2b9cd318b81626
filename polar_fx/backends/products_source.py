"""oneDNN's small products, which torch brings along, in C++: what the kernels for attention over
several tokens and for linears over a good many rows are built around.
"""

SOURCE = r"""
#ifndef POLAR_FX_PRODUCTS
#define POLAR_FX_PRODUCTS
#include <algorithm>
#include <memory>
#include <omp.h>
#include <stdexcept>
#include <type_traits>
#include <vector>

// As ATen/native/CPUBlas.h declares them, which takes long to compile: c (+)= a times b, for a
// [m, k], b [k, n] and c [m, n], by oneDNN; b in bfloat16 has pairs of its rows beside each other.
namespace at::native::cpublas {
TORCH_API void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c,
    const bool add, const float* a, const float* b, float* c, bool in_pairs
);
TORCH_API void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c,
    const bool add, const at::BFloat16* a, const at::BFloat16* b, float* c, bool in_pairs
);
TORCH_API void brgemm_release(bool in_pairs);
}

namespace polar_fx {

using Floats = at::vec::Vectorized<float>;
constexpr int64_t LANES = Floats::size();

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }
// oneDNN makes code for each size it meets: those of tiles are multiples of a step.
inline int64_t rounded(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// Raises what oneDNN raises where it does not multiply T, such as when it is switched off: an
// exception of one of several threads would end the process. For floats, others multiply then.
template <typename T> inline void try_products() {
    constexpr int64_t SIZE = 32;
    constexpr bool in_pairs = !std::is_same_v<T, float>;
    static const std::vector<T> given(SIZE * SIZE);
    float result[SIZE * SIZE];
    at::native::cpublas::brgemm(
        SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, false, given.data(), given.data(), result, in_pairs
    );
    if (in_pairs) at::native::cpublas::brgemm_release(true);
}

// to[k * width + r] = from[r * step + k], for `rows` rows, LANES at most, of `size` floats
inline void turn(
    const float* from, int64_t step, int64_t rows, int64_t size, float* to, int64_t width
) {
    int64_t k = 0;
    if (rows == LANES) {
        for (; k + LANES <= size; k += LANES) {
            at::vec::transpose_mxn<float, LANES, LANES>(from + k, step, to + k * width, width);
        }
    }
    for (; k < size; ++k) {
        for (int64_t r = 0; r < rows; ++r) to[k * width + r] = from[r * step + k];
    }
}

}  // namespace polar_fx
#endif
"""
