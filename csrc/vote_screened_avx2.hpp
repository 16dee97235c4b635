// vote for up to 8 members and 16 labels in AVX2: the design of vote_screened.hpp, 8 spans at a time in registers of 8.
#pragma once

#include "transpose.hpp"
#include "vote_heard.hpp"
#include "vote_x86.hpp"

namespace el4ner {

// exp in float32, relative error below 1e-5 for -87 < x < 88; 0 below -88, infinite above 89, NaN for NaN.
EL4NER_AVX2 inline __m256 exp_screen_avx2(__m256 x) {
    // of two numbers min and max return the second if one is NaN
    x = _mm256_max_ps(_mm256_set1_ps(-88.0f), _mm256_min_ps(_mm256_set1_ps(89.0f), x));
    const __m256 log2e = _mm256_set1_ps(1.44269504f);
    const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);  // 1.5 * 2^23 rounds; 127 is the exponent's bias
    const __m256 shifted = _mm256_fmadd_ps(x, log2e, magic);
    const __m256 f = _mm256_fmsub_ps(x, log2e, _mm256_sub_ps(shifted, magic));
    // 2^f for -1/2 <= f <= 1/2: best polynomial of the 4th degree, off by at most 3e-6
    __m256 p = _mm256_set1_ps(0.009666368515385448f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.05592197584225585f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.2402234903802036f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.6931210452034271f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    // The low bits of `shifted`, 0 to 255, are a power's exponent. A product, not a sum of bits, keeps NaN what it is.
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

// exp in float64 for -700 <= x <= 700: x = n ln2 + r, |r| <= ln2 / 2; best polynomial of degree 11, off by 3.2e-18.
EL4NER_AVX2 inline __m256d exp_near_avx2(__m256d x) {
    using C = ExpConstants;
    constexpr double best[12] = {1.0,
                                 1.0,
                                 0.5000000000000019,
                                 0.1666666666666668,
                                 0.04166666666648795,
                                 0.008333333333319589,
                                 0.0013888888952352863,
                                 0.00019841269890076403,
                                 2.4801485441561313e-05,
                                 2.755724088722987e-06,
                                 2.763265472252779e-07,
                                 2.5110049204818658e-08};
    const __m256d shifted = _mm256_fmadd_pd(x, _mm256_set1_pd(C::log2e), _mm256_set1_pd(C::magic));
    const __m256d n = _mm256_sub_pd(shifted, _mm256_set1_pd(C::magic));
    __m256d r = _mm256_fnmadd_pd(n, _mm256_set1_pd(C::ln2_high), x);
    r = _mm256_fnmadd_pd(n, _mm256_set1_pd(C::ln2_low), r);
    __m256d p = _mm256_set1_pd(best[11]);
#pragma GCC unroll 11
    for (int i = 10; i >= 0; --i) p = _mm256_fmadd_pd(p, r, _mm256_set1_pd(best[i]));
    const __m256i power = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);  // n in the exponent's place
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), power));
}

// 8 numbers or masks of 32 bits, widened to 4 and 4 of 64.
EL4NER_AVX2 inline __m256i half_of(__m256i numbers, int half) {
    return _mm256_cvtepi32_epi64(half == 0 ? _mm256_castsi256_si128(numbers) : _mm256_extracti128_si256(numbers, 1));
}

EL4NER_AVX2 inline __m256 join_halves(__m256d low, __m256d high) {
    return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
}

// Two masks of 4 and 4 doubles as one of 8 floats.
EL4NER_AVX2 inline __m256 join_masks(__m256d low, __m256d high) {
    const __m256 both = _mm256_shuffle_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high), 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xd8));
}

struct SpanEight {
    alignas(32) float score[2][8][8];  // [half of the labels][span][label]
    alignas(32) std::int32_t winner[8], second[8];
    alignas(8) std::uint8_t heard[8];  // [span], members as bits
};

