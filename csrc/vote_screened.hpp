// vote for up to 8 members and 16 labels: one register holds a member's row.
//
// Soft: float32 exponentials tell who wins and who is second; where a gap is too small for their error, all labels are
// summed in float64 (vote_span_avx512). Only the winner's and the second's scores are then computed in float64, so what
// is returned does not depend on the screen. Hard: maxima and counts, nothing is approximate.
#pragma once

#include "transpose.hpp"
#include "vote_x86.hpp"

namespace el4ner {

// Sums of weights by who is heard, computed once.
struct HeardWeights {
    bool usable = true;     // weights whose float32 quotients mean something
    double by_label[16][8];  // [label][member]
    double by_member[8][16];
    float screen[8][16];     // [member][label], relative to the largest weight
    float shares[8][16];     // [member][label], of the sum over all members; 0 where that is 0
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
                by_label[l][m] = inside ? call.weights[m * call.labels + l] : 0.0;
                by_member[m][l] = by_label[l][m];
                screen[m][l] = static_cast<float>(by_label[l][m] * unit);
            }
        for (std::size_t set = 0; set < heard.size(); ++set) fill(heard[set], set, unit);
        const double *all = heard.back().weight;
        for (int m = 0; m < 8; ++m)
            for (int l = 0; l < 16; ++l)
                shares[m][l] = all[l] > 0.0 ? static_cast<float>(by_label[l][m] / all[l]) : 0.0f;
    }

  private:
    // The last member of a set is added to the sum over the others, which is there already.
    void fill(Heard &entry, std::size_t set, double unit) {
        int last = 0;
        while (set >> (last + 1) != 0) ++last;
        const Heard &others = heard[set & ~(std::size_t{1} << last)];
        entry.anyone = false;
        for (int l = 0; l < 16; ++l) {
            entry.weight[l] = set == 0 ? 0.0 : others.weight[l] + by_label[l][last];
            const double relative = entry.weight[l] * unit;
            entry.anyone = entry.anyone || entry.weight[l] > 0.0;
            entry.inverse[l] = relative > 0.0 ? static_cast<float>(1.0 / relative) : 0.0f;
            if (relative > 0.0 && relative < 1e-20) usable = false;
        }
    }
};

// exp in float32, relative error below 2e-5 for -87 < x < 88; below that at most 1e-38, above it is infinite.
EL4NER_AVX512 inline __m512 exp_screen(__m512 x) {
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 f = _mm512_reduce_ps(power, 1);  // minus its floor; 0 for -infinity
    // 2^f for 0 <= f < 1: best polynomial of the 4th degree in relative error, off by at most 3e-6
    __m512 p = _mm512_set1_ps(0.013534168f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05201146f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144275f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(p, power);  // times 2 to the floor
}

// Which lanes of a row are labels, and who of the members is heard.
struct HeardRows {
    unsigned heard;
    bool good;
};

template <int M>
EL4NER_AVX512 inline HeardRows load_rows(const VoteCall &call, std::int64_t s, __mmask16 lanes, __m512 (&x)[M]) {
    unsigned heard = 0;
    bool good = true;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        x[m] = _mm512_maskz_loadu_ps(lanes, call.row(m, s));
        const __m512 top = _mm512_set1_ps(std::numeric_limits<float>::infinity());
        const __mmask16 finite = _mm512_mask_cmp_ps_mask(lanes, x[m], top, _CMP_LT_OQ);
        heard |= static_cast<unsigned>(finite == lanes) << m;
        if (__builtin_expect(finite != lanes, 0))
            good = good && _mm512_mask_cmp_ps_mask(lanes, x[m], x[m], _CMP_UNORD_Q) == lanes;
    }
    return {heard, good};
}

// Fetches a span's rows ahead. In this order, span by span, the processor's own prefetching follows all members.
template <int M>
EL4NER_AVX512 inline void prefetch_span(const VoteCall &call, std::int64_t s) {
    for (int m = 0; m < M; ++m) _mm_prefetch(reinterpret_cast<const char *>(call.row(m, s)), _MM_HINT_T0);
}

