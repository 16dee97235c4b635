// span_topk, the last steps of many queries together: what they want of one pool sentence is computed while it is at hand.
//
// Candidates of one query lie anywhere in a pool that no cache holds. In the order of the pool, the sentences that many
// queries want are read once, and one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "span_topk_query.hpp"
#include "span_topk_team.hpp"

namespace el4ner::topk {

// Queries whose candidates are known, until they are answered.
class Waiting {
  public:
    // pool_bytes: how large the pool is; those who wait take 1% of it, 64 KB at least and 2 MB at
    // most, and what the last one to come adds.
    Waiting(const Batch &batch, std::int64_t pool_bytes, Team &team, std::int64_t *ids, float *scores)
        : batch_(batch), budget_(std::clamp<std::int64_t>(pool_bytes / 100, 1 << 16, 1 << 21)), team_(team), ids_(ids),
          scores_(scores), rooms_(static_cast<std::size_t>(team.size())) {}

    // Query b. Answers all that wait if they are many; statistics: of the workers.
    void add(Query &&query, std::int64_t b, std::vector<Statistics> &statistics) {
        query.rest();
        const std::int64_t at = b * batch_.k;
        if (query.found.empty()) return query.answer(ids_ + at, scores_ + at, statistics[0]);
        bytes_ += query.bytes();
        queries_.push_back(std::move(query));
        numbers_.push_back(b);
        if (bytes_ >= budget_) answer(statistics);
    }

    void answer(std::vector<Statistics> &statistics) {
        for (int step = 0; step < Query::kSteps; ++step) tighten(step, statistics);
        team_.each(static_cast<std::int64_t>(queries_.size()), [&](std::int64_t n, int worker) {
            const std::int64_t at = numbers_[static_cast<std::size_t>(n)] * batch_.k;
            queries_[static_cast<std::size_t>(n)].answer(ids_ + at, scores_ + at, statistics[static_cast<std::size_t>(worker)]);
        });
        queries_.clear();
        numbers_.clear();
        bytes_ = 0;
    }

  private:
    struct Errand {
        std::int32_t id, query, candidate;  // pool sentence, place among those who wait, place among its candidates
    };

    const Batch &batch_;
    const std::int64_t budget_;
    Team &team_;
    std::int64_t *const ids_;
    float *const scores_;
    std::int64_t bytes_ = 0;
    std::vector<Query> queries_;
    std::vector<std::int64_t> numbers_;  // their places in the batch
    std::vector<std::vector<float>> rooms_;  // [worker]

    void tighten(int step, std::vector<Statistics> &statistics) {
        std::vector<Errand> errands;
        for (std::size_t q = 0; q < queries_.size(); ++q)
            queries_[q].ask(step, [&](std::size_t n) {
                errands.push_back({queries_[q].found[n].id, static_cast<std::int32_t>(q), static_cast<std::int32_t>(n)});
            });
        std::sort(errands.begin(), errands.end(), [](const Errand &a, const Errand &b) {
            return a.id < b.id || (a.id == b.id && a.query < b.query);
        });
        statistics[0].bounded += static_cast<std::int64_t>(errands.size());
        constexpr std::int64_t grain = 64;
        const auto count = static_cast<std::int64_t>(errands.size());
        team_.each((count + grain - 1) / grain, [&](std::int64_t run, int worker) {
            for (std::int64_t n = run * grain; n < std::min(count, (run + 1) * grain); ++n) {
                const Errand &one = errands[static_cast<std::size_t>(n)];
                queries_[static_cast<std::size_t>(one.query)].tighten(static_cast<std::size_t>(one.candidate),
                                                                      rooms_[static_cast<std::size_t>(worker)]);
            }
        });
    }
};

}  // namespace el4ner::topk
