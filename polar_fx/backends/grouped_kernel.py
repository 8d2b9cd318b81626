"""The CPU's kernel for `grouped_linear` (passes/grouped_linear.py): C++ that Inductor compiles into
a region like its own. Loops over the rows of a weight come from linear_source.py.
"""

from typing import Any

import torch

from ..passes.grouped_linear import grouped_linear
from .cpp_template import output_of
from .linear_source import SOURCE as SHARED

GROUPED_LINEAR: Any = torch.ops.polar_fx.grouped_linear.default
assert grouped_linear._opoverload is GROUPED_LINEAR

# Shape legend: S rows of x, sorted by expert; E experts; N rows of an expert's weight, K their
# size; M rows of x that one expert has.
SOURCE = r"""
#ifndef POLAR_FX_GROUPED_LINEAR
#define POLAR_FX_GROUPED_LINEAR
#include <vector>
namespace polar_fx {

// M rows of x, from `first` on, belong to this expert
struct Group {
    int64_t expert, first, M;
};

// The experts that have rows; `rows` becomes how many rows of x they have together
template <typename I> std::vector<Group> groups_of(
    const I* ends, int64_t E, int64_t S, int64_t& rows
) {
    std::vector<Group> groups;
    rows = 0;
    for (int64_t e = 0; e < E; ++e) {
        const int64_t end = std::min<int64_t>(ends[e], S);
        if (end <= rows) continue;
        groups.push_back({e, rows, end - rows});
        rows = end;
    }
    return groups;
}

// Columns that are multiplied at a time, of a weight [K, N], and rows of it between what is read
// and what is asked for
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t VECTORS = 4;
#else
constexpr int64_t VECTORS = 2;  // sums of four rows stay in registers
#endif
constexpr int64_t COLUMNS = VECTORS * Sums::size(), ROWS_AHEAD = 16;

// y[m * N] and the P vectors of columns from there on, of M rows of x and a weight [K, N] from its
// first of these columns on
template <int M, int P, typename T> C10_NOINLINE void multiply_columns(
    const T* x, const T* w, T* y, int64_t N, int64_t K
) {
    constexpr int64_t SIZE = Sums::size();
    Sums sums[M][P];
    for (int m = 0; m < M; ++m) {
        for (int p = 0; p < P; ++p) sums[m][p] = Sums(0);
    }
    for (int64_t k = 0; k < K; ++k) {
        Sums part[P];
        #pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            part[p] = wide(w + k * N + p * SIZE);
            __builtin_prefetch(w + (k + ROWS_AHEAD) * N + p * SIZE);
        }
        #pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Sums given(float(x[m * K + k]));
            #pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[m][p] = at::vec::fmadd(part[p], given, sums[m][p]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int p = 0; p < P; ++p) keep(y + m * N + p * SIZE, sums[m][p]);
    }
}

template <int P, typename T> inline void columns_of(
    const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K
) {
    each_block_of_rows<X_ROWS>(M, [&](auto count, int64_t m) {
        multiply_columns<count(), P>(x + m * K, w, y + m * N, N, K);
    });
}

// Columns from n on, COLUMNS at most, of a weight [K, N]
template <typename T> void columns(
    int64_t n, const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K
) {
    constexpr int64_t SIZE = Sums::size();
    const int64_t last = std::min(n + COLUMNS, N);
    if (n + COLUMNS <= N) {
        columns_of<VECTORS>(x, w + n, y + n, M, N, K);
        return;
    }
    for (; n + SIZE <= last; n += SIZE) columns_of<1>(x, w + n, y + n, M, N, K);
    for (; n < last; ++n) {
        for (int64_t m = 0; m < M; ++m) {
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += float(x[m * K + k]) * float(w[k * N + n]);
            y[m * N + n] = sum;
        }
    }
}

}  // namespace polar_fx
#endif
"""

KERNEL = r"""
extern "C" {{kernel.def_kernel(inputs={"x": x, "w": w, "ends": ends}, outputs={"y": y})}}
{
    using T = {{kernel.dtype(w)}};
    constexpr bool transposed = {{"true" if transposed else "false"}};
    const int64_t S = {{kernel.size(x, 0)}}, K = {{kernel.size(x, 1)}};
    const int64_t E = {{kernel.size(w, 0)}}, N = {{kernel.size(w, 2 if transposed else 1)}};
    const T* read = &{{kernel.index(x, [0, 0])}};
    const T* weight = &{{kernel.index(w, [0, 0, 0])}};
    int64_t rows = 0;
    std::vector<polar_fx::Group> few;
    for (const auto& each : polar_fx::groups_of(&{{kernel.index(ends, [0])}}, E, S, rows)) {
        const T *own_rows = read + each.first * K, *own_weight = weight + each.expert * N * K;
        T* result = y + each.first * N;
        {%- if transposed %}
        const bool done = each.M > polar_fx::Step<T>::most;
        if (done) {
            polar_fx::by_library<T>(own_rows, own_weight, nullptr, result, each.M, N, K, N, true);
        }
        {%- else %}
        const polar_fx::Plain<T> weights[] = { {own_weight, nullptr, N, 0, 0} };
        const bool done = polar_fx::multiply_many(
            own_rows, weights, result, N, each.M, K, {{threads}}
        );
        {%- endif %}
        if (!done) few.push_back(each);
    }
    std::fill(y + rows * N, y + S * N, T(0));
    const int64_t experts = few.size();
    {%- if transposed %}
    constexpr int64_t at_a_time = polar_fx::COLUMNS;
    const T* given = read;
    {%- else %}
    const int64_t at_a_time = polar_fx::rows_at_a_time(rows / std::max<int64_t>(1, experts));
    std::unique_ptr<polar_fx::Step<T>::X[]> place;
    const auto* given = polar_fx::as_read(read, few.empty() ? 0 : rows * K, place);
    {%- endif %}
    const int64_t parts = polar_fx::ceil_div(N, at_a_time), tasks = experts * parts;
    {%- if threads > 1 %}
    // experts have different numbers of rows
    #pragma omp parallel for num_threads({{threads}}) schedule(dynamic, transposed ? 1 : 16)
    {%- endif %}
    for (int64_t task = 0; task < tasks; ++task) {
        const auto& each = few[task / parts];
        const int64_t part = task % parts;
        const auto* own_rows = given + each.first * K;
        const T* own_weight = weight + each.expert * N * K;
        T* result = y + each.first * N;
        {%- if transposed %}
        polar_fx::columns(part * at_a_time, own_rows, own_weight, result, each.M, N, K);
        {%- else %}
        const polar_fx::Plain<T> own{own_weight, nullptr, N, parts, 0};
        polar_fx::group<T>(part, at_a_time, own_rows, own, result, N, each.M, K);
        {%- endif %}
    }
}
"""


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate

    class GroupedLinear(CppTemplate):
        """`grouped_linear` as C++, of weights [E, N, K] or transposed ones."""

        transposed: bool

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            x, w, ends = self.input_nodes
            return (
                self.header().getvalue()
                + SHARED
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    x=x,
                    w=w,
                    ends=ends,
                    y=template_buffer_node or self.output_node,
                    transposed=self.transposed,
                    threads=self.num_threads,
                )
            )

    @register_lowering(GROUPED_LINEAR, type_promotion_kind=None)
    def _(x: Any, weight: Any, ends: Any, transposed: bool) -> Any:
        size = [x.get_size()[0], weight.get_size()[2 if transposed else 1]]
        given = [x, weight, ends]
        return output_of(
            GroupedLinear, given, name="grouped_linear", size=size, transposed=transposed
        )
