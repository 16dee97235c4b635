// span_topk, innermost, with AMX: products of up to 32 query rows with one group of 32 sentences.
//
// The layout of a pool panel, [step][32 lanes] of 4-byte units, is that of two tiles side by side; query rows come as
// [16 steps][32 rows][step]. Query bytes are signed here, so sums start at zero; they are the same integers as on
// every other path. Beyond the last step query units are zero, and the pool holds finite numbers.
#pragma once

#include "amx.hpp"
#include "span_topk_tiles.hpp"

namespace el4ner::topk {

constexpr int kAmxRows = 32;  // 12 KB at a width of 384, which stay in the first cache; 64 were no faster

#if EL4NER_X86 && EL4NER_AMX

// Sums [rows][32 lanes] of one position whose maxima are still to be taken.
struct PendingSums {
    const std::uint32_t *sums;
    const float *scales;
    float *best;
    std::int64_t rows;
    bool first;  // position of the group
};

template <bool Integers>
EL4NER_AMX_TARGET EL4NER_INLINE void keep_amx(const PendingSums &from, std::int64_t begin, std::int64_t end) {
    for (int half = 0; half < kLanes; half += 16) {
        const __m512 scale = Integers && from.scales ? _mm512_loadu_ps(from.scales + half) : _mm512_setzero_ps();
        for (std::int64_t r = begin; r < end; ++r) {
            const __m512i sum = _mm512_load_si512(from.sums + r * kLanes + half);
            __m512 product = Integers ? _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale) : _mm512_castsi512_ps(sum);
            float *top = from.best + r * kLanes + half;
            if (!from.first) product = _mm512_max_ps(product, _mm512_load_ps(top));
            _mm512_store_ps(top, product);
        }
    }
}

// Sums of 16 rows, or 32, with one position. Products leave the vector units idle: between them they take the maxima of
// the position before, whose sums lie where these go in the end.
template <bool Integers, bool Both>
EL4NER_AMX_TARGET EL4NER_INLINE void multiply_amx(const std::uint32_t *query, const std::uint32_t *panel,
                                                  std::int64_t blocks, const PendingSums &before, std::uint32_t *sums) {
    constexpr std::int64_t tile = kTileRows * kTileUnits;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::int64_t b = 0; b < blocks; ++b, query += 2 * tile, panel += kTileUnits * kLanes) {
        _tile_loadd(6, panel, 4 * kLanes);
        _tile_loadd(4, query, 4 * kTileUnits);
        _tile_loadd(7, panel + 16, 4 * kLanes);
        if constexpr (Both) _tile_loadd(5, query + tile, 4 * kTileUnits);
        if constexpr (Integers) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if constexpr (Both) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (Both) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        keep_amx<Integers>(before, b * before.rows / blocks, (b + 1) * before.rows / blocks);
    }
    _tile_stored(0, sums, 4 * kLanes);
    _tile_stored(1, sums + 16, 4 * kLanes);
    if constexpr (Both) {
        _tile_stored(2, sums + kTileRows * kLanes, 4 * kLanes);
        _tile_stored(3, sums + kTileRows * kLanes + 16, 4 * kLanes);
    }
}

// Both: for 17 to 32 rows, else up to 16. best is aligned to 64 bytes.
template <bool Integers, bool Both>
EL4NER_AMX_TARGET void tile_amx(const std::uint32_t *query, const Group &group, std::int64_t steps, float *best) {
    constexpr std::int64_t rows = Both ? 2 * kTileRows : kTileRows;
    alignas(64) std::uint32_t sums[rows * kLanes];
    const std::int64_t blocks = (steps + kTileUnits - 1) / kTileUnits;
    PendingSums before{sums, nullptr, best, 0, true};
    asm volatile("" : : : "memory");  // what is loaded below has been written
    for (std::int64_t p = 0; p < group.positions; ++p) {
        multiply_amx<Integers, Both>(query, group.units + p * steps * kLanes, blocks, before, sums);
        before = {sums, Integers ? group.scales + p * kLanes : nullptr, best, rows, p == 0};
    }
    keep_amx<Integers>(before, 0, before.rows);
}

#endif  // EL4NER_X86 && EL4NER_AMX

}  // namespace el4ner::topk
