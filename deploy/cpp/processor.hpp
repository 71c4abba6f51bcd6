// Whether products of 8-bit codes are added in 32 bits here; see runtime/engines/int16_sums.py.
#pragma once

inline bool adds_in_int32() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
    return true;
#endif
}
