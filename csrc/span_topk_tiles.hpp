// span_topk, innermost: products of a few query rows with one group of sentences, and what follows each group.
//
// One sentence per SIMD lane, 32 lanes a group, spans position-major: the maximum over a sentence's spans is an
// element-wise running maximum over positions. All precisions share one layout of 4-byte units (1 float, 2 bf16 or
// 4 int8 along a vector): a pool panel is [step][32 lanes], a query tile [step][rows].
// Source of the formula: kernels/span_topk.py. Every function here is approximate; span_topk.hpp bounds the error.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef EL4NER_X86
#error "instruction_set.hpp has macros of these names with other targets: keep the two in files compiled apart"
#endif
#if defined(__GNUC__) || defined(__clang__)
#define EL4NER_INLINE inline __attribute__((always_inline))
#else
#define EL4NER_INLINE inline
#endif
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define EL4NER_X86 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics leave registers undefined on purpose and are warned about where they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
// Only these functions use wider instructions, so the module loads on any machine.
#define EL4NER_AVX2 __attribute__((target("avx2,fma")))
#define EL4NER_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define EL4NER_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define EL4NER_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#else
#define EL4NER_X86 0
#endif

namespace el4ner::topk {

constexpr std::int64_t kLanes = 32;
constexpr int kMostRows = 32;  // in a tile, of any instruction set

// One group of the packed pool. units [position][step][lane]; int8 also has minus the sum of each vector's integers
// and its scale, both [position][lane].
struct Group {
    const std::uint32_t *units;
    const std::int32_t *negated_sums;
    const float *scales;
    std::int64_t positions;
};

// Which queries a row of a tile counts for: uses[first[r]] to uses[first[r + 1]].
struct Use {
    std::int32_t query;
    float weight;
};

// best [rows][32]: for each row and lane the largest product over the group's positions.
using TileFunction = void (*)(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best);
// totals [query][32] += weight * best
using ScatterFunction = void (*)(const float *best, int rows, const std::int64_t *first, const Use *uses, float *totals);
// Lanes whose total + a * norm + b * error reaches tau, as bits.
using SurviveFunction = std::uint32_t (*)(const float *totals, const float *norms, const float *errors, float a, float b,
                                          float tau);

// ---- portable -------------------------------------------------------------------------------------------------------

inline float from_bf16(std::uint32_t bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Fp32Unit {
    using Sum = float;
    static void add(std::uint32_t q, std::uint32_t v, Sum &sum) {
        float a, b;
        std::memcpy(&a, &q, sizeof a);
        std::memcpy(&b, &v, sizeof b);
        sum += a * b;
    }
};

struct Bf16Unit {
    using Sum = float;
    static void add(std::uint32_t q, std::uint32_t v, Sum &sum) {
        sum += from_bf16(q & 0xffffu) * from_bf16(v & 0xffffu);
        sum += from_bf16(q >> 16) * from_bf16(v >> 16);
    }
};

struct Int8Unit {  // query bytes are unsigned (offset 128), pool bytes signed
    using Sum = std::int32_t;
    static void add(std::uint32_t q, std::uint32_t v, Sum &sum) {
        for (int shift = 0; shift < 32; shift += 8)
            sum += static_cast<std::int32_t>((q >> shift) & 0xffu) * static_cast<std::int8_t>((v >> shift) & 0xffu);
    }
};

constexpr int kPortableRows = 4;

template <typename Unit, int R>
void tile_portable(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    constexpr std::int64_t width = 8;  // two SSE or NEON registers for each row
    constexpr bool integers = std::is_integral<typename Unit::Sum>::value;
    for (std::int64_t block = 0; block < kLanes; block += width) {
        for (std::int64_t p = 0; p < group.positions; ++p) {
            typename Unit::Sum sums[R][width];
            const std::int64_t at = p * kLanes + block;
            for (int r = 0; r < R; ++r)
                for (std::int64_t l = 0; l < width; ++l)
                    sums[r][l] = integers ? static_cast<typename Unit::Sum>(group.negated_sums[at + l] * 128) : 0;
            const std::uint32_t *v = group.units + p * steps * kLanes + block;
            const std::uint32_t *q = query;
            for (std::int64_t s = 0; s < steps; ++s, v += kLanes, q += R)
                for (int r = 0; r < R; ++r)
                    for (std::int64_t l = 0; l < width; ++l) Unit::add(q[r], v[l], sums[r][l]);
            for (int r = 0; r < R; ++r)
                for (std::int64_t l = 0; l < width; ++l) {
                    const float product =
                        integers ? static_cast<float>(sums[r][l]) * group.scales[at + l] : static_cast<float>(sums[r][l]);
                    float &top = best[r * kLanes + block + l];
                    if (p == 0 || product > top) top = product;
                }
        }
    }
}

inline void scatter_portable(const float *best, int rows, const std::int64_t *first, const Use *uses, float *totals) {
    for (int r = 0; r < rows; ++r)
        for (std::int64_t u = first[r]; u < first[r + 1]; ++u) {
            float *total = totals + uses[u].query * kLanes;
            for (std::int64_t l = 0; l < kLanes; ++l) total[l] += uses[u].weight * best[r * kLanes + l];
        }
}

inline std::uint32_t survive_portable(const float *totals, const float *norms, const float *errors, float a, float b,
                                      float tau) {
    std::uint32_t lanes = 0;
    for (std::int64_t l = 0; l < kLanes; ++l)
        lanes |= static_cast<std::uint32_t>(totals[l] + a * norms[l] + b * errors[l] >= tau) << l;
    return lanes;
}

#if EL4NER_X86

// Accumulators are named variables: as arrays they are spilled to memory by GCC 12 (measured: half the speed).
#define EL4NER_ROWS6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define EL4NER_ROWS14(X) EL4NER_ROWS6(X) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)

// ---- AVX2: 6 rows x 16 lanes = 12 of 16 registers -------------------------------------------------------------------

constexpr int kAvx2Rows = 6;

template <int R>
EL4NER_AVX2 void tile_fp32_avx2(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    for (std::int64_t half = 0; half < kLanes; half += 16)
        for (std::int64_t p = 0; p < group.positions; ++p) {
            const float *v = reinterpret_cast<const float *>(group.units) + p * steps * kLanes + half;
            const float *q = reinterpret_cast<const float *>(query);
#define X(i) __m256 a##i = _mm256_setzero_ps(), b##i = _mm256_setzero_ps();
            EL4NER_ROWS6(X)
#undef X
            // Counting shares ports with the products: by fours 87.4 of 95.7 GFLOP/s, one by one 85 (Emerald Rapids).
#pragma GCC unroll 4
            for (std::int64_t s = 0; s < steps; ++s, v += kLanes, q += R) {
                const __m256 v0 = _mm256_loadu_ps(v), v1 = _mm256_loadu_ps(v + 8);
#define X(i)                                       \
    if constexpr (R > i) {                         \
        const __m256 x = _mm256_broadcast_ss(q + i); \
        a##i = _mm256_fmadd_ps(x, v0, a##i);       \
        b##i = _mm256_fmadd_ps(x, v1, b##i);       \
    }
                EL4NER_ROWS6(X)
#undef X
            }
#define X(i)                                                       \
    if constexpr (R > i) {                                         \
        float *top = best + i * kLanes + half;                     \
        if (p > 0) {                                               \
            a##i = _mm256_max_ps(a##i, _mm256_loadu_ps(top));      \
            b##i = _mm256_max_ps(b##i, _mm256_loadu_ps(top + 8));  \
        }                                                          \
        _mm256_storeu_ps(top, a##i);                               \
        _mm256_storeu_ps(top + 8, b##i);                           \
    }
            EL4NER_ROWS6(X)
#undef X
        }
}

// Sums of two steps meet in 16 bits before they are widened: three instructions on the multipliers for 64 products where
// each step by itself takes four. A 16-bit sum of four products stays below 2^15: numbers are scaled so that chunks of
// four, as they meet here, have norms of at most 78 and 157 (before rounding, which adds 1), a query's offset of 64 adds 128:
// (128 + 79) * 158 = 32,706. Steps are even in number.
constexpr int kPairedQueryNorm = 78, kPairedPoolNorm = 157;
constexpr int kPairedRows = 8;

// R query rows of a tile with `stride` of them, times 16 lanes of one position.
template <int R>
EL4NER_AVX2 EL4NER_INLINE void rows_int8_avx2(const std::uint32_t *q, int stride, const std::uint32_t *v,
                                              std::int64_t steps, const std::int32_t *negated_sums, const float *scales,
                                              bool first, float *best) {
    const __m256i ones = _mm256_set1_epi16(1);
    const auto *sums = reinterpret_cast<const __m256i *>(negated_sums);
    const __m256i start0 = _mm256_slli_epi32(_mm256_loadu_si256(sums), 6);
    const __m256i start1 = _mm256_slli_epi32(_mm256_loadu_si256(sums + 1), 6);
    __m256i low[R], high[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) low[r] = start0, high[r] = start1;
    for (std::int64_t s = 0; s < steps; s += 2, v += 2 * kLanes, q += 2 * stride) {
        const auto *panel = reinterpret_cast<const __m256i *>(v), *next = reinterpret_cast<const __m256i *>(v + kLanes);
        const __m256i v0 = _mm256_loadu_si256(panel), v1 = _mm256_loadu_si256(panel + 1);
        const __m256i w0 = _mm256_loadu_si256(next), w1 = _mm256_loadu_si256(next + 1);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256i x = _mm256_set1_epi32(static_cast<int>(q[r]));
            const __m256i y = _mm256_set1_epi32(static_cast<int>(q[r + stride]));
            const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(x, v0), _mm256_maddubs_epi16(y, w0));
            const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(x, v1), _mm256_maddubs_epi16(y, w1));
            low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(a, ones));
            high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(b, ones));
            // Both stay in registers: GCC 12 puts sums off to the end of the loop otherwise, and keeps them in memory.
            asm("" : "+x"(low[r]), "+x"(high[r]));
        }
    }
    const __m256 scale0 = _mm256_loadu_ps(scales), scale1 = _mm256_loadu_ps(scales + 8);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        float *top = best + r * kLanes;
        __m256 c = _mm256_mul_ps(_mm256_cvtepi32_ps(low[r]), scale0);
        __m256 d = _mm256_mul_ps(_mm256_cvtepi32_ps(high[r]), scale1);
        if (!first) {
            c = _mm256_max_ps(c, _mm256_loadu_ps(top));
            d = _mm256_max_ps(d, _mm256_loadu_ps(top + 8));
        }
        _mm256_storeu_ps(top, c);
        _mm256_storeu_ps(top + 8, d);
    }
}

