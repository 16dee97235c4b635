// choice_logprobs: log sum_v exp logit[r, v] over the vocabulary, fused with the product of hidden states and head.
//
// 32 rows of the head at a time are transposed into a panel [unit][32] (a unit is 4 bytes of a row: one float32 or two
// bfloat16), multiplied with up to 14 hidden states in registers, and written to a buffer of 512 columns, which is
// reduced to a maximum and a sum for each row. These partial results are merged in the order of the vocabulary, so
// that neither the number of threads nor the other rows of the batch change a result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "instruction_set.hpp"
#include "parallel.hpp"

#if defined(__GNUC__)
#define EL4NER_INLINE inline __attribute__((always_inline))
#else
#define EL4NER_INLINE inline
#endif

namespace el4ner {

constexpr std::int64_t kPanel = 32;   // columns (rows of the head) in a panel
constexpr std::int64_t kChunk = 512;  // columns between two reductions: 64 rows of it are 128 KiB, inside L2

// hidden (R, H) and head (V, H), both f32 or both bf16 (as bits), contiguous; bias (V,) f32 or nullptr; soft_cap 0: none.
struct HeadCall {
    const void *hidden, *head;
    bool bf16;
    std::int64_t rows, width, vocabulary;
    const float *bias;
    float scale, soft_cap;
    double *log_total;  // (R,)
};

inline float from_bf16(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// exp for x <= 88, relative error below 3e-7, 1e-38 below -87; plain code that compilers vectorise.
EL4NER_INLINE float exp_float(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    std::uint32_t bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += power << 23;  // times 2^n
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

// soft_cap * tanh(x / soft_cap)
EL4NER_INLINE float capped(float x, float soft_cap) {
    float y = x / soft_cap;
    y = y > 20.0f ? 20.0f : y;  // tanh is 1 there
    return soft_cap * (1.0f - 2.0f / (exp_float(2.0f * y) + 1.0f));
}

struct PartialSum {
    float top, sum;  // largest logit, sum of exp(logit - top)
};

// Scale, bias and cap of n products in place, and minus infinity up to a multiple of 16, which is returned.
EL4NER_INLINE std::int64_t finish_chunk(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    if (call.scale != 1.0f)
        for (std::int64_t i = 0; i < n; ++i) logit[i] *= call.scale;
    if (call.bias != nullptr)
        for (std::int64_t i = 0; i < n; ++i) logit[i] += call.bias[first + i];
    if (call.soft_cap > 0.0f)
        for (std::int64_t i = 0; i < n; ++i) logit[i] = capped(logit[i], call.soft_cap);
    const std::int64_t padded = (n + 15) / 16 * 16;
    for (std::int64_t i = n; i < padded; ++i) logit[i] = -std::numeric_limits<float>::infinity();
    return padded;
}

// n products to their maximum and sum, in plain C++.
EL4NER_INLINE PartialSum reduce_chunk(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
    const float infinity = std::numeric_limits<float>::infinity();
    const std::int64_t padded = finish_chunk(call, logit, n, first);
    float lane[16];
    for (int j = 0; j < 16; ++j) lane[j] = -infinity;
    for (std::int64_t i = 0; i < padded; i += 16)
        for (int j = 0; j < 16; ++j) lane[j] = logit[i + j] > lane[j] ? logit[i + j] : lane[j];
    float top = lane[0];
    for (int j = 1; j < 16; ++j) top = std::max(top, lane[j]);
    int broken = 0;  // no bool and no ||, so that the loop is vectorised
    for (std::int64_t i = 0; i < n; ++i) broken |= logit[i] != logit[i];
    if (broken != 0) return {std::numeric_limits<float>::quiet_NaN(), 1.0f};
    if (top == -infinity) return {top, 0.0f};
    for (int j = 0; j < 16; ++j) lane[j] = 0.0f;
    for (std::int64_t i = 0; i < padded; i += 16)
        for (int j = 0; j < 16; ++j) lane[j] += exp_float(logit[i + j] - top);
    float sum = 0.0f;
    for (int j = 0; j < 16; ++j) sum += lane[j];
    return {top, sum};
}

// 2^f for -1/2 <= f <= 1/2 by powers of f: best polynomial of degree 6, off by 2e-9; the vector units' exp uses it.
constexpr float kPowerOfTwo[7] = {1.0f,         0.693147207f,   0.240226509f,  0.0555032723f,
                                  0.009618057f, 0.00134004282f, 0.000154614447f};

// log_total from partial [chunk][stride], in the order of the vocabulary.
inline void merge_partials(const HeadCall &call, const PartialSum *partial, std::int64_t chunks, std::int64_t stride) {
    for (std::int64_t r = 0; r < call.rows; ++r) {
        double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
        for (std::int64_t c = 0; c < chunks; ++c) top = std::max(top, static_cast<double>(partial[c * stride + r].top));
        for (std::int64_t c = 0; c < chunks; ++c) {
            const PartialSum part = partial[c * stride + r];
            if (part.sum > 0.0f) sum += part.sum * std::exp(static_cast<double>(part.top) - top);  // NaN stays
        }
        call.log_total[r] = top + std::log(sum);
    }
}

// Hidden states as units (R, U): float32 values, or pairs of bfloat16 where the processor multiplies these.
inline std::vector<std::uint32_t> hidden_units(const HeadCall &call, bool pairs, std::int64_t units) {
    std::vector<std::uint32_t> out(static_cast<std::size_t>(call.rows * units), 0);
    if (call.width == 0) return out;  // memcpy wants pointers even for nothing
    for (std::int64_t r = 0; r < call.rows; ++r) {
        std::uint32_t *to = out.data() + r * units;
        const auto *halves = static_cast<const std::uint16_t *>(call.hidden) + r * call.width;
        if (!call.bf16)
            std::memcpy(to, static_cast<const float *>(call.hidden) + r * call.width,
                        static_cast<std::size_t>(call.width) * 4);
        else if (pairs)
            std::memcpy(to, halves, static_cast<std::size_t>(call.width) * 2);
        else
            for (std::int64_t k = 0; k < call.width; ++k) to[k] = static_cast<std::uint32_t>(halves[k]) << 16;
    }
    return out;
}

// Columns `first` on of the head, as float32, into a panel [U][32]; columns past the vocabulary are 0.
EL4NER_INLINE void pack_floats(const HeadCall &call, std::int64_t first, float *panel) {
    for (std::int64_t v = 0; v < kPanel; ++v) {
        const bool inside = first + v < call.vocabulary;
        const auto *halves = static_cast<const std::uint16_t *>(call.head) + (first + v) * call.width;
        const auto *floats = static_cast<const float *>(call.head) + (first + v) * call.width;
        for (std::int64_t k = 0; k < call.width; ++k)
            panel[k * kPanel + v] = !inside ? 0.0f : call.bf16 ? from_bf16(halves[k]) : floats[k];
    }
}

// out[r][0..32) for `rows` hidden states: plain sums over k in order.
EL4NER_INLINE void multiply_floats(const float *hidden, const float *panel, std::int64_t units, std::int64_t rows,
                                   float *out) {
    for (std::int64_t r = 0; r < rows; ++r) {
        float sum[kPanel] = {};
        for (std::int64_t k = 0; k < units; ++k)
            for (std::int64_t v = 0; v < kPanel; ++v) sum[v] += hidden[r * units + k] * panel[k * kPanel + v];
        std::memcpy(out + r * kChunk, sum, sizeof sum);
    }
}

}  // namespace el4ner

#if EL4NER_X86
#include "choice_logprobs_amx.hpp"
#include "choice_logprobs_x86.hpp"
#endif

namespace el4ner {

// What an instruction set brings: panels from the head, products, reduction.
struct PortableHead {
    static constexpr bool pairs = false;
    static void pack(const HeadCall &call, std::int64_t first, std::int64_t, std::uint32_t *panel) {
        pack_floats(call, first, reinterpret_cast<float *>(panel));
    }
    static void multiply(const std::uint32_t *hidden, const std::uint32_t *panel, std::int64_t units,
                         std::int64_t rows, float *out, const char *, std::int64_t) {
        multiply_floats(reinterpret_cast<const float *>(hidden), reinterpret_cast<const float *>(panel), units, rows,
                        out);
    }
    static PartialSum reduce(const HeadCall &call, float *logit, std::int64_t n, std::int64_t first) {
        return reduce_chunk(call, logit, n, first);
    }
};

template <typename Set>
inline void log_totals(const HeadCall &call, std::int64_t threads) {
    const std::int64_t units = Set::pairs ? (call.width + 1) / 2 : call.width;
    const std::int64_t row_bytes = call.width * (call.bf16 ? 2 : 4);
    const std::int64_t chunks = (call.vocabulary + kChunk - 1) / kChunk;
    const std::vector<std::uint32_t> hidden = hidden_units(call, Set::pairs, units);
    std::vector<PartialSum> partial(static_cast<std::size_t>(chunks * call.rows));
    in_parallel(chunks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        // 64 bytes of slack align the panel to a cache line
        std::vector<std::uint32_t> memory(static_cast<std::size_t>(kPanel * units + 16));
        auto *panel = reinterpret_cast<std::uint32_t *>(
            (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
        std::vector<float> logits(static_cast<std::size_t>(call.rows * kChunk));
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            const std::int64_t first = chunk * kChunk, n = std::min(kChunk, call.vocabulary - first);
            for (std::int64_t v = 0; v < n; v += kPanel) {
                Set::pack(call, first + v, units, panel);
                const std::int64_t behind = std::min(first + v + kPanel, call.vocabulary);
                const std::int64_t columns = std::min(kPanel, call.vocabulary - behind);
                Set::multiply(hidden.data(), panel, units, call.rows, logits.data() + v,
                              static_cast<const char *>(call.head) + behind * row_bytes, columns * row_bytes);
            }
            for (std::int64_t r = 0; r < call.rows; ++r)
                partial[static_cast<std::size_t>(chunk * call.rows + r)] =
                    Set::reduce(call, logits.data() + r * kChunk, n, first);
        }
    });
    merge_partials(call, partial.data(), chunks, call.rows);
}

// log_total[r] = log sum_v exp logit[r, v]; NaN where a logit is NaN.
inline void choice_log_totals(const HeadCall &call, std::int64_t threads) {
#if EL4NER_X86
    const InstructionSet set = instruction_set();
#if EL4NER_AMX
    if (set >= InstructionSet::amx && amx_takes(call)) return log_totals_amx(call, threads);
#endif
    const bool pairs = call.bf16 && set >= InstructionSet::avx512_bf16 && bf16_products_pay();
    if (pairs) return log_totals<Bf16Head>(call, threads);
    const bool few = call.bf16 && call.rows <= FewRowsHead::most;
    if (set >= InstructionSet::avx512 && few) return log_totals<FewRowsHead>(call, threads);
    if (set >= InstructionSet::avx512) return log_totals<Avx512Head>(call, threads);
    if (set >= InstructionSet::avx2) return log_totals<Avx2Head>(call, threads);
#endif
    log_totals<PortableHead>(call, threads);
}

}  // namespace el4ner