EL4NER_AVX2 inline void store_eight(const VoteCall &call, std::int64_t first, __m256i winner, __m256 score,
                                    __m256 margin) {
    auto *winners = reinterpret_cast<__m256i *>(call.winners + first);
    _mm256_storeu_si256(winners, half_of(winner, 0));
    _mm256_storeu_si256(winners + 1, half_of(winner, 1));
    _mm256_storeu_ps(call.scores + first, score);
    _mm256_storeu_ps(call.margins + first, margin);
}

// Screening scores of 8 spans; who is heard. Halves: 1 for up to 8 labels, 2 for more. false: as in vote_screened.hpp.
template <int Halves>
EL4NER_AVX2 inline bool screen_eight(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                     SpanEight &block) {
    const float *rows = call.row(0, first);
    const std::int64_t member = call.spans * call.labels;
    __m256 all[Halves], sum[Halves];
    for (int h = 0; h < Halves; ++h) all[h] = _mm256_setzero_ps();
    for (int j = 0; j < 8; ++j) {
        for (int h = 0; h < Halves; ++h) sum[h] = _mm256_setzero_ps();
        unsigned heard = 0;
        const float *row = rows + j * call.labels;
        for (int m = 0; m < call.members; ++m, row += member) {
            _mm_prefetch(reinterpret_cast<const char *>(row + 16 * call.labels), _MM_HINT_T0);
            const bool votes = begins_with_number(row);
            heard |= static_cast<unsigned>(votes) << m;
            const float *from = votes ? row : table.nobody;
#pragma GCC unroll 2
            for (int h = 0; h < Halves; ++h) {
                const __m256 p = exp_screen_avx2(_mm256_loadu_ps(from + 8 * h));
                sum[h] = _mm256_fmadd_ps(p, _mm256_loadu_ps(table.screen[m] + 8 * h), sum[h]);
            }
        }
        block.heard[j] = static_cast<std::uint8_t>(heard);
        for (int h = 0; h < Halves; ++h) {
            sum[h] = _mm256_mul_ps(sum[h], _mm256_loadu_ps(table.heard[heard].inverse + 8 * h));
            all[h] = _mm256_add_ps(all[h], sum[h]);
            _mm256_store_ps(block.score[h][j], sum[h]);
        }
    }
    unsigned finite = 0;
    const __m256 top = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    for (int h = 0; h < Halves; ++h)
        finite |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(all[h], top, _CMP_LT_OQ))) << (8 * h);
    const unsigned lanes = (1u << call.labels) - 1;
    return (finite & lanes) == lanes;
}

// Winner and second of 8 spans from their screening scores; the bits say for which spans these are certain. Labels are
// written into the lowest 4 bits of the scores, which changes them by 2e-6 at most: then they need not be selected.
template <int Halves>
EL4NER_AVX2 inline unsigned choose_eight(std::int64_t labels, SpanEight &block) {
    __m256 best = _mm256_set1_ps(-1.0f), second = best, third = best;
    for (int h = 0; h < Halves; ++h) {
        __m256 column[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) column[j] = _mm256_load_ps(block.score[h][j]);
        transpose_8(column);
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) {
            if (8 * h + l >= labels) break;
            __m256i bits = _mm256_and_si256(_mm256_castps_si256(column[l]), _mm256_set1_epi32(~15));
            bits = _mm256_or_si256(bits, _mm256_set1_epi32(8 * h + l));
            const __m256 score = _mm256_castsi256_ps(bits);
            third = _mm256_max_ps(third, _mm256_min_ps(score, second));
            second = _mm256_max_ps(second, _mm256_min_ps(score, best));
            best = _mm256_max_ps(best, score);
        }
    }
    const __m256i label = _mm256_set1_epi32(15);
    _mm256_store_si256(reinterpret_cast<__m256i *>(block.winner), _mm256_and_si256(_mm256_castps_si256(best), label));
    _mm256_store_si256(reinterpret_cast<__m256i *>(block.second), _mm256_and_si256(_mm256_castps_si256(second), label));
    // The distances of vote_screened.hpp's choose_block, for the reasons given there.
    const __m256 nearly = _mm256_set1_ps(0.9999f), least = _mm256_set1_ps(1e-30f), most = _mm256_set1_ps(1e30f);
    __m256 certain = _mm256_cmp_ps(_mm256_mul_ps(best, nearly), second, _CMP_GT_OQ);
    certain = _mm256_and_ps(certain, _mm256_cmp_ps(best, least, _CMP_GT_OQ));
    certain = _mm256_and_ps(certain, _mm256_cmp_ps(best, most, _CMP_LT_OQ));
    if (labels > 1) certain = _mm256_and_ps(certain, _mm256_cmp_ps(second, least, _CMP_GT_OQ));
    if (labels > 2)
        certain = _mm256_and_ps(certain, _mm256_cmp_ps(_mm256_mul_ps(second, nearly), third, _CMP_GT_OQ));
    return static_cast<unsigned>(_mm256_movemask_ps(certain));
}

