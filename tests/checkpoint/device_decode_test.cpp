// SPDX-License-Identifier: Apache-2.0
// What devices decode, by the bodies of their kernels run on the host, against Encoding::decode: bit for bit.
#include <dcp/checkpoint/devices.hpp>
#include <dcp/device/decode_elements.hpp>
#include <dcp/formats/block_codecs.hpp>

#include "support/campaign.hpp"
#include "support/decode_cases.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"

#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace dcp;
using dcp::detail::DecodeElements;
using dcp::detail::GroupEncoding;
using dcp::detail::GroupSpec;
using namespace dcp::test::decode;
using dcp::test::Random;

std::uint32_t bits_of_float(float value) { return std::bit_cast<std::uint32_t>(value); }

/// Runs at once what is put into it, its threads in any order.
class LaneOfHost final : public DeviceLane {
 public:
  explicit LaneOfHost(std::uint64_t seed) : random_{seed} {}
  void after(DeviceEvent const&) override {}
  std::shared_ptr<DeviceEvent> mark() override { return nullptr; }
  void copy(std::byte*, std::size_t, std::byte const*, std::size_t, std::size_t, std::size_t) override {}
  void finish() override {}
  ByteSpan buffer(int, std::size_t) override { return {}; }
  bool decode(DeviceDecode const& work) override {
    ++works;
    detail::with_decode_run(work, [&](auto type) {
      using Run = typename decltype(type)::type;
      auto grid = detail::DecodeGrid::of<Run>(work);
      if (random_.one_in(3)) grid.blocks_across = static_cast<std::uint32_t>(random_.between(1, grid.blocks_across)), grid.blocks_down = static_cast<std::uint32_t>(random_.between(1, grid.blocks_down));   // each has to do more
      if (random_.one_in(6)) grid.across = grid.down = 1;
      std::vector<std::pair<std::uint32_t, std::uint32_t>> threads;
      for (std::uint32_t y = 0; y < grid.blocks_down * grid.down; ++y)
        for (std::uint32_t x = 0; x < grid.blocks_across * grid.across; ++x) threads.emplace_back(x, y);
      random_.shuffle(threads);
      for (auto const& [x, y] : threads) detail::decode_thread<Run>(work, grid, x, y);
      return true;
    });
    return true;
  }
  int works = 0;

 private:
  Random random_;
};

}  // namespace

