// choice_logprobs on x86: panels, products and reductions in AVX2, AVX-512 and AVX-512 BF16.
#pragma once

#include "choice_logprobs.hpp"
#include "transpose.hpp"

namespace el4ner {

// Rows `first` on of the head as they lie in memory (Half: 2 bytes an element), transposed into a panel [U][32].
template <bool Half>
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
            for (std::int64_t i = 0; i < count; ++i)
                _mm512_store_si512(panel + (u + i) * kPanel + group, row[i]);
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

// R hidden states times one half of a panel: 2 R of 16 registers.
template <int R>
EL4NER_AVX2 inline void tile_avx2(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                                  float *out, const Ahead &ahead) {
    const auto *floats = reinterpret_cast<const float *>(panel), *states = reinterpret_cast<const float *>(hidden);
    __m256 low[R], high[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_ps();
    for (std::int64_t u = 0; u < units; ++u) {
        prefetch(ahead, u);
        const __m256 a = _mm256_loadu_ps(floats + u * kPanel), b = _mm256_loadu_ps(floats + u * kPanel + 8);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m256 h = _mm256_broadcast_ss(states + r * units + u);
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

EL4NER_AVX512 inline PartialSum reduce_avx512(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    return reduce_chunk(call, logit, n, first);
}
EL4NER_AVX2 inline PartialSum reduce_avx2(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    return reduce_chunk(call, logit, n, first);
}
EL4NER_AVX2 inline void pack_avx2(const HeadCall &call, std::int64_t first, float *panel) {
    pack_floats(call, first, panel);
}

struct Avx512Head {
    static constexpr bool pairs = false;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t units, std::uint32_t *panel) {
        if (call.bf16)
            pack_avx2(call, first, reinterpret_cast<float *>(panel));
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

struct Avx2Head {
    static constexpr bool pairs = false;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t, std::uint32_t *panel) {
        pack_avx2(call, first, reinterpret_cast<float *>(panel));
    }
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *next, std::int64_t bytes) {
        static constexpr Tile tiles[] = {tile_avx2<1>, tile_avx2<2>, tile_avx2<3>,
                                         tile_avx2<4>, tile_avx2<5>, tile_avx2<6>};
        for (std::int64_t half = 0; half < kPanel; half += 16)
            in_groups(tiles, 6, hidden, panel + half, units, rows, out + half, next, half == 0 ? bytes : 0);
    }
    static PartialSum reduce(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
        return reduce_avx2(call, logit, n, first);
    }
};

}  // namespace el4ner