// For 4 spans, the sum of the weights heard for a label each.
EL4NER_AVX2 inline __m256d weights_heard(const HeardWeights &table, const std::uint8_t *heard,
                                         const std::int32_t *label) {
    return _mm256_set_pd(table.heard[heard[3]].weight[label[3]], table.heard[heard[2]].weight[label[2]],
                         table.heard[heard[1]].weight[label[1]], table.heard[heard[0]].weight[label[0]]);
}

EL4NER_AVX2 inline __m256d weights_of(const double *weight, const std::int32_t *label) {
    return _mm256_set_pd(weight[label[3]], weight[label[2]], weight[label[1]], weight[label[0]]);
}

// Weighted float64 sums over members, in order, of 4 spans' winners and seconds, divided by the weights heard.
EL4NER_AVX2 inline void exact_four(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                   const SpanEight &block, int half, __m256d (&score)[2]) {
    const std::int32_t *label[2] = {block.winner + 4 * half, block.second + 4 * half};
    const float *rows = call.row(0, first + 4 * half);
    const std::int64_t member = call.spans * call.labels;
    __m256d total[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (int m = 0; m < call.members; ++m, rows += member)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            const __m128 x =
                _mm_set_ps(rows[3 * call.labels + label[c][3]], rows[2 * call.labels + label[c][2]],
                           rows[call.labels + label[c][1]], rows[label[c][0]]);
            const __m256d heard = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm_castps_si128(_mm_cmpord_ps(x, x))));
            const __m256d w = _mm256_and_pd(weights_of(table.by_member[m], label[c]), heard);
            const __m128 bounded = _mm_max_ps(x, _mm_set1_ps(ExpConstants::least));  // the latter for NaN
            total[c] = _mm256_add_pd(total[c], _mm256_mul_pd(w, exp_near_avx2(_mm256_cvtps_pd(bounded))));
        }
    for (int c = 0; c < 2; ++c)
        score[c] = _mm256_div_pd(total[c], weights_heard(table, block.heard + 4 * half, label[c]));
}

// 8 spans of a soft vote. false: a row must be refused.
template <int Halves>
EL4NER_AVX2 inline bool soft_eight(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                   SpanEight &block, VoteWork &work) {
    if (!screen_eight<Halves>(call, table, first, block)) {
        bool good = true;
        for (int j = 0; j < 8; ++j) good = vote_span_avx2(call, first + j, work) && good;
        return good;
    }
    const unsigned certain = choose_eight<Halves>(call.labels, block);
    __m256d low[2], high[2];
    exact_four(call, table, first, block, 0, low);
    exact_four(call, table, first, block, 1, high);
    const __m256 best = join_halves(low[0], high[0]), second = join_halves(low[1], high[1]);
    const __m256i winner = _mm256_load_si256(reinterpret_cast<const __m256i *>(block.winner));
    store_eight(call, first, winner, best, call.labels > 1 ? _mm256_sub_ps(best, second) : best);
    for (unsigned left = ~certain & 0xff; left != 0; left &= left - 1) {
        const int j = __builtin_ctz(left);
        if (table.heard[block.heard[j]].anyone)
            vote_span_avx2(call, first + j, work);
        else
            call.nobody(first + j);
    }
    return silent_rows_are_nan(call, first, block.heard, 8);
}

