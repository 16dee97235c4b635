// span_topk, packing: which kernels run, vectors to units, and the pool laid out for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "span_topk_amx.hpp"
#include "span_topk_dots.hpp"
#include "span_topk_tiles.hpp"

namespace el4ner::topk {

enum class Precision { fp32, bf16, int8 };
enum class Isa { portable, avx2, avx512, amx };

// One way to screen. Query numbers of int8 run from -levels to levels and are stored with an offset.
struct Kernels {
    Precision precision;
    Isa isa;
    int rows;
    int levels, offset;
    TileFunction tile[kMostRows + 1];  // by number of rows
    ScatterFunction scatter;
    SurviveFunction survive;
    Dots32Function dots32;
    Dot64Function dot64;
};

inline bool cpu_has(Isa isa, Precision precision) {
    if (isa == Isa::portable) return true;
#if EL4NER_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2 && precision != Precision::bf16;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::amx) return avx512 && precision != Precision::fp32 && amx_granted();
    if (precision == Precision::bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (precision == Precision::int8) return avx512 && __builtin_cpu_supports("avx512vnni");
    return avx512;
#else
    (void)precision;
    return false;
#endif
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
        Kernels k{precision, isa, kAmxRows, 127, 0, {}, scatter_avx512, survive_avx512, dots32_avx512, dot64_avx512};
        const bool int8 = precision == Precision::int8;
        for (int r = 1; r <= kAmxRows; ++r)
            k.tile[r] = r > kTileRows ? (int8 ? tile_amx<true, true> : tile_amx<false, true>)
                                      : (int8 ? tile_amx<true, false> : tile_amx<false, false>);
        return k;
    }
#endif
    if (isa == Isa::avx512) {
        Kernels k{precision, isa, kAvx512Rows, 127, 128, {}, scatter_avx512, survive_avx512, dots32_avx512, dot64_avx512};
        const TileFunction fp32[] = {EL4NER_TILES14(tile_fp32_avx512)}, bf16[] = {EL4NER_TILES14(tile_bf16_avx512)};
        const TileFunction int8[] = {EL4NER_TILES14(tile_int8_avx512)};
        const TileFunction *chosen = precision == Precision::fp32 ? fp32 : precision == Precision::bf16 ? bf16 : int8;
        std::copy(chosen, chosen + kAvx512Rows + 1, k.tile);
        return k;
    }
    if (isa == Isa::avx2) {
        Kernels k{precision, isa, kAvx2Rows, 63, 64, {}, scatter_avx2, survive_avx2, dots32_avx2, dot64_avx2};
        const TileFunction fp32[] = {EL4NER_TILES6(tile_fp32_avx2)}, int8[] = {EL4NER_TILES6(tile_int8_avx2)};
        std::copy(precision == Precision::fp32 ? fp32 : int8, (precision == Precision::fp32 ? fp32 : int8) + kAvx2Rows + 1,
                  k.tile);
        return k;
    }
#endif
    Kernels k{precision, isa, kPortableRows, 127, 128, {}, scatter_portable, survive_portable,
              dots32_portable, dot64_portable};
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

inline std::int64_t numbers_per_unit(Precision precision) {
    return precision == Precision::fp32 ? 1 : precision == Precision::bf16 ? 2 : 4;
}

// A vector in units, and how far they are from it; norms are rounded upwards.
struct Quantised {
    float norm;           // of the vector itself
    float error;          // of the difference
    float scale;          // int8: one integer step; else 1
    std::int32_t sum;     // int8: of the integers
};

inline float upwards(double x) {  // sums of float squares are off by a relative 1e-4 at most up to 1,600 numbers a lane
    return static_cast<float>(x * 1.0002);
}

// values (dims) finite with a norm of about 1; units (steps), zero beyond dims. offset: added to each int8 number,
// so that query bytes are unsigned (then the zeros beyond dims are stored as they are: they meet zeros of the pool).
template <Precision P>
EL4NER_INLINE Quantised quantise_body(const float *values, std::int64_t dims, std::int64_t steps,
                                                              int levels, int offset, std::uint32_t *units) {
    constexpr std::int64_t width = 16;
    float tops[width] = {}, squares[width] = {}, errors[width] = {};
    std::int32_t sums[width] = {};
    const std::int64_t whole = dims / width * width;
    for (std::int64_t d = 0; d < whole; d += width)
        for (std::int64_t l = 0; l < width; ++l) {
            const float x = values[d + l], size = std::fabs(x);
            squares[l] += x * x;
            tops[l] = size > tops[l] ? size : tops[l];
        }
    for (std::int64_t d = whole; d < dims; ++d) {
        squares[0] += values[d] * values[d];
        tops[0] = std::max(tops[0], std::fabs(values[d]));
    }
    const float top = *std::max_element(tops, tops + width);
    const auto total = [](const float *x) { return std::accumulate(x, x + width, 0.0); };
    Quantised out{upwards(std::sqrt(total(squares))), 0.0f, 1.0f, 0};
    if constexpr (P == Precision::fp32) {
        std::memcpy(units, values, static_cast<std::size_t>(dims) * sizeof(float));
        return out;
    }
    if constexpr (P == Precision::bf16) {
        auto *halves = reinterpret_cast<std::uint16_t *>(units);
        for (std::int64_t d = 0; d < dims; ++d) {
            std::uint32_t bits;
            std::memcpy(&bits, values + d, sizeof bits);
            bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to the nearest, ties to even
            const float gap = values[d] - from_bf16(bits);
            errors[d % width] += gap * gap;
            halves[d] = static_cast<std::uint16_t>(bits);
        }
        for (std::int64_t d = dims; d < 2 * steps; ++d) halves[d] = 0;
    }
    if constexpr (P == Precision::int8) {
        auto *bytes = reinterpret_cast<std::uint8_t *>(units);
        // Smaller numbers are zeros of their own error, which kSlack (span_topk.hpp) covers: 127 / top would overflow.
        out.scale = top > 1e-20f ? top / static_cast<float>(levels) : 1.0f;
        const float inverse = top > 1e-20f ? static_cast<float>(levels) / top : 0.0f;
        constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
        const auto one = [&](std::int64_t d, std::int64_t l) {
            const float shifted = values[d] * inverse + magic;
            std::int32_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            const float gap = values[d] - (shifted - magic) * out.scale;
            errors[l] += gap * gap;
            const std::int32_t number = bits - 0x4b400000;
            sums[l] += number;
            bytes[d] = static_cast<std::uint8_t>(number + offset);
        };
        for (std::int64_t d = 0; d < whole; d += width)
            for (std::int64_t l = 0; l < width; ++l) one(d + l, l);
        for (std::int64_t d = whole; d < dims; ++d) one(d, 0);
        for (std::int64_t d = dims; d < 4 * steps; ++d) bytes[d] = 0;
        out.sum = std::accumulate(sums, sums + width, 0);
    }
    // The float gaps are off by a rounding of the values themselves: 2^-23 of the norm each covers it.
    out.error = upwards(std::sqrt(total(errors)) + out.norm * std::ldexp(1.0, -22));
    return out;
}

template <Precision P>
Quantised quantise_portable(const float *values, std::int64_t dims, std::int64_t steps, int levels, int offset,
                            std::uint32_t *units) {
    return quantise_body<P>(values, dims, steps, levels, offset, units);
}
#if EL4NER_X86
template <Precision P>
EL4NER_AVX2 Quantised quantise_avx2(const float *values, std::int64_t dims, std::int64_t steps, int levels, int offset,
                                    std::uint32_t *units) {
    return quantise_body<P>(values, dims, steps, levels, offset, units);
}
#endif

using QuantiseFunction = Quantised (*)(const float *, std::int64_t, std::int64_t, int, int, std::uint32_t *);

inline QuantiseFunction quantise_for(Precision precision) {
#if EL4NER_X86
    if (cpu_has(Isa::avx2, Precision::fp32))
        return precision == Precision::fp32   ? quantise_avx2<Precision::fp32>
               : precision == Precision::bf16 ? quantise_avx2<Precision::bf16>
                                              : quantise_avx2<Precision::int8>;
#endif
    return precision == Precision::fp32   ? quantise_portable<Precision::fp32>
           : precision == Precision::bf16 ? quantise_portable<Precision::bf16>
                                          : quantise_portable<Precision::int8>;
}

// Runs work(task) for each task below `tasks` on several threads; the first exception goes to the caller.
template <typename Work>
void parallel(std::int64_t tasks, int threads, const Work &work) {
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, tasks)));
    std::atomic<std::int64_t> next{0};
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(used));
    const auto loop = [&](int number) {
        try {
            for (std::int64_t task = next++; task < tasks; task = next++) work(task);
        } catch (...) {
            errors[static_cast<std::size_t>(number)] = std::current_exception();
            next = tasks;
        }
    };
    std::vector<std::thread> others;
    for (int number = 1; number < used; ++number) {
        try {
            others.emplace_back(loop, number);
        } catch (const std::system_error &) {
            break;  // no more threads to be had: those that run do the work
        }
    }
    loop(0);
    for (std::thread &other : others) other.join();
    for (const std::exception_ptr &error : errors)
        if (error) std::rethrow_exception(error);
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