// 16 spans at a time. Their screening scores, and what is computed exactly, are transposed so that a lane is a span:
// then no step waits for a reduction across a register.
struct SpanBlock {
    alignas(64) float score[16][16];  // [span][label]
    alignas(64) float pair[16][16];   // [span][winner's column by member, then the second's]
    alignas(64) std::int32_t winner[16], second[16];
    unsigned heard[16];
    __mmask16 heard_by[8];  // by member: which spans
    bool good;
};

EL4NER_AVX512 inline void store_block(const VoteCall &call, std::int64_t first, __m512i winner, __m512 score,
                                      __m512 margin) {
    _mm512_storeu_si512(call.winners + first, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(winner)));
    _mm512_storeu_si512(call.winners + first + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(winner, 1)));
    _mm512_storeu_ps(call.scores + first, score);
    _mm512_storeu_ps(call.margins + first, margin);
}

EL4NER_AVX512 inline void transpose_floats(const float (&from)[16][16], __m512 (&to)[16]) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(from[i]);
    transpose_16(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) to[i] = _mm512_castsi512_ps(row[i]);
}

// Screening scores of 16 spans on which everybody is heard. false: a score is no number or infinite, since somebody
// abstains, a row must be refused, or numbers are far above 0. Rows are not checked one by one: comparisons into mask
// registers would take longer than the exponentials.
template <int M>
EL4NER_AVX512 inline bool screen_everybody(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                           __mmask16 lanes, SpanBlock &block) {
    const float *rows = call.row(0, first);
    const std::int64_t member = call.spans * call.labels;
    __m512 all = _mm512_setzero_ps();
    for (int j = 0; j < 16; ++j) {
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const float *row = rows + m * member + j * call.labels;
            _mm_prefetch(reinterpret_cast<const char *>(row + 16 * call.labels), _MM_HINT_T0);
            sum = _mm512_fmadd_ps(exp_screen(_mm512_loadu_ps(row)), _mm512_loadu_ps(table.shares[m]), sum);
        }
        all = _mm512_add_ps(all, sum);
        _mm512_store_ps(block.score[j], sum);
    }
    const __m512 top = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    return _mm512_mask_cmp_ps_mask(lanes, all, top, _CMP_LT_OQ) == lanes;
}

// Screening scores of 16 spans; who is heard.
template <int M>
EL4NER_AVX512 inline void screen_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                       __mmask16 lanes, SpanBlock &block) {
    block.good = true;
    unsigned everybody = (1u << M) - 1;
    for (int j = 0; j < 16; ++j) {
        __m512 x[M];
        const HeardRows rows = load_rows<M>(call, first + j, lanes, x);
        block.good = block.good && rows.good;
        block.heard[j] = rows.heard;
        everybody &= rows.heard;
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const auto on = static_cast<__mmask16>(0 - (rows.heard >> m & 1));
            sum = _mm512_mask3_fmadd_ps(exp_screen(x[m]), _mm512_loadu_ps(table.screen[m]), sum, on);
        }
        const __m512 score = _mm512_mul_ps(sum, _mm512_loadu_ps(table.heard[rows.heard].inverse));
        _mm512_store_ps(block.score[j], score);
    }
    for (int m = 0; m < M; ++m) {
        block.heard_by[m] = 0xffff;
        if (everybody >> m & 1) continue;
        unsigned by = 0;
        for (int j = 0; j < 16; ++j) by |= (block.heard[j] >> m & 1) << j;
        block.heard_by[m] = static_cast<__mmask16>(by);
    }
}

