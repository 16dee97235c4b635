// span_topk, rescoring: products of single vectors on the rows as they came, in float32 (bounded) and float64 (exact).
//
// The float64 sum has one fixed order for all instruction sets: 16 partial sums by index modulo 16, then a tree.
// Products of two float32 numbers are exact in float64, so fused and separate multiply-add give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "span_topk_tiles.hpp"

namespace el4ner::topk {

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
    double sums[16];
    _mm512_storeu_pd(sums, a);
    _mm512_storeu_pd(sums + 8, b);
    return rest64(sums, q, v, d, dims);
}

EL4NER_AVX2 inline float sum_avx2(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// R query rows times C pool rows, from rows i and j on: R + C loads for R C products, and chains enough to hide their latency.
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
    using Block = void (*)(const float *, const float *, std::int64_t, float *, std::int64_t);
#define EL4NER_BLOCKS(R) {block32_avx2<R, 1>, block32_avx2<R, 2>, block32_avx2<R, 3>}
    static constexpr Block blocks[4][3] = {EL4NER_BLOCKS(1), EL4NER_BLOCKS(2), EL4NER_BLOCKS(3), EL4NER_BLOCKS(4)};
#undef EL4NER_BLOCKS
    const std::int64_t row_parts = (queries + 3) / 4, column_parts = (spans + 2) / 3;  // of nearly equal size
    for (std::int64_t n = 0; n < column_parts; ++n) {
        const std::int64_t j = n * spans / column_parts, columns = (n + 1) * spans / column_parts - j;
        for (std::int64_t m = 0; m < row_parts; ++m) {
            const std::int64_t i = m * queries / row_parts, rows = (m + 1) * queries / row_parts - i;
            blocks[rows - 1][columns - 1](q + i * dims, v + j * dims, dims, out + i * spans + j, spans);
        }
    }
}

// Four sums at once: fewer shuffles than four times one.
EL4NER_AVX512 EL4NER_INLINE __m128 sums_avx512(__m512 a, __m512 b, __m512 c, __m512 e) {
    const auto half = [](__m512 x) EL4NER_AVX512 {
        const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    };
    return _mm_hadd_ps(_mm_hadd_ps(half(a), half(b)), _mm_hadd_ps(half(c), half(e)));
}

// 4 query rows x 2 pool rows at a time: rows come unaligned, so loads are the bottleneck, 6 for 8 products here.
EL4NER_AVX512 inline void dots32_avx512(const float *q, std::int64_t queries, const float *v, std::int64_t spans,
                                        std::int64_t dims, float *out) {
    const std::int64_t whole = dims / 16 * 16;
    const __mmask16 rest = static_cast<__mmask16>((1u << (dims - whole)) - 1u);
    for (std::int64_t j = 0; j < spans; j += 2) {
        const std::int64_t j1 = j + 1 < spans ? j + 1 : j;
        for (std::int64_t i = 0; i < queries; i += 4) {
            const std::int64_t i1 = i + 1 < queries ? i + 1 : i, i2 = i + 2 < queries ? i + 2 : i;
            const std::int64_t i3 = i + 3 < queries ? i + 3 : i;
            const float *y0 = v + j * dims, *y1 = v + j1 * dims;
            const float *r0 = q + i * dims, *r1 = q + i1 * dims, *r2 = q + i2 * dims, *r3 = q + i3 * dims;
            __m512 a0 = _mm512_setzero_ps(), b0 = a0, c0 = a0, e0 = a0, a1 = a0, b1 = a0, c1 = a0, e1 = a0;
#define X(load, d)                                                                        \
    {                                                                                     \
        const __m512 x0 = load(y0 + d), x1 = load(y1 + d), z0 = load(r0 + d), z1 = load(r1 + d); \
        const __m512 z2 = load(r2 + d), z3 = load(r3 + d);                                \
        a0 = _mm512_fmadd_ps(z0, x0, a0), a1 = _mm512_fmadd_ps(z0, x1, a1);               \
        b0 = _mm512_fmadd_ps(z1, x0, b0), b1 = _mm512_fmadd_ps(z1, x1, b1);               \
        c0 = _mm512_fmadd_ps(z2, x0, c0), c1 = _mm512_fmadd_ps(z2, x1, c1);               \
        e0 = _mm512_fmadd_ps(z3, x0, e0), e1 = _mm512_fmadd_ps(z3, x1, e1);               \
    }
#define EL4NER_PART(from) _mm512_maskz_loadu_ps(rest, from)
            // A load of which nothing is wanted is not free: beyond a page it costs hundreds of cycles.
            if (rest) X(EL4NER_PART, whole)
            for (std::int64_t d = 0; d < whole; d += 16) X(_mm512_loadu_ps, d)
#undef EL4NER_PART
#undef X
            float sums0[4], sums1[4];
            _mm_storeu_ps(sums0, sums_avx512(a0, b0, c0, e0));
            _mm_storeu_ps(sums1, sums_avx512(a1, b1, c1, e1));
            for (std::int64_t n = std::min<std::int64_t>(4, queries - i) - 1; n >= 0; --n) {
                out[(i + n) * spans + j1] = sums1[n];
                out[(i + n) * spans + j] = sums0[n];
            }
        }
    }
}

#endif  // EL4NER_X86

}  // namespace el4ner::topk
