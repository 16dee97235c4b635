// choice_logprobs on x86: panels, products and reductions in AVX-512 and AVX-512 BF16.
#pragma once

#include "choice_logprobs.hpp"
#include "transpose.hpp"

namespace el4ner {

// Rows `first` on of the head as they lie in memory (Half: 2 bytes an element), transposed into a panel [U][32].
// Widen: the two halves of a unit become two rows of float32, so that the panel is [H][32].
template <bool Half, bool Widen = false>
EL4NER_AVX512 inline void pack_units(const HeadCall &call, std::int64_t first, std::int64_t units,
                                     std::uint32_t *panel) {
    constexpr std::int64_t per_unit = Half ? 2 : 1, bytes = Half ? 2 : 4;
    const auto *head = static_cast<const char *>(call.head);
    for (std::int64_t group = 0; group < kPanel; group += 16)
        for (std::int64_t u = 0; u < units; u += 16) {
            const std::int64_t left = std::min<std::int64_t>(16 * per_unit, call.width - u * per_unit);
            const auto mask = static_cast<std::uint32_t>((std::uint64_t{1} << left) - 1);
            __m512i row[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const std::int64_t v = first + group + i;
                const char *from = head + (v * call.width + u * per_unit) * bytes;
                const std::uint32_t on = v < call.vocabulary ? mask : 0;
                row[i] = Half ? _mm512_maskz_loadu_epi16(on, from)
                              : _mm512_maskz_loadu_epi32(static_cast<__mmask16>(on), from);
            }
            transpose_16(row);
            const std::int64_t count = std::min<std::int64_t>(16, units - u);
            for (std::int64_t i = 0; i < count; ++i) {
                if (!Widen) {
                    _mm512_store_si512(panel + (u + i) * kPanel + group, row[i]);
                    continue;
                }
                std::uint32_t *to = panel + 2 * (u + i) * kPanel + group;
                _mm512_store_si512(to, _mm512_slli_epi32(row[i], 16));
                if (2 * (u + i) + 1 == call.width) continue;
                const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
                _mm512_store_si512(to + kPanel, _mm512_and_si512(row[i], upper));
            }
        }
}

// Part of the head to bring into the second-level cache meanwhile, `step` bytes for each unit: the 16 streams that
// pack_units reads are too many for the processor's own prefetching (measured: packing took 27 ms of 115, not 8).
struct Ahead {
    const char *from;
    std::int64_t step;
};

EL4NER_INLINE void prefetch(const Ahead &ahead, std::int64_t unit) {
    const char *at = ahead.from + unit * ahead.step;
    for (std::int64_t offset = 0; offset < ahead.step; offset += 64) __builtin_prefetch(at + offset, 0, 2);
}

// R hidden states times a panel: 2 R accumulators, 2 loads and R broadcasts for each unit.
template <int R>
EL4NER_AVX512_BF16 inline void tile_bf16(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                                         float *out, const Ahead &ahead) {
    __m512 low[R], high[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (std::int64_t u = 0; u < units; ++u) {
        prefetch(ahead, u);
        const auto a = (__m512bh)_mm512_load_si512(panel + u * kPanel);
        const auto b = (__m512bh)_mm512_load_si512(panel + u * kPanel + 16);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            const auto h = (__m512bh)_mm512_set1_epi32(static_cast<int>(hidden[r * units + u]));
            low[r] = _mm512_dpbf16_ps(low[r], h, a);
            high[r] = _mm512_dpbf16_ps(high[r], h, b);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(out + r * kChunk, low[r]);
        _mm512_storeu_ps(out + r * kChunk + 16, high[r]);
    }
}

template <int R>
EL4NER_AVX512 inline void tile_f32(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                                   float *out, const Ahead &ahead) {
    __m512 low[R], high[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (std::int64_t u = 0; u < units; ++u) {
        prefetch(ahead, u);
        const __m512 a = _mm512_load_ps(panel + u * kPanel), b = _mm512_load_ps(panel + u * kPanel + 16);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            const __m512 h = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(hidden[r * units + u])));
            low[r] = _mm512_fmadd_ps(h, a, low[r]);
            high[r] = _mm512_fmadd_ps(h, b, high[r]);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(out + r * kChunk, low[r]);
        _mm512_storeu_ps(out + r * kChunk + 16, high[r]);
    }
}

// tile_f32 of a panel of bfloat16 pairs, which are widened here: the same sums in the same order.
template <int R>
EL4NER_AVX512 inline void tile_widening(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                                        float *out, const Ahead &ahead) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    __m512 low[R], high[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (std::int64_t u = 0; u < units; ++u) {
        prefetch(ahead, u);
        const std::uint32_t *pair = panel + u / 2 * kPanel;
        const __m512i first = _mm512_load_si512(pair), second = _mm512_load_si512(pair + 16);
        const bool even = u % 2 == 0;
        const __m512i left = even ? _mm512_slli_epi32(first, 16) : _mm512_and_si512(first, upper);
        const __m512i right = even ? _mm512_slli_epi32(second, 16) : _mm512_and_si512(second, upper);
        const __m512 a = _mm512_castsi512_ps(left), b = _mm512_castsi512_ps(right);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            const __m512 h = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(hidden[r * units + u])));
            low[r] = _mm512_fmadd_ps(h, a, low[r]);
            high[r] = _mm512_fmadd_ps(h, b, high[r]);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(out + r * kChunk, low[r]);
        _mm512_storeu_ps(out + r * kChunk + 16, high[r]);
    }
}

