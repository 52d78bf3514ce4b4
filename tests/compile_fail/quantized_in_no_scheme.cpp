// SPDX-License-Identifier: Apache-2.0
// error: dcp: Quantized<Scheme, Base> needs a scheme first - dcp::Fp8Block<128, 128>, dcp::Mxfp4, dcp::AnyScheme, ...
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/quantized.hpp>

#ifdef MISTAKE
using Scheme = int;
#else
using Scheme = dcp::Mxfp4;
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::save<dcp::Quantized<Scheme, dcp::SafeTensors>>(self, "ckpt", {{"rate", rate}}); }
int main() {}
