// Hard votes for up to 8 members and 16 labels in AVX-512: maxima and counts, nothing is approximate.
#pragma once

#include "transpose.hpp"
#include "vote_heard.hpp"
#include "vote_x86.hpp"

namespace el4ner {

// Fetches a span's rows ahead. In this order, span by span, the processor's own prefetching follows all members.
template <int M>
EL4NER_AVX512 inline void prefetch_span(const VoteCall &call, std::int64_t s) {
    for (int m = 0; m < M; ++m) _mm_prefetch(reinterpret_cast<const char *>(call.row(m, s)), _MM_HINT_T0);
}

EL4NER_AVX512 inline void store_block(const VoteCall &call, std::int64_t first, __m512i winner, __m512 score,
                                      __m512 margin) {
    _mm512_storeu_si512(call.winners + first, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(winner)));
    _mm512_storeu_si512(call.winners + first + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(winner, 1)));
    _mm512_storeu_ps(call.scores + first, score);
    _mm512_storeu_ps(call.margins + first, margin);
}

// What a member says on 16 spans, a lane for each: the label it votes for (the lowest if several are best), and where
// it is heard.
struct Choices {
    __m512i label;
    __mmask16 heard;
    bool good;  // whether no row is partly NaN or holds +infinity
};

EL4NER_AVX512 inline Choices best_labels(const float *rows, std::int64_t labels) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) row[j] = _mm512_loadu_si512(rows + j * labels);
    transpose_16(row);
    __m512 highest = _mm512_castsi512_ps(row[0]);
    Choices out{_mm512_setzero_si512(), _mm512_cmp_ps_mask(highest, highest, _CMP_ORD_Q), true};
#pragma GCC unroll 16
    for (int l = 1; l < 16; ++l) {
        if (l >= labels) break;
        const __m512 column = _mm512_castsi512_ps(row[l]);
        out.label =
            _mm512_mask_mov_epi32(out.label, _mm512_cmp_ps_mask(column, highest, _CMP_GT_OQ), _mm512_set1_epi32(l));
        highest = _mm512_max_ps(highest, column);
        if (l % 2 == 1 || l + 1 == labels)  // one comparison for two columns
            out.heard &= _mm512_cmp_ps_mask(column, _mm512_castsi512_ps(row[l - 1]), _CMP_ORD_Q);
    }
    const __m512 top = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    out.heard &= _mm512_cmp_ps_mask(highest, top, _CMP_LT_OQ);
    if (out.heard == 0xffff) return out;
    auto silent = static_cast<__mmask16>(~out.heard);
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) {
        if (l >= labels) break;
        const __m512 column = _mm512_castsi512_ps(row[l]);
        silent = _mm512_mask_cmp_ps_mask(silent, column, column, _CMP_UNORD_Q);
    }
    out.good = (out.heard | silent) == 0xffff;
    return out;
}

// 8 of 16 numbers, widened.
EL4NER_AVX512 inline __m512i half_of(__m512i numbers, int half) {
    return _mm512_cvtepi32_epi64(half == 0 ? _mm512_castsi512_si256(numbers) : _mm512_extracti64x4_epi64(numbers, 1));
}

// The sum over the heard members of their weights for 8 spans' labels, members in order.
template <int M>
EL4NER_AVX512 inline __m512d weight_heard(const HeardWeights &table, const Choices (&said)[M], __m512i label,
                                          int half) {
    __m512d sum = _mm512_setzero_pd();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const auto heard = static_cast<__mmask8>(said[m].heard >> (8 * half));
        sum = _mm512_add_pd(sum, take_16(heard, table.by_member[m], label));
    }
    return sum;
}

