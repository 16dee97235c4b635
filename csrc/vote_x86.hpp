// vote on x86: float64 exponentials in AVX2 and AVX-512, and screened paths for up to 8 members and 16 labels.
#pragma once

#include "vote.hpp"

namespace el4ner {

// exp in float64 for x <= 700 (anything above gives garbage: callers check), 0 below -708. Relative error 3e-16:
// x = n ln2 + r, |r| <= ln2 / 2; Taylor to the 13th power leaves r^14 / 14! < 5e-18.
struct ExpConstants {
    static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10, magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double taylor[14] = {1.0,        1.0,         1.0 / 2,       1.0 / 6,        1.0 / 24,
                                          1.0 / 120,  1.0 / 720,   1.0 / 5040,    1.0 / 40320,    1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    static constexpr double near_0[7] = {1.0, 1.0, 0.4999999999999928, 0.16666666664373647, 0.04166666671292855,
                                         0.008333472971523051, 0.001388831551658607};
    alignas(64) static constexpr double sixteenths[16] = {  // 2^(k/16)
        1.0,                1.0442737824274138, 1.0905077326652577, 1.1387886347566916,
        1.189207115002721,  1.241857812073484,  1.2968395546510096, 1.3542555469368927,
        1.4142135623730951, 1.4768261459394993, 1.5422108254079407, 1.6104903319492543,
        1.681792830507429,  1.7562521603732995, 1.8340080864093424, 1.9152065613971474};
    static constexpr float least = -700.0f;  // what is below counts as e^-700, which no float32 score tells from 0
};

// One of 16 numbers for each lane.
EL4NER_AVX512 inline __m512d take_16(const double *from, __m512i index) {
    return _mm512_permutex2var_pd(_mm512_loadu_pd(from), index, _mm512_loadu_pd(from + 8));
}

// The same for some lanes, 0 in the others.
EL4NER_AVX512 inline __m512d take_16(__mmask8 lanes, const double *from, __m512i index) {
    return _mm512_maskz_permutex2var_pd(lanes, _mm512_loadu_pd(from), index, _mm512_loadu_pd(from + 8));
}

// exp for -700 <= x <= 700 with fewer terms, since 2 to a sixteenth comes from a table in two registers:
// x = n ln2 + r, n in sixteenths, |r| <= ln2 / 32; best polynomial of the 6th degree, off by 1.3e-17.
EL4NER_AVX512 inline __m512d exp_avx512(__m512d x) {
    using C = ExpConstants;
    const __m512d shifted = _mm512_fmadd_pd(x, _mm512_set1_pd(C::log2e), _mm512_set1_pd(C::magic / 16));
    const __m512d n = _mm512_sub_pd(shifted, _mm512_set1_pd(C::magic / 16));
    __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(C::ln2_high), x);
    r = _mm512_fnmadd_pd(n, _mm512_set1_pd(C::ln2_low), r);
    __m512d p = _mm512_set1_pd(C::near_0[6]);
#pragma GCC unroll 6
    for (int i = 5; i >= 0; --i) p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(C::near_0[i]));
    // the sixteenths are the low bits of `shifted`; scalef takes the floor of n
    p = _mm512_mul_pd(p, take_16(C::sixteenths, _mm512_castpd_si512(shifted)));
    return _mm512_scalef_pd(p, n);
}

EL4NER_AVX2 inline __m256d exp_avx2(__m256d x) {
    using C = ExpConstants;
    const __m256d inside = _mm256_cmp_pd(x, _mm256_set1_pd(-708.0), _CMP_GE_OQ);
    x = _mm256_max_pd(x, _mm256_set1_pd(-708.0));
    const __m256d shifted = _mm256_fmadd_pd(x, _mm256_set1_pd(C::log2e), _mm256_set1_pd(C::magic));
    const __m256d n = _mm256_sub_pd(shifted, _mm256_set1_pd(C::magic));
    __m256d r = _mm256_fnmadd_pd(n, _mm256_set1_pd(C::ln2_high), x);
    r = _mm256_fnmadd_pd(n, _mm256_set1_pd(C::ln2_low), r);
    __m256d p = _mm256_set1_pd(C::taylor[13]);
#pragma GCC unroll 13
    for (int i = 12; i >= 0; --i) p = _mm256_fmadd_pd(p, r, _mm256_set1_pd(C::taylor[i]));
    // the integer sits in the low bits of `shifted`; moved to the exponent it doubles p that often (n >= -1022)
    const __m256i power = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
    const __m256d scaled = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), power));
    return _mm256_and_pd(scaled, inside);
}

