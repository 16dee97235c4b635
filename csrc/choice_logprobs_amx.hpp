// choice_logprobs with AMX: rows of the head go into tiles as they lie in memory, hidden states are laid out once.
//
// Products come out with 16 rows of the head below each other and 16 hidden states side by side, so that maxima and sums
// over the vocabulary are taken lane by lane.
#pragma once

#include "amx.hpp"
#include "choice_logprobs.hpp"

namespace el4ner {

#if EL4NER_X86 && EL4NER_AMX

constexpr std::int64_t kPairs = 2 * kTileUnits;  // bfloat16 numbers of the depth in a tile

// Whole tiles of the depth only: what lies behind a row of the head is the next row, or not there at all.
inline bool amx_takes(const HeadCall &call) { return call.bf16 && call.width > 0 && call.width % kPairs == 0; }

// Hidden states [16 rows][32 of the depth][pair][row], rows beyond the last zero.
inline std::vector<std::uint32_t> hidden_tiles(const HeadCall &call, std::int64_t groups) {
    const std::int64_t units = call.width / 2;
    std::vector<std::uint32_t> out(static_cast<std::size_t>(groups * units * kTileRows), 0);
    for (std::int64_t r = 0; r < call.rows; ++r)
        for (std::int64_t u = 0; u < units; ++u)
            std::memcpy(&out[static_cast<std::size_t>((r / kTileRows * units + u) * kTileRows + r % kTileRows)],
                        static_cast<const std::uint16_t *>(call.hidden) + r * call.width + 2 * u, 4);
    return out;
}

// 32 rows of the head times 16 hidden states, or 32: logits [group of 16 states][row of the head][state], where groups
// are kChunk rows apart. ahead: what to bring into the second cache meanwhile, as much as is read here.
template <bool Both>
EL4NER_AMX_TARGET inline void multiply_head(const std::uint16_t *head, std::int64_t width, const std::uint32_t *hidden,
                                            const char *ahead, std::int64_t lines, float *logits) {
    const std::int64_t blocks = width / kPairs, tile = kTileRows * kTileUnits, group = blocks * tile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t b = 0; b < blocks; ++b, head += kPairs, hidden += tile) {
        _tile_loadd(4, head, 2 * width);
        _tile_loadd(6, hidden, 4 * kTileUnits);
        _tile_loadd(5, head + kTileRows * width, 2 * width);
        if constexpr (Both) _tile_loadd(7, hidden + group, 4 * kTileUnits);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (Both) {
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (std::int64_t line = b * lines / blocks; line < (b + 1) * lines / blocks; ++line)
            __builtin_prefetch(ahead + 64 * line, 0, 2);
    }
    _tile_stored(0, logits, 4 * kTileUnits);
    _tile_stored(1, logits + tile, 4 * kTileUnits);
    if constexpr (Both) {
        _tile_stored(2, logits + kChunk * kTileRows, 4 * kTileUnits);
        _tile_stored(3, logits + kChunk * kTileRows + tile, 4 * kTileUnits);
    }
}

// Scale, bias and cap of n products for 16 hidden states in place, then each one's maximum and sum.
EL4NER_AMX_TARGET inline void reduce_lanes(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first,
                                           PartialSum *out) {
    constexpr int lanes = 16, chains = 4;
    float top[lanes], sums[chains][lanes] = {};
    int broken[lanes] = {};
    std::fill_n(top, lanes, -std::numeric_limits<float>::infinity());
    for (std::int64_t v = 0; v < n; ++v) {
        float *own = logit + v * lanes;
        const float bias = call.bias == nullptr ? 0.0f : call.bias[first + v];
        if (call.scale != 1.0f)
            for (int j = 0; j < lanes; ++j) own[j] *= call.scale;
        if (call.bias != nullptr)
            for (int j = 0; j < lanes; ++j) own[j] += bias;
        if (call.soft_cap > 0.0f)
            for (int j = 0; j < lanes; ++j) own[j] = capped(own[j], call.soft_cap);
        for (int j = 0; j < lanes; ++j) broken[j] |= own[j] != own[j];
        for (int j = 0; j < lanes; ++j) top[j] = own[j] > top[j] ? own[j] : top[j];
    }
    float base[lanes];  // infinity minus infinity is none of the sums' business
    for (int j = 0; j < lanes; ++j) base[j] = top[j] > -std::numeric_limits<float>::infinity() ? top[j] : 0.0f;
    std::int64_t v = 0;
    for (; v + chains <= n; v += chains)
        for (int c = 0; c < chains; ++c)
            for (int j = 0; j < lanes; ++j) sums[c][j] += exp_float(logit[(v + c) * lanes + j] - base[j]);
    for (; v < n; ++v)
        for (int j = 0; j < lanes; ++j) sums[0][j] += exp_float(logit[v * lanes + j] - base[j]);
    for (int j = 0; j < lanes; ++j) {
        out[j] = {top[j], (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j])};
        if (broken[j] != 0) out[j] = {std::numeric_limits<float>::quiet_NaN(), 1.0f};
        else if (top[j] == -std::numeric_limits<float>::infinity()) out[j].sum = 0.0f;
    }
}