// Up to 4 rows have room in registers; the second half of a larger tile finds the panel in the first cache.
template <int R>
EL4NER_AVX2 void tile_int8_avx2(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    constexpr int begin = R > 4 ? (R + 1) / 2 : R;
    for (std::int64_t half = 0; half < kLanes; half += 16)
        for (std::int64_t p = 0; p < group.positions; ++p) {
            const std::uint32_t *v = group.units + p * steps * kLanes + half;
            const std::int32_t *sums = group.negated_sums + p * kLanes + half;
            const float *scales = group.scales + p * kLanes + half;
            rows_int8_avx2<begin>(query, R, v, steps, sums, scales, p == 0, best + half);
            if constexpr (R > begin)
                rows_int8_avx2<R - begin>(query + begin, R, v, steps, sums, scales, p == 0, best + begin * kLanes + half);
        }
}

EL4NER_AVX2 inline void scatter_avx2(const float *best, int rows, const std::int64_t *first, const Use *uses,
                                     float *totals) {
    for (int r = 0; r < rows; ++r)
        for (std::int64_t u = first[r]; u < first[r + 1]; ++u) {
            float *total = totals + uses[u].query * kLanes;
            const __m256 weight = _mm256_set1_ps(uses[u].weight);
            for (std::int64_t l = 0; l < kLanes; l += 8)
                _mm256_storeu_ps(total + l, _mm256_fmadd_ps(weight, _mm256_loadu_ps(best + r * kLanes + l),
                                                            _mm256_loadu_ps(total + l)));
        }
}

