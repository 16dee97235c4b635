// span_topk, packing: which kernels run, and the pool laid out for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "span_topk_amx.hpp"
#include "span_topk_dots.hpp"
#include "span_topk_quantise.hpp"
#include "span_topk_shared.hpp"
#include "span_topk_team.hpp"
#include "span_topk_tiles.hpp"

namespace el4ner::topk {

// One way to screen. Query numbers of int8 run from -levels to levels and are stored with an offset. paired: steps meet in
// 16 bits, which asks for other scales and an even number of steps.
struct Kernels {
    Precision precision;
    Isa isa;
    int rows;
    int levels, offset;
    bool paired;
    TileFunction tile[kMostRows + 1];  // by number of rows
    ScatterFunction scatter;
    SurviveFunction survive;
    LiftFunction lift;
    KeepFunction keep;
    Dots32Function dots32;
    Dot64Function dot64;
    BestFunction best;
};

// Whether these kernels read a pool of that layout.
inline bool paired(Precision precision, Isa isa) { return precision == Precision::int8 && isa == Isa::avx2; }

// levels: at most so many. The query's side of kPairedQueryNorm and kPairedPoolNorm, or the pool's.
inline int levels_of(const float *values, std::int64_t dims, int levels, bool paired, bool query) {
#if EL4NER_X86
    if (paired) return paired_levels(values, dims, levels, query ? kPairedQueryNorm : kPairedPoolNorm);
#endif
    (void)values, (void)dims, (void)paired, (void)query;
    return levels;
}

#define EL4NER_TILES6(name) nullptr, name<1>, name<2>, name<3>, name<4>, name<5>, name<6>
#define EL4NER_TILES14(name) \
    EL4NER_TILES6(name), name<7>, name<8>, name<9>, name<10>, name<11>, name<12>, name<13>, name<14>
#define EL4NER_TILES_PORTABLE(unit) \
    nullptr, tile_portable<unit, 1>, tile_portable<unit, 2>, tile_portable<unit, 3>, tile_portable<unit, 4>

// Raises std::invalid_argument where the machine lacks the instructions.
inline Kernels kernels_for(Precision precision, Isa isa) {
    if (!cpu_has(isa, precision)) throw std::invalid_argument("this CPU lacks the instructions");
#if EL4NER_X86
#if EL4NER_AMX
    if (isa == Isa::amx) {
        Kernels k{precision, isa, kAmxRows, 127, 0, false, {}, scatter_avx512, survive_avx512, lift_avx512, keep_avx512,
                  dots32_avx512, dot64_avx512, best_avx512};
        const bool int8 = precision == Precision::int8;
        for (int r = 1; r <= kAmxRows; ++r)
            k.tile[r] = r > kTileRows ? (int8 ? tile_amx<true, true> : tile_amx<false, true>)
                                      : (int8 ? tile_amx<true, false> : tile_amx<false, false>);
        return k;
    }
#endif
    if (isa == Isa::avx512) {
        Kernels k{precision, isa, kAvx512Rows, 127, 128, false, {}, scatter_avx512, survive_avx512, lift_avx512, keep_avx512,
                  dots32_avx512, dot64_avx512, best_avx512};
        const TileFunction fp32[] = {EL4NER_TILES14(tile_fp32_avx512)}, bf16[] = {EL4NER_TILES14(tile_bf16_avx512)};
        const TileFunction int8[] = {EL4NER_TILES14(tile_int8_avx512)};
        const TileFunction *chosen = precision == Precision::fp32 ? fp32 : precision == Precision::bf16 ? bf16 : int8;
        std::copy(chosen, chosen + kAvx512Rows + 1, k.tile);
        return k;
    }
    if (isa == Isa::avx2) {
        const bool int8 = precision == Precision::int8;
        Kernels k{precision, isa, int8 ? kPairedRows : kAvx2Rows, 63, 64, int8, {}, scatter_avx2, survive_avx2, lift_avx2, keep_avx2,
                  dots32_avx2, dot64_avx2, best_portable};
        const TileFunction fp32[] = {EL4NER_TILES6(tile_fp32_avx2)};
        const TileFunction bytes[] = {EL4NER_TILES6(tile_int8_avx2), tile_int8_avx2<7>, tile_int8_avx2<8>};
        std::copy_n(int8 ? bytes : fp32, k.rows + 1, k.tile);
        return k;
    }
#endif
    Kernels k{precision, isa, kPortableRows, 127, 128, false, {}, scatter_portable, survive_portable,
              lift_portable, keep_portable, dots32_portable, dot64_portable, best_portable};
    const TileFunction fp32[] = {EL4NER_TILES_PORTABLE(Fp32Unit)}, bf16[] = {EL4NER_TILES_PORTABLE(Bf16Unit)};
    const TileFunction int8[] = {EL4NER_TILES_PORTABLE(Int8Unit)};
    const TileFunction *chosen = precision == Precision::fp32 ? fp32 : precision == Precision::bf16 ? bf16 : int8;
    std::copy(chosen, chosen + kPortableRows + 1, k.tile);
    return k;
}

// The tile registers of this thread, where the kernels use them.
class TileRegisters {
  public:
    explicit TileRegisters(const Kernels &kernels) : used_(kernels.isa == Isa::amx) {
#if EL4NER_AMX
        if (used_) tiles_configure();
#endif
    }
    ~TileRegisters() {
#if EL4NER_AMX
        if (used_) tiles_release();
#endif
    }
    TileRegisters(const TileRegisters &) = delete;
    TileRegisters &operator=(const TileRegisters &) = delete;

