// vote for up to 8 members and 16 labels at memory speed: one register holds a member's row.
//
// Soft: float32 exponentials tell who wins and who is second; where a gap is too small for their error, all labels are
// summed in float64 (vote_span_avx512). Only the winner's and the second's scores are then computed in float64, so what
// is returned does not depend on the screen. Hard: maxima and counts, nothing is approximate.
#pragma once

#include "vote_x86.hpp"

namespace el4ner {

// Sums of weights by who is heard, computed once.
struct HeardWeights {
    bool usable = true;     // weights whose float32 quotients mean something
    double by_label[16][8];  // [label][member]
    float screen[8][16];     // [member][label], relative to the largest weight
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
                screen[m][l] = static_cast<float>(by_label[l][m] * unit);
            }
        for (std::size_t set = 0; set < heard.size(); ++set) fill(heard[set], set, unit);
    }

  private:
    void fill(Heard &entry, std::size_t set, double unit) {
        entry.anyone = false;
        for (int l = 0; l < 16; ++l) {
            entry.weight[l] = 0.0;
            for (int m = 0; m < 8; ++m)
                if (set >> m & 1) entry.weight[l] += by_label[l][m];
            const double relative = entry.weight[l] * unit;
            entry.anyone = entry.anyone || entry.weight[l] > 0.0;
            entry.inverse[l] = relative > 0.0 ? static_cast<float>(1.0 / relative) : 0.0f;
            if (relative > 0.0 && relative < 1e-20) usable = false;
        }
    }
};

// exp in float32, relative error below 2e-5 for -87 < x < 88; below that at most 1e-38, above it is infinite.
EL4NER_AVX512 inline __m512 exp_screen(__m512 x) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f), magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23
    x = _mm512_max_ps(x, _mm512_set1_ps(-100.0f));
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, log2e, magic), magic);
    const __m512 f = _mm512_fmsub_ps(x, log2e, n);
    // 2^f for |f| <= 1/2: best polynomial of the 4th degree in relative error, off by at most 3e-6
    __m512 p = _mm512_set1_ps(0.0095701019f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05591786f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024745f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69312181f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999926f));
    return _mm512_scalef_ps(p, n);
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

// Ordered sums over members of both columns, divided by their weights: (winner's score, second's).
template <int M>
EL4NER_AVX512 inline __m128d exact_pair(const HeardWeights &table, const __m512 (&x)[M], unsigned heard, int winner,
                                        int second) {
    const __m512i lane = _mm512_inserti64x4(_mm512_set1_epi32(winner), _mm256_set1_epi32(second), 1);
    __m512 both = _mm512_setzero_ps();  // lanes 0-7: the winner's column by member, 8-15: the second's
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
        both = _mm512_mask_permutexvar_ps(both, static_cast<__mmask16>(0x101 << m), lane, x[m]);
    const auto members = static_cast<__mmask8>(heard);
    const __m256 first_half = _mm512_castps512_ps256(both), second_half = _mm512_extractf32x8_ps(both, 1);
    const __m512d w = _mm512_maskz_mul_pd(members, exp_avx512(_mm512_cvtps_pd(first_half)),
                                          _mm512_loadu_pd(table.by_label[winner]));
    const __m512d v = _mm512_maskz_mul_pd(members, exp_avx512(_mm512_cvtps_pd(second_half)),
                                          _mm512_loadu_pd(table.by_label[second]));
    const __m512d even = _mm512_unpacklo_pd(w, v), odd = _mm512_unpackhi_pd(w, v);
    __m128d sum = _mm512_castpd512_pd128(even);
    sum = _mm_add_pd(sum, _mm512_castpd512_pd128(odd));
    if (M > 2) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(even, 1));
    if (M > 3) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(odd, 1));
    if (M > 4) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(even, 2));
    if (M > 5) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(odd, 2));
    if (M > 6) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(even, 3));
    if (M > 7) sum = _mm_add_pd(sum, _mm512_extractf64x2_pd(odd, 3));
    const double *weight = table.heard[heard].weight;
    return _mm_div_pd(sum, _mm_set_pd(weight[second], weight[winner]));
}

// false: the screen cannot tell, all labels have to be summed.
template <int M>
EL4NER_AVX512 inline bool soft_span(const VoteCall &call, const HeardWeights &table, const __m512 (&x)[M],
                                    unsigned heard, __mmask16 lanes, std::int64_t s) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const auto on = static_cast<__mmask16>(0 - (heard >> m & 1));
        sum = _mm512_mask3_fmadd_ps(exp_screen(x[m]), _mm512_loadu_ps(table.screen[m]), sum, on);
    }
    // Relative errors: 2e-5 of the exponentials and at most 10 roundings of 6e-8 in weights, sums and quotient. Two
    // scores that are 1e-4 apart are therefore in the right order.
    const __m512 score = _mm512_mul_ps(sum, _mm512_loadu_ps(table.heard[heard].inverse));
    const float top = _mm512_mask_reduce_max_ps(lanes, score);
    const __mmask16 first = _mm512_mask_cmp_ps_mask(lanes, score, _mm512_set1_ps(top * 0.9999f), _CMP_GE_OQ);
    const auto others = static_cast<__mmask16>(lanes & ~first);
    const float next = _mm512_mask_reduce_max_ps(others, score);
    const __mmask16 seconds = _mm512_mask_cmp_ps_mask(others, score, _mm512_set1_ps(next * 0.9999f), _CMP_GE_OQ);
    const bool alone = others == 0;  // one label
    // Far below 1 the clamped exponentials count, far above 1 float32 overflows.
    const bool certain = (first & (first - 1)) == 0 && top < 1e30f && top > 1e-30f &&
                         ((seconds & (seconds - 1)) == 0) && (alone || next > 1e-30f);
    if (!certain) return false;
    const int winner = __builtin_ctz(first), second = alone ? winner : __builtin_ctz(seconds);
    const __m128 pair = _mm_cvtpd_ps(exact_pair<M>(table, x, heard, winner, second));
    const float best = _mm_cvtss_f32(pair), runner_up = _mm_cvtss_f32(_mm_movehdup_ps(pair));
    call.winners[s] = winner;
    call.scores[s] = best;
    call.margins[s] = best - (alone ? 0.0f : runner_up);
    return true;
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

template <int M, bool Hard>
EL4NER_AVX512 inline bool vote_spans_of(const VoteCall &call, const HeardWeights &table, std::int64_t begin,
                                        std::int64_t end) {
    VoteWork work(call);
    const auto lanes = static_cast<__mmask16>((1u << call.labels) - 1);
    bool good = true;
    for (std::int64_t s = begin; s < end; ++s) {
        __m512 x[M];
        const HeardRows rows = load_rows<M>(call, s, lanes, x);
        good = good && rows.good;
        if (!table.heard[rows.heard].anyone)
            call.nobody(s);
        else if (Hard)
            hard_span<M>(call, table, x, rows.heard, lanes, s);
        else if (!soft_span<M>(call, table, x, rows.heard, lanes, s))
            vote_span_avx512(call, s, work);
    }
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
