// choice_logprobs in AVX2: panels widened to float32, products of 6 hidden states with 16 columns, a block of the depth
// at a time, so that what a product reads stays in the first-level cache.
#pragma once

#include "choice_logprobs.hpp"
#include "transpose.hpp"

namespace el4ner {

// 16 columns of a panel are 16 KiB to this depth, 6 hidden states 6 KiB; first-level caches have 32 or 48.
constexpr std::int64_t kDepth = 256, kHalfPanel = 16;

// 16 bfloat16 numbers, or 8 float32, of each of 8 rows of the head -> their columns, `step` floats apart.
template <bool Half>
EL4NER_AVX2 inline void pack_eight(const void *head, std::int64_t width, std::int64_t first, std::int64_t k,
                                   float *to) {
    __m256 row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const std::int64_t at = (first + i) * width + k;
        row[i] = Half ? _mm256_loadu_ps(reinterpret_cast<const float *>(static_cast<const std::uint16_t *>(head) + at))
                      : _mm256_loadu_ps(static_cast<const float *>(head) + at);
    }
    transpose_8(row);
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
        if (!Half) {
            _mm256_store_ps(to + u * kHalfPanel, row[u]);
            continue;
        }
        const __m256i pair = _mm256_castps_si256(row[u]);  // the first of two numbers is the lower half
        const __m256i second = _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
        _mm256_store_ps(to + 2 * u * kHalfPanel, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
        _mm256_store_ps(to + (2 * u + 1) * kHalfPanel, _mm256_castsi256_ps(second));
    }
}

// Columns `first` on of the head, as float32, into a panel [2][H][16]; columns past the vocabulary are 0.
template <bool Half>
EL4NER_AVX2 inline void pack_halves(const HeadCall &call, std::int64_t first, float *panel) {
    constexpr std::int64_t step = Half ? 16 : 8;
    const bool whole = first + kPanel <= call.vocabulary;
    const std::int64_t blocks = whole ? call.width / step * step : 0;
    for (std::int64_t half = 0; half < 2; ++half, panel += call.width * kHalfPanel) {
        const std::int64_t column = first + half * kHalfPanel;
        for (std::int64_t k = 0; k < blocks; k += step)
            for (std::int64_t eight = 0; eight < kHalfPanel; eight += 8)
                pack_eight<Half>(call.head, call.width, column + eight, k, panel + k * kHalfPanel + eight);
        for (std::int64_t v = 0; v < kHalfPanel; ++v)
            for (std::int64_t k = blocks; k < call.width; ++k) {
                const std::int64_t at = (column + v) * call.width + k;
                const bool inside = column + v < call.vocabulary;
                panel[k * kHalfPanel + v] = !inside ? 0.0f
                                            : Half  ? from_bf16(static_cast<const std::uint16_t *>(call.head)[at])
                                                    : static_cast<const float *>(call.head)[at];
            }
    }
}

// R hidden states, `stride` apart, times 16 columns over `depth` units; added to what is in `out` if there is `more`.
template <int R>
EL4NER_AVX2 inline void tile_avx2(const float *hidden, std::int64_t stride, const float *panel, std::int64_t depth,
                                  bool more, float *out) {
    __m256 low[R], high[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        low[r] = more ? _mm256_loadu_ps(out + r * kChunk) : _mm256_setzero_ps();
        high[r] = more ? _mm256_loadu_ps(out + r * kChunk + 8) : _mm256_setzero_ps();
    }
    for (std::int64_t u = 0; u < depth; ++u) {
        const __m256 a = _mm256_load_ps(panel + u * kHalfPanel), b = _mm256_load_ps(panel + u * kHalfPanel + 8);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m256 h = _mm256_broadcast_ss(hidden + r * stride + u);
            low[r] = _mm256_fmadd_ps(h, a, low[r]);
            high[r] = _mm256_fmadd_ps(h, b, high[r]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        _mm256_storeu_ps(out + r * kChunk, low[r]);
        _mm256_storeu_ps(out + r * kChunk + 8, high[r]);
    }
}

// exp for x <= 0, relative error below 3e-7 where it matters (x > -20), 1e-38 below -87.
EL4NER_AVX2 inline __m256 exp_below_0_avx2(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
    const __m256 log2e = _mm256_set1_ps(1.44269504f);
    const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);  // 1.5 * 2^23 rounds; 127 is the exponent's bias
    const __m256 shifted = _mm256_fmadd_ps(x, log2e, magic);
    const __m256 f = _mm256_fmsub_ps(x, log2e, _mm256_sub_ps(shifted, magic));
    __m256 p = _mm256_set1_ps(kPowerOfTwo[6]);
#pragma GCC unroll 6
    for (int i = 5; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kPowerOfTwo[i]));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