  private:
    const bool used_;
};

// The longest row's length; NaN if a number is not finite. Squares of float32 numbers do not overflow in float64.
inline double largest_norm(const float *vectors, std::int64_t count, std::int64_t dims, Dot64Function dot64, int threads) {
    constexpr std::int64_t rows = 4096;
    std::vector<double> tops(static_cast<std::size_t>((count + rows - 1) / rows), 0.0);
    parallel(static_cast<std::int64_t>(tops.size()), threads, [&](std::int64_t task) {
        double top = 0.0;
        for (std::int64_t s = task * rows; s < std::min(count, (task + 1) * rows); ++s) {
            const double square = dot64(vectors + s * dims, vectors + s * dims, dims);
            top = square <= top ? top : square;  // takes NaN too
            if (!std::isfinite(top)) break;
        }
        tops[static_cast<std::size_t>(task)] = top;
    });
    double top = 0.0;
    for (const double one : tops) {
        if (!std::isfinite(one)) return std::numeric_limits<double>::quiet_NaN();
        top = std::max(top, one);
    }
    return std::sqrt(top);
}

// Memory for the units, in huge pages where the system grants them (packing is bound by page faults).
class Units {
  public:
    explicit Units(std::size_t count) {
        const std::size_t bytes = (std::max<std::size_t>(count, 1) * sizeof(std::uint32_t) + kAlign - 1) / kAlign * kAlign;
        memory_ = static_cast<std::uint32_t *>(::operator new(bytes, std::align_val_t{kAlign}));
#if defined(__linux__)
        if (bytes >= (std::size_t{1} << 22)) madvise(memory_, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Units() { ::operator delete(memory_, std::align_val_t{kAlign}); }
    Units(const Units &) = delete;
    Units &operator=(const Units &) = delete;
    std::uint32_t *get() const { return memory_; }

  private:
    static constexpr std::size_t kAlign = std::size_t{1} << 12;
    std::uint32_t *memory_;
};

// Rows of a block where spans are shared: products with the shared ones take memory by the row.
constexpr std::int64_t kSharedRows = 224;

// Shared vectors whose products with a block of kSharedRows take about 2.6% of a pool's memory, and 7 MB. 5 bytes: a product
// and what tiles of 14 rows leave empty; those of 6 leave more, those of 4 as much again. A query of more spans has a larger block: kernels/span_topk.py packs without sharing for it.
inline std::int64_t most_shared(std::int64_t spans, std::int64_t dims) {
    const double pool = 4.0 * static_cast<double>(spans) * static_cast<double>(dims);
    const auto most = static_cast<std::int64_t>(std::min(0.026 * pool, 7e6) / (5.0 * kSharedRows));
    return most / kLanes * kLanes;
}

// The pool for one precision: sentences with spans of their own, those with the most first, in groups of 32 lanes, each
// position a vector of every lane; behind the groups the vectors that sentences share, 32 in a position.
class PackedPool {
  public:
    // most: shared vectors at most, by the pool's size if negative.
    PackedPool(const float *vectors, const std::int64_t *offsets, std::int64_t sentences, std::int64_t dims,
               double largest_norm, Precision precision, bool paired, int threads, std::int64_t most = -1)
        : precision(precision), paired(paired), sentences(sentences), dims(dims),
          steps(paired ? (dims + 7) / 8 * 2 : (dims + numbers_per_unit(precision) - 1) / numbers_per_unit(precision)) {
        // A power of two brings the longest vector below 1, so that no product overflows.
        int exponent = 0;
        if (largest_norm > 0.0) std::frexp(largest_norm * 1.001, &exponent);
        unit = std::ldexp(1.0, exponent);
        const std::int64_t spans = offsets[sentences];
        const SharedSpans found =
            find_shared(vectors, spans, dims, most < 0 ? most_shared(spans, dims) : most, threads);
        shared = static_cast<std::int64_t>(found.rows.size());
        arrange(offsets, found);
        // Tiles of AMX read up to a whole tile behind the last step.
        const std::int64_t used = positions() * steps * kLanes, behind = kTileUnits * kLanes;
        units = std::make_unique<Units>(static_cast<std::size_t>(used + behind));
        std::fill_n(units->get() + used, behind, 0u);
        norms.assign(order.size(), 0.0f);
        errors.assign(order.size(), 0.0f);
        if (precision == Precision::int8) {
            negated_sums.assign(static_cast<std::size_t>(positions() * kLanes), 0);
            scales.assign(static_cast<std::size_t>(positions() * kLanes), 0.0f);
        }
        const Source source{vectors, offsets, found, exponent};
        std::vector<Quantised> kept(static_cast<std::size_t>(shared));
        parallel(shared_groups(), threads, [&](std::int64_t g) { pack_shared(g, source, kept); });
        parallel(groups, threads, [&](std::int64_t g) { pack_group(g, source, kept); });
    }

    Group group(std::int64_t g) const { return at(first[g], first[g + 1] - first[g]); }

    // 32 shared vectors, in one position.
    Group shared_group(std::int64_t g) const { return at(first.back() + g, 1); }
    std::int64_t shared_groups() const { return (shared + kLanes - 1) / kLanes; }

    // Vectors of 32 lanes that are multiplied with every row.
    std::int64_t positions() const { return first.back() + shared_groups(); }

    std::int64_t bytes() const {
        return positions() * kLanes * (steps * 4 + (precision == Precision::int8 ? 8 : 0)) +
               static_cast<std::int64_t>(order.size()) * 12 + static_cast<std::int64_t>(shared_ids.size()) * 4 +
               static_cast<std::int64_t>(first_shared.size()) * 8;
    }

    const Precision precision;
    const bool paired;
    const std::int64_t sentences, dims, steps;
    double unit = 1.0;                // packed = vector / unit
    std::int64_t groups = 0;
    std::vector<std::int32_t> order;  // lane -> sentence, -1 where a lane is empty
    std::vector<std::int64_t> first;  // group -> its first position; one more at the end
    std::vector<float> norms, errors; // lane -> the largest norm, the largest error of its spans
    std::int64_t shared = 0;          // vectors that sentences share
    std::vector<std::int32_t> shared_ids;    // which ones the lanes have
    std::vector<std::int64_t> first_shared;  // lane -> its first of these; one more at the end. Empty without any

  private:
    struct Source {
        const float *vectors;
        const std::int64_t *offsets;
        const SharedSpans &found;
        int exponent;
    };

    Group at(std::int64_t p, std::int64_t count) const {
        return {units->get() + p * steps * kLanes, negated_sums.empty() ? nullptr : negated_sums.data() + p * kLanes,
                scales.empty() ? nullptr : scales.data() + p * kLanes, count};
    }

    // Which sentence lies where, and which shared vectors it has.
    void arrange(const std::int64_t *offsets, const SharedSpans &found) {
        std::vector<std::int64_t> own(static_cast<std::size_t>(sentences));  // spans that are not shared
        for (std::int64_t c = 0; c < sentences; ++c) {
            if (offsets[c + 1] > offsets[c]) order.push_back(static_cast<std::int32_t>(c));
            own[static_cast<std::size_t>(c)] = offsets[c + 1] - offsets[c];
            for (std::int64_t s = offsets[c]; shared && s < offsets[c + 1]; ++s)
                own[static_cast<std::size_t>(c)] -= found.of_span[static_cast<std::size_t>(s)] >= 0;
        }
        const auto length = [&](std::int32_t c) { return own[static_cast<std::size_t>(c)]; };
        std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return length(a) > length(b); });
        groups = (static_cast<std::int64_t>(order.size()) + kLanes - 1) / kLanes;
        order.resize(static_cast<std::size_t>(groups * kLanes), -1);
        first.push_back(0);
        for (std::int64_t g = 0; g < groups; ++g) first.push_back(first.back() + length(order[g * kLanes]));
        if (!shared) return;
        for (const std::int32_t c : order) {
            first_shared.push_back(static_cast<std::int64_t>(shared_ids.size()));
            for (std::int64_t s = c < 0 ? 0 : offsets[c]; s < (c < 0 ? 0 : offsets[c + 1]); ++s)
                if (found.of_span[static_cast<std::size_t>(s)] >= 0) shared_ids.push_back(found.of_span[static_cast<std::size_t>(s)]);
        }
        first_shared.push_back(static_cast<std::int64_t>(shared_ids.size()));
    }

