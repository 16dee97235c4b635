// span_topk, one query: its candidates, the bounds of their scores, and the exact scores of those that remain.
// span_topk_finish.hpp takes many queries through the last steps together.
//
// A sentence is dropped only if its upper bound is below the k-th largest lower bound, so what is left always holds the
// true top k, whoever found it and in whatever order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "span_topk_pack.hpp"

namespace el4ner::topk {

struct Batch {
    const float *queries;              // (Q, D)
    const std::int64_t *offsets;       // (B+1,)
    const double *weights;             // (Q,) > 0
    const std::int64_t *excluded;      // ids, sorted within a query
    const std::int64_t *excluded_offsets;  // (B+1,)
    std::int64_t count;                // B
    std::int64_t k;
};

struct Rows {  // the pool as it came
    const float *vectors;         // (S, D)
    const std::int64_t *offsets;  // (N+1,)
    double largest_norm;
};

// What a call did, for benchmarks. certified: queries for which the screening bound, with at most k rescored sentences
// at a time to raise the threshold, kept the candidates within their buffer.
struct Statistics {
    std::int64_t queries = 0, certified = 0, candidates = 0, bounded = 0, rescored = 0;
};

inline Statistics sum(const std::vector<Statistics> &parts) {
    Statistics all;
    for (const Statistics &one : parts) {
        all.queries += one.queries;
        all.certified += one.certified;
        all.candidates += one.candidates;
        all.bounded += one.bounded;
        all.rescored += one.rescored;
    }
    return all;
}

struct Candidate {
    std::int32_t id;
    float low, high;  // bounds of the score, in the units of the screen
    float score;      // where exact: the answer
    std::int32_t hint;  // where the spans' best partners stand in hints_, -1 before they are known
    bool tight;       // the bounds come from float32 products already
    bool exact;
};

// Candidates that a query holds before it drops some. 128: more rescoring; 384: no better.
inline std::int64_t most_candidates(std::int64_t k) { return std::max<std::int64_t>(256, 4 * k); }

constexpr double kSlack = 1e-15;                    // absolute: numbers that vanish in float32
constexpr double kRounding = 1.0 / (1 << 24);       // unit roundoff of float32
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The next float32 number; std::nextafter is a call that costs more than all the rest of a candidate.
inline float above(double x) {
    const auto near = static_cast<float>(x);
    std::int32_t bits;
    std::memcpy(&bits, &near, sizeof bits);
    if (near == 0.0f) bits = 1;  // the least denormal number, for minus zero too
    else if (near > 0.0f) bits += near <= std::numeric_limits<float>::max();
    else bits -= 1;
    float next;
    std::memcpy(&next, &bits, sizeof next);
    return next;
}
inline float below(double x) { return -above(-x); }

// One query: its error bounds and candidates. Scores of the screen are true scores / factor.
class Query {
  public:
    float per_norm = 0.0f, per_error = 0.0f;  // |screened - true| <= per_norm * norm + per_error * error (of the lane)
    float tau = kLowest;                      // no sentence below can be among the best k
    double factor = 1.0;
    std::vector<Candidate> found;
    bool overflowed = false;

    // norm_of(i): the length of query span i of the batch.
    template <typename NormOf>
    Query(const Batch &batch, const Rows &rows, const Kernels &kernels, std::int64_t dims, std::int64_t b,
          const NormOf &norm_of)
        : batch_(batch), rows_(rows), kernels_(kernels), dims_(dims), b_(b), start_(batch.offsets[b]),
          spans_(batch.offsets[b + 1] - start_), limit_(most_candidates(batch.k)) {
        double norms = 0.0, largest = 0.0, smallest = std::numeric_limits<double>::infinity();
        margins_.reserve(static_cast<std::size_t>(spans_));
        for (std::int64_t i = start_; i < start_ + spans_; ++i) {
            const double norm = norm_of(i);
            total_ += batch.weights[i];
            norms += batch.weights[i] * norm;
            margins_.push_back(norm);
            largest = std::max(largest, norm);
            smallest = std::min(smallest, norm);
        }
        // float32 products of such rows neither overflow nor vanish; others go to float64 at once
        safe_ = largest < 1e15 && rows.largest_norm < 1e15 && smallest > 1e-15 && rows.largest_norm > 1e-15;
        const double gamma = static_cast<double>(dims) * kRounding / (1.0 - static_cast<double>(dims) * kRounding);
        // two products, each off by gamma |q| |v|
        for (double &margin : margins_) margin = 2.02 * gamma * margin * rows.largest_norm + 1e-30;
        tight_error_ = total_ > 0.0 ? 1.01 * gamma * norms / total_ * rows.largest_norm + 1e-30 : 0.0;
    }

