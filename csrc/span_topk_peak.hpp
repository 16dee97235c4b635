// span_topk, measuring: what one core can do at most, for the share of it that a benchmark reports.
#pragma once

#include <chrono>

#include "span_topk_pack.hpp"

namespace el4ner::topk {

#if EL4NER_X86
// Twelve independent chains: more than latency times throughput of any x86 core so far.
#define EL4NER_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

EL4NER_AVX2 inline void peak_fp32_avx2(std::int64_t rounds) {
    const __m256 x = _mm256_set1_ps(1.0f), y = _mm256_set1_ps(1e-9f);
#define X(i) __m256 a##i = x;
    EL4NER_CHAINS(X)
#undef X
    for (std::int64_t n = 0; n < rounds; ++n) {
#define X(i)                             \
    a##i = _mm256_fmadd_ps(x, y, a##i);  \
    asm volatile("" : "+x"(a##i));
        EL4NER_CHAINS(X)
#undef X
    }
}
EL4NER_AVX512 inline void peak_fp32_avx512(std::int64_t rounds) {
    const __m512 x = _mm512_set1_ps(1.0f), y = _mm512_set1_ps(1e-9f);
#define X(i) __m512 a##i = x;
    EL4NER_CHAINS(X)
#undef X
    for (std::int64_t n = 0; n < rounds; ++n) {
#define X(i)                             \
    a##i = _mm512_fmadd_ps(x, y, a##i);  \
    asm volatile("" : "+v"(a##i));
        EL4NER_CHAINS(X)
#undef X
    }
}
EL4NER_BF16 inline void peak_bf16_avx512(std::int64_t rounds) {
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80), y = x;
#define X(i) __m512 a##i = _mm512_setzero_ps();
    EL4NER_CHAINS(X)
#undef X
    for (std::int64_t n = 0; n < rounds; ++n) {
#define X(i)                              \
    a##i = _mm512_dpbf16_ps(a##i, x, y);  \
    asm volatile("" : "+v"(a##i));
        EL4NER_CHAINS(X)
#undef X
    }
}
EL4NER_VNNI inline void peak_int8_avx512(std::int64_t rounds) {
    const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(1);
#define X(i) __m512i a##i = x;
    EL4NER_CHAINS(X)
#undef X
    for (std::int64_t n = 0; n < rounds; ++n) {
#define X(i)                                 \
    a##i = _mm512_dpbusd_epi32(a##i, x, y);  \
    asm volatile("" : "+v"(a##i));
        EL4NER_CHAINS(X)
#undef X
    }
}
EL4NER_AVX2 inline void peak_int8_avx2(std::int64_t rounds) {
    const __m256i x = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
#define X(i) __m256i a##i = x;
    EL4NER_CHAINS(X)
#undef X
    for (std::int64_t n = 0; n < rounds; ++n) {
#define X(i)                                                                            \
    {                                                                                   \
        __m256i t = _mm256_maddubs_epi16(x, a##i);                                      \
        asm volatile("" : "+x"(t));                                                     \
        a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(t, ones));                      \
        asm volatile("" : "+x"(a##i));                                                  \
    }
        EL4NER_CHAINS(X)
#undef X
    }
}
#if EL4NER_AMX
EL4NER_AMX_TARGET inline void peak_amx(std::int64_t rounds, bool bytes) {
    tiles_configure();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (std::int64_t n = 0; n < rounds; ++n)
        if (bytes) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    tiles_release();
}
#endif
#endif

// loop(rounds), each round so many products and sums: 10^9 operations (two a product) a second, the best of some runs.
template <typename Loop>
double fastest_gops(const Loop &loop, double products) {
    constexpr std::int64_t rounds = 400000;
    double best = 0.0;
    for (int run = 0; run < 12; ++run) {
        const auto begin = std::chrono::steady_clock::now();
        loop(rounds);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        best = std::max(best, 2.0 * products * static_cast<double>(rounds) / seconds * 1e-9);
    }
    return best;
}

// 10^9 operations (a product and a sum are two) per second of one thread; 0 where unknown.
inline double peak_gops(Precision precision, Isa isa) {
#if EL4NER_X86
    if (isa == Isa::portable || !cpu_has(isa, precision)) return 0.0;
#if EL4NER_AMX
    const auto amx = [=](std::int64_t rounds) { peak_amx(rounds, precision == Precision::int8); };
    if (isa == Isa::amx) return fastest_gops(amx, 4.0 * 16.0 * 16.0 * 16.0 * static_cast<double>(numbers_per_unit(precision)));
#endif
    void (*loop)(std::int64_t) = isa == Isa::avx2 ? (precision == Precision::fp32 ? peak_fp32_avx2 : peak_int8_avx2)
                                 : precision == Precision::fp32 ? peak_fp32_avx512
                                 : precision == Precision::bf16 ? peak_bf16_avx512
                                                                : peak_int8_avx512;
    const double numbers = (isa == Isa::avx2 ? 8.0 : 16.0) * static_cast<double>(numbers_per_unit(precision));
    return fastest_gops(loop, 12.0 * numbers);
#else
    (void)precision, (void)isa;
    return 0.0;
#endif
}

}  // namespace el4ner::topk