// 16 spans of a hard vote, a lane for each. A label that nobody votes for scores 0, so only the members' own labels are
// counted: at most one for each member. Who abstains has weight 0.
template <int M, bool Everybody>
EL4NER_AVX512 inline void count_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                      const Choices (&said)[M]) {
    __m512d weight[M][2], total[M][2];  // [member][half]: its weight for its label; the sum of all who vote for that
#pragma GCC unroll 8
    for (int b = 0; b < M; ++b) {
        for (int half = 0; half < 2; ++half) {
            const __m512i label = half_of(said[b].label, half);
            const auto heard = static_cast<__mmask8>(said[b].heard >> (8 * half));
            weight[b][half] = take_16(Everybody ? 0xff : heard, table.by_member[b], label);
            total[b][half] = _mm512_setzero_pd();
        }
        // members in order: those before b are added to b's label, then b itself, and b to the labels before
#pragma GCC unroll 8
        for (int a = 0; a < b; ++a) {
            const __mmask16 same = _mm512_cmpeq_epi32_mask(said[a].label, said[b].label);
            for (int half = 0; half < 2; ++half) {
                const auto part = static_cast<__mmask8>(same >> (8 * half));
                total[b][half] = _mm512_mask_add_pd(total[b][half], part, total[b][half], weight[a][half]);
                total[a][half] = _mm512_mask_add_pd(total[a][half], part, total[a][half], weight[b][half]);
            }
        }
        for (int half = 0; half < 2; ++half) total[b][half] = _mm512_add_pd(total[b][half], weight[b][half]);
    }
    const double *everybody = table.heard[(std::size_t{1} << M) - 1].weight;
    const __m512d zero = _mm512_setzero_pd();
    __m512 score[M];
    // Whoever is first with the highest score decides, if not with weight 0; without any weight all tie at 0: label 0.
    __m512 best = _mm512_setzero_ps(), second = best;
    __m512i winner = _mm512_setzero_si512();
    unsigned anyone = 0;  // the spans on which somebody is heard who has a weight
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        __m256 part[2];
        __mmask16 weighty = 0;
        for (int half = 0; half < 2; ++half) {
            const __m512i label = half_of(said[m].label, half);
            const __m512d all = Everybody ? take_16(everybody, label) : weight_heard<M>(table, said, label, half);
            const __mmask8 positive = _mm512_cmp_pd_mask(all, zero, _CMP_GT_OQ);
            part[half] = _mm512_cvtpd_ps(_mm512_maskz_div_pd(positive, total[m][half], all));
            const __mmask8 counts = _mm512_cmp_pd_mask(weight[m][half], zero, _CMP_GT_OQ);
            weighty = static_cast<__mmask16>(weighty | counts << (8 * half));
        }
        score[m] = _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
        const __mmask16 leads = _mm512_mask_cmp_ps_mask(weighty, score[m], best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, leads, score[m]);
        winner = _mm512_mask_mov_epi32(winner, leads, said[m].label);
        if (table.heard[std::size_t{1} << m].anyone) anyone |= said[m].heard;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __mmask16 other = _mm512_cmpneq_epi32_mask(said[m].label, winner);
        second = _mm512_mask_max_ps(second, other, second, score[m]);
    }
    winner = _mm512_mask_mov_epi32(_mm512_set1_epi32(-1), static_cast<__mmask16>(anyone), winner);
    store_block(call, first, winner, best, _mm512_sub_ps(best, second));
}

// false: a row must be refused.
template <int M>
EL4NER_AVX512 inline bool hard_block(const VoteCall &call, const HeardWeights &table, std::int64_t first) {
    Choices said[M];
    unsigned heard = 0xffff;
    bool good = true;
    for (int m = 0; m < M; ++m) {
        said[m] = best_labels(call.row(m, first), call.labels);
        heard &= said[m].heard;
        good = good && said[m].good;
        for (int j = 16 * m / M; j < 16 * (m + 1) / M; ++j) prefetch_span<M>(call, first + 16 + j);
    }
    if (heard == 0xffff)
        count_block<M, true>(call, table, first, said);
    else
        count_block<M, false>(call, table, first, said);
    return good;
}

}  // namespace el4ner
