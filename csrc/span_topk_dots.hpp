// span_topk, rescoring: products of single vectors on the rows as they came, in float32 (bounded) and float64 (exact).
//
// The float64 sum has one fixed order for all instruction sets: 16 partial sums by index modulo 16, then a tree.
// Products of two float32 numbers are exact in float64, so fused and separate multiply-add give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "span_topk_tiles.hpp"

namespace el4ner::topk {

// The largest of `count` > 0 numbers, and where it stands if all others lie more than `margin` below it, else -1.
struct Best {
    float value;
    std::int64_t alone;
};
using BestFunction = Best (*)(const float *row, std::int64_t count, double margin);

// A float32 number that is at most x and within three units in the last place of it; for denormal x the nearest one.
inline float at_most(double x) { return static_cast<float>(x - std::fabs(x) * 0x1p-23); }

inline Best best_portable(const float *row, std::int64_t count, double margin) {
    const float *best = std::max_element(row, row + count);
    const float least = at_most(static_cast<double>(*best) - margin);
    std::int64_t near = 0;
    for (std::int64_t j = 0; j < count; ++j) near += row[j] >= least;
    return {*best, near == 1 ? best - row : -1};
}

// out [queries][spans]
using Dots32Function = void (*)(const float *q, std::int64_t queries, const float *v, std::int64_t spans,
                                std::int64_t dims, float *out);
using Dot64Function = double (*)(const float *q, const float *v, std::int64_t dims);

inline double tree(double *sums) {
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0];
}

inline double rest64(double *sums, const float *q, const float *v, std::int64_t d, std::int64_t dims) {
    for (int l = 0; d + l < dims; ++l) sums[l] += static_cast<double>(q[d + l]) * static_cast<double>(v[d + l]);
    return tree(sums);
}

inline double dot64_portable(const float *q, const float *v, std::int64_t dims) {
    double sums[16] = {};
    std::int64_t d = 0;
    for (; d + 16 <= dims; d += 16)
        for (int l = 0; l < 16; ++l) sums[l] += static_cast<double>(q[d + l]) * static_cast<double>(v[d + l]);
    return rest64(sums, q, v, d, dims);
}

inline void dots32_portable(const float *q, std::int64_t queries, const float *v, std::int64_t spans, std::int64_t dims,
                            float *out) {
    for (std::int64_t i = 0; i < queries; ++i)
        for (std::int64_t j = 0; j < spans; ++j) {
            const float *a = q + i * dims, *b = v + j * dims;
            float sums[8] = {}, rest = 0.0f;
            std::int64_t d = 0;
            for (; d + 8 <= dims; d += 8)
                for (int l = 0; l < 8; ++l) sums[l] += a[d + l] * b[d + l];
            for (; d < dims; ++d) rest += a[d] * b[d];
            for (int l = 0; l < 8; ++l) rest += sums[l];
            out[i * spans + j] = rest;
        }
}

#if EL4NER_X86

EL4NER_AVX512 inline Best best_avx512(const float *row, std::int64_t count, double margin) {
    const auto part = [&](std::int64_t j) EL4NER_AVX512 {
        const auto inside = static_cast<__mmask16>(count - j >= 16 ? 0xffffu : (1u << (count - j)) - 1u);
        return _mm512_mask_loadu_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), inside, row + j);
    };
    __m512 top = part(0);
    for (std::int64_t j = 16; j < count; j += 16) top = _mm512_max_ps(top, part(j));
    const float value = _mm512_reduce_max_ps(top);
    const __m512 least = _mm512_set1_ps(at_most(static_cast<double>(value) - margin));
    std::int64_t near = 0, where = -1;
    for (std::int64_t j = 0; j < count; j += 16) {
        const unsigned reached = _mm512_cmp_ps_mask(part(j), least, _CMP_GE_OQ);
        near += __builtin_popcount(reached);
        if (reached) where = j + __builtin_ctz(reached);
    }
    return {value, near == 1 ? where : -1};
}

EL4NER_AVX2 inline double dot64_avx2(const float *q, const float *v, std::int64_t dims) {
    __m256d a = _mm256_setzero_pd(), b = a, c = a, e = a;
    std::int64_t d = 0;
#define X(sum, at) sum = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(q + at)), _mm256_cvtps_pd(_mm_loadu_ps(v + at)), sum);
    for (; d + 16 <= dims; d += 16) {
        X(a, d)
        X(b, d + 4)
        X(c, d + 8)
        X(e, d + 12)
    }
#undef X
    double sums[16];
    _mm256_storeu_pd(sums, a);
    _mm256_storeu_pd(sums + 4, b);
    _mm256_storeu_pd(sums + 8, c);
    _mm256_storeu_pd(sums + 12, e);
    return rest64(sums, q, v, d, dims);
}

EL4NER_AVX512 inline double dot64_avx512(const float *q, const float *v, std::int64_t dims) {
    __m512d a = _mm512_setzero_pd(), b = a;
    std::int64_t d = 0;
    for (; d + 16 <= dims; d += 16) {
        a = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(q + d)), _mm512_cvtps_pd(_mm256_loadu_ps(v + d)), a);
        b = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(q + d + 8)), _mm512_cvtps_pd(_mm256_loadu_ps(v + d + 8)), b);
    }
    if (d < dims) {
        double sums[16];
        _mm512_storeu_pd(sums, a);
        _mm512_storeu_pd(sums + 8, b);
        return rest64(sums, q, v, d, dims);
    }
    a = _mm512_add_pd(a, b);  // the tree of rest64
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