    std::int64_t spans() const { return spans_; }
    bool excludes(std::int64_t id) const {
        const std::int64_t *from = batch_.excluded + batch_.excluded_offsets[b_];
        const std::int64_t *to = batch_.excluded + batch_.excluded_offsets[b_ + 1];
        return from != to && std::binary_search(from, to, id);
    }

    void add(std::int32_t id, float total, float error, bool tight, Statistics &statistics) {
        ++statistics.candidates;
        found.push_back({id, below(static_cast<double>(total) - error), above(static_cast<double>(total) + error), 0.0f, -1,
                         tight, false});
        if (static_cast<std::int64_t>(found.size()) >= limit_) shrink(statistics);
    }

    // Room for all candidates of a pool of so many sentences at once, so that it is not found bit by bit.
    void reserve(std::int64_t sentences) { found.reserve(static_cast<std::size_t>(std::min(limit_, sentences))); }

    // A candidate of which nothing is known; it is bounded on the way to the answer.
    void propose(std::int32_t id) {
        found.push_back({id, kLowest, -kLowest, 0.0f, -1, false, false});
    }

    // Drops who cannot be among the best k, and the room for more.
    void rest() {
        raise();
        found.shrink_to_fit();
        scratch_ = {};
    }

    // Memory until the query is answered, at most: candidates, their hints with room to grow, tau's scratch and an errand.
    std::int64_t bytes() const {
        return static_cast<std::int64_t>(sizeof(Query)) + 8 * spans_ +
               static_cast<std::int64_t>(found.size()) * (static_cast<std::int64_t>(sizeof(Candidate)) + 16 + 4 * spans_);
    }

    // Steps towards the answer: before each, `ask` names the candidates to `tighten`; then come the next step and `answer`.
    static constexpr int kSteps = 2;

    // Raises tau, then calls wanted(candidate's place in found) where float32 products are wanted: in the first step for
    // the k that look best, as tau then lies one screening error below the k-th score; in the second for all that are left.
    template <typename Wanted>
    void ask(int step, const Wanted &wanted) {
        raise();
        if (!safe_) return;  // `answer` scores them all
        const auto k = static_cast<std::size_t>(batch_.k);
        if (step == 0 && found.size() > k) best_first();
        for (std::size_t n = 0; n < (step == 0 ? std::min(k, found.size()) : found.size()); ++n)
            if (Candidate &one = found[n]; one.hint < 0 && !one.exact && (step > 0 || !one.tight)) {
                expect(one);
                wanted(n);
            }
    }

    // Bounds from float32 products. Candidates that differ may be tightened at the same time. room: to work in.
    void tighten(std::size_t n, std::vector<float> &room) { bound(found[n], room); }

    // The best k of all candidates, exactly; ids and scores (k,) are padded by the caller.
    void answer(std::int64_t *ids, float *scores, Statistics &statistics) {
        raise();
        settle(statistics);
        ++statistics.queries;
        statistics.certified += !overflowed;
        for (std::size_t n = 0; n < found.size(); ++n) {
            ids[n] = found[n].id;
            scores[n] = found[n].score;
        }
        found = {};  // the memory goes now: others still need theirs
        scratch_ = {};
        hints_ = {};
    }

