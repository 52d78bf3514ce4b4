// SPDX-License-Identifier: Apache-2.0
#pragma once
// What every consumer of tests/packaging does with the library.

#include <dcp/dcp.hpp>

#include <filesystem>
#include <numeric>
#include <vector>

static_assert(__cplusplus >= 202002L, "the target brings the standard");

/// True: two ranks save, one loads.
inline bool uses_dcp() {
  auto const place = std::filesystem::temp_directory_path() / ("dcp-consumer-" + dcp::detail::random_id());
  using Rows = dcp::Placement<dcp::Shard<0>>;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {2}};
    std::vector<float> memory(dcp::local_box<Rows>(mesh, {7, 5}).size());
    dcp::ShardedTensor<float, Rows> weight{mesh, {7, 5}, memory};
    std::iota(memory.begin(), memory.end(), static_cast<float>(weight.local_box().origin[0] * 5));
    dcp::save<dcp::SafeTensors>(world, place, {{"weight", weight}});
  });
  bool equal = true;
  dcp::run_threads(1, [&](dcp::ThreadComm& world) {
    std::vector<float> memory(35), expected(35);
    std::iota(expected.begin(), expected.end(), 0.0f);
    dcp::TensorView<float> weight{memory, {7, 5}};
    dcp::load<dcp::SafeTensors>(world, place, {{"weight", weight}});
    equal = memory == expected;
    dcp::remove<dcp::SafeTensors>(world, place);
  });
  return equal && !std::filesystem::exists(place);
}