// Chunks [begin, end) of the vocabulary: partial [chunk][row of a whole group].
EL4NER_AMX_TARGET inline void head_chunks(const HeadCall &call, const std::uint32_t *hidden, std::int64_t groups,
                                          std::int64_t begin, std::int64_t end, PartialSum *partial) {
    const auto *head = static_cast<const std::uint16_t *>(call.head);
    const std::int64_t group = call.width / 2 * kTileRows, row_bytes = 2 * call.width;
    std::vector<std::uint16_t> last;  // the last rows of the head, up to a whole panel
    std::vector<float> logits(static_cast<std::size_t>(groups * kChunk * kTileRows));
    tiles_configure();
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
        const std::int64_t first = chunk * kChunk, n = std::min(kChunk, call.vocabulary - first);
        for (std::int64_t v = 0; v < n; v += kPanel) {
            const std::uint16_t *rows = head + (first + v) * call.width;
            if (v + kPanel > n) {
                last.assign(static_cast<std::size_t>(kPanel * call.width), 0);
                std::copy_n(rows, (n - v) * call.width, last.data());
                rows = last.data();
            }
            const std::int64_t behind = std::min(first + v + kPanel, call.vocabulary), steps = (groups + 1) / 2;
            const std::int64_t lines = std::min(kPanel, call.vocabulary - behind) * row_bytes / 64;
            for (std::int64_t s = 0; s < steps; ++s) {
                const std::int64_t from = s * lines / steps, share = (s + 1) * lines / steps - from;
                const char *ahead = reinterpret_cast<const char *>(head + behind * call.width) + 64 * from;
                float *out = logits.data() + (2 * s * kChunk + v) * kTileRows;
                if (2 * s + 1 < groups)
                    multiply_head<true>(rows, call.width, hidden + 2 * s * group, ahead, share, out);
                else
                    multiply_head<false>(rows, call.width, hidden + 2 * s * group, ahead, share, out);
            }
        }
        for (std::int64_t g = 0; g < groups; ++g)
            reduce_lanes(call, logits.data() + g * kChunk * kTileRows, n, first,
                         partial + (chunk * groups + g) * kTileRows);
    }
    tiles_release();
}

inline void log_totals_amx(const HeadCall &call, std::int64_t threads) {
    const std::int64_t groups = (call.rows + kTileRows - 1) / kTileRows;
    const std::int64_t chunks = (call.vocabulary + kChunk - 1) / kChunk;
    const std::vector<std::uint32_t> hidden = hidden_tiles(call, groups);
    std::vector<PartialSum> partial(static_cast<std::size_t>(chunks * groups * kTileRows));
    in_parallel(chunks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        head_chunks(call, hidden.data(), groups, begin, end, partial.data());
    });
    merge_partials(call, partial.data(), chunks, groups * kTileRows);
}

#endif  // EL4NER_X86 && EL4NER_AMX

}  // namespace el4ner
