// vote for up to 8 members and 16 labels: one register holds a member's row.
//
// Soft: float32 exponentials tell who wins and who is second; where a gap is too small for their error, all labels are
// summed in float64 (vote_span_avx512). Only the winner's and the second's scores are then computed in float64, so what
// is returned does not depend on the screen. Hard: maxima and counts, nothing is approximate.
#pragma once

#include "transpose.hpp"
#include "vote_hard.hpp"
#include "vote_heard.hpp"
#include "vote_x86.hpp"

namespace el4ner {

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

// 16 spans at a time. Their screening scores, and what is computed exactly, are transposed so that a lane is a span:
// then no step waits for a reduction across a register.
struct SpanBlock {
    alignas(64) float score[16][16];  // [span][label]
    alignas(64) float pair[16][16];   // [span][winner's column by member, then the second's]
    alignas(64) std::int32_t winner[16], second[16];
    alignas(16) std::uint8_t heard[16];  // [span], members as bits
    __mmask16 heard_by[8];               // by member: which spans
};

EL4NER_AVX512 inline void transpose_floats(const float (&from)[16][16], __m512 (&to)[16]) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(from[i]);
    transpose_16(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) to[i] = _mm512_castsi512_ps(row[i]);
}

// Screening scores of 16 spans; who is heard. A row that abstains is told by its first number, and minus infinity is
// read in its place, so that abstentions cost next to nothing. false: a score is no number or infinite, since a row must
// be refused or numbers are far above 0. Rows are not checked one by one: comparisons into mask registers would take
// longer than the exponentials.
template <int M>
EL4NER_AVX512 inline bool screen_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                       __mmask16 lanes, SpanBlock &block) {
    const float *rows = call.row(0, first);
    const std::int64_t member = call.spans * call.labels;
    __m512 all = _mm512_setzero_ps();
    for (int j = 0; j < 16; ++j) {
        __m512 sum = _mm512_setzero_ps();
        unsigned heard = 0;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const float *row = rows + m * member + j * call.labels;
            _mm_prefetch(reinterpret_cast<const char *>(row + 16 * call.labels), _MM_HINT_T0);
            const bool votes = begins_with_number(row);
            heard |= static_cast<unsigned>(votes) << m;
            const __m512 x = _mm512_loadu_ps(votes ? row : table.nobody);
            sum = _mm512_fmadd_ps(exp_screen(x), _mm512_loadu_ps(table.screen[m]), sum);
        }
        sum = _mm512_mul_ps(sum, _mm512_loadu_ps(table.heard[heard].inverse));
        all = _mm512_add_ps(all, sum);
        _mm512_store_ps(block.score[j], sum);
        block.heard[j] = static_cast<std::uint8_t>(heard);
    }
    const __m512i sets = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i *>(block.heard)));
    for (int m = 0; m < M; ++m) block.heard_by[m] = _mm512_test_epi32_mask(sets, _mm512_set1_epi32(1 << m));
    const __m512 top = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    return _mm512_mask_cmp_ps_mask(lanes, all, top, _CMP_LT_OQ) == lanes;
}

// Winner and second of 16 spans from their screening scores; the mask says for which spans these are certain. Labels are
// written into the lowest 4 bits of the scores, which changes them by 2e-6 at most: then they need not be selected.
EL4NER_AVX512 inline __mmask16 choose_block(int labels, SpanBlock &block) {
    __m512 column[16];
    transpose_floats(block.score, column);
    __m512 best = _mm512_set1_ps(-1.0f), second = best, third = best;
    const __m512i lowest = _mm512_set1_epi32(15);
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) {
        if (l >= labels) break;
        // bits of `lowest` from the label, the others from the score
        const __m512i bits =
            _mm512_ternarylogic_epi32(lowest, _mm512_castps_si512(column[l]), _mm512_set1_epi32(l), 0xac);
        const __m512 score = _mm512_castsi512_ps(bits);
        third = _mm512_max_ps(third, _mm512_min_ps(score, second));
        second = _mm512_max_ps(second, _mm512_min_ps(score, best));
        best = _mm512_max_ps(best, score);
    }
    _mm512_store_si512(block.winner, _mm512_and_si512(lowest, _mm512_castps_si512(best)));
    _mm512_store_si512(block.second, _mm512_and_si512(lowest, _mm512_castps_si512(second)));
    // Relative errors: 2e-5 of the exponentials, 2e-6 of the labels, 10 roundings of 6e-8 in weights, sums, quotient. Two
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
        const auto heard = static_cast<__mmask8>(block.heard_by[m] >> (8 * half));
        const __m512d w = Everybody ? take_16(table.by_member[m], index) : take_16(heard, table.by_member[m], index);
        total = _mm512_add_pd(total, _mm512_mul_pd(w, exp_avx512(_mm512_cvtps_pd(x))));
        if (!Everybody) weight = _mm512_add_pd(weight, w);
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

template <int M>
inline bool everybody_heard(const std::uint8_t *heard) {
    std::uint64_t part[2];
    std::memcpy(part, heard, sizeof part);
    return (part[0] & part[1]) == ((std::uint64_t{1} << M) - 1) * 0x0101010101010101u;
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
    if (!screen_block<M>(call, table, first, lanes, block)) {
        bool good = true;
        for (int j = 0; j < 16; ++j) good = vote_span_avx512(call, first + j, work) && good;
        return good;
    }
    if (everybody_heard<M>(block.heard)) {
        decide_block<M, true>(call, table, first, block, work);
        return true;
    }
    decide_block<M, false>(call, table, first, block, work);
    return silent_rows_are_nan(call, first, block.heard, 16);
}

template <int M>
EL4NER_AVX512 inline bool vote_block(const VoteCall &call, const HeardWeights &table, std::int64_t first,
                                     __mmask16 lanes, SpanBlock &block, VoteWork &work) {
    return call.hard ? hard_block<M>(call, table, first) : soft_block<M>(call, table, first, lanes, block, work);
}

template <int M>
EL4NER_AVX512 inline bool vote_spans_of(const VoteCall &call, const HeardWeights &table, std::int64_t begin,
                                        std::int64_t end) {
    VoteWork work(call);
    SpanBlock block;
    const auto lanes = static_cast<__mmask16>((1u << call.labels) - 1);
    bool good = true;
    std::int64_t s = begin;
    for (const std::int64_t whole = whole_blocks<16>(call, begin, end); s < whole; s += 16)
        good = vote_block<M>(call, table, s, lanes, block, work) && good;
    for (; s < end; s += 16) {
        LastSpans<16> last(call, s, end);
        good = vote_block<M>(last.call, table, 0, lanes, block, work) && good;
        last.store(call);
    }
    return good;
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