using Tile = void (*)(const std::uint32_t *, const std::uint32_t *, std::int64_t, float *, const Ahead &);

// All rows in groups of nearly equal size, at most `most`. Each row's sum is the same whatever its group.
// next, bytes: the memory that is packed after this panel.
inline void in_groups(const Tile *tiles, std::int64_t most, const std::uint32_t *hidden, const std::uint32_t *panel,
                      std::int64_t units, std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
    const std::int64_t groups = (rows + most - 1) / most;
    const std::int64_t loops = units * groups;  // 0 without rows or dimensions
    const Ahead share{next, loops > 0 ? bytes / loops + (bytes > 0) : 0};
    for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
        const Ahead ahead{share.from + group * units * share.step, share.step};
        tiles[end - begin - 1](hidden + begin * units, panel, units, out + begin * kChunk, ahead);
    }
}

// exp for x <= 0, relative error below 3e-7 where it matters (x > -20), 0 far below.
EL4NER_AVX512 inline __m512 exp_below_0_avx512(__m512 x) {
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(power, 0);  // the nearest whole number
    const __m512 f = _mm512_fmsub_ps(x, _mm512_set1_ps(1.44269504f), n);
    __m512 p = _mm512_set1_ps(kPowerOfTwo[6]);
#pragma GCC unroll 6
    for (int i = 5; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPowerOfTwo[i]));
    return _mm512_scalef_ps(p, n);
}

// reduce_chunk with its lanes in a register.
EL4NER_AVX512 inline PartialSum reduce_avx512(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    const std::int64_t padded = finish_chunk(call, logit, n, first);
    const float infinity = std::numeric_limits<float>::infinity();
    __m512 most = _mm512_set1_ps(-infinity);
    __mmask16 broken = 0;
    for (std::int64_t i = 0; i < padded; i += 16) {
        const __m512 x = _mm512_loadu_ps(logit + i);
        most = _mm512_max_ps(most, x);
        broken |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    }
    const float top = _mm512_reduce_max_ps(most);
    if (broken != 0 || top == infinity) return {std::numeric_limits<float>::quiet_NaN(), 1.0f};
    if (top == -infinity) return {top, 0.0f};
    // at least -1000: minus infinity would become NaN
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < padded; i += 16) {
        const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(logit + i), _mm512_set1_ps(top));
        sum = _mm512_add_ps(sum, exp_below_0_avx512(_mm512_max_ps(x, _mm512_set1_ps(-1000.0f))));
    }
    float lane[16], total = 0.0f;
    _mm512_storeu_ps(lane, sum);
    for (const float one : lane) total += one;
    return {top, total};
}

struct Avx512Head {
    static constexpr bool pairs = false;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t units, std::uint32_t *panel) {
        if (call.bf16)
            pack_units<true, true>(call, first, (units + 1) / 2, panel);
        else
            pack_units<false>(call, first, units, panel);
    }
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
        static constexpr Tile tiles[] = {tile_f32<1>,  tile_f32<2>,  tile_f32<3>,  tile_f32<4>,  tile_f32<5>,
                                         tile_f32<6>,  tile_f32<7>,  tile_f32<8>,  tile_f32<9>,  tile_f32<10>,
                                         tile_f32<11>, tile_f32<12>, tile_f32<13>, tile_f32<14>};
        in_groups(tiles, 14, hidden, panel, units, rows, out, next, bytes);
    }
    static PartialSum reduce(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
        return reduce_avx512(call, logit, n, first);
    }
};

// For as many rows as one tile takes, which reads a panel once: a head in bfloat16 is packed as it is.
struct FewRowsHead : Avx512Head {
    static constexpr std::int64_t most = 14;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t units, std::uint32_t *panel) {
        pack_units<true>(call, first, (units + 1) / 2, panel);
    }
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
        static constexpr Tile tiles[] = {tile_widening<1>,  tile_widening<2>,  tile_widening<3>,  tile_widening<4>,
                                         tile_widening<5>,  tile_widening<6>,  tile_widening<7>,  tile_widening<8>,
                                         tile_widening<9>,  tile_widening<10>, tile_widening<11>, tile_widening<12>,
                                         tile_widening<13>, tile_widening<14>};
        in_groups(tiles, most, hidden, panel, units, rows, out, next, bytes);
    }
};

struct Bf16Head : Avx512Head {
    static constexpr bool pairs = true;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t units, std::uint32_t *panel) {
        pack_units<true>(call, first, units, panel);
    }
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
        static constexpr Tile tiles[] = {tile_bf16<1>,  tile_bf16<2>,  tile_bf16<3>,  tile_bf16<4>,  tile_bf16<5>,
                                         tile_bf16<6>,  tile_bf16<7>,  tile_bf16<8>,  tile_bf16<9>,  tile_bf16<10>,
                                         tile_bf16<11>, tile_bf16<12>, tile_bf16<13>, tile_bf16<14>};
        in_groups(tiles, 14, hidden, panel, units, rows, out, next, bytes);
    }
};

}  // namespace el4ner

#include "choice_logprobs_avx2.hpp"
