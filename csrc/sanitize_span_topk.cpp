// A driver for address and undefined-behaviour sanitizers (make sanitize) over span_topk, on exactly sized heap arrays.
// Answers do not depend on precision, instruction set, threads or where candidates come from: all are compared with one.
#include <cstdio>
#include <random>

#include "span_topk.hpp"

namespace {

using namespace el4ner::topk;

constexpr Precision kPrecisions[] = {Precision::fp32, Precision::bf16, Precision::int8};
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx};
const char *const kPrecisionNames[] = {"fp32", "bf16", "int8"}, *const kIsaNames[] = {"portable", "avx2", "avx512", "amx"};

std::mt19937 random_bits(0);

struct Ragged {
    std::vector<float> vectors;
    std::vector<std::int64_t> offsets{0};

    Ragged(std::int64_t count, std::int64_t dims, int longest) {  // lengths from 0 on, the longest among them
        std::uniform_int_distribution<int> length(0, longest);
        for (std::int64_t n = 0; n < count; ++n)
            offsets.push_back(offsets.back() + (n == count / 2 ? longest : length(random_bits)));
        std::normal_distribution<float> normal;
        vectors.resize(static_cast<std::size_t>(offsets.back() * dims));
        for (float &one : vectors) one = normal(random_bits);
        // Spans that occur twice make ties, which the lower id wins.
        for (std::size_t d = 0; offsets.back() > 3 && d < static_cast<std::size_t>(dims); ++d)
            vectors[vectors.size() - 1 - d] = vectors[static_cast<std::size_t>(dims) - 1 - d];
    }

    // Half of the vectors become one of the first few.
    void repeat(std::int64_t dims) {
        for (std::int64_t s = 8; s < offsets.back(); ++s)
            if (random_bits() % 2) std::copy_n(vectors.begin() + random_bits() % 8 * dims, dims, vectors.begin() + s * dims);
    }
};

struct Answer {
    std::vector<std::int64_t> ids;
    std::vector<float> scores;

    explicit Answer(std::int64_t size)
        : ids(static_cast<std::size_t>(size), -1), scores(static_cast<std::size_t>(size), kLowest) {}
    bool operator==(const Answer &other) const { return ids == other.ids && scores == other.scores; }
};

int failures = 0, calls = 0;

void expect(bool right, const char *what, std::size_t precision, std::size_t isa) {
    ++calls;
    if (right) return;
    ++failures;
    std::printf("FAILED: %s, %s on %s\n", what, kPrecisionNames[precision], kIsaNames[isa]);
}

void compare(const Batch &batch, const Rows &rows, std::int64_t sentences, std::int64_t dims) {
    Answer expected(batch.count * batch.k);
    std::vector<std::int64_t> everything, begins{0};  // all sentences proposed to each query
    for (std::int64_t b = 0; b < batch.count; ++b) {
        for (std::int64_t c = 0; c < sentences; ++c) everything.push_back(c);
        begins.push_back(static_cast<std::int64_t>(everything.size()));
    }
    choose(batch, rows, sentences, kernels_for(Precision::fp32, Isa::portable), dims, everything.data(), begins.data(), 1,
           expected.ids.data(), expected.scores.data());
    for (std::size_t p = 0; p < 3; ++p)
        for (const auto &[threads, most] : {std::pair<int, int>{1, 0}, {1, 40}, {3, 3}, {3, -1}}) {
            for (std::size_t i = 0; i < 4; ++i) {
                if (!cpu_has(kIsas[i], kPrecisions[p])) continue;
                const PackedPool pool(rows.vectors, rows.offsets, sentences, dims, rows.largest_norm, kPrecisions[p],
                                      paired(kPrecisions[p], kIsas[i]), threads, most);
                const Kernels kernels = kernels_for(kPrecisions[p], kIsas[i]);
                Answer found(batch.count * batch.k), chosen(batch.count * batch.k);
                run(batch, rows, pool, kernels, threads, found.ids.data(), found.scores.data());
                expect(found == expected, "search", p, i);
                choose(batch, rows, sentences, kernels, dims, everything.data(), begins.data(), threads, chosen.ids.data(),
                       chosen.scores.data());
                expect(chosen == expected, "choose", p, i);
            }
        }
}

