// span_scores: projected token states -> scores of all spans up to a length. best_flat: the best flat set of spans.
// The results are defined by kernels/span_scores.py; the operations and their order are the same, so are the bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "instruction_set.hpp"
#include "parallel.hpp"

namespace el4ner {

// mean, last (T, L) f32 contiguous -> out (T, N, L) f32.
struct SpanScoresCall {
    const float *mean, *last;
    std::int64_t tokens, max_length, labels;
    float *out;
};

// prefix (T + 1, L): sums of `mean` over the tokens before.
inline std::vector<double> prefix_sums(const SpanScoresCall &call) {
    std::vector<double> prefix(static_cast<std::size_t>((call.tokens + 1) * call.labels));
    for (std::int64_t i = 0; i < call.tokens * call.labels; ++i)
        prefix[static_cast<std::size_t>(i + call.labels)] = prefix[static_cast<std::size_t>(i)] + call.mean[i];
    return prefix;
}

// Spans that start at tokens begin to end. Inlined into one function for each instruction set; the compiler vectorises
// the loop over labels. The quotient is a division, not a product with a reciprocal, which would round differently.
#if defined(__GNUC__)
__attribute__((always_inline))
#endif
inline void span_scores_rows(const SpanScoresCall &call, const double *prefix, std::int64_t begin, std::int64_t end) {
    const std::int64_t labels = call.labels;
    for (std::int64_t i = begin; i < end; ++i) {
        const double *from = prefix + i * labels;
        for (std::int64_t n = 0; n < call.max_length; ++n) {
            float *out = call.out + (i * call.max_length + n) * labels;
            if (i + n >= call.tokens) {
                for (std::int64_t l = 0; l < labels; ++l) out[l] = -std::numeric_limits<float>::infinity();
                continue;
            }
            const double *to = from + (n + 1) * labels;
            const float *last = call.last + (i + n) * labels;
            const double length = static_cast<double>(n + 1);
            for (std::int64_t l = 0; l < labels; ++l)
                out[l] = static_cast<float>((to[l] - from[l]) / length + static_cast<double>(last[l]));
        }
    }
}

inline void span_scores_portable(const SpanScoresCall &call, const double *prefix, std::int64_t begin,
                                 std::int64_t end) {
    span_scores_rows(call, prefix, begin, end);
}
#if EL4NER_X86
EL4NER_AVX2 inline void span_scores_avx2(const SpanScoresCall &call, const double *prefix, std::int64_t begin,
                                         std::int64_t end) {
    span_scores_rows(call, prefix, begin, end);
}
EL4NER_AVX512 inline void span_scores_avx512(const SpanScoresCall &call, const double *prefix, std::int64_t begin,
                                             std::int64_t end) {
    span_scores_rows(call, prefix, begin, end);
}
#endif

inline void span_scores(const SpanScoresCall &call, std::int64_t threads) {
    const std::vector<double> prefix = prefix_sums(call);
    const InstructionSet set = instruction_set();
    const std::int64_t grain = 1 + (1 << 18) / (call.max_length * call.labels + 1);
    in_parallel(call.tokens, grain, threads, [&](std::int64_t begin, std::int64_t end) {
#if EL4NER_X86
        if (set >= InstructionSet::avx512) return span_scores_avx512(call, prefix.data(), begin, end);
        if (set >= InstructionSet::avx2) return span_scores_avx2(call, prefix.data(), begin, end);
#endif
        span_scores_portable(call, prefix.data(), begin, end);
    });
}

// scores (T, N, L) f32 -> taken (T,): tokens of the span taken at i in the best set of the suffix i.., 0 for none, and
// label (T,): its label. false if a score inside the text is NaN or +inf, or that of `none` is not finite.
inline bool best_flat(const float *scores, std::int64_t tokens, std::int64_t max_length, std::int64_t labels,
                      std::int64_t none, std::int64_t *taken, std::int64_t *label) {
    std::vector<double> total(static_cast<std::size_t>(tokens + 1), 0.0);
    std::vector<std::int64_t> count(static_cast<std::size_t>(tokens + 1), 0);
    constexpr float infinity = std::numeric_limits<float>::infinity();
    bool good = true;
    for (std::int64_t i = tokens - 1; i >= 0; --i) {
        total[i] = total[i + 1];
        count[i] = count[i + 1];
        taken[i] = label[i] = 0;
        for (std::int64_t n = 0; n < max_length && i + n < tokens; ++n) {
            const float *row = scores + (i * max_length + n) * labels;
            float best = -infinity;
            std::int64_t best_label = 0;
            for (std::int64_t l = 0; l < labels; ++l) {
                good = good && row[l] < infinity;  // false for NaN too
                if (l != none && row[l] > best) {
                    best = row[l];
                    best_label = l;
                }
            }
            good = good && row[none] > -infinity;
            const double gain = static_cast<double>(best) - static_cast<double>(row[none]);
            if (!(gain > 0.0)) continue;
            const double value = gain + total[i + n + 1];
            const std::int64_t spans = count[i + n + 1] + 1;
            // At equal value a span beats no span here (it starts earlier), and a shorter one a longer one.
            const bool same = value == total[i] && spans == count[i] && taken[i] == 0;
            if (value > total[i] || (value == total[i] && spans < count[i]) || same) {
                total[i] = value;
                count[i] = spans;
                taken[i] = n + 1;
                label[i] = best_label;
            }
        }
    }
    return good;
}

}  // namespace el4ner