// Winner and second of 16 spans from their screening scores; the mask says for which spans these are certain.
EL4NER_AVX512 inline __mmask16 choose_block(int labels, SpanBlock &block) {
    __m512 column[16];
    transpose_floats(block.score, column);
    __m512 best = column[0], second = _mm512_set1_ps(-1.0f), third = second;
    __m512i winner = _mm512_setzero_si512(), runner_up = winner;
    for (int l = 1; l < labels; ++l) {
        const __m512 score = column[l];
        const __m512i label = _mm512_set1_epi32(l);
        const __mmask16 leads = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ);
        const __mmask16 follows = _mm512_cmp_ps_mask(score, second, _CMP_GT_OQ);
        third = _mm512_max_ps(third, _mm512_min_ps(score, second));
        second = _mm512_max_ps(second, _mm512_min_ps(score, best));
        best = _mm512_max_ps(best, score);
        runner_up = _mm512_mask_mov_epi32(runner_up, follows, label);
        runner_up = _mm512_mask_mov_epi32(runner_up, leads, winner);
        winner = _mm512_mask_mov_epi32(winner, leads, label);
    }
    _mm512_store_si512(block.winner, winner);
    _mm512_store_si512(block.second, runner_up);
    // Relative errors: 2e-5 of the exponentials and at most 10 roundings of 6e-8 in weights, sums and quotient. Two
    // scores that are 1e-4 apart are therefore in the right order. Far below 1 exponentials vanish, far above 1
    // float32 overflows.
    const __m512 nearly = _mm512_set1_ps(0.9999f), least = _mm512_set1_ps(1e-30f), most = _mm512_set1_ps(1e30f);
    __mmask16 certain = _mm512_cmp_ps_mask(_mm512_mul_ps(best, nearly), second, _CMP_GT_OQ);
    certain &= _mm512_cmp_ps_mask(best, least, _CMP_GT_OQ) & _mm512_cmp_ps_mask(best, most, _CMP_LT_OQ);
    if (labels > 1) certain &= _mm512_cmp_ps_mask(second, least, _CMP_GT_OQ);
    if (labels > 2) certain &= _mm512_cmp_ps_mask(_mm512_mul_ps(second, nearly), third, _CMP_GT_OQ);
    return certain;
}

// Weighted float64 sums over members, in order, of 8 spans' chosen columns, divided by the weights heard.
template <int M, bool Everybody>
EL4NER_AVX512 inline __m256 exact_eight(const HeardWeights &table, const SpanBlock &block, const __m512 *column,
                                        const std::int32_t *label, int half) {
    const __m512i index = _mm512_cvtepi32_epi64(_mm256_load_si256(reinterpret_cast<const __m256i *>(label + 8 * half)));
    __m512d total = _mm512_setzero_pd(), weight = _mm512_setzero_pd();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __m256 x = half == 0 ? _mm512_castps512_ps256(column[m]) : _mm512_extractf32x8_ps(column[m], 1);
        const __m512d w = take_16(table.by_member[m], index);
        const __m512d p = _mm512_mul_pd(w, exp_avx512(_mm512_cvtps_pd(x)));
        if (Everybody) {
            total = _mm512_add_pd(total, p);
            continue;
        }
        const auto heard = static_cast<__mmask8>(block.heard_by[m] >> (8 * half));
        total = _mm512_mask_add_pd(total, heard, total, p);
        weight = _mm512_mask_add_pd(weight, heard, weight, w);
    }
    if (Everybody) weight = take_16(table.heard[(std::size_t{1} << M) - 1].weight, index);
    return _mm512_cvtpd_ps(_mm512_div_pd(total, weight));
}

