// span_topk: screening in tiles, candidates by certified bounds, exact scores. Defined by kernels/span_topk.py.
//
// Every screened score comes with a bound on its error, so what is dropped (span_topk_query.hpp) cannot be among the
// best. Threads, blocks and the order of the pool change the work, never the answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <mutex>
#include <unordered_map>

#include "span_topk_blocks.hpp"
#include "span_topk_finish.hpp"

namespace el4ner::topk {

// Queries whose spans are laid out together. Equal spans share one row. The threads of a team share the
// block: memory does not grow with their number, and each reads another part of the pool.
class Block {
  public:
    std::vector<std::int64_t> numbers;  // query -> its place in the batch
    std::vector<Query> queries;

    // numbers: of the queries in the batch; asked: the rows of these and other queries; products: room that blocks use one
    // after another, as it is large and would leave holes in memory.
    Block(const Batch &batch, const Rows &rows, const PackedPool &pool, const Kernels &kernels,
          std::vector<std::int64_t> numbers, const QueryRows &asked, std::vector<float> &products, Team &team)
        : numbers(std::move(numbers)), pool_(pool), kernels_(kernels), tiled_(kernels.isa == Isa::amx),
          steps_(tiled_ ? (pool.steps + kTileUnits - 1) / kTileUnits * kTileUnits : pool.steps), alone_(team.size() == 1),
          products_(products) {
        std::vector<const float *> unique;
        std::vector<std::int64_t> row_of;  // spans of all queries, one after another -> row of the block
        std::unordered_map<std::int32_t, std::int64_t> known;
        for (const std::int64_t b : this->numbers)
            for (std::int64_t i = batch.offsets[b]; i < batch.offsets[b + 1]; ++i) {
                const std::int32_t row = asked.of(i);
                const auto [at, is_new] = known.emplace(row, static_cast<std::int64_t>(unique.size()));
                if (is_new) unique.push_back(asked.vectors[static_cast<std::size_t>(row)]);
                row_of.push_back(at->second);
            }
        layout(static_cast<std::int64_t>(unique.size()));
        std::vector<RowFacts> facts(unique.size());
        if (pool.shared)
            if (const std::size_t size = (tiles_.size() - 1) * static_cast<std::size_t>(table_size()); products_.size() < size) {
                products_ = {};  // before there is a larger one: what it holds is no longer wanted
                products_.resize(size);
            }
        team.each(static_cast<std::int64_t>(tiles_.size()) - 1, [&](std::int64_t t, int) {
            fill_tile(t, unique, facts);
            if (pool.shared) fill_products(t);
        });
        std::vector<std::vector<Use>> uses(unique.size());
        queries.reserve(this->numbers.size());
        const std::int64_t *own = row_of.data();
        for (const std::int64_t b : this->numbers) {
            const auto length_of = [&](std::int64_t i) {
                return facts[static_cast<std::size_t>(own[i - batch.offsets[b]])].length;
            };
            queries.emplace_back(batch, rows, kernels, pool.dims, b, length_of);
            weigh(queries.back(), batch, b, own, facts, uses);
            if (queries.back().spans()) queries.back().reserve(pool.groups * kLanes);
            own += batch.offsets[b + 1] - batch.offsets[b];
        }
        first_use_.push_back(0);
        for (const std::vector<Use> &some : uses) {
            uses_.insert(uses_.end(), some.begin(), some.end());
            first_use_.push_back(static_cast<std::int64_t>(uses_.size()));
        }
        const std::size_t count = queries.size();
        totals_.resize(count * kLanes * static_cast<std::size_t>(team.size()));
        locks_ = std::make_unique<std::mutex[]>(alone_ ? 0 : count);
        thresholds_ = std::make_unique<std::atomic<float>[]>(count);
        for (std::size_t b = 0; b < count; ++b) thresholds_[b] = queries[b].tau;
    }

