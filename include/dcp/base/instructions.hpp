// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which instructions this processor has beyond those that every program of its architecture may use: kernels are compiled for several
// sets and chosen when they run. Results are the same with all of them.

#include <dcp/base/config.hpp>

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDA_ARCH__)
#define DCP_X86_KERNELS 1
#define DCP_TARGET_AVX2 __attribute__((target("avx2,f16c")))   // without FMA: a product is rounded before it is added to
#else
#define DCP_X86_KERNELS 0
#endif

namespace dcp::detail {

enum class Instructions : std::uint8_t { portable, avx2 };

/// The most that this processor has.
template <class = Deferred>
Instructions best_instructions() {
#if DCP_X86_KERNELS
  static Instructions const best = [] {
    __builtin_cpu_init();   // a caller may run before the constructors of the run-time library
    // Every processor with AVX2 converts halves as well (F16C), which compilers of before 2023 cannot be asked for.
    return __builtin_cpu_supports("avx2") ? Instructions::avx2 : Instructions::portable;
  }();
  return best;
#else
  return Instructions::portable;
#endif
}

/// `value`, rounded to a float now: no compiler then fuses it with what comes after (a * b + c), whatever its flags say.
inline float rounded(float value) {
#if DCP_X86_KERNELS
  __asm__("" : "+x"(value));
  return value;
#else
  float volatile stored = value;
  return stored;
#endif
}

/// Rounding to nearest, and subnormal numbers as they are, while it lives, on this thread: kernels give the same bits in a program that has
/// told its processor to flush them to zero.
class StandardArithmetic {
 public:
#if DCP_X86_KERNELS
  StandardArithmetic() : before_{__builtin_ia32_stmxcsr()} {
    if (!standard()) __builtin_ia32_ldmxcsr((before_ & 0x3Fu) | 0x1F80u);   // which takes longer than to look
  }
  ~StandardArithmetic() {
    if (!standard()) __builtin_ia32_ldmxcsr(before_);
  }

 private:
  bool standard() const { return (before_ & ~0x3Fu) == 0x1F80u; }
  unsigned before_;

 public:
#else
  StandardArithmetic() {}
  ~StandardArithmetic() {}
#endif
  StandardArithmetic(StandardArithmetic const&) = delete;
  StandardArithmetic& operator=(StandardArithmetic const&) = delete;
};

}  // namespace dcp::detail