  private:
    const Batch &batch_;
    const Rows &rows_;
    const Kernels &kernels_;
    const std::int64_t dims_, b_, start_, spans_, limit_;
    double total_ = 0.0, tight_error_ = 0.0;
    std::vector<double> margins_;  // span -> products that differ by more are in their true order
    bool safe_ = true;
    std::vector<float> scratch_;
    std::vector<std::int16_t> hints_;  // [hint][span]: the partner that is the best for sure, or -1

    // Answers are rounded to float32 before they are ordered, so equal answers may differ by that much.
    double rounding(double score) const { return 4.0 * kRounding * std::fabs(score) + 3e-45 / factor; }

    // Raises tau to the k-th largest lower bound and drops whoever cannot reach it.
    void raise() {
        const std::int64_t k = batch_.k;
        if (static_cast<std::int64_t>(found.size()) < k) return;
        scratch_.clear();
        for (const Candidate &one : found) scratch_.push_back(one.low);
        std::nth_element(scratch_.begin(), scratch_.begin() + (k - 1), scratch_.end(), std::greater<float>());
        const double least = scratch_[static_cast<std::size_t>(k - 1)];
        tau = std::max(tau, below(least - rounding(least)));
        const auto hopeless = [&](const Candidate &one) { return one.high < tau; };
        found.erase(std::remove_if(found.begin(), found.end(), hopeless), found.end());
    }

    void shrink(Statistics &statistics) {
        const auto size = [&] { return static_cast<std::int64_t>(found.size()); };
        raise();
        if (size() > limit_ * 3 / 4) tighten_best(statistics);
        if (size() > limit_ * 3 / 4) {
            overflowed = true;
            tighten_all(statistics);
            if (size() > limit_ * 3 / 4) settle(statistics);
        }
        if (static_cast<std::int64_t>(hints_.size()) > limit_ / 2 * spans_) forget();
    }

    // Keeps the hints of those who are still candidates.
    void forget() {
        std::vector<std::int16_t> kept;
        for (Candidate &one : found)
            if (one.hint >= 0) {
                const auto from = hints_.begin() + one.hint;
                one.hint = static_cast<std::int32_t>(kept.size());
                kept.insert(kept.end(), from, from + spans_);
            }
        hints_ = std::move(kept);
    }

    // Puts the k that look best in front, in any order.
    void best_first() {
        std::nth_element(found.begin(), found.begin() + batch_.k, found.end(),
                         [](const Candidate &a, const Candidate &b) { return a.low + a.high > b.low + b.high; });
    }

    // Bounds from float32 products for the k that look best: tau then lies one screening error below the k-th score.
    void tighten_best(Statistics &statistics) {
        const auto k = static_cast<std::size_t>(batch_.k);
        if (found.size() > k) best_first();
        tighten_first(std::min(k, found.size()), statistics);
        raise();
    }

    void tighten_all(Statistics &statistics) {
        tighten_first(found.size(), statistics);
        raise();
    }

    void tighten_first(std::size_t count, Statistics &statistics) {
        for (std::size_t n = 0; n < count; ++n) {
            // Rows lie anywhere in a large pool: fetch those of the next while this one is computed.
            if (n + 1 < count && !found[n + 1].tight) fetch(found[n + 1].id);
            if (!found[n].tight) tighten_now(found[n], statistics);
        }
    }

    void fetch(std::int64_t id) const {
#if defined(__GNUC__) || defined(__clang__)
        const auto *from = reinterpret_cast<const char *>(rows_.vectors + rows_.offsets[id] * dims_);
        const auto *to = reinterpret_cast<const char *>(rows_.vectors + rows_.offsets[id + 1] * dims_);
        for (to = std::min(to, from + 16384); from < to; from += 64) __builtin_prefetch(from);
#else
        (void)id;
#endif
    }

    void tighten_now(Candidate &one, Statistics &statistics) {
        if (one.hint >= 0 || one.exact) return;
        if (!safe_) return rescore(one, statistics);
        ++statistics.bounded;
        expect(one);
        bound(one, scratch_);
    }

    // Makes room for a candidate's hints.
    void expect(Candidate &one) {
        one.hint = static_cast<std::int32_t>(hints_.size());
        hints_.resize(hints_.size() + static_cast<std::size_t>(spans_));
    }