    // Screens a group of the pool. Workers that differ may do so at the same time.
    void screen(std::int64_t g, int worker, Statistics &statistics) {
        alignas(64) float best[kMostRows * kLanes];
        const std::size_t count = queries.size();
        float *totals = totals_.data() + count * kLanes * static_cast<std::size_t>(worker);
        std::fill_n(totals, count * kLanes, 0.0f);
        const Group group = pool_.group(g);
        {
            const TileRegisters registers(kernels_);
            for (std::size_t t = 0; t + 1 < tiles_.size(); ++t) {
                const auto rows = static_cast<int>(tiles_[t + 1] - tiles_[t]);
                kernels_.tile[rows](tile(t), group, pool_.steps, best);
                if (pool_.shared) kernels_.lift(lookup(t, g), rows, group.positions == 0, best);
                kernels_.scatter(best, rows, first_use_.data() + tiles_[t], uses_.data(), totals);
            }
        }
        const float *norms = pool_.norms.data() + g * kLanes, *errors = pool_.errors.data() + g * kLanes;
        // Each worker begins with another query, lest all wait for the first one's lock.
        const std::size_t shift = alone_ ? 0 : static_cast<std::size_t>(worker) * 37 % std::max<std::size_t>(count, 1);
        for (std::size_t n = 0; n < count; ++n) {
            const std::size_t b = n + shift < count ? n + shift : n + shift - count;
            const Query &query = queries[b];
            if (!query.spans()) continue;
            const float *own = totals + b * kLanes;
            const float tau = thresholds_[b].load(std::memory_order_relaxed);
            const std::uint32_t lanes = kernels_.survive(own, norms, errors, query.per_norm, query.per_error, tau);
            if (lanes) keep(b, lanes, g, own, statistics);
        }
    }

  private:
    // A row: its length, the power of two that brings it just below 1, what laying it out lost.
    struct RowFacts {
        double length = 0.0;
        int exponent = 0;
        Quantised quantised{};
    };

    const PackedPool &pool_;
    const Kernels &kernels_;
    const bool tiled_;                     // rows lie as AMX reads them
    const std::int64_t steps_;             // of a row
    const bool alone_;                     // one thread: nothing to lock
    std::vector<std::int64_t> tiles_;      // tile -> its first row; one more at the end
    std::unique_ptr<Units> units_;         // [tile][step][row of the tile], or as span_topk_amx.hpp says
    std::vector<float> &products_;         // [tile][shared vector][row of the tile]
    std::vector<std::int64_t> first_use_;  // row -> its first use; one more at the end
    std::vector<Use> uses_;
    std::vector<float> totals_;            // [worker][query][lane]
    std::unique_ptr<std::mutex[]> locks_;  // [query]: for its candidates
    std::unique_ptr<std::atomic<float>[]> thresholds_;  // [query]: its tau, which only rises; an old one costs work only

    // Rows of a tile, rounded up to whole registers of any instruction set that has so many.
    std::int64_t width() const { return (kernels_.rows + 7) / 8 * 8; }
    std::int64_t table_size() const { return pool_.shared_groups() * kLanes * width(); }

    Lookup lookup(std::size_t t, std::int64_t g) const {
        return {products_.data() + static_cast<std::int64_t>(t) * table_size(), width(), pool_.shared_ids.data(),
                pool_.first_shared.data() + g * kLanes};
    }

    // What the rows of tile t make of the shared vectors.
    void fill_products(std::int64_t t) {
        alignas(64) float best[kMostRows * kLanes];
        const auto rows = static_cast<int>(tiles_[static_cast<std::size_t>(t + 1)] - tiles_[static_cast<std::size_t>(t)]);
        float *table = products_.data() + t * table_size();
        const TileRegisters registers(kernels_);
        for (std::int64_t g = 0; g < pool_.shared_groups(); ++g, table += kLanes * width()) {
            kernels_.tile[rows](tile(static_cast<std::size_t>(t)), pool_.shared_group(g), pool_.steps, best);
            kernels_.keep(best, rows, width(), table);
        }
    }