// What a member says on 8 spans of a hard vote, a lane for each.
struct ChoicesOfEight {
    alignas(32) std::int32_t label[8];  // the lowest if several are best
    __m256 heard;                       // as a mask
    bool good;                          // whether no row is partly NaN or holds +infinity
};

EL4NER_AVX2 inline void best_labels(const float *rows, std::int64_t labels, ChoicesOfEight &out) {
    __m256 highest = _mm256_setzero_ps();
    __m256 heard = _mm256_castsi256_ps(_mm256_set1_epi32(-1)), silent = heard;
    __m256i label = _mm256_setzero_si256();
    for (int h = 0; 8 * h < labels; ++h) {
        __m256 column[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) column[j] = _mm256_loadu_ps(rows + j * labels + 8 * h);
        transpose_8(column);
        if (h == 0) highest = column[0];
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) {
            if (8 * h + l >= labels) break;
            const __m256 leads = _mm256_cmp_ps(column[l], highest, _CMP_GT_OQ);
            label = _mm256_blendv_epi8(label, _mm256_set1_epi32(8 * h + l), _mm256_castps_si256(leads));
            highest = _mm256_max_ps(highest, column[l]);
            const __m256 number = _mm256_cmp_ps(column[l], column[l], _CMP_ORD_Q);
            heard = _mm256_and_ps(heard, number);
            silent = _mm256_andnot_ps(number, silent);
        }
    }
    const __m256 top = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    out.heard = _mm256_and_ps(heard, _mm256_cmp_ps(highest, top, _CMP_LT_OQ));
    out.good = _mm256_movemask_ps(_mm256_or_ps(out.heard, silent)) == 0xff;
    _mm256_store_si256(reinterpret_cast<__m256i *>(out.label), label);
}

// Weights of the members for their own labels, and the sums over all who vote for these, members in order.
struct CountsOfEight {
    __m256d weight[8][2], total[8][2];  // [member][half of the spans]
};

EL4NER_AVX2 inline void count_eight(const VoteCall &call, const HeardWeights &table, const ChoicesOfEight (&said)[8],
                                    CountsOfEight &counts) {
    for (int b = 0; b < call.members; ++b) {
        const __m256i label = _mm256_load_si256(reinterpret_cast<const __m256i *>(said[b].label));
        __m256d own[2], sum[2];
        for (int half = 0; half < 2; ++half) {
            const __m256d heard = _mm256_castsi256_pd(half_of(_mm256_castps_si256(said[b].heard), half));
            own[half] = _mm256_and_pd(weights_of(table.by_member[b], said[b].label + 4 * half), heard);
            sum[half] = _mm256_setzero_pd();
        }
        for (int a = 0; a < b; ++a) {
            const __m256i other = _mm256_load_si256(reinterpret_cast<const __m256i *>(said[a].label));
            const __m256i same = _mm256_cmpeq_epi32(label, other);
            for (int half = 0; half < 2; ++half) {
                const __m256d part = _mm256_castsi256_pd(half_of(same, half));
                sum[half] = _mm256_add_pd(sum[half], _mm256_and_pd(part, counts.weight[a][half]));
                counts.total[a][half] = _mm256_add_pd(counts.total[a][half], _mm256_and_pd(part, own[half]));
            }
        }
        for (int half = 0; half < 2; ++half) {
            counts.weight[b][half] = own[half];
            counts.total[b][half] = _mm256_add_pd(sum[half], own[half]);
        }
    }
}

