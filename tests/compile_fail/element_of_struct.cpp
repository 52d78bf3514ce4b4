// SPDX-License-Identifier: Apache-2.0
// error: dcp: no checkpoint format has this element type; use bool, a fixed-width integer, float, double, std::complex of both, or a dcp float such as dcp::bf16
// error (gcc): an_element_type<Pixel
// error (clang): is_element<Pixel
// error (nvcc): T=Pixel
#include <dcp/core/sharded_tensor.hpp>

struct Pixel {
  std::uint8_t red, green, blue;
};

#ifdef MISTAKE
using Weight = dcp::ShardedTensor<Pixel, dcp::Placement<dcp::Shard<0>>>;
#else
using Weight = dcp::ShardedTensor<std::uint8_t, dcp::Placement<dcp::Shard<0>>>;
#endif

int main() { return static_cast<int>(sizeof(Weight)) == 0; }
