// span_topk, spans that many sentences share: each is multiplied once, and its sentences look the product up.
//
// Texts repeat their words: of the 53,000 noun phrases of WNUT17's training set 57% are distinct, of 96,000 of GENIA 40%.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "span_topk_team.hpp"
#include "span_topk_tiles.hpp"
#include "transpose.hpp"

namespace el4ner::topk {

// Which spans of a pool are shared. of_span: span -> its shared vector, -1 where it has one of its own; rows: shared
// vector -> a span that has it.
struct SharedSpans {
    std::vector<std::int32_t> of_span;
    std::vector<std::int64_t> rows;
};

// Equal vectors have the same one.
inline std::uint64_t hash_of(const float *vector, std::int64_t count) {
    std::uint64_t hash = 0x9e3779b97f4a7c15u;
    for (std::int64_t d = 0; d < count; ++d) {
        std::uint32_t bits;
        std::memcpy(&bits, vector + d, sizeof bits);
        hash = (hash ^ bits) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 29;
    }
    return hash;
}

// Finds at most `most` vectors that occur more than once, the commonest first. Equal vectors may be missed, where many
// others begin with the same 16 numbers; unequal ones are never taken for each other.
inline SharedSpans find_shared(const float *vectors, std::int64_t count, std::int64_t dims, std::int64_t most, int threads) {
    SharedSpans shared;
    if (most < 1 || count >= (std::int64_t{1} << 30)) return shared;  // places in the table are 32-bit
    const std::int64_t head = std::min<std::int64_t>(dims, 16);  // a cache line
    std::vector<std::uint64_t> hashes(static_cast<std::size_t>(count));
    constexpr std::int64_t chunk = 4096;
    parallel((count + chunk - 1) / chunk, threads, [&](std::int64_t task) {
        for (std::int64_t s = task * chunk; s < std::min(count, (task + 1) * chunk); ++s)
            hashes[static_cast<std::size_t>(s)] = hash_of(vectors + s * dims, head);
    });
    struct Entry {
        std::int32_t row = -1, count = 0;
    };
    std::size_t size = 64;
    while (size < 2 * static_cast<std::size_t>(count)) size *= 2;
    std::vector<Entry> table(size);
    std::vector<std::int32_t> entry_of(static_cast<std::size_t>(count), -1);
    const std::size_t bytes = static_cast<std::size_t>(dims) * sizeof(float);
    for (std::int64_t s = 0; s < count; ++s) {
        std::size_t at = hashes[static_cast<std::size_t>(s)] & (size - 1);
        for (int tries = 0; tries < 8; ++tries, at = (at + 1) & (size - 1)) {  // few, whatever the vectors are like
            Entry &entry = table[at];
            if (entry.row < 0) entry.row = static_cast<std::int32_t>(s);
            else if (hashes[static_cast<std::size_t>(entry.row)] != hashes[static_cast<std::size_t>(s)] ||
                     std::memcmp(vectors + entry.row * dims, vectors + s * dims, bytes) != 0)
                continue;
            ++entry.count;
            entry_of[static_cast<std::size_t>(s)] = static_cast<std::int32_t>(at);
            break;
        }
    }
    std::vector<std::int32_t> repeated;
    for (std::size_t at = 0; at < size; ++at)
        if (table[at].count > 1) repeated.push_back(static_cast<std::int32_t>(at));
    const auto commoner = [&](std::int32_t a, std::int32_t b) {
        const Entry &one = table[static_cast<std::size_t>(a)], &other = table[static_cast<std::size_t>(b)];
        return one.count > other.count || (one.count == other.count && one.row < other.row);
    };
    std::sort(repeated.begin(), repeated.end(), commoner);
    if (static_cast<std::int64_t>(repeated.size()) > most) repeated.resize(static_cast<std::size_t>(most));
    std::int64_t spans = 0;
    for (const std::int32_t at : repeated) spans += table[static_cast<std::size_t>(at)].count;
    if (spans - static_cast<std::int64_t>(repeated.size()) < count / 32) return shared;  // not worth the looking up
    std::vector<std::int32_t> number(size, -1);
    for (const std::int32_t at : repeated) {
        number[static_cast<std::size_t>(at)] = static_cast<std::int32_t>(shared.rows.size());
        shared.rows.push_back(table[static_cast<std::size_t>(at)].row);
    }
    shared.of_span.reserve(static_cast<std::size_t>(count));
    for (const std::int32_t at : entry_of) shared.of_span.push_back(at < 0 ? -1 : number[static_cast<std::size_t>(at)]);
    return shared;
}

// Products of a tile's rows with the shared vectors, [vector][width] floats, behind the last row minus infinity; which
// vectors each lane of a group has, ids[first[lane]] to ids[first[lane + 1]].
struct Lookup {
    const float *table;
    std::int64_t width;
    const std::int32_t *ids;
    const std::int64_t *first;
};

// best [rows][32], what a tile made of 32 shared vectors, goes to their place in the table, [32][width]; behind the last
// row minus infinity. width is a multiple of 8, of 16 with AVX-512.
using KeepFunction = void (*)(const float *best, int rows, std::int64_t width, float *table);

// best [rows][32] becomes the larger of itself and of what the lanes look up; what they look up alone where `alone`.
using LiftFunction = void (*)(const Lookup &lookup, int rows, bool alone, float *best);

constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline void keep_portable(const float *best, int rows, std::int64_t width, float *table) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        float *to = table + lane * width;
        for (int r = 0; r < rows; ++r) to[r] = best[r * kLanes + lane];
        std::fill(to + rows, to + width, kNothing);
    }
}

