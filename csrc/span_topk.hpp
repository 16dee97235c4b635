// span_topk: screening in tiles, candidates by certified bounds, exact scores. Defined by kernels/span_topk.py.
//
// Every screened score comes with a bound on its error, so what is dropped (span_topk_query.hpp) cannot be among the
// best. Threads, blocks and the order of the pool change the work, never the answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "span_topk_query.hpp"

namespace el4ner::topk {

// Consecutive queries whose spans are laid out together. Equal spans share one row.
class Block {
  public:
    std::vector<Query> queries;

    Block(const Batch &batch, const Rows &rows, const PackedPool &pool, const Kernels &kernels, std::int64_t begin,
          std::int64_t end)
        : pool_(pool), kernels_(kernels), tiled_(kernels.isa == Isa::amx),
          steps_(tiled_ ? (pool.steps + kTileUnits - 1) / kTileUnits * kTileUnits : pool.steps) {
        const std::int64_t dims = pool.dims;
        const QuantiseFunction quantise = quantise_for(kernels.precision);
        std::vector<const float *> unique;
        std::vector<std::int64_t> row_of;  // span -> unique row
        distinct(batch.queries + batch.offsets[begin] * dims, batch.offsets[end] - batch.offsets[begin], dims, unique,
                 row_of);
        std::vector<std::vector<Use>> uses(unique.size());
        layout(static_cast<std::int64_t>(unique.size()));
        std::vector<int> exponents(unique.size());
        std::vector<Quantised> facts(unique.size());
        std::vector<float> scaled(static_cast<std::size_t>(dims));
        std::vector<std::uint32_t> row(static_cast<std::size_t>(pool.steps));
        for (std::size_t t = 0; t + 1 < tiles_.size(); ++t)
            for (std::int64_t u = tiles_[t]; u < tiles_[t + 1]; ++u) {
                const float *vector = unique[static_cast<std::size_t>(u)];
                const double norm = std::sqrt(kernels.dot64(vector, vector, dims));
                int exponent = 0;  // a power of two brings the row's norm just below 1
                if (norm > 0.0) std::frexp(norm * 1.001, &exponent);
                exponents[static_cast<std::size_t>(u)] = exponent;
                const float factor = std::ldexp(1.0f, -exponent / 2), factor2 = std::ldexp(1.0f, -exponent + exponent / 2);
                for (std::int64_t d = 0; d < dims; ++d) scaled[d] = vector[d] * factor * factor2;
                facts[static_cast<std::size_t>(u)] =
                    quantise(scaled.data(), dims, pool.steps, kernels.levels, kernels.offset, row.data());
                place(t, u, row.data());
            }
        for (std::int64_t b = begin; b < end; ++b) {
            queries.emplace_back(batch, rows, kernels, dims, b);
            weigh(queries.back(), batch, b, batch.offsets[begin], row_of, exponents, facts, uses);
        }
        first_use_.push_back(0);
        for (const std::vector<Use> &some : uses) {
            uses_.insert(uses_.end(), some.begin(), some.end());
            first_use_.push_back(static_cast<std::int64_t>(uses_.size()));
        }
    }

    // Screens groups [begin, end) of the pool.
    void screen(std::int64_t begin, std::int64_t end, Statistics &statistics) {
        alignas(64) float best[kMostRows * kLanes];
        std::vector<float> totals(queries.size() * kLanes);
        const TileRegisters registers(kernels_);
        const bool tight = kernels_.precision == Precision::fp32;
        for (std::int64_t g = begin; g < end; ++g) {
            const Group group = pool_.group(g);
            std::fill(totals.begin(), totals.end(), 0.0f);
            for (std::size_t t = 0; t + 1 < tiles_.size(); ++t) {
                const auto rows = static_cast<int>(tiles_[t + 1] - tiles_[t]);
                kernels_.tile[rows](tile(t), group, pool_.steps, best);
                kernels_.scatter(best, rows, first_use_.data() + tiles_[t], uses_.data(), totals.data());
            }
            const float *norms = pool_.norms.data() + g * kLanes, *errors = pool_.errors.data() + g * kLanes;
            for (std::size_t b = 0; b < queries.size(); ++b) {
                Query &query = queries[b];
                if (!query.spans()) continue;
                const float *own = totals.data() + b * kLanes;
                std::uint32_t lanes = kernels_.survive(own, norms, errors, query.per_norm, query.per_error, query.tau);
                for (int lane = 0; lanes; ++lane, lanes >>= 1) {
                    if (!(lanes & 1u)) continue;
                    const std::int32_t id = pool_.order[static_cast<std::size_t>(g * kLanes + lane)];
                    if (id < 0 || query.excludes(id)) continue;
                    const float error = query.per_norm * norms[lane] + query.per_error * errors[lane];
                    query.add(id, own[lane], error, tight, statistics);
                }
            }
        }
    }

