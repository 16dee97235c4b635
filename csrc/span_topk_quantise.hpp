// span_topk: what a CPU can run, and vectors in units of a screening precision with a bound on what that loses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "span_topk_amx.hpp"
#include "span_topk_tiles.hpp"

namespace el4ner::topk {

enum class Precision { fp32, bf16, int8 };
enum class Isa { portable, avx2, avx512, amx };

inline bool cpu_has(Isa isa, Precision precision) {
    if (isa == Isa::portable) return true;
#if EL4NER_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2 && precision != Precision::bf16;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::amx) return avx512 && precision != Precision::fp32 && amx_granted();
    if (precision == Precision::bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (precision == Precision::int8) return avx512 && __builtin_cpu_supports("avx512vnni");
    return avx512;
#else
    (void)precision;
    return false;
#endif
}

inline std::int64_t numbers_per_unit(Precision precision) {
    return precision == Precision::fp32 ? 1 : precision == Precision::bf16 ? 2 : 4;
}

// A vector in units, and how far they are from it; norms are rounded upwards.
struct Quantised {
    float norm;           // of the vector itself
    float error;          // of the difference
    float scale;          // int8: one integer step; else 1
    std::int32_t sum;     // int8: of the integers
};

inline float upwards(double x) {  // sums of float squares are off by a relative 1e-4 at most up to 1,600 numbers a lane
    return static_cast<float>(x * 1.0002);
}

// Turns a vector, so that its largest numbers are spread over eight: int8 steps become finer, as they follow the largest
// number (an embedding's is 4 times its root mean square, afterwards 3.2). Products of two vectors stay, up to kTurning.
// Hadamard's matrix of 8 x 8 on each 128 numbers: number n with those 16, 32, ... 112 behind it. The rest stays.
EL4NER_INLINE void turn_body(float *values, std::int64_t dims) {
    constexpr std::int64_t width = 16, eight = 8 * width;
    constexpr float scale = 0.35355339059327373f;  // 8^-0.5
    for (std::int64_t from = 0; from + eight <= dims; from += eight) {
        float *x = values + from;
        for (std::int64_t half = width; half < eight; half *= 2)
            for (std::int64_t block = 0; block < eight; block += 2 * half)
                for (std::int64_t d = block; d < block + half; ++d) {
                    const float a = x[d], b = x[d + half];
                    x[d] = a + b;
                    x[d + half] = a - b;
                }
        for (std::int64_t d = 0; d < eight; ++d) x[d] *= scale;
    }
}

// Roundings that turning both vectors costs their product: 3 sums and a product each, and the scale's own.
constexpr double kTurning = 12.0;

inline void turn_portable(float *values, std::int64_t dims) { turn_body(values, dims); }
#if EL4NER_X86
EL4NER_AVX2 inline void turn_avx2(float *values, std::int64_t dims) { turn_body(values, dims); }
#endif

using TurnFunction = void (*)(float *values, std::int64_t dims);

inline TurnFunction turn_for() {
#if EL4NER_X86
    if (cpu_has(Isa::avx2, Precision::fp32)) return turn_avx2;
#endif
    return turn_portable;
}

// values (dims) finite with a norm of about 1; units (steps), zero beyond dims. offset: added to each int8 number,
// so that query bytes are unsigned (then the zeros beyond dims are stored as they are: they meet zeros of the pool).
template <Precision P>
EL4NER_INLINE Quantised quantise_body(const float *values, std::int64_t dims, std::int64_t steps,
                                                              int levels, int offset, std::uint32_t *units) {
    constexpr std::int64_t width = 16;
    float tops[width] = {}, squares[width] = {}, errors[width] = {};
    std::int32_t sums[width] = {};
    const std::int64_t whole = dims / width * width;
    for (std::int64_t d = 0; d < whole; d += width)
        for (std::int64_t l = 0; l < width; ++l) {
            const float x = values[d + l], size = std::fabs(x);
            squares[l] += x * x;
            tops[l] = size > tops[l] ? size : tops[l];
        }
    for (std::int64_t d = whole; d < dims; ++d) {
        squares[0] += values[d] * values[d];
        tops[0] = std::max(tops[0], std::fabs(values[d]));
    }
    const float top = *std::max_element(tops, tops + width);
    const auto total = [](const float *x) { return std::accumulate(x, x + width, 0.0); };
    Quantised out{upwards(std::sqrt(total(squares))), 0.0f, 1.0f, 0};
    if constexpr (P == Precision::fp32) {
        std::memcpy(units, values, static_cast<std::size_t>(dims) * sizeof(float));
        return out;
    }
    if constexpr (P == Precision::bf16) {
        auto *halves = reinterpret_cast<std::uint16_t *>(units);
        for (std::int64_t d = 0; d < dims; ++d) {
            std::uint32_t bits;
            std::memcpy(&bits, values + d, sizeof bits);
            bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to the nearest, ties to even
            const float gap = values[d] - from_bf16(bits);
            errors[d % width] += gap * gap;
            halves[d] = static_cast<std::uint16_t>(bits);
        }
        for (std::int64_t d = dims; d < 2 * steps; ++d) halves[d] = 0;
    }
    if constexpr (P == Precision::int8) {
        auto *bytes = reinterpret_cast<std::uint8_t *>(units);
        // Smaller numbers are zeros of their own error, which kSlack (span_topk.hpp) covers: 127 / top would overflow.
        out.scale = top > 1e-20f ? top / static_cast<float>(levels) : 1.0f;
        const float inverse = top > 1e-20f ? static_cast<float>(levels) / top : 0.0f;
        constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
        const auto one = [&](std::int64_t d, std::int64_t l) {
            const float shifted = values[d] * inverse + magic;
            std::int32_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            const float gap = values[d] - (shifted - magic) * out.scale;
            errors[l] += gap * gap;
            const std::int32_t number = bits - 0x4b400000;
            sums[l] += number;
            bytes[d] = static_cast<std::uint8_t>(number + offset);
        };
        for (std::int64_t d = 0; d < whole; d += width)
            for (std::int64_t l = 0; l < width; ++l) one(d + l, l);
        for (std::int64_t d = whole; d < dims; ++d) one(d, 0);
        for (std::int64_t d = dims; d < 4 * steps; ++d) bytes[d] = 0;
        out.sum = std::accumulate(sums, sums + width, 0);
    }
    // The float gaps are off by a rounding of the values themselves: 2^-23 of the norm each covers it.
    out.error = upwards(std::sqrt(total(errors)) + out.norm * std::ldexp(1.0, -22));
    return out;
}

template <Precision P>
Quantised quantise_portable(const float *values, std::int64_t dims, std::int64_t steps, int levels, int offset,
                            std::uint32_t *units) {
    return quantise_body<P>(values, dims, steps, levels, offset, units);
}
#if EL4NER_X86
template <Precision P>
EL4NER_AVX2 Quantised quantise_avx2(const float *values, std::int64_t dims, std::int64_t steps, int levels, int offset,
                                    std::uint32_t *units) {
    return quantise_body<P>(values, dims, steps, levels, offset, units);
}
// By hand for int8, which packing a pool waits for: GCC 12 makes 128-bit code of the loops above (430 ns a vector of 384).
EL4NER_AVX512 inline Quantised quantise_int8_avx512(const float *values, std::int64_t dims, std::int64_t steps, int levels,
                                                    int offset, std::uint32_t *units) {
    const std::int64_t whole = dims / 16 * 16;
    const auto rest = static_cast<__mmask16>((1u << (dims - whole)) - 1u);
    auto *bytes = reinterpret_cast<std::uint8_t *>(units);
    __m512 squares = _mm512_setzero_ps(), tops = squares, errors = squares;
    const __m512 last = rest ? _mm512_maskz_loadu_ps(rest, values + whole) : squares;  // zeros add nothing
    for (std::int64_t d = 0; d < whole; d += 16) {
        const __m512 x = _mm512_loadu_ps(values + d);
        squares = _mm512_fmadd_ps(x, x, squares);
        tops = _mm512_max_ps(tops, _mm512_abs_ps(x));
    }
    squares = _mm512_fmadd_ps(last, last, squares);
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(tops, _mm512_abs_ps(last)));
    const bool some = top > 1e-20f;  // as in quantise_body
    Quantised out{upwards(std::sqrt(_mm512_reduce_add_ps(squares))), 0.0f, some ? top / static_cast<float>(levels) : 1.0f, 0};
    const __m512 inverse = _mm512_set1_ps(some ? static_cast<float>(levels) / top : 0.0f), scale = _mm512_set1_ps(out.scale);
    const __m512i shift = _mm512_set1_epi32(offset);
    __m512i sums = _mm512_setzero_si512();
    const auto one = [&](__m512 x) EL4NER_AVX512 {
        const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));  // to the nearest
        const __m512 gap = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(number), scale, x);
        errors = _mm512_fmadd_ps(gap, gap, errors);
        sums = _mm512_add_epi32(sums, number);
        return _mm512_cvtepi32_epi8(_mm512_add_epi32(number, shift));
    };
    for (std::int64_t d = 0; d < whole; d += 16)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(bytes + d), one(_mm512_loadu_ps(values + d)));
    if (rest) _mm_mask_storeu_epi8(bytes + whole, rest, one(last));
    for (std::int64_t d = dims; d < 4 * steps; ++d) bytes[d] = 0;
    out.sum = _mm512_reduce_add_epi32(sums);
    out.error = upwards(std::sqrt(_mm512_reduce_add_ps(errors)) + out.norm * std::ldexp(1.0, -22));
    return out;
}
#endif

