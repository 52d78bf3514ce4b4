// SPDX-License-Identifier: Apache-2.0
// The least there is to a checkpoint: one process, two tensors, a number.
#include <dcp/dcp.hpp>

#include <cstdint>
#include <iostream>
#include <stdexcept>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: my_trainer CHECKPOINT");
  dcp::SelfComm world;
  std::vector<float> weight_memory(8 * 4, 0.5f), bias_memory(8, 0.25f);
  dcp::TensorView<float> weight{weight_memory, {8, 4}}, bias{bias_memory, {8}};
  std::int64_t step = 7;
  dcp::StateDict const state{{"weight", weight}, {"bias", bias}, {"step", step}};

  std::cout << dcp::save<dcp::SafeTensors>(world, argv[1], state, {.if_exists = dcp::IfExists::replace}) << '\n';
  step = 0;
  std::cout << dcp::load<dcp::SafeTensors>(world, argv[1], state) << '\n';
  return step == 7 ? 0 : 1;
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