EL4NER_AVX2 inline float sum_avx2(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

using Block32 = void (*)(const float *q, const float *v, std::int64_t dims, float *out, std::int64_t spans);

// All products in blocks of nearly equal size, of at most MostRows query rows and MostColumns pool rows; blocks[R-1][C-1].
template <int MostRows, int MostColumns>
inline void in_blocks(const Block32 (&blocks)[MostRows][MostColumns], const float *q, std::int64_t queries, const float *v,
                      std::int64_t spans, std::int64_t dims, float *out) {
    const std::int64_t row_parts = (queries + MostRows - 1) / MostRows;
    const std::int64_t column_parts = (spans + MostColumns - 1) / MostColumns;
    for (std::int64_t n = 0; n < column_parts; ++n) {
        const std::int64_t j = n * spans / column_parts, columns = (n + 1) * spans / column_parts - j;
        for (std::int64_t m = 0; m < row_parts; ++m) {
            const std::int64_t i = m * queries / row_parts, rows = (m + 1) * queries / row_parts - i;
            blocks[rows - 1][columns - 1](q + i * dims, v + j * dims, dims, out + i * spans + j, spans);
        }
    }
}

// R query rows times C pool rows: R + C loads for R C products, and chains enough to hide their latency.
template <int R, int C>
EL4NER_AVX2 void block32_avx2(const float *q, const float *v, std::int64_t dims, float *out, std::int64_t spans) {
    __m256 sums[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sums[r][c] = _mm256_setzero_ps();
    std::int64_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        __m256 y[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) y[c] = _mm256_loadu_ps(v + c * dims + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256 x = _mm256_loadu_ps(q + r * dims + d);
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                sums[r][c] = _mm256_fmadd_ps(x, y[c], sums[r][c]);
                asm("" : "+x"(sums[r][c]));  // stays in its register: GCC 12 keeps one of nine in memory otherwise
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) {
            out[r * spans + c] = sum_avx2(sums[r][c]);
            for (std::int64_t rest = d; rest < dims; ++rest)
                out[r * spans + c] += q[r * dims + rest] * v[c * dims + rest];
        }
}

EL4NER_AVX2 inline void dots32_avx2(const float *q, std::int64_t queries, const float *v, std::int64_t spans,
                                    std::int64_t dims, float *out) {
#define EL4NER_BLOCKS(R) {block32_avx2<R, 1>, block32_avx2<R, 2>, block32_avx2<R, 3>}
    static constexpr Block32 blocks[4][3] = {EL4NER_BLOCKS(1), EL4NER_BLOCKS(2), EL4NER_BLOCKS(3), EL4NER_BLOCKS(4)};
#undef EL4NER_BLOCKS
    in_blocks<4, 3>(blocks, q, queries, v, spans, dims, out);
}

// Four sums at once: fewer shuffles than four times one.
EL4NER_AVX512 EL4NER_INLINE __m128 sums_avx512(__m512 a, __m512 b, __m512 c, __m512 e) {
    const auto half = [](__m512 x) EL4NER_AVX512 {
        const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    };
    return _mm_hadd_ps(_mm_hadd_ps(half(a), half(b)), _mm_hadd_ps(half(c), half(e)));
}

// R query rows times C pool rows. Rows come unaligned, so that most loads cross a cache line and take two cycles: 4 x 6
// products from 10 loads leave the multipliers the bottleneck.
template <int R, int C>
EL4NER_AVX512 void block32_avx512(const float *q, const float *v, std::int64_t dims, float *out, std::int64_t spans) {
    __m512 sums[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    const auto add = [&](const auto &load) EL4NER_AVX512 {
        __m512 y[C];
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
            y[c] = load(v + c * dims);
            asm("" : "+v"(y[c]));  // is loaded once: GCC 12 has every multiplication load it again otherwise
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 x = load(q + r * dims);
#pragma GCC unroll 6
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_fmadd_ps(x, y[c], sums[r][c]);
        }
    };
    const std::int64_t whole = dims / 16 * 16;
    const __mmask16 rest = static_cast<__mmask16>((1u << (dims - whole)) - 1u);
    // A load of which nothing is wanted is not free: beyond a page it costs hundreds of cycles.
    if (rest) add([&](const float *row) EL4NER_AVX512 { return _mm512_maskz_loadu_ps(rest, row + whole); });
    for (std::int64_t d = 0; d < whole; d += 16)
        add([&](const float *row) EL4NER_AVX512 { return _mm512_loadu_ps(row + d); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; c += 4) {
            const auto &own = sums[r];
            float found[4];
            _mm_storeu_ps(found, sums_avx512(own[c], own[std::min(c + 1, C - 1)], own[std::min(c + 2, C - 1)],
                                             own[std::min(c + 3, C - 1)]));
            std::copy_n(found, std::min(4, C - c), out + r * spans + c);
        }
}

EL4NER_AVX512 inline void dots32_avx512(const float *q, std::int64_t queries, const float *v, std::int64_t spans,
                                        std::int64_t dims, float *out) {
#define EL4NER_BLOCKS(R)                                                                            \
    {block32_avx512<R, 1>, block32_avx512<R, 2>, block32_avx512<R, 3>, block32_avx512<R, 4>, \
     block32_avx512<R, 5>, block32_avx512<R, 6>}
    static constexpr Block32 blocks[4][6] = {EL4NER_BLOCKS(1), EL4NER_BLOCKS(2), EL4NER_BLOCKS(3), EL4NER_BLOCKS(4)};
#undef EL4NER_BLOCKS
    in_blocks<4, 6>(blocks, q, queries, v, spans, dims, out);
}

#endif  // EL4NER_X86

}  // namespace el4ner::topk