    // Candidates of query b among the lanes of group g.
    void keep(std::size_t b, std::uint32_t lanes, std::int64_t g, const float *totals, Statistics &statistics) {
        std::unique_lock<std::mutex> lock;
        if (!alone_) lock = std::unique_lock<std::mutex>(locks_[b]);
        Query &query = queries[b];
        for (int lane = 0; lanes; ++lane, lanes >>= 1) {
            if (!(lanes & 1u)) continue;
            const auto at = static_cast<std::size_t>(g * kLanes + lane);
            const std::int32_t id = pool_.order[at];
            if (id < 0 || query.excludes(id)) continue;
            const float error = query.per_norm * pool_.norms[at] + query.per_error * pool_.errors[at];
            query.add(id, totals[lane], error, kernels_.precision == Precision::fp32, statistics);
        }
        thresholds_[b].store(query.tau, std::memory_order_relaxed);
    }

    void layout(std::int64_t rows) {
        const std::int64_t tiles = (rows + kernels_.rows - 1) / kernels_.rows;
        for (std::int64_t t = 0; t <= tiles; ++t) tiles_.push_back(tiles ? t * rows / tiles : 0);
        const std::int64_t size = tiled_ ? tiles * kAmxRows * steps_ : rows * steps_;
        units_ = std::make_unique<Units>(static_cast<std::size_t>(size));
        if (tiled_) std::fill_n(units_->get(), size, 0u);
    }

    std::uint32_t *tile(std::size_t t) const {
        return units_->get() + (tiled_ ? static_cast<std::int64_t>(t) * kAmxRows : tiles_[t]) * steps_;
    }

    // The rows of tile t, scaled and in the units of the screen.
    void fill_tile(std::int64_t t, const std::vector<const float *> &unique, std::vector<RowFacts> &facts) {
        const QuantiseFunction quantise = quantise_for(kernels_.precision);
        const TurnFunction turn = turn_for();
        const std::int64_t dims = pool_.dims;
        std::vector<float> scaled(static_cast<std::size_t>(dims));
        std::vector<std::uint32_t> row(static_cast<std::size_t>(pool_.steps));
        for (std::int64_t u = tiles_[static_cast<std::size_t>(t)]; u < tiles_[static_cast<std::size_t>(t + 1)]; ++u) {
            const float *vector = unique[static_cast<std::size_t>(u)];
            RowFacts &fact = facts[static_cast<std::size_t>(u)];
            fact.length = std::sqrt(kernels_.dot64(vector, vector, dims));
            if (fact.length > 0.0) std::frexp(fact.length * 1.001, &fact.exponent);
            const int half = -fact.exponent / 2;
            const float factor = std::ldexp(1.0f, half), factor2 = std::ldexp(1.0f, -fact.exponent - half);
            for (std::int64_t d = 0; d < dims; ++d) scaled[static_cast<std::size_t>(d)] = vector[d] * factor * factor2;
            if (kernels_.precision == Precision::int8) turn(scaled.data(), dims);
            const int levels = levels_of(scaled.data(), dims, kernels_.levels, kernels_.paired, true);
            fact.quantised = quantise(scaled.data(), dims, pool_.steps, levels, kernels_.offset, row.data());
            place(static_cast<std::size_t>(t), u, row.data());
        }
    }

    // Row u goes into tile t.
    void place(std::size_t t, std::int64_t u, const std::uint32_t *row) {
        const std::int64_t r = u - tiles_[t], rows = tiles_[t + 1] - tiles_[t];
        std::uint32_t *to = tile(t);
        if (!tiled_)
            for (std::int64_t s = 0; s < pool_.steps; ++s) to[s * rows + r] = row[s];
        else
            for (std::int64_t s = 0; s < pool_.steps; s += kTileUnits)
                std::copy_n(row + s, std::min(kTileUnits, pool_.steps - s), to + s * kAmxRows + r * kTileUnits);
    }

