// vote: members x spans x labels -> winning label, its score, its margin.
// The result is defined by kernels/vote.py (vote_ref): float64 sums over members in order, rounded once to float32.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "instruction_set.hpp"
#include "parallel.hpp"

namespace el4ner {

// One call's arrays. logp (M, S, L) f32, weights (M, L) f64, contiguous; winners, scores, margins (S,).
struct VoteCall {
    const float *logp;
    const double *weights;
    std::int64_t members, spans, labels;
    bool hard;
    std::int64_t *winners;
    float *scores, *margins;

    const float *row(std::int64_t m, std::int64_t s) const { return logp + (m * spans + s) * labels; }
    void nobody(std::int64_t s) const {
        winners[s] = -1;
        scores[s] = margins[s] = 0.0f;
    }
};

// What a span needs while it is counted; one for each thread.
struct VoteWork {
    std::vector<double> total, weight;
    std::vector<float> score;
    std::vector<std::int64_t> first;  // the earliest member for a label (hard)

    explicit VoteWork(const VoteCall &call)
        : total(static_cast<std::size_t>(call.labels + 8)), weight(static_cast<std::size_t>(call.labels + 8)),
          score(static_cast<std::size_t>(call.labels + 8)), first(static_cast<std::size_t>(call.labels + 8)) {}
};

// 1: votes, 0: abstains (all NaN), -1: partly NaN or +inf, which the caller refuses.
inline int vote_row_kind(const float *row, std::int64_t labels) {
    std::int64_t missing = 0;
    for (std::int64_t l = 0; l < labels; ++l) {
        missing += std::isnan(row[l]);
        if (row[l] == std::numeric_limits<float>::infinity()) return -1;
    }
    return missing == 0 ? 1 : missing == labels ? 0 : -1;
}

// From the labels' scores to the winner.
inline void vote_decide(const VoteCall &call, const VoteWork &work, std::int64_t s) {
    const float *score = work.score.data();
    std::int64_t winner = 0;
    for (std::int64_t l = 1; l < call.labels; ++l) {
        const bool earlier = call.hard && score[l] == score[winner] && work.first[l] < work.first[winner];
        if (score[l] > score[winner] || earlier) winner = l;
    }
    float second = 0.0f;  // scores are never negative
    for (std::int64_t l = 0; l < call.labels; ++l)
        if (l != winner && score[l] > second) second = score[l];
    call.winners[s] = winner;
    call.scores[s] = score[winner];
    call.margins[s] = score[winner] - second;
}

// One span in plain C++. false if a row of it must be refused.
inline bool vote_span(const VoteCall &call, std::int64_t s, VoteWork &work) {
    const std::int64_t labels = call.labels;
    for (std::int64_t l = 0; l < labels; ++l) {
        work.total[l] = work.weight[l] = 0.0;
        work.first[l] = call.members;
    }
    bool heard = false;
    for (std::int64_t m = 0; m < call.members && labels > 0; ++m) {
        const float *row = call.row(m, s);
        const int kind = vote_row_kind(row, labels);
        if (kind < 0) return false;
        if (kind == 0) continue;
        const double *w = call.weights + m * labels;
        std::int64_t best = 0;
        for (std::int64_t l = 1; l < labels; ++l)
            if (row[l] > row[best]) best = l;
        for (std::int64_t l = 0; l < labels; ++l) {
            heard = heard || w[l] > 0.0;
            work.weight[l] += w[l];
            if (!call.hard) work.total[l] += w[l] * std::exp(static_cast<double>(row[l]));
        }
        if (call.hard) {
            work.total[best] += w[best];
            if (w[best] > 0.0 && work.first[best] == call.members) work.first[best] = m;
        }
    }
    if (!heard) {
        call.nobody(s);
        return true;
    }
    for (std::int64_t l = 0; l < labels; ++l)
        work.score[l] = work.weight[l] > 0.0 ? static_cast<float>(work.total[l] / work.weight[l]) : 0.0f;
    vote_decide(call, work, s);
    return true;
}

// Spans from begin on, in plain C++. false if a row must be refused.
inline bool vote_spans(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    VoteWork work(call);
    bool good = true;
    for (std::int64_t s = begin; s < end; ++s) good = vote_span(call, s, work) && good;
    return good;
}

}  // namespace el4ner

#if EL4NER_X86
#include "vote_x86.hpp"
#endif

namespace el4ner {

// All spans. false if a row is partly NaN or holds +inf; what was written is then of no use.
inline bool vote(const VoteCall &call, std::int64_t threads) {
    const InstructionSet set = instruction_set();
    std::atomic<bool> good{true};
    // A megabyte of log-probabilities takes about 0.1 ms; less is not worth waiting for another thread.
    const std::int64_t grain = 1 + (1 << 18) / (call.members * call.labels + 1);
    in_parallel(call.spans, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        bool fine = false;
#if EL4NER_X86
        const bool screened = call.members <= 8 && call.labels >= 1 && call.labels <= 16;
        if (set >= InstructionSet::avx512 && screened)
            fine = vote_spans_screened(call, begin, end);
        else if (set >= InstructionSet::avx2 && screened)
            fine = vote_spans_screened_avx2(call, begin, end);
        else if (set >= InstructionSet::avx512 && !call.hard)
            fine = vote_spans_avx512(call, begin, end);
        else if (set >= InstructionSet::avx2 && !call.hard)
            fine = vote_spans_avx2(call, begin, end);
        else
#endif
            fine = vote_spans(call, begin, end);
        if (!fine) good = false;
    });
    return good;
}

}  // namespace el4ner