    // Lays span s out as `lane` of position p; row and scaled are room to work in.
    Quantised place(std::int64_t s, std::int64_t p, std::int64_t lane, const Source &source, std::vector<float> &scaled,
                    std::vector<std::uint32_t> &row) {
        const float factor = std::ldexp(1.0f, -source.exponent / 2);
        const float factor2 = std::ldexp(1.0f, -source.exponent + source.exponent / 2);
        const float *vector = source.vectors + s * dims;
        for (std::int64_t d = 0; d < dims; ++d) scaled[d] = vector[d] * factor * factor2;
        if (precision == Precision::int8) turn_(scaled.data(), dims);
        const int levels = levels_of(scaled.data(), dims, 127, paired, false);
        const Quantised q = quantise_for(precision)(scaled.data(), dims, steps, levels, 0, row.data());
        if (precision == Precision::int8) {
            negated_sums[p * kLanes + lane] = -q.sum;
            scales[p * kLanes + lane] = q.scale;
        }
        std::uint32_t *panel = units->get() + p * steps * kLanes + lane;
        for (std::int64_t n = 0; n < steps; ++n) panel[n * kLanes] = row[n];
        return q;
    }

    // In a lane what the position before has there, so that the maximum stays.
    void repeat(std::int64_t p, std::int64_t lane) {
        std::uint32_t *panel = units->get() + p * steps * kLanes + lane;
        const std::uint32_t *before = panel - steps * kLanes;
        for (std::int64_t n = 0; n < steps; ++n) panel[n * kLanes] = before[n * kLanes];
        if (precision == Precision::int8) {
            negated_sums[p * kLanes + lane] = negated_sums[(p - 1) * kLanes + lane];
            scales[p * kLanes + lane] = scales[(p - 1) * kLanes + lane];
        }
    }