#if EL4NER_X86
// As many of `levels` as keep chunks of numbers within a norm of `most` steps. A chunk is what span_topk_tiles.hpp adds in
// 16 bits: of each 8 numbers 0, 1, 4 and 5, and 2, 3, 6 and 7. No fewer than half of `most`.
EL4NER_AVX2 inline int paired_levels(const float *values, std::int64_t dims, int levels, int most) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 tops = _mm256_setzero_ps(), chunks = tops;
    for (std::int64_t d = 0; d < dims; d += 8) {
        alignas(32) float part[8] = {};
        if (d + 8 > dims) std::copy_n(values + d, dims - d, part);
        const __m256 x = d + 8 > dims ? _mm256_load_ps(part) : _mm256_loadu_ps(values + d), square = _mm256_mul_ps(x, x);
        const __m256 fours = _mm256_add_ps(square, _mm256_permute2f128_ps(square, square, 1));
        tops = _mm256_max_ps(tops, _mm256_andnot_ps(sign, x));
        chunks = _mm256_max_ps(chunks, _mm256_hadd_ps(fours, fours));
    }
    alignas(32) float top[8], chunk[8];
    _mm256_store_ps(top, tops);
    _mm256_store_ps(chunk, chunks);
    const double largest = *std::max_element(top, top + 8), norm = std::sqrt(static_cast<double>(*std::max_element(chunk, chunk + 8)));
    return norm > 0.0 ? std::min(levels, static_cast<int>(0.9999 * most * largest / norm)) : levels;
}
#endif

using QuantiseFunction = Quantised (*)(const float *, std::int64_t, std::int64_t, int, int, std::uint32_t *);

inline QuantiseFunction quantise_for(Precision precision) {
#if EL4NER_X86
    if (precision == Precision::int8 && cpu_has(Isa::avx512, Precision::fp32)) return quantise_int8_avx512;
    if (cpu_has(Isa::avx2, Precision::fp32))
        return precision == Precision::fp32   ? quantise_avx2<Precision::fp32>
               : precision == Precision::bf16 ? quantise_avx2<Precision::bf16>
                                              : quantise_avx2<Precision::int8>;
#endif
    return precision == Precision::fp32   ? quantise_portable<Precision::fp32>
           : precision == Precision::bf16 ? quantise_portable<Precision::bf16>
                                          : quantise_portable<Precision::int8>;
}

}  // namespace el4ner::topk
