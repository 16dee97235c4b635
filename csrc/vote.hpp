// vote: members x spans x labels -> winning label, its score, its margin.
// The result is defined by kernels/vote.py (vote_ref); the order of the sums is the same, so the doubles are equal.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace el4ner {

// logp (M, S, L) contiguous f32 log-probabilities, weights (M, L) contiguous f64; an all-NaN row abstains (checked by
// the caller, so the first column tells). winners (S,), scores (S,), margins (S,).
inline void vote(const float *logp, const double *weights, std::int64_t members, std::int64_t spans,
                 std::int64_t labels, bool hard, std::int64_t *winners, float *scores, float *margins) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<double> total(static_cast<std::size_t>(labels)), weight(static_cast<std::size_t>(labels));
    std::vector<std::int64_t> first(static_cast<std::size_t>(labels));  // the earliest member for a label (hard)
    for (std::int64_t s = 0; s < spans; ++s) {
        for (std::int64_t l = 0; l < labels; ++l) {
            total[l] = 0.0;
            weight[l] = 0.0;
            first[l] = members;
        }
        bool heard = false;
        for (std::int64_t m = 0; m < members; ++m) {
            const float *row = logp + (m * spans + s) * labels;
            if (labels == 0 || std::isnan(row[0])) continue;
            const double *w = weights + m * labels;
            std::int64_t best = 0;
            for (std::int64_t l = 1; l < labels; ++l)
                if (row[l] > row[best]) best = l;
            for (std::int64_t l = 0; l < labels; ++l) {
                heard = heard || w[l] > 0.0;
                weight[l] += w[l];
                if (!hard) total[l] += w[l] * std::exp(static_cast<double>(row[l]));
            }
            if (hard) {
                total[best] += w[best];
                if (w[best] > 0.0 && first[best] == members) first[best] = m;
            }
        }
        if (!heard) {
            winners[s] = -1;
            scores[s] = nan;
            margins[s] = nan;
            continue;
        }
        for (std::int64_t l = 0; l < labels; ++l) total[l] = weight[l] > 0.0 ? total[l] / weight[l] : 0.0;
        std::int64_t winner = 0;
        for (std::int64_t l = 1; l < labels; ++l)
            if (total[l] > total[winner] || (hard && total[l] == total[winner] && first[l] < first[winner])) winner = l;
        double second = labels > 1 ? -std::numeric_limits<double>::infinity() : 0.0;
        for (std::int64_t l = 0; l < labels; ++l)
            if (l != winner && total[l] > second) second = total[l];
        winners[s] = winner;
        scores[s] = static_cast<float>(total[winner]);
        margins[s] = static_cast<float>(total[winner] - second);
    }
}

}  // namespace el4ner