TEST_CASE("law: any box of what is codes times scales, in memory of any strides, has the bits on a device that it has on the host") {
  std::uint64_t const base = test::first_seed();
  int single = 0, works = 0;
  for (int round = 0; round < test::rounds(3000, 200'000); ++round) {
    std::uint64_t const seed = base + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Case const made = any_case(random);
    GroupEncoding<> const encoding{made.spec};
    Box const box = any_box(random, made.spec.shape);
    std::vector<Bytes> held;
    std::vector<PartBytes> given;
    for (std::size_t p = 0; p < 2; ++p) {
      EncodedPart const& part = encoding.parts()[p];
      Box const needed = part.grid.needed(box, made.spec.shape, part.shape);
      held.push_back(part_of(part, p == 0 ? made.codes : made.scales, needed));
      given.push_back({nullptr, needed});
    }
    for (std::size_t p = 0; p < 2; ++p) given[p].data = held[p].data();
    DType const dtype = random.any_of(std::array{DType::f32, DType::bf16, DType::f16});
    Target const target = any_target(random, box.shape);
    std::size_t const width = static_cast<std::size_t>(bits_of(dtype)) / 8;
    Bytes const untouched = random.bytes(static_cast<std::size_t>(target.elements) * width);
    Bytes host = untouched, device = untouched;
    auto const view = [&](Bytes& memory) { return MemoryView{memory.data() + static_cast<std::size_t>(target.first) * width, target.strides}; };
    encoding.decode(box, given, dtype, view(host));
    LaneOfHost lane{seed};
    REQUIRE_NOTHROW(encoding.check_scales(given[1]));
    REQUIRE(detail::decode_by(lane, encoding, box, given, dtype, view(device)));
    single += lane.works == 1 ? 1 : 0;
    works += lane.works;
    CAPTURE(to_string(made.spec.shape));
    CAPTURE(to_string(box));
    CAPTURE(to_string(dtype));
    CAPTURE(to_string(made.spec.codes.dtype));
    CAPTURE(to_string(made.spec.scales.dtype));
    REQUIRE(host == device);
  }
  CHECK(works > single);   // some need several kernels
  CHECK(single > 0);
}

TEST_CASE("every code with scales of all magnitudes, to every dtype") {
  Random random{7};
  constexpr std::array<DType, 3> dtypes{DType::f32, DType::bf16, DType::f16};
  for (DType const code : {DType::f8_e4m3, DType::f8_e5m2, DType::i8, DType::u8}) {
    // A row of all codes for each scale.
    std::int64_t const rows = 600, columns = code == DType::u8 ? 512 : 256;
    GroupSpec spec;
    spec.scheme = "all";
    spec.shape = Extents{rows, columns};
    spec.kind = code == DType::u8 ? detail::Codes::e2m1 : code == DType::i8 ? detail::Codes::i8 : detail::Codes::floats;
    spec.codes = {"codes", code, Extents{rows, 256}, PartGrid::rows(2, columns / 256)};
    spec.scales = {"scales", DType::f32, Extents{rows}, PartGrid::along({PartAxis{0, 1}})};
    GroupEncoding<> const encoding{spec};
    Bytes codes(static_cast<std::size_t>(rows * 256));
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::byte>(i & 255);
    std::vector<float> scales;
    for (std::int64_t row = 0; row < rows; ++row) scales.push_back(row < 254 ? float_of(static_cast<std::uint32_t>(row) << 23 | 0x2A'AAABu) : some_scale(random, false));
    std::array<PartBytes, 2> const given{PartBytes{codes.data(), Box::whole(Extents{rows, 256})}, PartBytes{reinterpret_cast<std::byte const*>(scales.data()), Box::whole(Extents{rows})}};
    for (DType const dtype : dtypes) {
      CAPTURE(to_string(code));
      CAPTURE(to_string(dtype));
      Bytes host(static_cast<std::size_t>(bytes_of(dtype, rows * columns))), device(host.size());
      Box const box = Box::whole(spec.shape);
      encoding.decode(box, given, dtype, {host.data(), row_major_strides(spec.shape)});
      LaneOfHost lane{1};
      REQUIRE(detail::decode_by(lane, encoding, box, given, dtype, {device.data(), row_major_strides(spec.shape)}));
      CHECK(host == device);
    }
  }
}

TEST_CASE("numbers of sixteen bits and powers of two become floats, and floats numbers of sixteen bits, as on the host") {
  int wrong = 0;
  for (std::uint32_t code = 0; code < 65536; ++code) {
    auto const bits = static_cast<std::uint16_t>(code);
    auto const* const bytes = reinterpret_cast<std::byte const*>(&bits);
    float half = 0, bfloat = 0;
    detail::block_kernels().from_f16(bytes, 1, &half);
    detail::block_kernels().from_bf16(bytes, 1, &bfloat);
    wrong += bits_of_float(DecodeElements::from_f16(code)) != bits_of_float(half);
    wrong += bits_of_float(DecodeElements::from_bf16(code)) != bits_of_float(bfloat);
  }
  CHECK(wrong == 0);
  for (std::uint32_t code = 0; code < 256; ++code) wrong += bits_of_float(DecodeElements::from_e8m0(code)) != bits_of_float(static_cast<float>(f8_e8m0::from_bits(static_cast<std::uint8_t>(code))));
  CHECK(wrong == 0);
  // All upper halves of floats, with lower halves at and next to where rounding changes; and many others.
  std::vector<float> floats;
  for (std::uint32_t high = 0; high < 65536; ++high)
    for (std::uint32_t const low : {0x0000u, 0x0001u, 0x0FFFu, 0x1000u, 0x1001u, 0x2FFFu, 0x3000u, 0x3001u, 0x7FFFu, 0x8000u, 0x8001u, 0xCAFEu, 0xFFFFu}) floats.push_back(float_of(high << 16 | low));
  Random random{3};
  for (int i = 0; i < 300'000; ++i) floats.push_back(float_of(static_cast<std::uint32_t>(random.between(0, 0xFFFF'FFFFll))));
  // Halfway between subnormal halves, and next to it.
  for (std::uint32_t code = 0; code < 1025; ++code)
    for (float const at : {static_cast<float>(code) * 0x1p-24f, (static_cast<float>(code) + 0.5f) * 0x1p-24f})
      for (float const x : {at, std::nextafterf(at, INFINITY), std::nextafterf(at, -INFINITY)}) floats.push_back(x);
  for (float const x : floats) {
    wrong += DecodeElements::to_f16(x) != f16{x}.bits();
    wrong += DecodeElements::to_bf16(x) != bf16{x}.bits();
  }
  CHECK(wrong == 0);
}

