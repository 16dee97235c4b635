// vote: members x spans x labels -> winning label, its score, its margin.
// The result is defined by kernels/vote.py (vote_ref); the order of the sums is the same, so are the roundings.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace el4ner {

// logp (M, S, L) contiguous f32 log-probabilities, weights (M, L) contiguous f64; an all-NaN row abstains (checked by
// the caller, so the first column tells). winners (S,), scores (S,), margins (S,).
inline void vote(const float *logp, const double *weights, std::int64_t members, std::int64_t spans,
                 std::int64_t labels, bool hard, std::int64_t *winners, float *scores, float *margins) {
    std::vector<double> total(static_cast<std::size_t>(labels)), weight(static_cast<std::size_t>(labels));
    std::vector<float> score(static_cast<std::size_t>(labels));
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
            scores[s] = 0.0f;
            margins[s] = 0.0f;
            continue;
        }
        for (std::int64_t l = 0; l < labels; ++l) score[l] = weight[l] > 0.0 ? static_cast<float>(total[l] / weight[l]) : 0.0f;
        std::int64_t winner = 0;
        for (std::int64_t l = 1; l < labels; ++l)
            if (score[l] > score[winner] || (hard && score[l] == score[winner] && first[l] < first[winner])) winner = l;
        float second = 0.0f;  // scores are never negative
        for (std::int64_t l = 0; l < labels; ++l)
            if (l != winner && score[l] > second) second = score[l];
        winners[s] = winner;
        scores[s] = score[winner];
        margins[s] = score[winner] - second;
    }
}

}  // namespace el4ner