    // Weights and error bounds of one query. In the units of the screen, rows and pool vectors have norms below 1 and
    // weights sum to 1:  sum_i w_i max_j q_i.v_j / sum_i w_i = factor * sum_i omega_i max_j q'_i.v'_j.
    // row_of: span of the query -> row.
    void weigh(Query &query, const Batch &batch, std::int64_t b, const std::int64_t *row_of,
               const std::vector<RowFacts> &facts, std::vector<std::vector<Use>> &uses) {
        const std::int64_t begin = batch.offsets[b], end = batch.offsets[b + 1];
        double weight = 0.0, total = 0.0;
        const auto row = [&](std::int64_t i) { return static_cast<std::size_t>(row_of[i - begin]); };
        for (std::int64_t i = begin; i < end; ++i) {
            weight += batch.weights[i];
            total += std::ldexp(batch.weights[i], facts[row(i)].exponent);
        }
        if (!(total > 0.0)) return;
        query.factor = total / weight * pool_.unit;
        // |q.v - q^.v^| <= |q - q^| |v| + |q^| |v - v^|. Sums of D products in float32 are off by D u |q^| |v^| at most
        // (Higham, Accuracy and Stability, 3.5; twice that for bf16, whose pairs may round apart), integers not at all;
        // then a conversion, a scale, the weights and their sum: a few roundings for each span.
        const double dims = static_cast<double>(pool_.dims);
        double roundings = 24.0 + kTurning + 2.0 * static_cast<double>(end - begin);
        if (kernels_.precision != Precision::int8) roundings += kernels_.precision == Precision::bf16 ? 2.0 * dims : dims;
        const double gamma = roundings * kRounding / (1.0 - roundings * kRounding);
        double error = 0.0, norm = 0.0;
        for (std::int64_t i = begin; i < end; ++i) {
            const Quantised &fact = facts[row(i)].quantised;
            const double share = std::ldexp(batch.weights[i], facts[row(i)].exponent) / total;
            error += share * fact.error;
            norm += share * (static_cast<double>(fact.norm) + fact.error);
            uses[row(i)].push_back({static_cast<std::int32_t>(queries.size() - 1), static_cast<float>(share * fact.scale)});
        }
        query.per_norm = static_cast<float>(1.0001 * (error + gamma * norm) + kSlack);
        query.per_error = static_cast<float>(1.0001 * norm * (1.0 + gamma) + kSlack);
    }
};

// Rows of the blocks that are open at a time: few enough for the second-level cache and for memory, many enough for the
// pool to be read seldom.
inline std::int64_t rows_at_a_time(const PackedPool &pool) {
    constexpr std::int64_t budget = 192 * 1024;  // units: 768 KB
    return std::clamp<std::int64_t>(budget / std::max<std::int64_t>(pool.steps, 1), 56, pool.shared ? kSharedRows : 1024);
}

// The end of the queries from `begin` on among which those are looked for that go into a block together: at most 1,024, and
// so many spans, of which each takes about 64 bytes while it is done, that these are 1% of the pool.
inline std::int64_t alike_end(const Batch &batch, std::int64_t begin, std::int64_t pool_bytes) {
    const std::int64_t most = std::min(batch.count, begin + 1024), spans = std::max<std::int64_t>(pool_bytes / 6400, 1024);
    std::int64_t end = begin + 1;
    while (end < most && batch.offsets[end + 1] - batch.offsets[begin] <= spans) ++end;
    return end;
}

// Queries of a block: so many that their candidates, with a hint for each span, take about 2 MB.
inline std::int64_t queries_at_a_time(const Batch &batch) {
    const std::int64_t spans = batch.offsets[batch.count] / batch.count + 1;
    const std::int64_t bytes = most_candidates(batch.k) * static_cast<std::int64_t>(sizeof(Candidate) + 2 * spans);
    return std::clamp<std::int64_t>((std::int64_t{1} << 21) / bytes, 8, 1024);
}

// ids (B, k) and scores (B, k) come filled with -1 and minus infinity.
inline Statistics run(const Batch &batch, const Rows &rows, const PackedPool &pool, const Kernels &kernels, int threads,
                      std::int64_t *ids, float *scores) {
    if (!batch.k || !batch.count || !pool.groups) return {};
    // Starting a thread costs about as much as a million products.
    const double work = static_cast<double>(batch.offsets[batch.count]) * static_cast<double>(pool.positions() * kLanes) *
                        static_cast<double>(pool.dims);
    Team team(std::max(1, std::min(threads, static_cast<int>(std::min(work / 1e6, 1e6)))));
    // Small pools have few groups: then several smaller blocks give every thread something to do.
    const std::int64_t wanted = team.size() == 1 ? 1 : (4 * team.size() + pool.groups - 1) / pool.groups;
    const std::int64_t together = std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(1, rows_at_a_time(pool) / 56));
    const std::int64_t most_rows = rows_at_a_time(pool) / together;
    const std::int64_t most_queries = std::max<std::int64_t>(1, queries_at_a_time(batch) / together);
    std::vector<Statistics> statistics(static_cast<std::size_t>(team.size()));
    std::vector<std::vector<float>> products(static_cast<std::size_t>(together));
    const std::int64_t pool_bytes = rows.offsets[pool.sentences] * pool.dims * 4;
    Waiting waiting(batch, pool_bytes, team, ids, scores);
    for (std::int64_t begin = 0, end = 0; begin < batch.count; begin = end) {
        end = alike_end(batch, begin, pool_bytes);
        const QueryRows asked = query_rows(batch, begin, end, pool.dims, team);
        std::vector<std::vector<std::int64_t>> parts = alike(batch, begin, end, asked, most_rows, most_queries);
        for (auto from = parts.begin(); from != parts.end();) {
            const auto to = from + std::min<std::int64_t>(together, parts.end() - from);
            std::vector<std::unique_ptr<Block>> blocks;
            for (; from != to; ++from)
                blocks.push_back(std::make_unique<Block>(batch, rows, pool, kernels, std::move(*from), asked,
                                                         products[blocks.size()], team));
            const auto open = static_cast<std::int64_t>(blocks.size());
            team.each(pool.groups * open, [&](std::int64_t task, int worker) {
                blocks[static_cast<std::size_t>(task % open)]->screen(task / open, worker, statistics[worker]);
            });
            for (std::unique_ptr<Block> &block : blocks) {
                std::vector<Query> queries = std::move(block->queries);
                const std::vector<std::int64_t> numbers = std::move(block->numbers);
                block.reset();  // its memory is not needed for the answers
                for (std::size_t n = 0; n < queries.size(); ++n) waiting.add(std::move(queries[n]), numbers[n], statistics);
            }
        }
    }
    waiting.answer(statistics);
    return sum(statistics);
}