template <int M, bool Everybody>
EL4NER_AVX512 inline __m512 exact_block(const HeardWeights &table, const SpanBlock &block, const __m512 *column,
                                        const std::int32_t *label) {
    const __m256 low = exact_eight<M, Everybody>(table, block, column, label, 0);
    const __m256 high = exact_eight<M, Everybody>(table, block, column, label, 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// What follows the screen for 16 spans; those that it cannot decide are summed in full.
template <int M, bool Everybody>
EL4NER_AVX512 inline void decide_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                       SpanBlock &block, VoteWork &work) {
    const __mmask16 certain = choose_block(static_cast<int>(call.labels), block);
    const float *rows = call.row(0, first);
    const std::int64_t member = call.spans * call.labels;
    for (int j = 0; j < 16; ++j) {
        const __m512i lane = _mm512_mask_set1_epi32(_mm512_set1_epi32(block.winner[j]), 0xff00, block.second[j]);
        __m512 both = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            both = _mm512_mask_permutexvar_ps(both, static_cast<__mmask16>(0x101 << m), lane,
                                              _mm512_loadu_ps(rows + m * member + j * call.labels));
        _mm512_store_ps(block.pair[j], _mm512_max_ps(both, _mm512_set1_ps(ExpConstants::least)));
    }
    __m512 column[16];
    transpose_floats(block.pair, column);
    const __m512 best = exact_block<M, Everybody>(table, block, column, block.winner);
    const __m512 second = exact_block<M, Everybody>(table, block, column + 8, block.second);
    const __m512 margin = call.labels > 1 ? _mm512_sub_ps(best, second) : best;
    store_block(call, first, _mm512_load_si512(block.winner), best, margin);
    for (unsigned left = static_cast<__mmask16>(~certain); left != 0; left &= left - 1) {
        const int j = __builtin_ctz(left);
        if (table.heard[Everybody ? (std::size_t{1} << M) - 1 : block.heard[j]].anyone)
            vote_span_avx512(call, first + j, work);
        else
            call.nobody(first + j);
    }
}

// 16 spans of a soft vote.
template <int M>
EL4NER_AVX512 inline bool soft_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                     __mmask16 lanes, SpanBlock &block, VoteWork &work) {
    if (screen_everybody<M>(call, table, first, lanes, block)) {
        decide_block<M, true>(call, table, first, block, work);
        return true;
    }
    screen_block<M>(call, table, first, lanes, block);
    if (block.good) decide_block<M, false>(call, table, first, block, work);
    return block.good;
}

template <int M>
EL4NER_AVX512 inline void hard_span(const VoteCall &call, const HeardWeights &table, const __m512 (&x)[M],
                                    unsigned heard, __mmask16 lanes, std::int64_t s) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    unsigned votes[M];  // the label each member votes for, as a bit
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __m512 top = _mm512_set1_ps(_mm512_mask_reduce_max_ps(lanes, x[m]));
        unsigned best = _mm512_mask_cmp_ps_mask(lanes, x[m], top, _CMP_EQ_OQ);
        best = heard >> m & 1 ? best & (0 - best) : 0;
        votes[m] = best;
        const double w = best ? table.by_label[__builtin_ctz(best)][m] : 0.0;
        low = _mm512_mask_add_pd(low, static_cast<__mmask8>(best), low, _mm512_set1_pd(w));
        high = _mm512_mask_add_pd(high, static_cast<__mmask8>(best >> 8), high, _mm512_set1_pd(w));
    }
    const double *weight = table.heard[heard].weight;
    const __m512d zero = _mm512_setzero_pd(), wl = _mm512_loadu_pd(weight), wh = _mm512_loadu_pd(weight + 8);
    low = _mm512_maskz_div_pd(_mm512_cmp_pd_mask(wl, zero, _CMP_GT_OQ), low, wl);
    high = _mm512_maskz_div_pd(_mm512_cmp_pd_mask(wh, zero, _CMP_GT_OQ), high, wh);
    const __m512 score = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
    const float best = _mm512_mask_reduce_max_ps(lanes, score);
    unsigned ahead = _mm512_mask_cmp_ps_mask(lanes, score, _mm512_set1_ps(best), _CMP_EQ_OQ);
    if (ahead & (ahead - 1)) {  // a tie: the label whose voter of positive weight comes first
        for (int m = 0; m < M; ++m)
            if ((votes[m] & ahead) && table.by_label[__builtin_ctz(votes[m])][m] > 0.0) {
                ahead = votes[m];
                break;
            }
    }
    const int winner = __builtin_ctz(ahead);
    const auto others = static_cast<__mmask16>(lanes & ~(1u << winner));
    const float second = others ? _mm512_mask_reduce_max_ps(others, score) : 0.0f;
    call.winners[s] = winner;
    call.scores[s] = best;
    call.margins[s] = best - second;
}