EL4NER_AVX2 inline std::uint32_t survive_avx2(const float *totals, const float *norms, const float *errors, float a,
                                              float b, float tau) {
    std::uint32_t lanes = 0;
    for (int l = 0; l < 32; l += 8) {
        __m256 upper = _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(norms + l), _mm256_loadu_ps(totals + l));
        upper = _mm256_fmadd_ps(_mm256_set1_ps(b), _mm256_loadu_ps(errors + l), upper);
        const int some = _mm256_movemask_ps(_mm256_cmp_ps(upper, _mm256_set1_ps(tau), _CMP_GE_OQ));
        lanes |= static_cast<std::uint32_t>(some) << l;
    }
    return lanes;
}

// ---- AVX-512: 14 rows x 32 lanes = 28 of 32 registers ---------------------------------------------------------------

constexpr int kAvx512Rows = 14;

#define EL4NER_KEEP(i, c, d)                                         \
    if constexpr (R > i) {                                           \
        float *top = best + i * kLanes;                              \
        __m512 c_ = c, d_ = d;                                       \
        if (p > 0) {                                                 \
            c_ = _mm512_max_ps(c_, _mm512_loadu_ps(top));            \
            d_ = _mm512_max_ps(d_, _mm512_loadu_ps(top + 16));       \
        }                                                            \
        _mm512_storeu_ps(top, c_);                                   \
        _mm512_storeu_ps(top + 16, d_);                              \
    }