    void clear(std::int64_t p, std::int64_t lane) {
        std::uint32_t *panel = units->get() + p * steps * kLanes + lane;
        for (std::int64_t n = 0; n < steps; ++n) panel[n * kLanes] = 0;
    }

    void pack_shared(std::int64_t g, const Source &source, std::vector<Quantised> &kept) {
        std::vector<float> scaled(static_cast<std::size_t>(dims));
        std::vector<std::uint32_t> row(static_cast<std::size_t>(steps));
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const std::int64_t n = g * kLanes + lane, p = first.back() + g;
            if (n < shared)
                kept[static_cast<std::size_t>(n)] =
                    place(source.found.rows[static_cast<std::size_t>(n)], p, lane, source, scaled, row);
            else
                clear(p, lane);
        }
    }
    void pack_group(std::int64_t g, const Source &source, const std::vector<Quantised> &kept) {
        std::vector<float> scaled(static_cast<std::size_t>(dims));
        std::vector<std::uint32_t> row(static_cast<std::size_t>(steps));
        const auto is_shared = [&](std::int64_t s) {
            return shared && source.found.of_span[static_cast<std::size_t>(s)] >= 0;
        };
        const auto heed = [&](std::int64_t at, const Quantised &q) {
            norms[at] = std::max(norms[at], q.norm);
            errors[at] = std::max(errors[at], q.error);
        };
        std::int64_t next[kLanes];  // span of each lane
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const std::int64_t at = g * kLanes + lane, c = order[at];
            next[lane] = c < 0 ? 0 : source.offsets[c];
            for (std::int64_t n = shared ? first_shared[at] : 0; n < (shared ? first_shared[at + 1] : 0); ++n)
                heed(at, kept[static_cast<std::size_t>(shared_ids[n])]);
        }
        for (std::int64_t p = first[g]; p < first[g + 1]; ++p)  // outside, so that the panel written to stays in the first cache
            for (std::int64_t lane = 0; lane < kLanes; ++lane) {
                const std::int64_t at = g * kLanes + lane, c = order[at], end = c < 0 ? 0 : source.offsets[c + 1];
                while (next[lane] < end && is_shared(next[lane])) ++next[lane];
                if (next[lane] < end) heed(at, place(next[lane]++, p, lane, source, scaled, row));
                else if (c < 0) clear(p, lane);
                else if (p > first[g]) repeat(p, lane);
                else place(source.offsets[c], p, lane, source, scaled, row);  // all are shared, any of them will do
            }
    }

    const TurnFunction turn_ = turn_for();
    std::unique_ptr<Units> units;
    std::vector<std::int32_t> negated_sums;
    std::vector<float> scales;
};

}  // namespace el4ner::topk
