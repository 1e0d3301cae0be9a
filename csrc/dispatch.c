#include "dispatch.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* One line per instruction set here, and one in CMakeLists.txt with its compiler flags. */
#define DECLARE(isa)                                                                                                   \
    extern const struct mask_kernels pyreg_masks_##isa;                                                                \
    extern const struct kernels pyreg_kernels_##isa##_F32, pyreg_kernels_##isa##_F64, pyreg_kernels_##isa##_F16,       \
        pyreg_kernels_##isa##_BF16
DECLARE(baseline);
#if defined(__x86_64__)
DECLARE(v3);
DECLARE(v4);
#endif

#define TABLES(isa)                                                                                                    \
    &pyreg_masks_##isa, {                                                                                              \
        [PYREG_F32] = &pyreg_kernels_##isa##_F32, [PYREG_F64] = &pyreg_kernels_##isa##_F64,                            \
        [PYREG_F16] = &pyreg_kernels_##isa##_F16, [PYREG_BF16] = &pyreg_kernels_##isa##_BF16                           \
    }

static bool always(void) { return true; }
#if defined(__x86_64__)
/* The levels of the x86-64 psABI.  Older compilers do not know them all, and where there is no compiler-rt, as with
 * clang-cl, __builtin_cpu_supports is not there: so the CPU is asked. */
static bool has_all(unsigned features, unsigned wanted) { return (features & wanted) == wanted; }

static bool has_v3(void) {
    unsigned a, b, basic, extended, more, d, registers;
    if (!__get_cpuid(1, &a, &b, &basic, &d) || !has_all(basic, bit_OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &extended, &b, &d) || !__get_cpuid(0x80000001, &a, &b, &more, &d)) return false;
    __asm__("xgetbv" : "=a"(registers), "=d"(d) : "c"(0)); /* that the operating system keeps */
    return has_all(basic, bit_SSE3 | bit_SSSE3 | bit_FMA | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_MOVBE |
                              bit_POPCNT | bit_AVX | bit_F16C) &&
           has_all(extended, bit_BMI | bit_AVX2 | bit_BMI2) && has_all(more, bit_LAHF_LM | bit_LZCNT) &&
           has_all(registers, 0x06);
}

static bool has_v4(void) {
    unsigned a, c, d, extended, registers;
    if (!has_v3() || !__get_cpuid_count(7, 0, &a, &extended, &c, &d)) return false;
    __asm__("xgetbv" : "=a"(registers), "=d"(d) : "c"(0));
    return has_all(extended, bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL) &&
           has_all(registers, 0xe6);
}
#endif

/* Best first. */
static const struct isa {
    const char *name;
    bool (*supported)(void);
    const struct mask_kernels *masks;
    const struct kernels *kernels[PYREG_NUM_DTYPES];
} isas[] = {
#if defined(__x86_64__)
    {"x86-64-v4", has_v4, TABLES(v4)},
    {"x86-64-v3", has_v3, TABLES(v3)},
#endif
    {"baseline", always, TABLES(baseline)},
};
enum { NUM_ISAS = sizeof isas / sizeof isas[0] };

static const struct isa *in_use = &isas[NUM_ISAS - 1];

enum pyreg_status pyreg_use_isa(const char *name) {
    for (size_t i = 0; i < NUM_ISAS; i++) {
        if (name && strcmp(name, isas[i].name) != 0) continue;
        if (isas[i].supported()) {
            in_use = &isas[i];
            return PYREG_OK;
        }
    }
    return PYREG_BAD_ISA;
}

enum pyreg_status pyreg_init(void) {
    const char *forced = getenv("PYREG_ISA");
    return pyreg_use_isa(forced && *forced ? forced : NULL);
}

const char *pyreg_isa_name(void) { return in_use->name; }

const char *pyreg_isa_available(int i) {
    for (size_t j = 0; j < NUM_ISAS; j++)
        if (isas[j].supported() && i-- == 0) return isas[j].name;
    return NULL;
}

const char *pyreg_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

const struct mask_kernels *dispatch_masks(void) { return in_use->masks; }
const struct kernels *dispatch_kernels(enum pyreg_dtype dtype) { return in_use->kernels[dtype]; }

size_t dispatch_bytes(enum pyreg_dtype dtype) {
    static const size_t bytes[PYREG_NUM_DTYPES] = {[PYREG_F32] = 4, [PYREG_F64] = 8, [PYREG_F16] = 2, [PYREG_BF16] = 2};
    return bytes[dtype];
}

/* ---- The generators alone ---------------------------------------------------------------------------------------- */

void pyreg_philox4x32_10(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]) {
    dispatch_masks()->philox_block(key, counter, out);
}

void pyreg_threefry2x32_20(const uint32_t key[2], const uint32_t counter[2], uint32_t out[2]) {
    dispatch_masks()->threefry_block(key, counter, out);
}
