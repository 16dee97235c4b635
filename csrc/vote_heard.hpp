// What the screened votes share: sums of weights by who is heard, and who is heard.
#pragma once

#include <algorithm>
#include <cstring>

#include "vote.hpp"

namespace el4ner {

// Sums of weights by who is heard, computed once.
struct HeardWeights {
    bool usable = true;     // weights whose float32 quotients mean something
    double by_member[8][16];  // [member][label]
    float screen[8][16];      // relative to the largest weight
    alignas(64) float nobody[16];  // read in place of a row that abstains: minus infinity, whose exponential is 0
    struct Heard {
        double weight[16];   // sum over the heard, members in order
        float inverse[16];   // 1 / (weight relative to the largest), 0 where nobody is heard
        bool anyone;
    };
    std::vector<Heard> heard;  // [set of members as bits]

    explicit HeardWeights(const VoteCall &call) : heard(std::size_t{1} << call.members) {
        double largest = 0.0;
        for (std::int64_t i = 0; i < call.members * call.labels; ++i) largest = std::max(largest, call.weights[i]);
        const double unit = largest > 0.0 ? 1.0 / largest : 0.0;
        // Outside, products of weights and probabilities may fall below what float64 holds, where plain sums tie.
        usable = largest == 0.0 || (largest > 1e-100 && largest < 1e100);
        for (int l = 0; l < 16; ++l)
            for (int m = 0; m < 8; ++m) {
                const bool inside = l < call.labels && m < call.members;
                by_member[m][l] = inside ? call.weights[m * call.labels + l] : 0.0;
                screen[m][l] = static_cast<float>(by_member[m][l] * unit);
            }
        for (std::size_t set = 0; set < heard.size(); ++set) fill(heard[set], set, unit);
        std::fill_n(nobody, 16, -std::numeric_limits<float>::infinity());
    }

  private:
    // The last member of a set is added to the sum over the others, which is there already.
    void fill(Heard &entry, std::size_t set, double unit) {
        int last = 0;
        while (set >> (last + 1) != 0) ++last;
        const Heard &others = heard[set & ~(std::size_t{1} << last)];
        entry.anyone = false;
        for (int l = 0; l < 16; ++l) {
            entry.weight[l] = set == 0 ? 0.0 : others.weight[l] + by_member[last][l];
            const double relative = entry.weight[l] * unit;
            entry.anyone = entry.anyone || entry.weight[l] > 0.0;
            entry.inverse[l] = relative > 0.0 ? static_cast<float>(1.0 / relative) : 0.0f;
            if (relative > 0.0 && relative < 1e-20) usable = false;
        }
    }
};

// Whether a member votes, from its first number: for a row that is all numbers or all NaN, which is checked elsewhere.
// Integers, since units for floats are what everything else waits for.
inline __attribute__((always_inline)) bool begins_with_number(const float *row) {
    std::uint32_t bits;
    std::memcpy(&bits, row, sizeof bits);
    return bits << 1 <= 0xff000000u;  // without its sign no greater than infinity
}

// Whether all rows that begin with NaN are NaN throughout. heard: a byte for each of 8 or 16 spans, members as bits.
inline bool silent_rows_are_nan(const VoteCall &call, std::int64_t first, const std::uint8_t *heard, int count) {
    bool good = true;
    for (int part = 0; part < count; part += 8) {
        std::uint64_t silent;
        std::memcpy(&silent, heard + part, sizeof silent);
        silent = ~silent & ((std::uint64_t{1} << call.members) - 1) * 0x0101010101010101u;
        for (; silent != 0; silent &= silent - 1) {
            const int bit = __builtin_ctzll(silent);
            const float *row = call.row(bit % 8, first + part + bit / 8);
            std::uint32_t least = ~std::uint32_t{0};
            for (std::int64_t l = 0; l < call.labels; ++l) {
                std::uint32_t bits;
                std::memcpy(&bits, row + l, sizeof bits);
                least = std::min(least, bits << 1);
            }
            good = good && least > 0xff000000u;
        }
    }
    return good;
}

// Up to where spans from `begin` on may be taken in blocks: whole registers are read where a row may be shorter, but not
// of the last spans, behind which nothing lies.
template <int Block>
inline std::int64_t whole_blocks(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    const std::int64_t safe = std::min(end, call.spans - 15 / call.labels);
    return safe > begin ? begin + (safe - begin) / Block * Block : begin;
}

// Up to Block spans as a call of their own, filled up with spans on which everybody abstains.
template <int Block>
struct LastSpans {
    float logp[8 * 16 * Block + 16];
    std::int64_t winners[Block];
    float scores[Block], margins[Block];
    std::int64_t first, count;
    VoteCall call;

    LastSpans(const VoteCall &whole, std::int64_t from, std::int64_t end)
        : first(from), count(std::min<std::int64_t>(Block, end - from)), call(whole) {
        std::fill_n(logp, sizeof logp / sizeof *logp, std::numeric_limits<float>::quiet_NaN());
        for (std::int64_t m = 0; m < whole.members; ++m)
            std::copy_n(whole.row(m, first), count * whole.labels, logp + m * Block * whole.labels);
        call.logp = logp;
        call.spans = Block;
        call.winners = winners;
        call.scores = scores;
        call.margins = margins;
    }
    void store(const VoteCall &whole) const {
        std::copy_n(winners, count, whole.winners + first);
        std::copy_n(scores, count, whole.scores + first);
        std::copy_n(margins, count, whole.margins + first);
    }
};

}  // namespace el4ner