template <int R>
EL4NER_AVX512 void tile_fp32_avx512(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    for (std::int64_t p = 0; p < group.positions; ++p) {
        const float *v = reinterpret_cast<const float *>(group.units) + p * steps * kLanes;
        const float *q = reinterpret_cast<const float *>(query);
#define X(i) __m512 a##i = _mm512_setzero_ps(), b##i = _mm512_setzero_ps();
        EL4NER_ROWS14(X)
#undef X
        for (std::int64_t s = 0; s < steps; ++s, v += kLanes, q += R) {
            const __m512 v0 = _mm512_loadu_ps(v), v1 = _mm512_loadu_ps(v + 16);
#define X(i)                                  \
    if constexpr (R > i) {                    \
        const __m512 x = _mm512_set1_ps(q[i]); \
        a##i = _mm512_fmadd_ps(x, v0, a##i);  \
        b##i = _mm512_fmadd_ps(x, v1, b##i);  \
    }
            EL4NER_ROWS14(X)
#undef X
        }
#define X(i) EL4NER_KEEP(i, a##i, b##i)
        EL4NER_ROWS14(X)
#undef X
    }
}

// As intrinsics these two cost GCC 12 a copy of every accumulator in memory (measured for int8: 172 instead of about
// 430 GOP/s on a Zen 4 core), hence the instruction itself.
EL4NER_BF16 EL4NER_INLINE void add_bf16(__m512 &sum, __m512i q, __m512i v) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(q), "v"(v));
}

EL4NER_VNNI EL4NER_INLINE void add_int8(__m512i &sum, __m512i q, __m512i v) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(v));
}