// The best k of the given sentences only: proposed [begins[b], begins[b + 1]) for query b.
inline Statistics choose(const Batch &batch, const Rows &rows, std::int64_t sentences, const Kernels &kernels, std::int64_t dims,
                         const std::int64_t *proposed, const std::int64_t *begins, int threads, std::int64_t *ids,
                         float *scores) {
    Team team(std::min<std::int64_t>(threads, batch.k ? batch.count : 1));
    std::vector<Statistics> statistics(static_cast<std::size_t>(team.size()));
    Waiting waiting(batch, rows.offsets[sentences] * dims * 4, team, ids, scores);
    for (std::int64_t b = 0; b < (batch.k ? batch.count : 0); ++b) {
        const auto norm_of = [&](std::int64_t i) {
            return std::sqrt(kernels.dot64(batch.queries + i * dims, batch.queries + i * dims, dims));
        };
        Query query(batch, rows, kernels, dims, b, norm_of);
        if (!query.spans()) continue;
        for (std::int64_t n = begins[b]; n < begins[b + 1]; ++n) {
            const std::int64_t id = proposed[n];
            if (rows.offsets[id + 1] == rows.offsets[id] || query.excludes(id)) continue;
            ++statistics[0].candidates;
            query.propose(static_cast<std::int32_t>(id));
        }
        waiting.add(std::move(query), b, statistics);
    }
    waiting.answer(statistics);
    return sum(statistics);
}

}  // namespace el4ner::topk