// One span of a soft vote, 8 labels at a time; the sums have vote_span's order. false: a row must be refused.
EL4NER_AVX512 inline bool vote_span_avx512(const VoteCall &call, std::int64_t s, VoteWork &work) {
    bool heard = false;
    for (std::int64_t l = 0; l < call.labels; l += 8) {
        const auto part = static_cast<__mmask8>(call.labels - l >= 8 ? 0xff : (1 << (call.labels - l)) - 1);
        __m512d total = _mm512_setzero_pd(), weight = _mm512_setzero_pd();
        for (std::int64_t m = 0; m < call.members; ++m) {
            const float *row = call.row(m, s);
            const bool votes = !std::isnan(row[0]);
            const __m256 x = _mm256_maskz_loadu_ps(part, row + l);
            // not NaN and below 700 (a log-probability is at most 0; what lies far above goes the slow way)
            const __mmask8 usable = _mm256_mask_cmp_ps_mask(part, x, _mm256_set1_ps(700.0f), _CMP_LT_OQ);
            if (usable != (votes ? part : 0)) return vote_span(call, s, work);
            if (!votes && _mm256_mask_cmp_ps_mask(part, x, x, _CMP_UNORD_Q) != part) return false;
            if (!votes) continue;
            const __m512d w = _mm512_maskz_loadu_pd(part, call.weights + m * call.labels + l);
            heard = heard || _mm512_cmp_pd_mask(w, _mm512_setzero_pd(), _CMP_GT_OQ) != 0;
            weight = _mm512_add_pd(weight, w);
            const __m256 bounded = _mm256_max_ps(x, _mm256_set1_ps(ExpConstants::least));
            total = _mm512_add_pd(total, _mm512_mul_pd(w, exp_avx512(_mm512_cvtps_pd(bounded))));
        }
        const __mmask8 positive = _mm512_cmp_pd_mask(weight, _mm512_setzero_pd(), _CMP_GT_OQ);
        _mm256_storeu_ps(work.score.data() + l, _mm512_cvtpd_ps(_mm512_maskz_div_pd(positive, total, weight)));
    }
    if (heard)
        vote_decide(call, work, s);
    else
        call.nobody(s);
    return true;
}

EL4NER_AVX512 inline bool vote_spans_avx512(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    VoteWork work(call);
    bool good = true;
    for (std::int64_t s = begin; s < end; ++s) good = vote_span_avx512(call, s, work) && good;
    return good;
}

// The same with 4 labels at a time; a span with fewer than 4 labels left is finished in plain C++.
EL4NER_AVX2 inline bool vote_span_avx2(const VoteCall &call, std::int64_t s, VoteWork &work) {
    for (std::int64_t m = 0; m < call.members; ++m) {
        const float *row = call.row(m, s);
        float highest = row[0];
        for (std::int64_t l = 1; l < call.labels; ++l) highest = row[l] > highest ? row[l] : highest;
        if (vote_row_kind(row, call.labels) < 0) return false;
        if (highest > 700.0f) return vote_span(call, s, work);
    }
    bool heard = false;
    for (std::int64_t l = 0; l < call.labels; ++l) work.total[l] = work.weight[l] = 0.0;
    for (std::int64_t m = 0; m < call.members; ++m) {
        const float *row = call.row(m, s);
        if (std::isnan(row[0])) continue;
        const double *w = call.weights + m * call.labels;
        std::int64_t l = 0;
        for (; l + 4 <= call.labels; l += 4) {
            const __m256d weight = _mm256_loadu_pd(w + l);
            const __m256d p = _mm256_mul_pd(weight, exp_avx2(_mm256_cvtps_pd(_mm_loadu_ps(row + l))));
            _mm256_storeu_pd(&work.total[l], _mm256_add_pd(_mm256_loadu_pd(&work.total[l]), p));
            _mm256_storeu_pd(&work.weight[l], _mm256_add_pd(_mm256_loadu_pd(&work.weight[l]), weight));
        }
        for (; l < call.labels; ++l) {
            work.total[l] += w[l] * std::exp(static_cast<double>(row[l]));
            work.weight[l] += w[l];
        }
        for (l = 0; l < call.labels; ++l) heard = heard || w[l] > 0.0;
    }
    if (!heard) {
        call.nobody(s);
        return true;
    }
    for (std::int64_t l = 0; l < call.labels; ++l)
        work.score[l] = work.weight[l] > 0.0 ? static_cast<float>(work.total[l] / work.weight[l]) : 0.0f;
    vote_decide(call, work, s);
    return true;
}

EL4NER_AVX2 inline bool vote_spans_avx2(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    VoteWork work(call);
    bool good = true;
    for (std::int64_t s = begin; s < end; ++s) good = vote_span_avx2(call, s, work) && good;
    return good;
}

}  // namespace el4ner

#include "vote_screened.hpp"
#include "vote_screened_avx2.hpp"
