// SPDX-License-Identifier: Apache-2.0
#pragma once
// What one thread of a device does to decode: the body of the kernels in device/cuda_decoders.cuh, as host code wherever something else than nvcc compiles it. So a test
// on the host shows that its bits are those of Encoding::decode.
//
// Only that header and tests include this one: what a compiler sees here depends on which compiler it is, which in a function that many files include would break the
// one-definition rule.
//
//   products   are single instructions of PTX: neither fused with what comes after them nor flushed to zero, whatever flags a program is compiled with
//   NaN        a device's products make one NaN of all, and so do those of the host here; elements keep the sign and the bits that they have on the host
//   all else   is done with integers

#include <dcp/base/instructions.hpp>
#include <dcp/device/driver.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define DCP_HOST_AND_DEVICE __host__ __device__
#else
#define DCP_HOST_AND_DEVICE
#endif

namespace dcp::detail {

struct DecodeElements {
  DCP_HOST_AND_DEVICE static float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    return std::bit_cast<float>(bits);
#endif
  }
  DCP_HOST_AND_DEVICE static std::uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    return std::bit_cast<std::uint32_t>(value);
#endif
  }
  DCP_HOST_AND_DEVICE static float product(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return as_devices_have_it(rounded(a * b));
#endif
  }
  DCP_HOST_AND_DEVICE static float sum(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return as_devices_have_it(rounded(a + b));
#endif
  }

  /// PTX ISA, mul and add of f32: whatever NaN goes in, this one comes out.
  static float as_devices_have_it(float result) { return (bits_of(result) & 0x7FFF'FFFFu) > 0x7F80'0000u ? float_of(0x7FFF'FFFFu) : result; }

  /// A code's value. Its bits stand where a float has them; one product, which is exact, puts the exponent right, that of subnormal codes too.
  template <DeviceDecode::Codes Code>
  DCP_HOST_AND_DEVICE static float value_of(std::uint32_t code) {
    if constexpr (Code == DeviceDecode::Codes::i8) {
      return static_cast<float>(static_cast<std::int8_t>(static_cast<std::uint8_t>(code)));
    } else if constexpr (Code == DeviceDecode::Codes::e2m1) {
      return product(float_of((code & 8u) << 28 | (code & 7u) << 22), 0x1p126f);
    } else if constexpr (Code == DeviceDecode::Codes::e4m3) {
      std::uint32_t const sign = (code & 0x80u) << 24, magnitude = code & 0x7Fu;
      return magnitude == 0x7Fu ? float_of(sign | 0x7FC0'0000u) : product(float_of(sign | magnitude << 20), 0x1p120f);
    } else {
      std::uint32_t const sign = (code & 0x80u) << 24, magnitude = code & 0x7Fu;
      if (magnitude > 0x7Cu) return float_of(sign | 0x7FC0'0000u | magnitude << 21);   // quiet
      return magnitude == 0x7Cu ? float_of(sign | 0x7F80'0000u) : product(float_of(sign | magnitude << 21), 0x1p112f);
    }
  }
  /// An element. The scale is a finite number and not zero.
  template <DeviceDecode::Codes Code>
  DCP_HOST_AND_DEVICE static float element(std::uint32_t code, float scale) {
    float const value = value_of<Code>(code);
    return (bits_of(value) & 0x7FFF'FFFFu) > 0x7F80'0000u ? value : product(value, scale);
  }

  DCP_HOST_AND_DEVICE static float from_e8m0(std::uint32_t code) { return float_of(code == 255 ? 0x7FC0'0000u : code == 0 ? 0x0040'0000u : code << 23); }
  DCP_HOST_AND_DEVICE static float from_bf16(std::uint32_t bits) { return float_of(bits << 16); }
  DCP_HOST_AND_DEVICE static float from_f16(std::uint32_t bits) {
    std::uint32_t const sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude > 0x7C00u) return float_of(sign | 0x7FC0'0000u | magnitude << 13);   // quiet
    return magnitude == 0x7C00u ? float_of(sign | 0x7F80'0000u) : product(float_of(sign | magnitude << 13), 0x1p112f);
  }
  /// To nearest, ties to even; of each sign there is one NaN.
  DCP_HOST_AND_DEVICE static std::uint32_t to_bf16(float value) {
    std::uint32_t const bits = bits_of(value);
    return (bits & 0x7FFF'FFFFu) > 0x7F80'0000u ? (bits >> 16 & 0x8000u) | 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  }
  DCP_HOST_AND_DEVICE static std::uint32_t to_f16(float value) {
    std::uint32_t const bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFF'FFFFu;
    if (magnitude > 0x7F80'0000u) return sign | 0x7E00u;
    if (magnitude >= 0x4780'0000u) return sign | 0x7C00u;                                                         // 2^16
    if (magnitude < 0x3880'0000u) return sign | (bits_of(sum(float_of(magnitude), 0.5f)) - bits_of(0.5f));       // 2^-14: neighbours of 0.5 are as far apart as subnormal halves
    return sign | (magnitude - 0x3800'0000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;                             // beyond the largest: infinity
  }

  template <class Word>
  DCP_HOST_AND_DEVICE static Word load(std::byte const* at) {   // aligned as a Word is
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<Word const*>(at);
#else
    Word word;
    std::memcpy(&word, at, sizeof word);
    return word;
#endif
  }
  template <class Word>
  DCP_HOST_AND_DEVICE static void store(Word word, std::byte* at) {
#ifdef __CUDA_ARCH__
    *reinterpret_cast<Word*>(at) = word;
#else
    std::memcpy(at, &word, sizeof word);
#endif
  }
  DCP_HOST_AND_DEVICE static float scale_at(DeviceDecode const& work, std::int64_t at) {
    switch (work.scale) {
      case DeviceDecode::Scales::float32: return load<float>(work.scales + 4 * at);
      case DeviceDecode::Scales::bfloat16: return from_bf16(load<std::uint16_t>(work.scales + 2 * at));
      case DeviceDecode::Scales::float16: return from_f16(load<std::uint16_t>(work.scales + 2 * at));
      case DeviceDecode::Scales::e8m0: return from_e8m0(load<std::uint8_t>(work.scales + at));
    }
    return 0;
  }
};

/// As many neighbours in a row as make 16 bytes: what a thread reads at once and writes at once, if it lies as it should for that.
template <DeviceDecode::Codes Code, DeviceDecode::Values Value>
class DecodeRun : DecodeElements {
 public:
  static constexpr std::uint32_t width = Value == DeviceDecode::Values::float32 ? 4 : 2, length = 16 / width;

  /// `row`: of all planes. `before`: a run of the row before, whose scale may be the same.
  DCP_HOST_AND_DEVICE void read(DeviceDecode const& work, std::uint32_t row, std::uint32_t column, DecodeRun const* before) {
    std::uint32_t const plane = row / work.rows.count, in_plane = row - plane * work.rows.count, left = work.columns.count - column;
    column_ = column;
    count_ = left < length ? left : length;
    codes_ = codes_at(work.codes, work.first_code + plane * work.planes.codes + in_plane * work.rows.codes + column);
    values_ = work.values + (plane * work.planes.values + in_plane * work.rows.values + column * work.columns.values) * static_cast<std::int64_t>(width);
    row_scales_ = group_of(work.planes, plane) * work.planes.scales + group_of(work.rows, in_plane) * work.rows.scales;
    std::uint32_t const group = group_of(work.columns, column);
    one_scale_ = column + work.columns.begun - group * work.columns.group + count_ <= work.columns.group;
    scale_index_ = row_scales_ + group * work.columns.scales;
    scale_ = before != nullptr && before->scale_index_ == scale_index_ ? before->scale_ : scale_at(work, scale_index_);
  }
  DCP_HOST_AND_DEVICE void write(DeviceDecode const& work) const {
    std::uint32_t words[4] = {0, 0, 0, 0};
    for (std::uint32_t i = 0; i < length; ++i) {
      if (i >= count_) break;
      float const scale = one_scale_ ? scale_ : scale_at(work, row_scales_ + group_of(work.columns, column_ + i) * work.columns.scales);
      float const value = element<Code>(static_cast<std::uint32_t>(codes_ >> (code_bits * i)) & ((1u << code_bits) - 1), scale);
      if constexpr (Value == DeviceDecode::Values::float32) words[i] = bits_of(value);
      else words[i / 2] |= (Value == DeviceDecode::Values::bfloat16 ? to_bf16(value) : to_f16(value)) << (16 * (i % 2));
    }
    if (count_ == length && work.columns.values == 1 && reinterpret_cast<std::uintptr_t>(values_) % 16 == 0) {
#ifdef __CUDA_ARCH__
      store(make_uint4(words[0], words[1], words[2], words[3]), values_);
#else
      std::memcpy(values_, words, 16);
#endif
      return;
    }
    for (std::uint32_t i = 0; i < length; ++i) {
      if (i >= count_) break;
      std::byte* const to = values_ + i * work.columns.values * static_cast<std::int64_t>(width);
      if constexpr (width == 4) store(words[i], to);
      else store(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2))), to);
    }
  }

 private:
  static constexpr std::uint32_t code_bits = Code == DeviceDecode::Codes::e2m1 ? 4 : 8;
  using Word = std::conditional_t<length * code_bits == 64, std::uint64_t, std::conditional_t<length * code_bits == 32, std::uint32_t, std::uint16_t>>;

  DCP_HOST_AND_DEVICE static std::uint32_t group_of(DeviceDecode::Axis const& axis, std::uint32_t at) { return (at + axis.begun) / axis.group; }
  DCP_HOST_AND_DEVICE std::uint64_t codes_at(std::byte const* codes, std::int64_t at) const {
    constexpr std::int64_t in_byte = 8 / code_bits;
    std::byte const* const from = codes + at / in_byte;
    if (count_ == length && at % in_byte == 0 && reinterpret_cast<std::uintptr_t>(from) % sizeof(Word) == 0) return load<Word>(from);
    std::uint64_t found = 0;
    for (std::uint32_t i = 0; i < count_; ++i, ++at) {
      auto const byte = static_cast<std::uint64_t>(codes[at / in_byte]);
      found |= (in_byte == 1 ? byte : byte >> (4 * (at % in_byte)) & 15u) << (code_bits * i);
    }
    return found;
  }

  std::uint64_t codes_ = 0;   // the first in the lowest bits
  std::byte* values_ = nullptr;
  std::int64_t row_scales_ = 0, scale_index_ = 0;
  std::uint32_t column_ = 0, count_ = 0;
  float scale_ = 0;           // of the first
  bool one_scale_ = false;    // for all
};

/// The threads of a kernel.
struct DecodeGrid {
  static constexpr std::uint32_t threads = 256, most_blocks = 65535, rows_each = 4;
  std::uint32_t across, down, blocks_across, blocks_down;   // threads of a block, and blocks: along rows, and along columns

  template <class Run>
  static DecodeGrid of(DeviceDecode const& work) {
    auto const up = [](std::uint32_t a, std::uint32_t b) { return a / b + (a % b != 0 ? 1 : 0); };
    std::uint32_t const runs = up(work.columns.count, Run::length), across = std::bit_ceil(std::min(runs, threads)), down = threads / across;
    return {across, down, std::min(most_blocks, up(runs, across)), std::min(most_blocks, up(work.planes.count * work.rows.count, down * rows_each))};
  }
};

/// What thread (x, y) does, counted over all blocks. Runs below each other are its own: their codes are under way at once, and blocks of rows have one scale.
template <class Run>
DCP_HOST_AND_DEVICE void decode_thread(DeviceDecode const& work, DecodeGrid const& grid, std::uint32_t x, std::uint32_t y) {
  constexpr std::uint32_t each = DecodeGrid::rows_each;
  std::uint32_t const rows = work.planes.count * work.rows.count;
  for (std::uint32_t row = y * each; row < rows; row += grid.blocks_down * grid.down * each)
    for (std::uint32_t column = x * Run::length; column < work.columns.count; column += grid.blocks_across * grid.across * Run::length) {
      Run runs[each];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (std::uint32_t i = 0; i < each; ++i)
        if (row + i < rows) runs[i].read(work, row + i, column, i == 0 ? nullptr : &runs[i - 1]);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (std::uint32_t i = 0; i < each; ++i)
        if (row + i < rows) runs[i].write(work);
    }
}

/// Calls f with the type of runs that `work` asks for.
template <class F>
auto with_decode_run(DeviceDecode const& work, F f) {
  auto const of = [&]<DeviceDecode::Codes Code>(std::integral_constant<DeviceDecode::Codes, Code>) {
    switch (work.value) {
      case DeviceDecode::Values::float32: break;
      case DeviceDecode::Values::bfloat16: return f(std::type_identity<DecodeRun<Code, DeviceDecode::Values::bfloat16>>{});
      case DeviceDecode::Values::float16: return f(std::type_identity<DecodeRun<Code, DeviceDecode::Values::float16>>{});
    }
    return f(std::type_identity<DecodeRun<Code, DeviceDecode::Values::float32>>{});
  };
  switch (work.code) {
    case DeviceDecode::Codes::e4m3: break;
    case DeviceDecode::Codes::e5m2: return of(std::integral_constant<DeviceDecode::Codes, DeviceDecode::Codes::e5m2>{});
    case DeviceDecode::Codes::i8: return of(std::integral_constant<DeviceDecode::Codes, DeviceDecode::Codes::i8>{});
    case DeviceDecode::Codes::e2m1: return of(std::integral_constant<DeviceDecode::Codes, DeviceDecode::Codes::e2m1>{});
  }
  return of(std::integral_constant<DeviceDecode::Codes, DeviceDecode::Codes::e4m3>{});
}

}  // namespace dcp::detail

#undef DCP_HOST_AND_DEVICE
