// SPDX-License-Identifier: Apache-2.0
// error: dcp: no checkpoint format has this element type; use bool, a fixed-width integer, float, double, std::complex of both, or a dcp float such as dcp::bf16
// error (gcc): an_element_type<std::complex<long double>
// error (clang): is_element<std::complex<long double>
// error (nvcc): T=std::complex<long double>
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using Weight = dcp::ShardedTensor<std::complex<long double>, dcp::Placement<dcp::Shard<0>>>;
#else
using Weight = dcp::ShardedTensor<std::complex<double>, dcp::Placement<dcp::Shard<0>>>;
#endif

int main() { return static_cast<int>(sizeof(Weight)) == 0; }