template <int R>
EL4NER_BF16 void tile_bf16_avx512(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    for (std::int64_t p = 0; p < group.positions; ++p) {
        const std::uint32_t *v = group.units + p * steps * kLanes;
        const std::uint32_t *q = query;
#define X(i) __m512 a##i = _mm512_setzero_ps(), b##i = _mm512_setzero_ps();
        EL4NER_ROWS14(X)
#undef X
        for (std::int64_t s = 0; s < steps; ++s, v += kLanes, q += R) {
            const __m512i v0 = _mm512_loadu_si512(v), v1 = _mm512_loadu_si512(v + 16);
#define X(i)                                                                      \
    if constexpr (R > i) {                                                        \
        const __m512i x = _mm512_set1_epi32(static_cast<int>(q[i]));              \
        add_bf16(a##i, x, v0);                                                    \
        add_bf16(b##i, x, v1);                                                    \
    }
            EL4NER_ROWS14(X)
#undef X
        }
#define X(i) EL4NER_KEEP(i, a##i, b##i)
        EL4NER_ROWS14(X)
#undef X
    }
}

template <int R>
EL4NER_VNNI void tile_int8_avx512(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    for (std::int64_t p = 0; p < group.positions; ++p) {
        const std::uint32_t *v = group.units + p * steps * kLanes;
        const std::uint32_t *q = query;
        const std::int32_t *sums = group.negated_sums + p * kLanes;
        const __m512i start0 = _mm512_slli_epi32(_mm512_loadu_si512(sums), 7);
        const __m512i start1 = _mm512_slli_epi32(_mm512_loadu_si512(sums + 16), 7);
#define X(i) __m512i a##i = start0, b##i = start1;
        EL4NER_ROWS14(X)
#undef X
        for (std::int64_t s = 0; s < steps; ++s, v += kLanes, q += R) {
            const __m512i v0 = _mm512_loadu_si512(v), v1 = _mm512_loadu_si512(v + 16);
#define X(i)                                                              \
    if constexpr (R > i) {                                                \
        const __m512i x = _mm512_set1_epi32(static_cast<int>(q[i]));      \
        add_int8(a##i, x, v0);                                            \
        add_int8(b##i, x, v1);                                            \
    }
            EL4NER_ROWS14(X)
#undef X
        }
        const __m512 scale0 = _mm512_loadu_ps(group.scales + p * kLanes);
        const __m512 scale1 = _mm512_loadu_ps(group.scales + p * kLanes + 16);
#define X(i)                                                                                              \
    EL4NER_KEEP(i, _mm512_mul_ps(_mm512_cvtepi32_ps(a##i), scale0), _mm512_mul_ps(_mm512_cvtepi32_ps(b##i), scale1))
        EL4NER_ROWS14(X)
#undef X
    }
}

EL4NER_AVX512 inline void scatter_avx512(const float *best, int rows, const std::int64_t *first, const Use *uses,
                                         float *totals) {
    for (int r = 0; r < rows; ++r) {
        const __m512 b0 = _mm512_loadu_ps(best + r * kLanes), b1 = _mm512_loadu_ps(best + r * kLanes + 16);
        for (std::int64_t u = first[r]; u < first[r + 1]; ++u) {
            float *total = totals + uses[u].query * kLanes;
            const __m512 weight = _mm512_set1_ps(uses[u].weight);
            _mm512_storeu_ps(total, _mm512_fmadd_ps(weight, b0, _mm512_loadu_ps(total)));
            _mm512_storeu_ps(total + 16, _mm512_fmadd_ps(weight, b1, _mm512_loadu_ps(total + 16)));
        }
    }
}

EL4NER_AVX512 inline std::uint32_t survive_avx512(const float *totals, const float *norms, const float *errors, float a,
                                                  float b, float tau) {
    const __m512 a_ = _mm512_set1_ps(a), b_ = _mm512_set1_ps(b), tau_ = _mm512_set1_ps(tau);
    std::uint32_t lanes = 0;
    for (int l = 0; l < 32; l += 16) {
        __m512 upper = _mm512_fmadd_ps(a_, _mm512_loadu_ps(norms + l), _mm512_loadu_ps(totals + l));
        upper = _mm512_fmadd_ps(b_, _mm512_loadu_ps(errors + l), upper);
        lanes |= static_cast<std::uint32_t>(_mm512_cmp_ps_mask(upper, tau_, _CMP_GE_OQ)) << l;
    }
    return lanes;
}

#endif  // EL4NER_X86

}  // namespace el4ner::topk
