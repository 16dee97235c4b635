// span_topk, which queries go into a block together: those that ask for the same spans, as each is multiplied once a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "span_topk_query.hpp"
#include "span_topk_team.hpp"

namespace el4ner::topk {

// Query spans by content: texts ask for the same words again and again. `row_of`: span, counted from `first`, -> row.
struct QueryRows {
    std::int64_t first = 0;
    std::vector<const float *> vectors;  // row -> one of its spans
    std::vector<std::int32_t> row_of;

    std::int32_t of(std::int64_t span) const { return row_of[static_cast<std::size_t>(span - first)]; }
};

// The rows of the queries [begin, end).
inline QueryRows query_rows(const Batch &batch, std::int64_t begin, std::int64_t end, std::int64_t dims, Team &team) {
    QueryRows rows;
    rows.first = batch.offsets[begin];
    const std::int64_t count = batch.offsets[end] - rows.first;
    const float *vectors = batch.queries + rows.first * dims;
    const std::size_t bytes = static_cast<std::size_t>(dims) * sizeof(float);
    std::vector<std::uint64_t> hashes(static_cast<std::size_t>(count));
    team.runs(count, 32, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t i = from; i < to; ++i)
            hashes[static_cast<std::size_t>(i)] = hash_of(vectors + i * dims, dims);
    });
    std::unordered_multimap<std::uint64_t, std::int32_t> seen;
    seen.reserve(static_cast<std::size_t>(count));
    rows.row_of.reserve(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
        const float *vector = vectors + i * dims;
        std::int32_t row = -1;
        const auto range = seen.equal_range(hashes[static_cast<std::size_t>(i)]);
        for (auto at = range.first; at != range.second && row < 0; ++at)
            if (std::memcmp(rows.vectors[static_cast<std::size_t>(at->second)], vector, bytes) == 0) row = at->second;
        if (row < 0) {
            row = static_cast<std::int32_t>(rows.vectors.size());
            rows.vectors.push_back(vector);
            seen.emplace(hashes[static_cast<std::size_t>(i)], row);
        }
        rows.row_of.push_back(row);
    }
    return rows;
}

// Which rows the queries [begin, end) ask for and who asks for a row, each once, queries counted from 0: own[own_from[q]],
// askers[asked_from[row]] and on, up to where the next one begins.
struct Asking {
    std::vector<std::int32_t> own, askers;
    std::vector<std::int64_t> own_from{0}, asked_from;

    Asking(const Batch &batch, std::int64_t begin, std::int64_t end, const QueryRows &rows)
        : asked_from(rows.vectors.size() + 1, 0) {
        const auto count = static_cast<std::size_t>(end - begin);
        std::vector<std::int32_t> last(rows.vectors.size(), -1);  // who asked for a row last
        for (std::size_t q = 0; q < count; ++q) {
            const std::int64_t b = begin + static_cast<std::int64_t>(q);
            for (std::int64_t i = batch.offsets[b]; i < batch.offsets[b + 1]; ++i) {
                const auto row = static_cast<std::size_t>(rows.of(i));
                if (last[row] == static_cast<std::int32_t>(q)) continue;
                last[row] = static_cast<std::int32_t>(q);
                own.push_back(rows.of(i));
                ++asked_from[row + 1];
            }
            own_from.push_back(static_cast<std::int64_t>(own.size()));
        }
        for (std::size_t row = 0; row < rows.vectors.size(); ++row) asked_from[row + 1] += asked_from[row];
        askers.resize(own.size());
        std::vector<std::int64_t> next(asked_from.begin(), asked_from.end() - 1);
        for (std::size_t q = 0; q < count; ++q)
            for (std::int64_t n = own_from[q]; n < own_from[q + 1]; ++n) {
                const auto row = static_cast<std::size_t>(own[static_cast<std::size_t>(n)]);
                askers[static_cast<std::size_t>(next[row]++)] = static_cast<std::int32_t>(q);
            }
    }

    std::int64_t rows_of(std::size_t q) const { return own_from[q + 1] - own_from[q]; }
};

// Queries [begin, end) in blocks of at most so many rows, but for a query that has more alone, and so many queries. A block
// begins with the first query that is left and takes the one with the largest share of rows that the block has already,
// the first of equals, as long as one fits: where nothing repeats, queries stay nearly in their order.
inline std::vector<std::vector<std::int64_t>> alike(const Batch &batch, std::int64_t begin, std::int64_t end,
                                                    const QueryRows &rows, std::int64_t most_rows, std::int64_t most_queries) {
    const auto count = static_cast<std::size_t>(end - begin);
    const Asking asking(batch, begin, end, rows);
    std::vector<std::int32_t> left, known(count);  // known: how many rows of a query the present block has
    for (std::size_t q = 0; q < count; ++q) left.push_back(static_cast<std::int32_t>(q));
    std::vector<std::int32_t> block_of(rows.vectors.size(), -1);  // the last block that a row came into
    std::vector<std::vector<std::int64_t>> blocks;
    while (!left.empty()) {
        blocks.emplace_back();
        std::fill(known.begin(), known.end(), 0);
        std::int64_t size = 0;
        for (std::size_t at = 0; at < left.size();) {
            const auto q = static_cast<std::size_t>(left[at]);
            left.erase(left.begin() + static_cast<std::ptrdiff_t>(at));
            blocks.back().push_back(begin + static_cast<std::int64_t>(q));
            for (std::int64_t n = asking.own_from[q]; n < asking.own_from[q + 1]; ++n) {
                const auto row = static_cast<std::size_t>(asking.own[static_cast<std::size_t>(n)]);
                if (block_of[row] == static_cast<std::int32_t>(blocks.size())) continue;
                block_of[row] = static_cast<std::int32_t>(blocks.size());
                ++size;
                for (std::int64_t m = asking.asked_from[row]; m < asking.asked_from[row + 1]; ++m)
                    ++known[static_cast<std::size_t>(asking.askers[static_cast<std::size_t>(m)])];
            }
            if (static_cast<std::int64_t>(blocks.back().size()) >= most_queries) break;
            double best = -1.0;
            at = left.size();
            for (std::size_t n = 0; n < left.size(); ++n) {
                const auto other = static_cast<std::size_t>(left[n]);
                const std::int64_t all = asking.rows_of(other);
                if (size + all - known[other] > most_rows) continue;
                const double share = all ? static_cast<double>(known[other]) / static_cast<double>(all) : 1.0;
                if (share > best) best = share, at = n;
            }
        }
        std::sort(blocks.back().begin(), blocks.back().end());
    }
    return blocks;
}

}  // namespace el4ner::topk
