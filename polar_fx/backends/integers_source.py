"""How the kernel for `quantized_linear` (quantized_kernel.py) reads and multiplies integers, in
C++: as floats, or as bfloat16 where the processor multiplies it.
"""

# Shape legend: M rows of x, K their size.
SOURCE = r"""
#ifndef POLAR_FX_INTEGERS
#define POLAR_FX_INTEGERS
#include <cstring>
namespace polar_fx {

constexpr int GROUP = 32;  // numbers that share a scale and a zero, where they are two a byte

C10_ALWAYS_INLINE Sums widened(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
    return Sums(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#else
    float wide[Sums::size()];
    for (int i = 0; i < Sums::size(); ++i) wide[i] = p[i];
    return Sums::loadu(wide);
#endif
}

// Numbers of a byte each, in order
struct Bytes {
    using Data = int8_t;
    static constexpr bool grouped = false;
    static int64_t row_bytes(int64_t K) { return K; }
};

// Numbers of 0 to 15, two a byte
struct Nibbles {
    using Data = uint8_t;
    static constexpr bool grouped = true;
    static int64_t row_bytes(int64_t K) { return K / 2; }
};

// How numbers of a weight are multiplied with x of type T: BLOCK of them, along K, become PARTS
// vectors of type V, and x is read in the same order as numbers of type X. As floats here.
template <typename W, typename T> struct Form {
    using X = float;
    using V = Sums;
    static constexpr int BLOCK = 64, PARTS = BLOCK / Sums::size();
    static constexpr int64_t bytes = W::grouped ? BLOCK / 2 : BLOCK;
    // whether the lanes of all vectors of a block have the same scales
    static constexpr bool alike = Sums::size() == BLOCK / 4;
    // few rows of x are scaled block by block, more by the weight
    static constexpr bool is_scaled_late(int M) { return W::grouped && alike && M <= 2; }

    // Four numbers in a word become one lane of four vectors, where they lie: as 1, 16, 256 and
    // 4,096 times the number. x is divided by that.
    static void arrange(const T* from, float* to) {
        if constexpr (!W::grouped) {
            #pragma omp simd
            for (int k = 0; k < BLOCK; ++k) to[k] = from[k];
            return;
        }
        #pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float part = 1.0f / (1 << 4 * i);
            #pragma omp simd
            for (int j = 0; j < BLOCK / 4; ++j) {
                to[i * (BLOCK / 4) + j] = part * float(from[4 * j + i]);
            }
        }
    }
    // The numbers of a block, of which `left` bytes are there unless it is WHOLE
    template <bool WHOLE> C10_ALWAYS_INLINE static void load(
        const typename W::Data* p, int64_t left, Sums* part
    ) {
        typename W::Data last[bytes];
        if constexpr (!WHOLE) {
            std::memset(last, 0, sizeof(last));
            std::memcpy(last, p, left);
            p = last;
        }
        if constexpr (!W::grouped) {
            #pragma GCC unroll 8
            for (int i = 0; i < PARTS; ++i) part[i] = widened(p + i * Sums::size());
            return;
        }
#if defined(CPU_CAPABILITY_AVX512)
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        #pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i four_bits = _mm512_set1_epi32(15 << 4 * i);
            part[i] = Sums(_mm512_cvtepi32_ps(_mm512_and_si512(words, four_bits)));
        }
#else
        float wide[BLOCK];
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < BLOCK / 4; ++j) {
                const int word = (p[2 * j] & 255) | (p[2 * j + 1] & 255) << 8;
                wide[i * (BLOCK / 4) + j] = word & 15 << 4 * i;
            }
        }
        for (int i = 0; i < PARTS; ++i) part[i] = Sums::loadu(wide + i * Sums::size());
#endif
    }
    // The scales of a block's halves, in the lanes of its vector number i; the last half of one
    // that is not WHOLE may be missing
    template <bool WHOLE, typename S> C10_ALWAYS_INLINE static Sums scales(
        const S* scale, int64_t, int i
    ) {
#if defined(CPU_CAPABILITY_AVX512)
        if constexpr (!std::is_same_v<S, float>) {
            uint32_t both = scale[0].x;
            if constexpr (WHOLE) std::memcpy(&both, scale, sizeof(both));
            const __m512i pairs = _mm512_set1_epi32(both);
            const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
            return Sums(_mm512_castsi512_ps(_mm512_mask_slli_epi32(high, 0x00ff, pairs, 16)));
        }
#endif
        const float first = scale[0], second = WHOLE ? float(scale[1]) : 0.0f;
        float lanes[BLOCK / 4];
        for (int l = 0; l < BLOCK / 4; ++l) lanes[l] = l < BLOCK / 8 ? first : second;
        return Sums::loadu(lanes + i * Sums::size() % (BLOCK / 4));
    }
    C10_ALWAYS_INLINE static Sums read(const float* x, int i) {
        return Sums::loadu(x + i * Sums::size());
    }
    C10_ALWAYS_INLINE static Sums add(const Sums& w, const Sums& x, const Sums& sums) {
        return at::vec::fmadd(w, x, sums);
    }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
// As bfloat16, which these integers are without loss: pairs are multiplied by one instruction.
struct Pairs {
    using X = at::BFloat16;
    using V = __m512i;
    static constexpr bool alike = true;
    static __m512i read(const at::BFloat16* x, int i) { return _mm512_loadu_si512(x + i * 32); }
    static Sums add(__m512i w, __m512i x, const Sums& sums) {
        return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
    }
};

template <> struct Form<Bytes, at::BFloat16> : Pairs {
    static constexpr int BLOCK = 64, PARTS = 2;
    static constexpr int64_t bytes = BLOCK;
    static constexpr bool is_scaled_late(int) { return false; }
    static void arrange(const at::BFloat16* from, at::BFloat16* to) {
        std::copy(from, from + BLOCK, to);
    }
    template <bool WHOLE> C10_ALWAYS_INLINE static void load(
        const int8_t* p, int64_t left, __m512i* part
    ) {
        const auto some = [&](int64_t first) {
            const int64_t n = std::clamp<int64_t>(left - first, 0, 16);
            const __m128i bytes = WHOLE ? _mm_loadu_si128((const __m128i*)(p + first))
                                        : _mm_maskz_loadu_epi8((1u << n) - 1, p + first);
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        };
        #pragma GCC unroll 2
        for (int i = 0; i < PARTS; ++i) {
            part[i] = (__m512i)_mm512_cvtne2ps_pbh(some(32 * i + 16), some(32 * i));
        }
    }
    template <bool WHOLE, typename S> static Sums scales(const S*, int64_t, int) { return Sums(1); }
};

template <> struct Form<Nibbles, at::BFloat16> : Pairs {
    static constexpr int BLOCK = 128, PARTS = 4;
    static constexpr int64_t bytes = BLOCK / 2;
    static constexpr bool is_scaled_late(int) { return true; }
    // Four numbers in a word become one element of four vectors.
    static void arrange(const at::BFloat16* from, at::BFloat16* to) {
        __m512i given[4], pairs[4];
        alignas(64) int16_t order[32];  // every fourth number of two vectors, and those after them
        for (int j = 0; j < 32; ++j) order[j] = 4 * (j % 16) + j / 16;
        const __m512i first = _mm512_load_si512(order);
        const __m512i third = _mm512_add_epi16(first, _mm512_set1_epi16(2));
        for (int i = 0; i < 4; ++i) given[i] = _mm512_loadu_si512(from + 32 * i);
        for (int i = 0; i < 4; ++i) {
            const __m512i low = given[i % 2 * 2], high = given[i % 2 * 2 + 1];
            pairs[i] = _mm512_permutex2var_epi16(low, i < 2 ? first : third, high);
        }
        for (int i = 0; i < 4; i += 2) {
            const __m512i even = _mm512_shuffle_i64x2(pairs[i], pairs[i + 1], 0x44);
            const __m512i odd = _mm512_shuffle_i64x2(pairs[i], pairs[i + 1], 0xee);
            _mm512_storeu_si512(to + 32 * i, even);
            _mm512_storeu_si512(to + 32 * (i + 1), odd);
        }
    }
    template <bool WHOLE> C10_ALWAYS_INLINE static void load(
        const uint8_t* p, int64_t left, __m512i* part
    ) {
        const __m512i words = WHOLE ? _mm512_loadu_si512(p)
                                    : _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, p);
        // 0 to 15 as bfloat16, twice: of the five bits that choose one, the first does not count
        const __m512i floats = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
            0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170
        ));
        #pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) {
            part[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), floats);
        }
    }
    // The scales of four groups, each in four lanes
    template <bool WHOLE, typename S> C10_ALWAYS_INLINE static Sums scales(
        const S* scale, int64_t left, int
    ) {
        const __mmask8 there = WHOLE ? 15 : (1 << left / (GROUP / 2)) - 1;
        const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        if constexpr (std::is_same_v<S, float>) {
            const __m128 four = WHOLE ? _mm_loadu_ps(scale) : _mm_maskz_loadu_ps(there, scale);
            return Sums(_mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(four)));
        } else {
            const __m128i four = WHOLE ? _mm_loadl_epi64((const __m128i*)scale)
                                       : _mm_maskz_loadu_epi16(there, scale);
            const __m512i high = _mm512_slli_epi32(quarter, 16);
            return Sums(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
                0xaaaaaaaa, high, _mm512_castsi128_si512(four)
            )));
        }
    }
};
#endif

}  // namespace polar_fx
#endif
"""