// The pool for one precision: sentences with spans, the longest first, in groups of 32 lanes.
class PackedPool {
  public:
    PackedPool(const float *vectors, const std::int64_t *offsets, std::int64_t sentences, std::int64_t dims,
               double largest_norm, Precision precision, int threads)
        : precision(precision), sentences(sentences), dims(dims), steps((dims + numbers_per_unit(precision) - 1) / numbers_per_unit(precision)) {
        // A power of two brings the longest vector below 1, so that no product overflows.
        int exponent = 0;
        if (largest_norm > 0.0) std::frexp(largest_norm * 1.001, &exponent);
        unit = std::ldexp(1.0, exponent);
        for (std::int64_t c = 0; c < sentences; ++c)
            if (offsets[c + 1] > offsets[c]) order.push_back(static_cast<std::int32_t>(c));
        const auto length = [&](std::int32_t c) { return offsets[c + 1] - offsets[c]; };
        std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return length(a) > length(b); });
        groups = (static_cast<std::int64_t>(order.size()) + kLanes - 1) / kLanes;
        order.resize(static_cast<std::size_t>(groups * kLanes), -1);
        first.push_back(0);
        for (std::int64_t g = 0; g < groups; ++g) first.push_back(first.back() + length(order[g * kLanes]));
        // Tiles of AMX read up to a whole tile behind the last step.
        const std::int64_t used = first.back() * steps * kLanes, behind = kTileUnits * kLanes;
        units = std::make_unique<Units>(static_cast<std::size_t>(used + behind));
        std::fill_n(units->get() + used, behind, 0u);
        norms.assign(order.size(), 0.0f);
        errors.assign(order.size(), 0.0f);
        if (precision == Precision::int8) {
            negated_sums.assign(static_cast<std::size_t>(first.back() * kLanes), 0);
            scales.assign(static_cast<std::size_t>(first.back() * kLanes), 0.0f);
        }
        parallel(groups, threads, [&](std::int64_t g) { pack_group(g, vectors, offsets, exponent); });
    }

    Group group(std::int64_t g) const {
        const std::int64_t p = first[g];
        return {units->get() + p * steps * kLanes, negated_sums.empty() ? nullptr : negated_sums.data() + p * kLanes,
                scales.empty() ? nullptr : scales.data() + p * kLanes, first[g + 1] - p};
    }

    std::int64_t bytes() const {
        return first.back() * kLanes * (steps * 4 + (precision == Precision::int8 ? 8 : 0)) +
               static_cast<std::int64_t>(order.size()) * 12;
    }

    const Precision precision;
    const std::int64_t sentences, dims, steps;
    double unit = 1.0;                // packed = vector / unit
    std::int64_t groups = 0;
    std::vector<std::int32_t> order;  // lane -> sentence, -1 where a lane is empty
    std::vector<std::int64_t> first;  // group -> its first position; one more at the end
    std::vector<float> norms, errors; // lane -> the largest norm, the largest error of its spans

  private:
    void pack_group(std::int64_t g, const float *vectors, const std::int64_t *offsets, int exponent) {
        const QuantiseFunction quantise = quantise_for(precision);
        const float factor = std::ldexp(1.0f, -exponent / 2), factor2 = std::ldexp(1.0f, -exponent + exponent / 2);
        std::vector<float> scaled(static_cast<std::size_t>(dims));
        std::vector<std::uint32_t> row(static_cast<std::size_t>(steps));
        const std::int64_t positions = first[g + 1] - first[g];
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const std::int64_t at = g * kLanes + lane;
            const std::int32_t c = order[at];
            for (std::int64_t p = 0; p < positions; ++p) {
                const std::int64_t place = (first[g] + p) * kLanes + lane;
                std::uint32_t *panel = units->get() + (first[g] + p) * steps * kLanes + lane;
                if (c < 0) {
                    for (std::int64_t s = 0; s < steps; ++s) panel[s * kLanes] = 0;
                    continue;
                }
                const std::int64_t own = offsets[c + 1] - offsets[c];
                if (p < own) {  // else the last span again: the maximum stays
                    const float *vector = vectors + (offsets[c] + p) * dims;
                    for (std::int64_t d = 0; d < dims; ++d) scaled[d] = vector[d] * factor * factor2;
                    const Quantised q = quantise(scaled.data(), dims, steps, 127, 0, row.data());
                    norms[at] = std::max(norms[at], q.norm);
                    errors[at] = std::max(errors[at], q.error);
                    if (precision == Precision::int8) {
                        negated_sums[place] = -q.sum;
                        scales[place] = q.scale;
                    }
                } else if (precision == Precision::int8) {
                    negated_sums[place] = negated_sums[place - kLanes];
                    scales[place] = scales[place - kLanes];
                }
                for (std::int64_t s = 0; s < steps; ++s) panel[s * kLanes] = row[s];
            }
        }
    }

    std::unique_ptr<Units> units;
    std::vector<std::int32_t> negated_sums;
    std::vector<float> scales;
};

}  // namespace el4ner::topk