// 8 spans of a hard vote, as hard_block of vote_hard.hpp does it. false: a row must be refused.
EL4NER_AVX2 inline bool hard_eight(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                   SpanEight &block) {
    ChoicesOfEight said[8];
    CountsOfEight counts;
    const auto members = static_cast<int>(call.members);
    __m256i sets = _mm256_setzero_si256();
    __m256 anyone = _mm256_setzero_ps();
    bool good = true;
    for (int m = 0; m < members; ++m) {
        best_labels(call.row(m, first), call.labels, said[m]);
        good = good && said[m].good;
        const __m256i bit = _mm256_set1_epi32(1 << m);
        sets = _mm256_or_si256(sets, _mm256_and_si256(bit, _mm256_castps_si256(said[m].heard)));
        if (table.heard[std::size_t{1} << m].anyone) anyone = _mm256_or_ps(anyone, said[m].heard);
        for (int j = 8 * m / members; j < 8 * (m + 1) / members; ++j)
            for (int n = 0; n < members; ++n)
                _mm_prefetch(reinterpret_cast<const char *>(call.row(n, first + 16 + j)), _MM_HINT_T0);
    }
    alignas(32) std::int32_t heard[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(heard), sets);
    for (int j = 0; j < 8; ++j) block.heard[j] = static_cast<std::uint8_t>(heard[j]);
    count_eight(call, table, said, counts);
    __m256 score[8], best = _mm256_setzero_ps(), second = best;
    __m256i winner = _mm256_setzero_si256();
    for (int m = 0; m < members; ++m) {
        __m256d part[2], weighty[2];
        for (int half = 0; half < 2; ++half) {
            const __m256d zero = _mm256_setzero_pd();
            const __m256d all = weights_heard(table, block.heard + 4 * half, said[m].label + 4 * half);
            const __m256d positive = _mm256_cmp_pd(all, zero, _CMP_GT_OQ);
            part[half] = _mm256_and_pd(positive, _mm256_div_pd(counts.total[m][half], all));
            weighty[half] = _mm256_cmp_pd(counts.weight[m][half], zero, _CMP_GT_OQ);
        }
        score[m] = join_halves(part[0], part[1]);
        const __m256 ahead = _mm256_cmp_ps(score[m], best, _CMP_GT_OQ);
        const __m256 leads = _mm256_and_ps(join_masks(weighty[0], weighty[1]), ahead);
        const __m256i label = _mm256_load_si256(reinterpret_cast<const __m256i *>(said[m].label));
        best = _mm256_blendv_ps(best, score[m], leads);
        winner = _mm256_blendv_epi8(winner, label, _mm256_castps_si256(leads));
    }
    for (int m = 0; m < members; ++m) {
        const __m256i label = _mm256_load_si256(reinterpret_cast<const __m256i *>(said[m].label));
        const __m256 same = _mm256_castsi256_ps(_mm256_cmpeq_epi32(label, winner));
        second = _mm256_max_ps(second, _mm256_andnot_ps(same, score[m]));
    }
    winner = _mm256_blendv_epi8(_mm256_set1_epi32(-1), winner, _mm256_castps_si256(anyone));
    store_eight(call, first, winner, best, _mm256_sub_ps(best, second));
    return good;
}

EL4NER_AVX2 inline bool vote_eight(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                   SpanEight &block, VoteWork &work) {
    if (call.hard) return hard_eight(call, table, first, block);
    return call.labels > 8 ? soft_eight<2>(call, table, first, block, work)
                           : soft_eight<1>(call, table, first, block, work);
}

// Spans begin to end of a call with up to 8 members and 1 to 16 labels.
EL4NER_AVX2 inline bool vote_spans_screened_avx2(const VoteCall &call, std::int64_t begin, std::int64_t end) {
    const HeardWeights table(call);
    if (!table.usable || call.members == 0) return vote_spans(call, begin, end);
    VoteWork work(call);
    SpanEight block;
    bool good = true;
    std::int64_t s = begin;
    for (const std::int64_t whole = whole_blocks<8>(call, begin, end); s < whole; s += 8)
        good = vote_eight(call, table, s, block, work) && good;
    for (; s < end; s += 8) {
        LastSpans<8> last(call, s, end);
        good = vote_eight(last.call, table, 0, block, work) && good;
        last.store(call);
    }
    return good;
}

}  // namespace el4ner
