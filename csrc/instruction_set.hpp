// Which instruction sets this processor has, and the switch that tests use to try the others.
#pragma once

#include <cstdlib>
#include <cstring>

#include "amx.hpp"

#ifdef EL4NER_X86
#error "span_topk_tiles.hpp has macros of these names with other targets: keep the two in files compiled apart"
#endif
// Function-level targets and intrinsics as GCC and Clang know them; elsewhere only the portable code is compiled.
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__amd64__))
#define EL4NER_X86 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics leave registers undefined on purpose and are warned about where they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define EL4NER_AVX2 __attribute__((target("avx2,fma")))
#define EL4NER_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define EL4NER_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#else
#define EL4NER_X86 0
#endif

namespace el4ner {

enum class InstructionSet { portable, avx2, avx512, avx512_bf16, amx };

inline InstructionSet widest_instruction_set() {
#if EL4NER_X86
    static const InstructionSet widest = [] {
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
        if (bf16) return amx_granted() ? InstructionSet::amx : InstructionSet::avx512_bf16;
        return avx512 ? InstructionSet::avx512 : avx2 ? InstructionSet::avx2 : InstructionSet::portable;
    }();
    return widest;
#else
    return InstructionSet::portable;
#endif
}

// The set to use: the widest, or a narrower one that EL4NER_ISA names (portable, avx2, avx512, avx512_bf16); read at every call.
inline InstructionSet instruction_set() {
    const InstructionSet widest = widest_instruction_set();
    const char *asked = std::getenv("EL4NER_ISA");
    if (asked == nullptr) return widest;
    InstructionSet limit = widest;
    if (std::strcmp(asked, "portable") == 0) limit = InstructionSet::portable;
    if (std::strcmp(asked, "avx2") == 0) limit = InstructionSet::avx2;
    if (std::strcmp(asked, "avx512") == 0) limit = InstructionSet::avx512;
    if (std::strcmp(asked, "avx512_bf16") == 0) limit = InstructionSet::avx512_bf16;
    return limit < widest ? limit : widest;
}

// Whether vector products of bfloat16 are faster than the same as float32. A Xeon's core gave 83 GFLOP/s in bfloat16 and
// 169 in float32 (its fast unit is AMX), an AMD core of the Zen 4 generation 234 and 117. Who asks for avx512_bf16
// by name gets it.
inline bool bf16_products_pay() {
#if EL4NER_X86
    const char *asked = std::getenv("EL4NER_ISA");
    if (asked != nullptr && std::strcmp(asked, "avx512_bf16") == 0) return true;
    static const bool intel = [] {
        __builtin_cpu_init();
        return __builtin_cpu_is("intel") != 0;
    }();
    return !intel;
#else
    return false;
#endif
}

}  // namespace el4ner