    // Bounds from float32 products, and hints. Touches nothing else of the query, so that several threads may.
    void bound(Candidate &one, std::vector<float> &room) {
        const std::int64_t length = products(one.id, room);
        double score = 0.0;
        std::int16_t *hints = hints_.data() + one.hint;
        for (std::int64_t i = 0; i < spans_; ++i) {
            const Best best = kernels_.best(room.data() + i * length, length, margins_[static_cast<std::size_t>(i)]);
            score += batch_.weights[start_ + i] * static_cast<double>(best.value);
            const bool known = best.alone <= std::numeric_limits<std::int16_t>::max();  // else all are compared later
            hints[i] = static_cast<std::int16_t>(known ? best.alone : -1);
        }
        score /= total_;
        const double error = tight_error_ + std::fabs(score) * 1e-12;
        one.low = below((score - error) / factor);
        one.high = above((score + error) / factor);
        one.tight = true;
    }

    // float32 products of all spans with all spans of a sentence, to room [spans][length].
    std::int64_t products(std::int64_t id, std::vector<float> &room) const {
        const std::int64_t from = rows_.offsets[id], length = rows_.offsets[id + 1] - from;
        room.resize(static_cast<std::size_t>(spans_ * length));
        kernels_.dots32(batch_.queries + start_ * dims_, spans_, rows_.vectors + from * dims_, length, dims_, room.data());
        return length;
    }

    // The exact score. Only products that may be the largest are computed in float64; the others are smaller for sure.
    void rescore(Candidate &one, Statistics &statistics) {
        if (one.exact) return;
        ++statistics.rescored;
        if (safe_) tighten_now(one, statistics);  // for its hints
        const std::int64_t from = rows_.offsets[one.id], length = rows_.offsets[one.id + 1] - from;
        double score = 0.0, weight = 0.0;
        for (std::int64_t i = 0; i < spans_; ++i) {
            const float *query = batch_.queries + (start_ + i) * dims_;
            const std::int32_t only = safe_ ? hints_[static_cast<std::size_t>(one.hint + i)] : -1;
            double top = -std::numeric_limits<double>::infinity();
            for (std::int64_t j = only < 0 ? 0 : only; j < (only < 0 ? length : only + 1); ++j)
                top = std::max(top, kernels_.dot64(query, rows_.vectors + (from + j) * dims_, dims_));
            score += batch_.weights[start_ + i] * top;
            weight += batch_.weights[start_ + i];
        }
        one.score = static_cast<float>(score / weight);
        one.exact = one.tight = true;
        one.low = below(score / weight / factor);
        one.high = above(score / weight / factor);
    }

    // Exact scores of all that may still be among the best k, then those k in order.
    void settle(Statistics &statistics) {
        std::sort(found.begin(), found.end(), [](const Candidate &a, const Candidate &b) { return a.high > b.high; });
        const auto better = [](const Candidate &a, const Candidate &b) {
            return a.score > b.score || (a.score == b.score && a.id < b.id);
        };
        std::vector<Candidate> best;  // a heap, its worst on top
        for (std::size_t n = 0; n < found.size(); ++n) {
            Candidate &one = found[n];
            if (n + 1 < found.size() && found[n + 1].hint < 0) fetch(found[n + 1].id);
            if (static_cast<std::int64_t>(best.size()) == batch_.k) {
                const double least = best.front().score / factor;
                if (one.high < least - rounding(least)) break;
            }
            rescore(one, statistics);
            if (!(one.score > kLowest)) continue;
            if (static_cast<std::int64_t>(best.size()) < batch_.k) {
                best.push_back(one);
                std::push_heap(best.begin(), best.end(), better);
            } else if (better(one, best.front())) {
                std::pop_heap(best.begin(), best.end(), better);
                best.back() = one;
                std::push_heap(best.begin(), best.end(), better);
            }
        }
        std::sort_heap(best.begin(), best.end(), better);
        found.assign(best.begin(), best.end());  // in the memory that it has
        raise();
    }
};

}  // namespace el4ner::topk
