// What one core can multiply at most, measured with nothing but registers: the ceiling that shares are taken of.
#pragma once

#include <chrono>

#include "instruction_set.hpp"

namespace el4ner {

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if EL4NER_X86
constexpr int kPeakLoops = 200000, kPeakRegisters = 24;

// Floating-point operations of kPeakLoops rounds; the result is handed out so that the loop is not dropped.
EL4NER_AVX512 inline double peak_round_f32(float *out) {
    __m512 sum[kPeakRegisters], x = _mm512_set1_ps(1.0f);
    for (auto &one : sum) one = _mm512_setzero_ps();
    for (int loop = 0; loop < kPeakLoops; ++loop)
#pragma GCC unroll 24
        for (int i = 0; i < kPeakRegisters; ++i) sum[i] = _mm512_fmadd_ps(x, x, sum[i]);
    for (auto &one : sum) *out += _mm512_reduce_add_ps(one);
    return 32.0 * kPeakRegisters * kPeakLoops;
}
EL4NER_AVX512_BF16 inline double peak_round_bf16(float *out) {
    __m512 sum[kPeakRegisters];
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (auto &one : sum) one = _mm512_setzero_ps();
    for (int loop = 0; loop < kPeakLoops; ++loop)
#pragma GCC unroll 24
        for (int i = 0; i < kPeakRegisters; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
    for (auto &one : sum) *out += _mm512_reduce_add_ps(one);
    return 64.0 * kPeakRegisters * kPeakLoops;
}
#if EL4NER_AMX
EL4NER_AMX_TARGET inline double peak_round_amx() {
    tiles_configure();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int loop = 0; loop < kPeakLoops; ++loop) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    tiles_release();
    return 4.0 * 2.0 * 16 * 16 * 32 * kPeakLoops;
}
#endif
#endif

// The fastest of `rounds` short loops in FLOP/s, 0 where this processor has no such instructions.
inline double peak_flops(bool bf16, int rounds) {
    double best = 0.0;
#if EL4NER_X86
    const InstructionSet set = widest_instruction_set();
    if (set < (bf16 ? InstructionSet::avx512_bf16 : InstructionSet::avx512)) return 0.0;
    volatile float kept = 0.0f;
    for (int round = 0; round < rounds; ++round) {
        float out = 0.0f;
        const double start = seconds_now();
        double work = 0.0;
#if EL4NER_AMX
        if (bf16 && set >= InstructionSet::amx) work = peak_round_amx();
#endif
        // numbers in bfloat16 may be multiplied as float32 too, where that is faster
        if (work == 0.0) work = bf16 && round % 2 == 0 ? peak_round_bf16(&out) : peak_round_f32(&out);
        const double speed = work / (seconds_now() - start);
        kept = out;
        best = speed > best ? speed : best;
    }
    (void)kept;
#else
    (void)bf16;
    (void)rounds;
#endif
    return best;
}

}  // namespace el4ner