TEST_CASE("scales that a scheme does not have are refused for a device in the words of the host, and what is more than codes times scales is left to the host") {
  GroupSpec spec;
  spec.scheme = "rows";
  spec.shape = Extents{4, 32};
  spec.codes = {"codes", DType::f8_e4m3, spec.shape, PartGrid::rows(2)};
  spec.scales = {"scales", DType::f32, Extents{4}, PartGrid::along({PartAxis{0, 1}})};
  Bytes const codes(128, std::byte{0x38});
  Bytes memory(512);
  for (std::uint32_t const bits : {0x0000'0000u, 0x8000'0000u, 0x7F80'0000u, 0xFF80'0000u, 0x7FC0'0000u, 0x7F80'0001u, 0xBF80'0000u}) {
    std::array<float, 4> scales{1, 2, float_of(bits), 3};
    std::array<PartBytes, 2> const given{PartBytes{codes.data(), Box::whole(spec.shape)}, PartBytes{reinterpret_cast<std::byte const*>(scales.data()), Box::whole(Extents{4})}};
    GroupEncoding<> const encoding{spec};
    auto const host = test::error_of([&] { encoding.decode(Box::whole(spec.shape), given, DType::f32, {memory.data(), Extents{32, 1}}); }), device = test::error_of([&] { encoding.check_scales(given[1]); });
    REQUIRE(host);
    REQUIRE(device);
    CHECK(std::string{host->what()} == std::string{device->what()});
    CHECK(device->code() == ErrorCode::quant_mismatch);
  }
  CHECK(detail::decodes_on_devices(GroupEncoding<>{spec}, DType::bf16));
  CHECK_FALSE(detail::decodes_on_devices(GroupEncoding<>{spec}, DType::f64));
  auto const left = [&](auto change) {
    GroupSpec other = spec;
    change(other);
    return !detail::decodes_on_devices(GroupEncoding<>{other}, DType::bf16);
  };
  EncodedPart const one{"one", DType::f32, Extents{}, PartGrid::along({})};
  CHECK(left([&](GroupSpec& s) { s.second = one, s.second_kind = detail::SecondScale::Kind::multiply; }));
  CHECK(left([&](GroupSpec& s) { s.zeros = one; }));
  CHECK(left([&](GroupSpec& s) { s.group_index = one; }));
  CHECK(left([&](GroupSpec& s) { s.divisor = 127; }));
  CHECK(left([&](GroupSpec& s) { s.rule.zero = true; }));
  CHECK(left([&](GroupSpec& s) { s.kind = detail::Codes::packed; }));
  CHECK(left([&](GroupSpec& s) { s.codes.dtype = DType::f8_e4m3fnuz; }));
  CHECK(left([&](GroupSpec& s) { s.scales.dtype = DType::f64; }));
}
