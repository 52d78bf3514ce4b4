// SPDX-License-Identifier: Apache-2.0
// The kernels on a device, against the host: run where there is one, and compiled wherever nvcc is.
#include <dcp/checkpoint/devices.hpp>
#include <dcp/device/cuda_decoders.cuh>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/decode_cases.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using namespace dcp;
using namespace dcp::test::decode;
using dcp::test::Random;

struct Freed {
  void operator()(std::byte* memory) const { static_cast<void>(cudaFree(memory)); }
};

/// What a device makes of `box` and of memory that holds `before`.
Bytes decoded(DeviceLane& lane, Encoding const& encoding, Box const& box, std::vector<PartBytes> given, std::array<Bytes, 2> const& held, DType dtype, Bytes const& before, std::int64_t first, Extents const& strides) {
  std::size_t const codes = static_cast<std::size_t>(round_up(static_cast<std::uint64_t>(held[0].size()), std::uint64_t{64}));
  ByteSpan const parts = lane.buffer(0, codes + held[1].size());
  std::memcpy(parts.data(), held[0].data(), held[0].size());
  std::memcpy(parts.data() + codes, held[1].data(), held[1].size());
  given[0].data = parts.data(), given[1].data = parts.data() + codes;
  void* allocated = nullptr;
  REQUIRE(cudaMalloc(&allocated, before.size()) == cudaSuccess);
  std::unique_ptr<std::byte, Freed> const memory{static_cast<std::byte*>(allocated)};
  REQUIRE(cudaMemcpy(memory.get(), before.data(), before.size(), cudaMemcpyHostToDevice) == cudaSuccess);
  REQUIRE(detail::decode_by(lane, encoding, box, given, dtype, {memory.get() + first * (bits_of(dtype) / 8), strides}));
  lane.finish();
  Bytes after(before.size());
  REQUIRE(cudaMemcpy(after.data(), memory.get(), after.size(), cudaMemcpyDeviceToHost) == cudaSuccess);
  return after;
}

}  // namespace

TEST_CASE("CUDA, law: any box of what is codes times scales, in memory of any strides, has the bits on a device that it has on the host") {
  auto const lane = detail::cuda_driver()->lane(0);
  std::uint64_t const base = test::first_seed();
  for (int round = 0; round < test::rounds(3000, 100'000); ++round) {
    std::uint64_t const seed = base + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Case const made = any_case(random);
    detail::GroupEncoding<> const encoding{made.spec};
    Box const box = any_box(random, made.spec.shape);
    std::array<Bytes, 2> held;
    std::vector<PartBytes> given;
    for (std::size_t p = 0; p < 2; ++p) {
      EncodedPart const& part = encoding.parts()[p];
      Box const needed = part.grid.needed(box, made.spec.shape, part.shape);
      held[p] = part_of(part, p == 0 ? made.codes : made.scales, needed);
      given.push_back({held[p].data(), needed});
    }
    DType const dtype = random.any_of(std::array{DType::f32, DType::bf16, DType::f16});
    Target const target = any_target(random, box.shape);
    std::size_t const width = static_cast<std::size_t>(bits_of(dtype)) / 8;
    Bytes const before = random.bytes(static_cast<std::size_t>(target.elements) * width);
    Bytes host = before;
    encoding.decode(box, given, dtype, {host.data() + static_cast<std::size_t>(target.first) * width, target.strides});
    REQUIRE(decoded(*lane, encoding, box, given, held, dtype, before, target.first, target.strides) == host);
  }
}

TEST_CASE("CUDA: a large matrix in blocks of 128 x 128") {
  auto const lane = detail::cuda_driver()->lane(0);
  Random random{1};
  std::int64_t const rows = 3000, columns = 2056;
  detail::GroupSpec spec;
  spec.scheme = "blocks";
  spec.shape = Extents{rows, columns};
  spec.codes = {"codes", DType::f8_e4m3, spec.shape, PartGrid::rows(2)};
  spec.scales = {"scales", DType::f32, Extents{ceil_div(rows, std::int64_t{128}), ceil_div(columns, std::int64_t{128})}, PartGrid::along({PartAxis{0, 128}, PartAxis{1, 128}})};
  detail::GroupEncoding<> const encoding{spec};
  std::array<Bytes, 2> held{random.bytes(static_cast<std::size_t>(rows * columns)), Bytes(static_cast<std::size_t>(spec.scales.shape.elements()) * 4)};
  for (std::size_t at = 0; at < held[1].size(); at += 4) {
    float const scale = some_scale(random, false);
    std::memcpy(held[1].data() + at, &scale, 4);
  }
  std::vector<PartBytes> const given{{held[0].data(), Box::whole(spec.shape)}, {held[1].data(), Box::whole(spec.scales.shape)}};
  for (DType const dtype : {DType::f32, DType::bf16, DType::f16}) {
    Bytes host(static_cast<std::size_t>(bytes_of(dtype, rows * columns)));
    encoding.decode(Box::whole(spec.shape), given, dtype, {host.data(), row_major_strides(spec.shape)});
    CHECK(decoded(*lane, encoding, Box::whole(spec.shape), given, held, dtype, Bytes(host.size()), 0, row_major_strides(spec.shape)) == host);
  }
}