// reduce_chunk with its lanes in two registers.
EL4NER_AVX2 inline PartialSum reduce_avx2(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    const std::int64_t padded = finish_chunk(call, logit, n, first);
    __m256 low = _mm256_set1_ps(-std::numeric_limits<float>::infinity()), high = low, broken = _mm256_setzero_ps();
    for (std::int64_t i = 0; i < padded; i += 16) {
        const __m256 a = _mm256_loadu_ps(logit + i), b = _mm256_loadu_ps(logit + i + 8);
        low = _mm256_max_ps(low, a);
        high = _mm256_max_ps(high, b);
        broken = _mm256_or_ps(broken, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    }
    float lane[8];
    _mm256_storeu_ps(lane, _mm256_max_ps(low, high));
    const float top = *std::max_element(lane, lane + 8);
    if (_mm256_movemask_ps(broken) != 0 || top == std::numeric_limits<float>::infinity())
        return {std::numeric_limits<float>::quiet_NaN(), 1.0f};
    if (top == -std::numeric_limits<float>::infinity()) return {top, 0.0f};
    low = high = _mm256_setzero_ps();
    const __m256 base = _mm256_set1_ps(top);
    for (std::int64_t i = 0; i < padded; i += 16) {
        low = _mm256_add_ps(low, exp_below_0_avx2(_mm256_sub_ps(_mm256_loadu_ps(logit + i), base)));
        high = _mm256_add_ps(high, exp_below_0_avx2(_mm256_sub_ps(_mm256_loadu_ps(logit + i + 8), base)));
    }
    _mm256_storeu_ps(lane, _mm256_add_ps(low, high));
    float sum = 0.0f;
    for (const float one : lane) sum += one;
    return {top, sum};
}

struct Avx2Head {
    static constexpr bool pairs = false;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t, std::uint32_t *panel) {
        (call.bf16 ? pack_halves<true> : pack_halves<false>)(call, first, reinterpret_cast<float *>(panel));
    }
    // Each row's sum is the same whatever its group: over the depth in order, kept as float32 between blocks.
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
        using Product = void (*)(const float *, std::int64_t, const float *, std::int64_t, bool, float *);
        static constexpr Product tiles[] = {tile_avx2<1>, tile_avx2<2>, tile_avx2<3>,
                                            tile_avx2<4>, tile_avx2<5>, tile_avx2<6>};
        const auto *states = reinterpret_cast<const float *>(hidden);
        const auto *columns = reinterpret_cast<const float *>(panel);
        const std::int64_t groups = (rows + 5) / 6, blocks = std::max<std::int64_t>((units + kDepth - 1) / kDepth, 1);
        const std::int64_t calls = 2 * blocks * groups, lines = bytes / 64;
        std::int64_t done = 0, fetched = 0;
        for (std::int64_t half = 0; half < 2; ++half, columns += units * kHalfPanel)
            for (std::int64_t block = 0; block < blocks; ++block) {
                const std::int64_t from = block * kDepth, depth = std::min(kDepth, units - from);
                for (std::int64_t group = 0; group < groups; ++group) {
                    // the memory that is packed next, a share before each product
                    for (++done; fetched < done * lines / calls; ++fetched)
                        __builtin_prefetch(next + 64 * fetched, 0, 2);
                    const std::int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
                    tiles[end - begin - 1](states + begin * units + from, units, columns + from * kHalfPanel, depth,
                                           block > 0, out + begin * kChunk + half * kHalfPanel);
                }
            }
    }
    static PartialSum reduce(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
        return reduce_avx2(call, logit, n, first);
    }
};

}  // namespace el4ner
