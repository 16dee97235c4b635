// AMX, the tile unit of newer Xeons: whether compiler, processor and kernel have it, and the one shape of tiles used.
//
// Tiles are 16 rows of 64 bytes. A product adds a (16 rows x 64 bytes of the depth) times b (16 groups of 4 bytes of the
// depth x 16 columns) to 16 x 16 numbers of 4 bytes. Linux grants the registers only to processes that ask.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include <cstdint>

#if defined(__linux__) && defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define EL4NER_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define EL4NER_AMX_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,amx-bf16")))
#endif
#endif
#ifndef EL4NER_AMX
#define EL4NER_AMX 0
#endif

namespace el4ner {

constexpr std::int64_t kTileRows = 16, kTileUnits = 16;  // units of 4 bytes

// Whether products of bytes and of bfloat16 may be used. Asks Linux for the registers once, for the whole process.
inline bool amx_granted() {
#if EL4NER_AMX
    static const bool granted = [] {
        constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (bf16 | tile | int8))) return false;
        constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

#if EL4NER_AMX
// All eight tiles full. A thread that multiplies calls this first and tiles_release last.
EL4NER_AMX_TARGET inline void tiles_configure() {
    struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t bytes[16] = {};
        std::uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
        shape.bytes[tile] = 4 * kTileUnits;
        shape.rows[tile] = kTileRows;
    }
    static_assert(sizeof shape == 64, "the layout that ldtilecfg reads");
    asm volatile("" : : "r"(&shape) : "memory");  // the intrinsic of GCC does not say what it reads
    _tile_loadconfig(&shape);
}

EL4NER_AMX_TARGET inline void tiles_release() { _tile_release(); }
#endif

}  // namespace el4ner