void cases(std::int64_t dims, std::int64_t sentences, std::int64_t count) {
    Ragged pool(sentences, dims, 5);
    const Ragged queries(count, dims, 17);
    if (count != 1) pool.repeat(dims);
    double largest = 0.0;
    for (std::int64_t s = 0; s < pool.offsets.back(); ++s)
        largest = std::max(largest, dot64_portable(pool.vectors.data() + s * dims, pool.vectors.data() + s * dims, dims));
    std::vector<double> weights(static_cast<std::size_t>(queries.offsets.back()));
    for (std::size_t n = 0; n < weights.size(); ++n) weights[n] = 1.0 + static_cast<double>(n % 3);
    std::vector<std::int64_t> excluded, excluded_offsets{0};
    for (std::int64_t b = 0; b < count; ++b) {
        if (b % 2 && sentences) excluded.push_back(b % sentences);
        excluded_offsets.push_back(static_cast<std::int64_t>(excluded.size()));
    }
    for (std::int64_t k : {0, 1, 5, 80})
        compare({queries.vectors.data(), queries.offsets.data(), weights.data(), excluded.data(), excluded_offsets.data(),
                 count, k},
                {pool.vectors.data(), pool.offsets.data(), std::sqrt(largest)}, sentences, dims);
}

// Screening sums in int8 are integers: one row at a time on the portable loop, and all rows on AMX, give the same bits.
void compare_sums(std::int64_t dims, std::int64_t rows) {
    if (!cpu_has(Isa::amx, Precision::int8)) return;
    const Ragged pool(40, dims, 5);
    const PackedPool packed(pool.vectors.data(), pool.offsets.data(), 40, dims, 1e3, Precision::int8, false, 1);
    const Kernels amx = kernels_for(Precision::int8, Isa::amx), portable = kernels_for(Precision::int8, Isa::portable);
    const std::int64_t steps = packed.steps, padded = (steps + el4ner::kTileUnits - 1) / el4ner::kTileUnits * el4ner::kTileUnits;
    Units tile(static_cast<std::size_t>(padded * kAmxRows));
    std::fill_n(tile.get(), padded * kAmxRows, 0u);
    std::vector<std::uint32_t> row(static_cast<std::size_t>(rows * steps));
    std::uniform_int_distribution<int> number(-127, 127);
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t s = 0; s < steps; ++s) {
            std::uint32_t with_offset = 0, plain = 0;
            for (int shift = 0; shift < 32; shift += 8) {
                const int n = number(random_bits);
                with_offset |= static_cast<std::uint32_t>(n + portable.offset) << shift;
                plain |= static_cast<std::uint32_t>(n & 0xff) << shift;
            }
            row[static_cast<std::size_t>(r * steps + s)] = with_offset;
            tile.get()[(s / 16 * kAmxRows + r) * 16 + s % 16] = plain;
        }
    alignas(64) float best[kMostRows * kLanes], expected[kLanes];
    const TileRegisters registers(amx);
    for (std::int64_t g = 0; g < packed.groups; ++g) {
        amx.tile[rows](tile.get(), packed.group(g), steps, best);
        for (std::int64_t r = 0; r < rows; ++r) {
            portable.tile[1](row.data() + r * steps, packed.group(g), steps, expected);
            expect(std::memcmp(expected, best + r * kLanes, sizeof expected) == 0, "sums", 2, 3);
        }
    }
}

}  // namespace

int main() {
    for (std::int64_t dims : {1, 5, 33, 64, 70, 384})
        for (std::int64_t rows : {1, 15, 16, 17, 31, 32}) compare_sums(dims, rows);
    for (std::int64_t dims : {1, 5, 16, 33, 70, 130})
        for (std::int64_t sentences : {0, 1, 31, 33, 600})
            for (std::int64_t count : {0, 1, 9}) cases(dims, sentences, count);
    std::printf("span_topk: %d answers compared, %s\n", calls, failures == 0 ? "no findings" : "findings");
    return failures == 0 ? 0 : 1;
}