// The label that a member votes for on each of 16 spans, the lowest if several are best. `usual` loses the spans whose
// row holds NaN or +infinity.
EL4NER_AVX512 inline __m512i best_labels(const float *rows, std::int64_t labels, __mmask16 &usual) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) row[j] = _mm512_loadu_si512(rows + j * labels);
    transpose_16(row);
    __m512 highest = _mm512_castsi512_ps(row[0]);
    __m512i label = _mm512_setzero_si512();
    usual &= _mm512_cmp_ps_mask(highest, highest, _CMP_ORD_Q);
#pragma GCC unroll 16
    for (int l = 1; l < 16; ++l) {
        if (l >= labels) break;
        const __m512 column = _mm512_castsi512_ps(row[l]);
        label = _mm512_mask_mov_epi32(label, _mm512_cmp_ps_mask(column, highest, _CMP_GT_OQ), _mm512_set1_epi32(l));
        highest = _mm512_max_ps(highest, column);
        if (l % 2 == 1 || l + 1 == labels)  // one comparison for two columns
            usual &= _mm512_cmp_ps_mask(column, _mm512_castsi512_ps(row[l - 1]), _CMP_ORD_Q);
    }
    const __m512 top = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    usual &= _mm512_cmp_ps_mask(highest, top, _CMP_LT_OQ);
    return label;
}

// 8 of 16 numbers, widened.
EL4NER_AVX512 inline __m512i half_of(__m512i numbers, int half) {
    return _mm512_cvtepi32_epi64(half == 0 ? _mm512_castsi512_si256(numbers) : _mm512_extracti64x4_epi64(numbers, 1));
}