  private:
    const PackedPool &pool_;
    const Kernels &kernels_;
    const bool tiled_;                     // rows lie as AMX reads them
    const std::int64_t steps_;             // of a row
    std::vector<std::int64_t> tiles_;      // tile -> its first row; one more at the end
    std::unique_ptr<Units> units_;         // [tile][step][row of the tile], or as span_topk_amx.hpp says
    std::vector<std::int64_t> first_use_;  // row -> its first use; one more at the end
    std::vector<Use> uses_;

    // Rows by content. A pool of short texts asks for the same words again and again.
    static void distinct(const float *vectors, std::int64_t count, std::int64_t dims, std::vector<const float *> &unique,
                         std::vector<std::int64_t> &row_of) {
        std::unordered_multimap<std::uint64_t, std::int64_t> seen;
        const std::size_t bytes = static_cast<std::size_t>(dims) * sizeof(float);
        for (std::int64_t i = 0; i < count; ++i) {
            const float *vector = vectors + i * dims;
            std::uint64_t hash = 0x9e3779b97f4a7c15u;
            for (std::int64_t d = 0; d < dims; ++d) {
                std::uint32_t bits;
                std::memcpy(&bits, vector + d, sizeof bits);
                hash = (hash ^ bits) * 0xff51afd7ed558ccdu;
                hash ^= hash >> 29;
            }
            std::int64_t row = -1;
            const auto range = seen.equal_range(hash);
            for (auto at = range.first; at != range.second && row < 0; ++at)
                if (std::memcmp(unique[static_cast<std::size_t>(at->second)], vector, bytes) == 0) row = at->second;
            if (row < 0) {
                row = static_cast<std::int64_t>(unique.size());
                unique.push_back(vector);
                seen.emplace(hash, row);
            }
            row_of.push_back(row);
        }
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
    void weigh(Query &query, const Batch &batch, std::int64_t b, std::int64_t base, const std::vector<std::int64_t> &row_of,
               const std::vector<int> &exponents, const std::vector<Quantised> &facts, std::vector<std::vector<Use>> &uses) {
        const std::int64_t begin = batch.offsets[b], end = batch.offsets[b + 1];
        double weight = 0.0, total = 0.0;
        const auto row = [&](std::int64_t i) { return static_cast<std::size_t>(row_of[static_cast<std::size_t>(i - base)]); };
        for (std::int64_t i = begin; i < end; ++i) {
            weight += batch.weights[i];
            total += std::ldexp(batch.weights[i], exponents[row(i)]);
        }
        if (!(total > 0.0)) return;
        query.factor = total / weight * pool_.unit;
        // |q.v - q^.v^| <= |q - q^| |v| + |q^| |v - v^|. Sums of D products in float32 are off by D u |q^| |v^| at most
        // (Higham, Accuracy and Stability, 3.5; twice that for bf16, whose pairs may round apart), integers not at all;
        // then a conversion, a scale, the weights and their sum: a few roundings for each span.
        const double dims = static_cast<double>(pool_.dims);
        double roundings = 24.0 + 2.0 * static_cast<double>(end - begin);
        if (kernels_.precision != Precision::int8) roundings += kernels_.precision == Precision::bf16 ? 2.0 * dims : dims;
        const double gamma = roundings * kRounding / (1.0 - roundings * kRounding);
        double error = 0.0, norm = 0.0;
        for (std::int64_t i = begin; i < end; ++i) {
            const Quantised &fact = facts[row(i)];
            const double share = std::ldexp(batch.weights[i], exponents[row(i)]) / total;
            error += share * fact.error;
            norm += share * (static_cast<double>(fact.norm) + fact.error);
            uses[row(i)].push_back({static_cast<std::int32_t>(queries.size() - 1), static_cast<float>(share * fact.scale)});
        }
        query.per_norm = static_cast<float>(1.0001 * (error + gamma * norm) + kSlack);
        query.per_error = static_cast<float>(1.0001 * norm * (1.0 + gamma) + kSlack);
    }
};

// Rows of a block: few enough for the second-level cache, many enough for the pool to be read seldom. 1,024 rows in
// float32 do not fit a cache of 1 MB, but a tile of them is used so often that reading it from behind costs little.
inline std::int64_t rows_in_block(const PackedPool &pool, const Batch &batch, int threads) {
    constexpr std::int64_t budget = 384 * 1024;  // units: 1.5 MB
    const std::int64_t most = std::clamp<std::int64_t>(budget / std::max<std::int64_t>(pool.steps, 1), 56, 1024);
    const std::int64_t rows = batch.offsets[batch.count];
    std::int64_t blocks = (rows + most - 1) / most;
    const std::int64_t even = (blocks + threads - 1) / threads * threads;  // as many for each thread
    if (rows / std::max<std::int64_t>(even, 1) >= 56) blocks = even;
    return std::max<std::int64_t>(1, (rows + blocks - 1) / std::max<std::int64_t>(blocks, 1));
}

// ids (B, k) and scores (B, k) come filled with -1 and minus infinity.
inline Statistics run(const Batch &batch, const Rows &rows, const PackedPool &pool, const Kernels &kernels, int threads,
                      std::int64_t *ids, float *scores) {
    if (!batch.k || !batch.count || !pool.groups) return {};
    // Starting a thread costs about as much as a million products.
    const double work = static_cast<double>(batch.offsets[batch.count]) * static_cast<double>(pool.first.back() * kLanes) *
                        static_cast<double>(pool.dims);
    threads = std::max(1, std::min(threads, static_cast<int>(std::min(work / 1e6, 1e6))));
    const std::int64_t most = rows_in_block(pool, batch, threads);
    std::vector<std::int64_t> blocks{0};
    for (std::int64_t b = 1; b <= batch.count; ++b)
        if (b == batch.count || batch.offsets[b + 1] - batch.offsets[blocks.back()] > most || b - blocks.back() >= 1024)
            blocks.push_back(b);
    const auto count = static_cast<std::int64_t>(blocks.size()) - 1;
    const std::int64_t parts = std::min(pool.groups, count < threads ? (threads + count - 1) / count : std::int64_t{1});
    std::vector<Statistics> statistics(static_cast<std::size_t>(count * parts));
    std::vector<std::unique_ptr<Block>> open(static_cast<std::size_t>(count * parts));
    const auto finish = [&](std::int64_t block, Statistics &own) {
        for (std::int64_t b = blocks[block]; b < blocks[block + 1]; ++b) {
            Query &query = open[block * parts]->queries[static_cast<std::size_t>(b - blocks[block])];
            for (std::int64_t part = 1; part < parts; ++part)
                query.merge(open[block * parts + part]->queries[static_cast<std::size_t>(b - blocks[block])]);
            query.finish(ids + b * batch.k, scores + b * batch.k, own);
        }
        for (std::int64_t part = 0; part < parts; ++part) open[block * parts + part].reset();
    };
    parallel(count * parts, threads, [&](std::int64_t task) {
        const std::int64_t block = task / parts, part = task % parts;
        open[task] = std::make_unique<Block>(batch, rows, pool, kernels, blocks[block], blocks[block + 1]);
        open[task]->screen(part * pool.groups / parts, (part + 1) * pool.groups / parts, statistics[task]);
        if (parts == 1) finish(block, statistics[task]);
    });
    if (parts > 1) parallel(count, threads, [&](std::int64_t block) { finish(block, statistics[block * parts]); });
    return sum(statistics);
}

// The best k of the given sentences only: proposed [begins[b], begins[b + 1]) for query b.
inline Statistics choose(const Batch &batch, const Rows &rows, const Kernels &kernels, std::int64_t dims,
                         const std::int64_t *proposed, const std::int64_t *begins, int threads, std::int64_t *ids,
                         float *scores) {
    std::vector<Statistics> statistics(static_cast<std::size_t>(batch.count));
    parallel(batch.k ? batch.count : 0, threads, [&](std::int64_t b) {
        Query query(batch, rows, kernels, dims, b);
        if (!query.spans()) return;
        Statistics own;
        for (std::int64_t n = begins[b]; n < begins[b + 1]; ++n) {
            const std::int64_t id = proposed[n];
            if (rows.offsets[id + 1] == rows.offsets[id] || query.excludes(id)) continue;
            ++own.candidates;
            query.propose(static_cast<std::int32_t>(id));
        }
        query.finish(ids + b * batch.k, scores + b * batch.k, own);
        statistics[static_cast<std::size_t>(b)] = own;
    });
    return sum(statistics);
}

}  // namespace el4ner::topk