inline void lift_portable(const Lookup &lookup, int rows, bool alone, float *best) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        float top[kMostRows];
        std::fill_n(top, rows, kNothing);
        for (std::int64_t n = lookup.first[lane]; n < lookup.first[lane + 1]; ++n) {
            const float *products = lookup.table + lookup.ids[n] * lookup.width;
            for (int r = 0; r < rows; ++r) top[r] = std::max(top[r], products[r]);
        }
        for (int r = 0; r < rows; ++r) {
            float &own = best[r * kLanes + lane];
            own = alone ? top[r] : std::max(own, top[r]);
        }
    }
}

#if EL4NER_X86

EL4NER_AVX2 inline void keep_avx2(const float *best, int rows, std::int64_t width, float *table) {
    for (int from = 0; from < width; from += 8)
        for (std::int64_t lane = 0; lane < kLanes; lane += 8) {
            __m256 part[8];
            for (int r = 0; r < 8; ++r)
                part[r] = from + r < rows ? _mm256_loadu_ps(best + (from + r) * kLanes + lane) : _mm256_set1_ps(kNothing);
            transpose_8(part);
            for (int l = 0; l < 8; ++l) _mm256_storeu_ps(table + (lane + l) * width + from, part[l]);
        }
}

EL4NER_AVX512 inline void keep_avx512(const float *best, int rows, std::int64_t width, float *table) {
    for (int from = 0; from < width; from += 16)
        for (std::int64_t lane = 0; lane < kLanes; lane += 16) {
            __m512i part[16];
            for (int r = 0; r < 16; ++r)
                part[r] = _mm512_castps_si512(from + r < rows ? _mm512_loadu_ps(best + (from + r) * kLanes + lane)
                                                              : _mm512_set1_ps(kNothing));
            transpose_16(part);
            for (int l = 0; l < 16; ++l) _mm512_storeu_si512(table + (lane + l) * width + from, part[l]);
        }
}

EL4NER_AVX2 inline void lift_avx2(const Lookup &lookup, int rows, bool alone, float *best) {
    for (std::int64_t lane = 0; lane < kLanes; lane += 8) {
        __m256 top[8];
        for (int l = 0; l < 8; ++l) {
            top[l] = _mm256_set1_ps(kNothing);
            for (std::int64_t n = lookup.first[lane + l]; n < lookup.first[lane + l + 1]; ++n)
                top[l] = _mm256_max_ps(top[l], _mm256_loadu_ps(lookup.table + lookup.ids[n] * lookup.width));
        }
        transpose_8(top);
        for (int r = 0; r < rows; ++r) {
            float *own = best + r * kLanes + lane;
            _mm256_storeu_ps(own, alone ? top[r] : _mm256_max_ps(top[r], _mm256_loadu_ps(own)));
        }
    }
}

EL4NER_AVX512 inline void lift_avx512(const Lookup &lookup, int rows, bool alone, float *best) {
    for (int from = 0; from < rows; from += 16)
        for (std::int64_t lane = 0; lane < kLanes; lane += 16) {
            __m512i top[16];
            for (int l = 0; l < 16; ++l) {
                __m512 own = _mm512_set1_ps(kNothing);
                for (std::int64_t n = lookup.first[lane + l]; n < lookup.first[lane + l + 1]; ++n)
                    own = _mm512_max_ps(own, _mm512_loadu_ps(lookup.table + lookup.ids[n] * lookup.width + from));
                top[l] = _mm512_castps_si512(own);
            }
            transpose_16(top);
            for (int r = from; r < std::min(rows, from + 16); ++r) {
                float *own = best + r * kLanes + lane;
                const __m512 found = _mm512_castsi512_ps(top[r - from]);
                _mm512_storeu_ps(own, alone ? found : _mm512_max_ps(found, _mm512_loadu_ps(own)));
            }
        }
}

#endif

}  // namespace el4ner::topk