// 16 spans of a hard vote on which everybody is heard, a lane for each. A label that nobody votes for scores 0, so only
// the members' own labels are counted: at most one for each member. false: the spans have to be taken one by one.
template <int M>
EL4NER_AVX512 inline bool hard_block(const VoteCall &call, const HeardWeights &table, std::int64_t first) {
    if (!table.heard[(std::size_t{1} << M) - 1].anyone) return false;
    __m512i label[M];
    __mmask16 usual = 0xffff;
    for (int m = 0; m < M; ++m) {
        label[m] = best_labels(call.row(m, first), call.labels, usual);
        for (int j = 16 * m / M; j < 16 * (m + 1) / M; ++j) prefetch_span<M>(call, first + 16 + j);
    }
    if (usual != 0xffff) return false;
    __m512d weight[M][2], total[M][2];  // [member][half]: its weight for its label; the sum of all who vote for that
#pragma GCC unroll 8
    for (int b = 0; b < M; ++b) {
        for (int half = 0; half < 2; ++half) {
            weight[b][half] = take_16(table.by_member[b], half_of(label[b], half));
            total[b][half] = _mm512_setzero_pd();
        }
        // members in order: those before b are added to b's label, then b itself, and b to the labels before
#pragma GCC unroll 8
        for (int a = 0; a < b; ++a) {
            const __mmask16 same = _mm512_cmpeq_epi32_mask(label[a], label[b]);
            for (int half = 0; half < 2; ++half) {
                const auto part = static_cast<__mmask8>(same >> (8 * half));
                total[b][half] = _mm512_mask_add_pd(total[b][half], part, total[b][half], weight[a][half]);
                total[a][half] = _mm512_mask_add_pd(total[a][half], part, total[a][half], weight[b][half]);
            }
        }
        for (int half = 0; half < 2; ++half) total[b][half] = _mm512_add_pd(total[b][half], weight[b][half]);
    }
    const double *heard = table.heard[(std::size_t{1} << M) - 1].weight;
    const __m512d zero = _mm512_setzero_pd();
    __m512 score[M];
    // Whoever is first with the highest score decides, if not with weight 0; without any weight all tie at 0: label 0.
    __m512 best = _mm512_setzero_ps(), second = best;
    __m512i winner = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        __m256 part[2];
        __mmask16 weighty = 0;
        for (int half = 0; half < 2; ++half) {
            const __m512d all = take_16(heard, half_of(label[m], half));
            const __mmask8 positive = _mm512_cmp_pd_mask(all, zero, _CMP_GT_OQ);
            part[half] = _mm512_cvtpd_ps(_mm512_maskz_div_pd(positive, total[m][half], all));
            const __mmask8 counts = _mm512_cmp_pd_mask(weight[m][half], zero, _CMP_GT_OQ);
            weighty = static_cast<__mmask16>(weighty | counts << (8 * half));
        }
        score[m] = _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
        const __mmask16 leads = _mm512_mask_cmp_ps_mask(weighty, score[m], best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, leads, score[m]);
        winner = _mm512_mask_mov_epi32(winner, leads, label[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __mmask16 other = _mm512_cmpneq_epi32_mask(label[m], winner);
        second = _mm512_mask_max_ps(second, other, second, score[m]);
    }
    store_block(call, first, winner, best, _mm512_sub_ps(best, second));
    return true;
}

template <int M>
EL4NER_AVX512 inline bool hard_spans(const VoteCall &call, const HeardWeights &table, std::int64_t begin,
                                     std::int64_t end, __mmask16 lanes) {
    bool good = true;
    for (std::int64_t s = begin; s < end; ++s) {
        prefetch_span<M>(call, s + 16);
        __m512 x[M];
        const HeardRows rows = load_rows<M>(call, s, lanes, x);
        good = good && rows.good;
        if (!table.heard[rows.heard].anyone)
            call.nobody(s);
        else
            hard_span<M>(call, table, x, rows.heard, lanes, s);
    }
    return good;
}

template <int M, bool Hard>
EL4NER_AVX512 inline bool vote_spans_of(const VoteCall &call, const HeardWeights &table, std::int64_t begin,
                                        std::int64_t end) {
    VoteWork work(call);
    const auto lanes = static_cast<__mmask16>((1u << call.labels) - 1);
    bool good = true;
    std::int64_t s = begin;
    SpanBlock block;
    // Whole registers are read where a row may be shorter: not of the last spans, behind which nothing lies.
    const std::int64_t safe = std::min(end, call.spans - 15 / call.labels);
    for (; s + 16 <= safe; s += 16) {
        if (!Hard)
            good = soft_block<M>(call, table, s, lanes, block, work) && good;
        else if (!hard_block<M>(call, table, s))
            good = hard_spans<M>(call, table, s, s + 16, lanes) && good;
    }
    if (Hard) return hard_spans<M>(call, table, s, end, lanes) && good;
    for (; s < end; ++s) good = vote_span_avx512(call, s, work) && good;
    return good;
}

template <int M>
inline bool vote_spans_of(const VoteCall &call, const HeardWeights &table, std::int64_t begin, std::int64_t end) {
    return call.hard ? vote_spans_of<M, true>(call, table, begin, end)
                     : vote_spans_of<M, false>(call, table, begin, end);
}

// Spans begin to end of a call with 1 to 8 members (0 too) and 1 to 16 labels.
inline bool vote_spans_screened(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    const HeardWeights table(call);
    if (!table.usable) return vote_spans(call, begin, end);
    switch (call.members) {
        case 1: return vote_spans_of<1>(call, table, begin, end);
        case 2: return vote_spans_of<2>(call, table, begin, end);
        case 3: return vote_spans_of<3>(call, table, begin, end);
        case 4: return vote_spans_of<4>(call, table, begin, end);
        case 5: return vote_spans_of<5>(call, table, begin, end);
        case 6: return vote_spans_of<6>(call, table, begin, end);
        case 7: return vote_spans_of<7>(call, table, begin, end);
        case 8: return vote_spans_of<8>(call, table, begin, end);
        default: return vote_spans(call, begin, end);
    }
}

}  // namespace el4ner
